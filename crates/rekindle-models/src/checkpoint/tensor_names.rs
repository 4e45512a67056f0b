//! Renames the tensors of a checkpoint to the model's own names: prefixes of wrappers are removed, and missing or different
//! prefixes are corrected.

use rekindle_hub::Checkpoint;
use serde_json::Value;

use crate::families;

/// Segments that wrappers of PyTorch put anywhere into a name: `torch.compile`, FSDP and activation checkpointing.
const SEGMENTS: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Prefixes of data-parallel wrappers and of PEFT.
const WRAPPERS: [&str; 2] = ["module.", "base_model.model."];

/// The prefix of everything but the head; a checkpoint of the model without a head, such as an embedding model, lacks it.
const PREFIX: &str = "model.";

/// The parts of the model that stand below [`PREFIX`].
const PARTS: [&str; 3] = ["embed_tokens.", "layers.", "norm."];

/// Returns the checkpoint with every tensor under the model's own name for it.
///
/// Names that fit no pattern stay as they are, for [`check_tensors`](super::load::check_tensors) to report.
pub(crate) fn canonical(checkpoint: &Checkpoint) -> Checkpoint {
    let naming = TensorNaming::of(checkpoint.config(), checkpoint.names());
    checkpoint.renamed(|stored| naming.name(stored)).unwrap_or_else(|| checkpoint.clone())
}

/// The renaming of one checkpoint's tensors to the model's own names.
#[derive(Default)]
pub(crate) struct TensorNaming {
    lacks_prefix: bool,
    /// Beginnings of stored names with the model's own, for a checkpoint that has them.
    stored: &'static [(&'static str, &'static str)],
    /// Parts of stored names with the model's own, for a checkpoint that has them.
    parts: &'static [(&'static str, &'static str)],
}

impl TensorNaming {
    /// The naming of a checkpoint with this `config.json` and these tensors.
    pub(crate) fn of<'a>(config: &Value, names: impl Iterator<Item = &'a str>) -> Self {
        let names: Vec<String> = names.map(unwrapped).collect();
        let has = |start: &str| names.iter().any(|name| name.starts_with(start));
        let family = families::of(config).ok();
        let stored = family.map_or(&[][..], |family| family.names.stored);
        let parts = family.map_or(&[][..], |family| family.names.stored_parts);
        let has_part = |part: &str| names.iter().any(|name| name.contains(part));
        Self {
            lacks_prefix: !has(PREFIX) && PARTS.iter().all(|part| has(part)),
            stored: if stored.iter().any(|(start, _)| has(start)) { stored } else { &[] },
            parts: if parts.iter().any(|(part, _)| has_part(part)) { parts } else { &[] },
        }
    }

    /// The name in a file of a tensor of the model.
    pub(crate) fn stored(&self, own: &str) -> String {
        let renamed = |(stored, start): &(&str, &str)| Some(format!("{stored}{}", own.strip_prefix(start)?));
        let name = self.stored.iter().find_map(renamed).unwrap_or_else(|| own.to_owned());
        self.parts.iter().fold(name, |name, (stored, own)| name.replace(own, stored))
    }

    /// The model's own name of a tensor in a file.
    pub(crate) fn name(&self, stored: &str) -> String {
        let name = self.parts.iter().fold(unwrapped(stored), |name, (stored, own)| name.replace(stored, own));
        let renamed = |(start, own): &(&str, &str)| Some(format!("{own}{}", name.strip_prefix(start)?));
        if let Some(name) = self.stored.iter().find_map(renamed) {
            return name;
        }
        let below = self.lacks_prefix && PARTS.iter().any(|part| name.starts_with(part));
        if below { format!("{PREFIX}{name}") } else { name }
    }
}

/// The name without what wrappers put into it.
fn unwrapped(stored: &str) -> String {
    let name = SEGMENTS.iter().fold(stored.to_owned(), |name, segment| name.replace(segment, ""));
    let mut rest = name.as_str();
    while let Some(inner) = WRAPPERS.iter().find_map(|wrapper| rest.strip_prefix(wrapper)) {
        rest = inner;
    }
    rest.to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const OWN: [&str; 4] = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.norm.weight",
    ];

    fn names(stored: &[String]) -> Vec<String> {
        let naming = TensorNaming::of(&json!({}), stored.iter().map(String::as_str));
        stored.iter().map(|name| naming.name(name)).collect()
    }

    #[test]
    fn wrappers_and_prefixes_come_off_and_on() {
        let layouts: [fn(&str) -> String; 7] = [
            str::to_owned,
            |name| name.replacen("model.", "", 1),
            |name| format!("_orig_mod.{name}"),
            |name| format!("module._orig_mod.{name}"),
            |name| format!("base_model.model.{name}"),
            |name| name.replace("layers.0.", "layers.0._orig_mod."),
            |name| format!("module.{}", name.replacen("model.", "", 1)),
        ];
        for layout in layouts {
            let stored: Vec<String> = OWN.iter().map(|name| layout(name)).collect();
            assert_eq!(names(&stored), OWN, "{stored:?}");
        }
    }

    /// transformers stores the text part of Gemma 3 under the names of its first version.
    #[test]
    fn a_multimodal_model_has_two_sets_of_names() {
        let config = json!({ "architectures": ["Gemma3ForConditionalGeneration"] });
        let pairs = [
            ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("vision_tower.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ];
        let old = TensorNaming::of(&config, pairs.iter().map(|(stored, _)| *stored));
        let new = TensorNaming::of(&config, pairs.iter().map(|(_, own)| *own));
        for (stored, own) in pairs {
            assert_eq!((old.name(stored).as_str(), old.stored(own).as_str()), (own, stored));
            assert_eq!((new.name(own).as_str(), new.stored(own).as_str()), (own, own));
        }
    }

    /// transformers 5 has the experts of Granite's mixtures under other names than its files.
    #[test]
    fn parts_of_names_differ_in_files() {
        let config = json!({ "architectures": ["GraniteMoeForCausalLM"] });
        let pairs = [
            (
                "model.layers.1.block_sparse_moe.input_linear.weight",
                "model.layers.1.block_sparse_moe.experts.gate_up_proj",
            ),
            (
                "model.layers.1.block_sparse_moe.output_linear.weight",
                "model.layers.1.block_sparse_moe.experts.down_proj",
            ),
            ("model.layers.1.block_sparse_moe.router.layer.weight", "model.layers.1.block_sparse_moe.router.weight"),
            ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ];
        let naming = TensorNaming::of(&config, pairs.iter().map(|(stored, _)| *stored));
        for (stored, own) in pairs {
            assert_eq!((naming.name(stored).as_str(), naming.stored(own).as_str()), (own, stored));
        }
    }

    #[test]
    fn other_models_keep_their_names() {
        for stored in ["transformer.wte.weight", "language_model.model.norm.weight", "norm.weight"] {
            assert_eq!(names(&[stored.to_owned()]), [stored]);
        }
    }
}

//! Checkpoints whose tensors have prefixes that the model's own names lack, or lack the one that they have.

use rekindle_hub::Checkpoint;

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
    let naming = TensorNaming::of(checkpoint.names());
    checkpoint.renamed(|stored| naming.name(stored)).unwrap_or_else(|| checkpoint.clone())
}

/// How the names of one checkpoint become the model's own.
pub(crate) struct TensorNaming {
    lacks_prefix: bool,
}

impl TensorNaming {
    pub(crate) fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let names: Vec<String> = names.map(unwrapped).collect();
        let has = |start: &str| names.iter().any(|name| name.starts_with(start));
        Self { lacks_prefix: !has(PREFIX) && PARTS.iter().all(|part| has(part)) }
    }

    pub(crate) fn name(&self, stored: &str) -> String {
        let name = unwrapped(stored);
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
    use super::*;

    const OWN: [&str; 4] = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.norm.weight",
    ];

    fn names(stored: &[String]) -> Vec<String> {
        let naming = TensorNaming::of(stored.iter().map(String::as_str));
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

    #[test]
    fn other_models_keep_their_names() {
        for stored in ["transformer.wte.weight", "language_model.model.norm.weight", "norm.weight"] {
            assert_eq!(names(&[stored.to_owned()]), [stored]);
        }
    }
}

//! Comparison of a checkpoint's tensors with those that its configuration needs.

use std::collections::BTreeSet;

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_quant::mxfp4;

use super::quantization::QuantizationPlan;
use crate::parameters::ParameterSpec;
use crate::{Error, ModelConfig, Role};

/// Compares the tensors of the checkpoint, under the names of [`canonical`](super::tensor_names::canonical), with those that the configuration needs. With
/// `new_score`, the checkpoint has no score head.
pub(crate) fn check_tensors(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    plan: Option<&QuantizationPlan>,
    new_score: bool,
) -> Result<(), Error> {
    let is_quantized = |name: &str| plan.is_some_and(|plan| plan.is_stored(name));
    let needed = config.parameters();
    let (mut missing, mut unfit, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
    for ParameterSpec { name, role, shape } in &needed {
        match checkpoint.get(name) {
            // MXFP4 has codes and scales under other names.
            None if is_quantized(name) && checkpoint.get(&format!("{name}{}", mxfp4::BLOCKS)).is_some() => {}
            None if new_score && *role == Role::Head => {}
            None => missing.push(format!("\"{name}\" {shape:?}")),
            // Checked when its quantized data is read.
            Some(_) if is_quantized(name) && role.is_linear() => {}
            Some(_) if is_quantized(name) => {
                unfit.push(format!("\"{name}\" is quantized; only linears of blocks can be quantized"));
            }
            Some(view) if view.shape != shape.as_slice() => {
                unfit.push(format!("\"{name}\" has shape {:?}, expected {shape:?}", view.shape));
            }
            Some(view) if view.dtype == Dtype::F8E4M3 => unfit.push(format!(
                "\"{name}\" is in fp8 (F8_E4M3) without \"{name}_scale_inv\" or \"{name}_scale\", or config.json has no \
                 quantization_config; supported: quant_method \"fp8\", \"fbgemm_fp8\" and \"compressed-tensors\""
            )),
            Some(view) if !is_float(view.dtype) => {
                unfit.push(format!(
                    "\"{name}\" has dtype {}; supported: F32, F16, BF16 and blocks of GGUF with a decoder",
                    view.dtype
                ));
            }
            Some(_) => {}
        }
    }
    let (embedding, head) = (config.names.tensor(Role::Embedding), config.names.tensor(Role::Head));
    let known: BTreeSet<&str> = needed.iter().map(|n| n.name.as_str()).collect();
    for name in checkpoint.names().filter(|name| !known.contains(name)) {
        let owner = rekindle_quant::bnb::owner(name);
        if owner.is_some_and(|weight| is_quantized(&weight) && known.contains(weight.as_str())) {
            continue;
        }
        // Old Llama checkpoints carry the rotary frequencies, which follow from the configuration.
        if name.ends_with("rotary_emb.inv_freq") || config.names.keeps(name) {
            continue;
        }
        // A reward model does not use the head over the vocabulary.
        if config.has_score_head() && name == "lm_head.weight" {
            continue;
        }
        if name == head && config.tie_word_embeddings() {
            let same = checkpoint.get(&head).map(|t| t.data) == checkpoint.get(&embedding).map(|t| t.data);
            if !same {
                unfit.push(format!("\"{head}\" differs from \"{embedding}\" although tie_word_embeddings is true"));
            }
            continue;
        }
        foreign.push(format!("\"{name}\""));
    }
    let architecture = &config.architecture;
    let problems = if missing.len() == needed.len() {
        let example = listed(&missing);
        let has = checkpoint.names().map(|name| format!("\"{name}\"")).collect::<Vec<_>>();
        vec![format!(
            "no tensor has a name that {architecture} needs ({example}); it has {} tensors: {}",
            has.len(),
            listed(&has)
        )]
    } else {
        let adapted = foreign.iter().any(|name| name.contains(".base_layer."));
        let kinds = [
            (missing, "is missing".to_owned(), "are missing".to_owned()),
            (unfit, String::new(), "do not fit config.json".to_owned()),
            (foreign, format!("is not part of {architecture}"), format!("are not part of {architecture}")),
        ];
        let mut problems: Vec<String> =
            kinds.into_iter().flat_map(|(list, one, many)| few(&list, &one, &many)).collect();
        if adapted {
            problems.push("it was saved with an adapter attached; call merge_and_unload before saving".to_owned());
        }
        problems
    };
    if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: checkpoint.path().to_path_buf(), problems }) }
}

/// Tensors that a message lists.
const LISTED: usize = 3;

/// A sentence for each tensor, or one for all of them where there are many.
fn few(list: &[String], one: &str, many: &str) -> Vec<String> {
    if list.len() <= LISTED {
        return list.iter().map(|tensor| format!("tensor {tensor} {one}").trim_end().to_owned()).collect();
    }
    vec![format!("{} tensors {many}: {}", list.len(), listed(list))]
}

/// The first of the list, and how many more there are.
fn listed(list: &[String]) -> String {
    let shown: Vec<&str> = list.iter().take(LISTED).map(String::as_str).collect();
    let more = list.len() - shown.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

/// Returns true for dtypes whose elements become a model's weights.
fn is_float(dtype: Dtype) -> bool {
    match dtype {
        Dtype::Blocks(format) => format.decode.is_some(),
        dtype => matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16),
    }
}

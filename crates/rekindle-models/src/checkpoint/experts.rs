//! The linears of experts in checkpoints: tensors of their own, or all of a layer in one tensor with an axis of experts.

use std::collections::BTreeMap;

use rekindle_hub::{Checkpoint, CheckpointHeaders, TensorInfo, TensorPart};

use crate::parameters::{ExpertStack, LayerRole};
use crate::spec::{FeedForwardSpec, MoeSpec};
use crate::{Error, ModelConfig, Role};

/// The stacks of a layer.
const STACKS: [ExpertStack; 2] = [ExpertStack::GateUp, ExpertStack::Down];

/// A checkpoint whose experts are linears of their own.
pub(crate) struct ByExpert {
    /// Tensors of all experts are parts under the names of their linears.
    pub(crate) checkpoint: Checkpoint,
    /// True if there were such tensors.
    pub(crate) was_stacked: bool,
}

/// Returns the checkpoint with every linear of an expert under its own name.
///
/// # Errors
/// [`Error::Tensors`] with one sentence for each tensor of all experts that has another shape.
pub(crate) fn by_expert(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<ByExpert, Error> {
    let (mut parts, mut problems) = (BTreeMap::new(), Vec::new());
    for Stack { name, shape, linears } in stacks(config) {
        let Some(view) = checkpoint.get(&name) else { continue };
        if view.shape == shape {
            parts.insert(name, linears);
        } else {
            problems.push(format!("tensor \"{name}\" has shape {:?}, expected {shape:?}", view.shape));
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors { path: checkpoint.path().to_path_buf(), problems });
    }
    Ok(ByExpert { was_stacked: !parts.is_empty(), checkpoint: checkpoint.with_parts(parts) })
}

/// The headers with every linear of an expert under its own name.
pub(crate) fn headers_by_expert(
    mut tensors: BTreeMap<String, TensorInfo>,
    config: &ModelConfig,
) -> BTreeMap<String, TensorInfo> {
    for Stack { name, linears, .. } in stacks(config) {
        let Some(whole) = tensors.remove(&name) else { continue };
        let bytes = whole.bytes / linears.len() as u64;
        let info = |part: TensorPart| (part.name, TensorInfo { dtype: whole.dtype, shape: part.shape, bytes });
        tensors.extend(linears.into_iter().map(info));
    }
    tensors
}

/// A tensor that may stand for the linears of all experts of a layer.
struct Stack {
    name: String,
    /// `[experts, out, in]`.
    shape: Vec<usize>,
    linears: Vec<TensorPart>,
}

fn stacks(config: &ModelConfig) -> Vec<Stack> {
    let mixtures = config.spec.layers.iter().enumerate().filter_map(|(layer, spec)| match &spec.feed_forward {
        FeedForwardSpec::Moe(moe) => Some((layer, moe)),
        _ => None,
    });
    mixtures.flat_map(|(layer, moe)| STACKS.map(|stack| Stack::of(config, layer, moe, stack))).collect()
}

impl Stack {
    fn of(config: &ModelConfig, layer: usize, moe: &MoeSpec, stack: ExpertStack) -> Self {
        let name = |role: LayerRole| config.names.tensor(Role::Layer(layer, role));
        let part = moe.expert_shape(stack, config.hidden_size());
        let of = |expert: usize| stack.roles().iter().map(move |&role| LayerRole::Expert(role, expert));
        let linears = (0..moe.experts).flat_map(of);
        let linears = linears.map(|role| TensorPart { name: name(role), shape: part.to_vec() }).collect();
        let [rows, input] = moe.stack_shape(stack, config.hidden_size());
        Self { name: name(LayerRole::Experts(stack)), shape: vec![moe.experts, rows / moe.experts, input], linears }
    }
}

/// The tensors of a checkpoint that is described by its headers alone.
pub(crate) fn headers(headers: &CheckpointHeaders, config: &ModelConfig) -> BTreeMap<String, TensorInfo> {
    let naming = super::tensor_names::TensorNaming::of(&config.json, headers.tensors.keys().map(String::as_str));
    let named = headers.tensors.iter().map(|(stored, tensor)| (naming.name(stored), tensor.clone()));
    headers_by_expert(named.collect(), config)
}

//! The linears of experts in checkpoints: tensors of their own, or all of a layer in one tensor with an axis of experts.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rekindle_hub::{Checkpoint, CheckpointHeaders, TensorInfo, TensorPart};
use rekindle_quant::mxfp4;

use crate::parameters::{ExpertStack, LayerRole};
use crate::spec::{FeedForwardSpec, MoeSpec};
use crate::{Error, ModelConfig, Role};

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
            let blocks = if name.ends_with(mxfp4::BLOCKS) || name.ends_with(mxfp4::SCALES) {
                format!(": the MXFP4 blocks of {} that rows of config.json's sizes have", mxfp4::BLOCK)
            } else {
                String::new()
            };
            problems.push(format!("tensor \"{name}\" has shape {:?}, expected {shape:?}{blocks}", view.shape));
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
    /// `[experts, out, in]`, `[experts, in, out]`, or that of MXFP4 blocks or their scales.
    shape: Vec<usize>,
    linears: Vec<TensorPart>,
}

fn stacks(config: &ModelConfig) -> Vec<Stack> {
    let mixtures = config.spec.layers.iter().enumerate().filter_map(|(layer, spec)| match &spec.feed_forward {
        FeedForwardSpec::Moe(moe) => Some((layer, moe)),
        _ => None,
    });
    mixtures
        .flat_map(|(layer, moe)| ExpertStack::ALL.map(|stack| Stack::of(config, layer, moe, stack)))
        .flatten()
        .collect()
}

impl Stack {
    /// The tensor of values, and those of MXFP4.
    fn of(config: &ModelConfig, layer: usize, moe: &MoeSpec, stack: ExpertStack) -> [Self; 3] {
        let name = |role: LayerRole| config.names.tensor(Role::Layer(layer, role));
        let [out, input] = moe.expert_shape(stack, config.hidden_size());
        let roles = moe.roles(stack);
        let of = |expert: usize| roles.iter().map(move |&role| LayerRole::Expert(role, expert));
        let whole = name(LayerRole::Experts(stack));
        let tensor = |suffix: &str, shape: Vec<usize>, transposed: bool| {
            let linears = (0..moe.experts).flat_map(of);
            let part = |role| TensorPart { name: format!("{}{suffix}", name(role)), shape: shape.clone(), transposed };
            let linears = linears.map(part).collect();
            let mut shape = shape.clone();
            shape[0] *= roles.len();
            if transposed {
                shape.swap(0, 1);
            }
            shape.insert(0, moe.experts);
            Self { name: format!("{whole}{suffix}"), shape, linears }
        };
        let per_row = input / mxfp4::BLOCK;
        [
            tensor("", vec![out, input], config.names.experts.transposed),
            tensor(mxfp4::BLOCKS, vec![out, per_row, mxfp4::BLOCK / 2], false),
            tensor(mxfp4::SCALES, vec![out, per_row], false),
        ]
    }
}

/// The values of the tensor of all experts in the order of its file, from rows expert by expert.
pub(crate) fn stored_order<'a>(values: &'a [f32], config: &ModelConfig, role: Role) -> Cow<'a, [f32]> {
    let Role::Layer(layer, LayerRole::Experts(stack)) = role else { return Cow::Borrowed(values) };
    let FeedForwardSpec::Moe(moe) = &config.spec.layers[layer].feed_forward else { return Cow::Borrowed(values) };
    if !config.names.experts.transposed {
        return Cow::Borrowed(values);
    }
    let [rows, input] = moe.stack_shape(stack, config.hidden_size());
    let out = rows / moe.experts;
    let mut stored = Vec::with_capacity(values.len());
    for expert in values.chunks_exact(out * input) {
        stored.extend((0..input).flat_map(|column| (0..out).map(move |row| expert[row * input + column])));
    }
    Cow::Owned(stored)
}

/// The tensors of a checkpoint that is described by its headers alone.
pub(crate) fn headers(headers: &CheckpointHeaders, config: &ModelConfig) -> BTreeMap<String, TensorInfo> {
    let naming = super::tensor_names::TensorNaming::of(&config.json, headers.tensors.keys().map(String::as_str));
    let named = headers.tensors.iter().map(|(stored, tensor)| (naming.name(stored), tensor.clone()));
    headers_by_expert(named.collect(), config)
}

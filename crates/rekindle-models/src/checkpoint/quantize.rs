//! Quantizes a dense checkpoint without building a model.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use rekindle_hub::{Checkpoint, CheckpointHeaders, TensorSpec, write_f32};
use rekindle_quant::bnb::StoredWeight;

use super::check_tensors::check_tensors;
use super::experts::{ByExpert, by_expert};
use super::quantization::{LoadIn, QuantizationPlan, is_quantized, written_dtype};
use super::tensor_names::canonical;
use super::writer::{self, CheckpointTensor, KeptTensors};
use crate::non_finite::check_view;
use crate::{Error, MemoryReport, ModelConfig, Role};

/// Writes `checkpoint` with quantized linears into the existing directory `dir`: the tensors and the
/// `config.json` that bitsandbytes would have written, or for fp8 those of compressed-tensors. All other tensors are
/// copied unchanged.
///
/// `skip_modules` are the linears that stay dense; `None` is `lm_head`. The codes are held in memory until all are
/// made; dense weights are read from the memory map. `progress` receives the bytes of each tensor as it is read.
///
/// # Errors
/// [`Error::Argument`] for a checkpoint that is quantized already, [`Error::Config`], [`Error::Tensors`] and
/// [`Error::File`] as [`CausalLm::load`](crate::CausalLm::load), [`Error::NonFinite`] for a tensor with an infinity or
/// NaN.
pub fn quantize(
    checkpoint: &Checkpoint,
    load_in: LoadIn,
    skip_modules: Option<&[String]>,
    dir: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<MemoryReport, Error> {
    let checkpoint = &canonical(checkpoint);
    let config = ModelConfig::from_checkpoint(checkpoint)?;
    let ByExpert { checkpoint, .. } = &by_expert(checkpoint, &config)?;
    if is_quantized(checkpoint.config()) {
        return Err(Error::Argument(format!(
            "{} is already quantized; use the 16-bit checkpoint that it was made from",
            checkpoint.path().display()
        )));
    }
    let plan = QuantizationPlan::of(checkpoint, Some(load_in), skip_modules, &config)?;
    let plan = plan.ok_or_else(|| Error::Argument("quantizing needs a format of 4 or 8 bits".to_owned()))?;
    check_tensors(checkpoint, &config, None, false)?;

    let mut packed: BTreeMap<String, StoredWeight> = BTreeMap::new();
    let mut tensors = Vec::new();
    for needed in config.parameters() {
        let view = checkpoint.get(&needed.name).expect("every needed tensor was checked to be there");
        let quantized =
            if needed.role.is_linear() { plan.weight(checkpoint, &needed.name, &needed.shape)? } else { None };
        progress(view.bytes() as u64);
        match quantized {
            None => {
                check_view(&view)?;
                let spec = TensorSpec::new(needed.name.clone(), written_dtype(view.dtype), needed.shape);
                tensors.push(CheckpointTensor { spec, source: needed.name });
            }
            Some(weight) => {
                tensors.extend(CheckpointTensor::quantized(&needed.name, &weight, &needed.name));
                packed.insert(needed.name, weight);
            }
        }
    }
    // A tied checkpoint may spell its output layer out; it stays what it is.
    let head = config.names.tensor(Role::Head);
    if config.tie_word_embeddings()
        && let Some(view) = checkpoint.get(&head)
    {
        let spec = TensorSpec::new(head.clone(), view.dtype, view.shape);
        tensors.push(CheckpointTensor { spec, source: head });
    }

    let kept = KeptTensors::of(checkpoint.path(), &config)?;
    writer::write_tensors(dir, &kept, tensors, |name, spec, out| match packed.get(name) {
        None => {
            let view = checkpoint.get(name).expect("it was listed");
            if view.dtype == spec.dtype {
                return out.write_all(&view.row_major());
            }
            let values = view.to_f32().map_err(io::Error::other)?;
            write_f32(out, spec.dtype, &values)
        }
        Some(weight) => writer::write_quantized(name, weight, spec, out),
    })?;
    let mut json = checkpoint.config().clone();
    writer::set_quantization(&mut json, Some(plan.config().to_json()));
    writer::write_config(dir, &json)?;
    let written = CheckpointHeaders::open(dir)?;
    Ok(MemoryReport::of_headers(&written, &config))
}

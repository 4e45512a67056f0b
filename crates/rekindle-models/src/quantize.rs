//! From a dense checkpoint to a quantized one, without a model in between.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, DEFAULT_MAX_SHARD_SIZE, Headers, TensorSpec, write_atomic, write_sharded};
use rekindle_quant::bnb::StoredWeight;
use serde_json::Value;

use crate::names::{self, HEAD};
use crate::non_finite::check_view;
use crate::quantization::{Plan, hub_dtype, stored_quantization};
use crate::{Error, LoadIn, MemoryReport, ModelConfig};

/// Writes `checkpoint` with its linears in codes into the existing directory `dir`: the tensors and the
/// `config.json` that bitsandbytes would have written. Everything else stays as it is, bit for bit.
///
/// `skip_modules` are the linears that stay dense; `None` is `lm_head`. The codes are held in memory until all are
/// made; of the dense weights no copy is. `progress` is told the bytes of each tensor as it is read.
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
    let checkpoint = &crate::layout::canonical(checkpoint);
    let config = ModelConfig::from_checkpoint(checkpoint)?;
    if stored_quantization(checkpoint.config()).is_some() {
        return Err(Error::Argument(format!(
            "{} is quantized already; give the 16-bit checkpoint that it was made from",
            checkpoint.path().display()
        )));
    }
    let plan = Plan::of(checkpoint, Some(load_in), skip_modules)?;
    let plan = plan.ok_or_else(|| Error::Argument("quantizing needs a 4-bit or 8-bit format".to_owned()))?;
    crate::load::check_tensors(checkpoint, &config, None)?;

    let mut packed: BTreeMap<String, StoredWeight> = BTreeMap::new();
    let mut specs: Vec<(TensorSpec, String)> = Vec::new();
    for needed in names::needed(&config) {
        let view = checkpoint.get(&needed.name).expect("every needed tensor was checked to be there");
        let codes = match names::Projection::is_linear(&needed.name) {
            true => plan.codes(checkpoint, &needed.name, &needed.shape)?,
            false => None,
        };
        progress(view.data.len() as u64);
        match codes {
            None => {
                check_view(&view)?;
                specs.push((TensorSpec::new(needed.name.clone(), view.dtype, needed.shape), needed.name));
            }
            Some(weight) => {
                for (key, tensor) in weight.write(&needed.name) {
                    specs.push((TensorSpec::new(key, hub_dtype(tensor.dtype), tensor.shape), needed.name.clone()));
                }
                packed.insert(needed.name, weight);
            }
        }
    }
    // A tied checkpoint may spell its output layer out; it stays what it is.
    if config.tie_word_embeddings
        && let Some(view) = checkpoint.get(HEAD)
    {
        specs.push((TensorSpec::new(HEAD, view.dtype, view.shape), HEAD.to_owned()));
    }

    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let (specs, sources): (Vec<_>, Vec<_>) = specs.into_iter().unzip();
    write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &specs, |index, out| {
        let name = &sources[index];
        match packed.get(name) {
            None => out.write_all(checkpoint.get(name).expect("it was listed").data),
            Some(weight) => {
                let tensors = weight.write(name);
                let found = tensors.iter().find(|(key, _)| *key == specs[index].name);
                out.write_all(&found.expect("the keys follow from the format").1.bytes)
            }
        }
    })?;
    let mut json = checkpoint.config().clone();
    if let Value::Object(fields) = &mut json {
        fields.insert("quantization_config".to_owned(), plan.config.to_json());
    }
    write_atomic(&dir.join("config.json"), format!("{json:#}\n").as_bytes())?;
    let written = Headers::open(dir)?;
    Ok(MemoryReport::of_headers(&written, &config))
}

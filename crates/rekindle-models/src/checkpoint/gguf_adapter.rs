//! From an adapter to a GGUF file that llama.cpp applies to its base.

use std::path::Path;

use rekindle_gguf::{GgmlType, GgufTensorSpec, MetadataValue, write_gguf_files};
use rekindle_hub::Checkpoint;
use rekindle_lora::{Adapter, LoraFactors};

use super::gguf_decoder::{architecture, tensor_name};
use super::gguf_tensors::{ValueChange, change};
use crate::{Error, ModelConfig};

/// Writes `adapter`, trained on `base`, as a GGUF adapter at `path`, with factors of the type `kind` (F32, F16 or BF16).
///
/// llama.cpp multiplies B·A with one alpha / r. Other scales (rsLoRA, `alpha_pattern`) are multiplied into B.
///
/// # Errors
/// [`Error::Argument`] for an adapter with more than factors of linears, such as DoRA's magnitudes or trained tables;
/// [`Error::Gguf`] for a base that has no architecture in llama.cpp, and if the file cannot be written.
pub fn export_gguf_adapter(
    base: &Checkpoint,
    adapter: &Adapter,
    kind: GgmlType,
    metadata: &[(String, MetadataValue)],
    path: &Path,
) -> Result<(), Error> {
    let config = ModelConfig::from_checkpoint(base)?;
    let architecture = architecture(&config)?;
    check(adapter)?;
    let lora = adapter.config.lora();
    let alpha_of = |module: &str, factors: &LoraFactors| lora.scale_of(module) * factors.r as f64;
    let alpha = adapter.factors.iter().next().map_or(1.0, |(module, factors)| alpha_of(module, factors));

    let (mut tensors, mut values) = (Vec::new(), Vec::new());
    for needed in config.parameters() {
        let is_plain = needed.role.is_linear() && needed.role.expert().is_none();
        let Some(factors) = adapter.factors.get(needed.module()).filter(|_| is_plain) else { continue };
        let &[out, input] = needed.shape.as_slice() else { continue };
        let ratio = alpha_of(needed.module(), factors) / alpha;
        let b: Vec<f32> = factors.b.iter().map(|&value| (f64::from(value) * ratio) as f32).collect();
        let name = tensor_name(&architecture, needed.role)?;
        // A has the columns of the weight, and B its rows.
        let ValueChange { rows, columns, .. } = change(&architecture, &config, &needed);
        let a = ValueChange::of_order(None, columns).apply(factors.a.clone(), input);
        let b = ValueChange::of_order(rows, None).apply(b, factors.r);
        let r = factors.r as u64;
        tensors.push(GgufTensorSpec::new(format!("{name}.lora_a"), kind, [r, input as u64]));
        values.push(a);
        tensors.push(GgufTensorSpec::new(format!("{name}.lora_b"), kind, [out as u64, r]));
        values.push(b);
    }
    let mut keys = vec![
        ("general.architecture".to_owned(), architecture.name().into()),
        ("general.type".to_owned(), "adapter".into()),
        ("adapter.type".to_owned(), "lora".into()),
        ("adapter.lora.alpha".to_owned(), (alpha as f32).into()),
    ];
    keys.extend(metadata.iter().cloned());
    if 2 * adapter.factors.len() != tensors.len() {
        return Err(Error::Argument(
            "the adapter is on linears that a GGUF adapter cannot have, such as experts".to_owned(),
        ));
    }
    write_gguf_files(path, None, &keys, &tensors, |index, out| {
        let columns = tensors[index].shape[1] as usize;
        out.write_all(&kind.quantize(&values[index], columns, None)?)
    })?;
    Ok(())
}

/// Refuses an adapter that is more than factors.
fn check(adapter: &Adapter) -> Result<(), Error> {
    let extra = if adapter.factors.values().any(|factors| factors.magnitude.is_some()) {
        "DoRA's magnitudes"
    } else if !adapter.biases.is_empty() {
        "trained biases"
    } else if !adapter.saved.is_empty() || !adapter.tables.is_empty() {
        "an embedding table or a head (modules_to_save or resize_model_vocab)"
    } else if adapter.factors.is_empty() {
        return Err(Error::Argument("the adapter has no factors to export".to_owned()));
    } else {
        return Ok(());
    };
    Err(Error::Argument(format!("a GGUF adapter cannot have {extra}; export the merged model instead")))
}

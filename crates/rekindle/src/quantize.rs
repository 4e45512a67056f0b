//! Quantization of a dense checkpoint, from files to files.

use std::path::Path;

use rekindle_hub::companion_files;
use rekindle_models::{LoadIn, MemoryReport, ModelConfig, is_quantized, open_checkpoint};
use rekindle_train::{Companion, write_result};
use serde_json::Value;

use crate::{Error, ModelSource, skip};

/// Writes the checkpoint `model`, a directory or a name on the hub, to `out` with quantized linears in the format of
/// bitsandbytes, or for fp8 that of compressed-tensors, and the tokenizer's files. `skip_modules` are not quantized; `None` is `lm_head`. `progress` receives the
/// bytes read so far and in total.
///
/// `out` is written atomically; an earlier quantized checkpoint there is replaced, a dense one never.
///
/// # Errors
/// [`Error::File`] and [`Error::Model`] for a checkpoint that is missing, invalid, not supported or already quantized,
/// [`Error::Train`] if the result cannot be written.
pub fn quantize(
    model: impl AsRef<Path>,
    load_in: LoadIn,
    skip_modules: Option<&[String]>,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MemoryReport, Error> {
    let model = &ModelSource::new(model.as_ref()).fetch()?.path;
    let checkpoint = open_checkpoint(model)?;
    if let Some(modules) = skip_modules {
        skip::check(modules, &ModelConfig::from_checkpoint(&checkpoint)?)?;
    }
    spare_dense(out.as_ref())?;
    let (mut done, total) = (0, checkpoint.total_bytes());
    // Nothing is trained here, so the generation configuration stays as it is.
    let companions: Vec<_> = companion_files(model).into_iter().map(Companion::from).collect();
    let report = write_result(out.as_ref(), false, &companions, |dir| {
        Ok(rekindle_models::quantize(&checkpoint, load_in, skip_modules, dir, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?)
    })?;
    Ok(report)
}

/// Refuses to replace a directory with dense weights, such as `model` itself.
fn spare_dense(out: &Path) -> Result<(), Error> {
    let config = out.join("config.json");
    if !config.exists() {
        return Ok(());
    }
    let json: Value = rekindle_hub::read_json(&config)?;
    if is_quantized(&json) {
        return Ok(());
    }
    Err(rekindle_hub::Error::Unwritable {
        path: out.to_owned(),
        reason: "it contains an unquantized checkpoint, which would be overwritten; choose a new directory".to_owned(),
    }
    .into())
}

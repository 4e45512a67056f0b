//! From a dense checkpoint on disk to a quantized one.

use std::path::Path;

use rekindle_data::companion_files;
use rekindle_hub::Checkpoint;
use rekindle_models::{LoadIn, MemoryReport};
use rekindle_train::write_result;

use crate::Error;

/// Writes the checkpoint in `model` to `out` with its linears in codes, as transformers with bitsandbytes reads it,
/// the tokenizer's files included. `skip_modules` stay dense; `None` is `lm_head`. `progress` is told the bytes read so
/// far and in all.
///
/// `out` appears whole or not at all; an earlier checkpoint there is replaced.
///
/// # Errors
/// [`Error::File`] and [`Error::Model`] for a checkpoint that is missing, broken, not supported or quantized already,
/// [`Error::Train`] when the result cannot be written.
pub fn quantize(
    model: impl AsRef<Path>,
    load_in: LoadIn,
    skip_modules: Option<&[String]>,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MemoryReport, Error> {
    let model = model.as_ref();
    let checkpoint = Checkpoint::open(model)?;
    let (mut done, total) = (0, checkpoint.total_bytes());
    let report = write_result(out.as_ref(), false, &companion_files(model), |dir| {
        Ok(rekindle_models::quantize(&checkpoint, load_in, skip_modules, dir, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?)
    })?;
    Ok(report)
}

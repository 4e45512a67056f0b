//! Storage of the weights when all of them are trained.
//!
//! By default they are stored in f32, with a copy in the compute dtype if that differs. Otherwise they are stored in place,
//! without an f32 copy: in bf16 (`stochastic_rounding`), or the linears of the blocks in 4 or 8 bits and the other matrices in
//! bf16; vectors are f32. An update decodes a tensor into f32 scratch memory, changes it there, and rounds it back
//! stochastically with new scales ([`rekindle_kernels::stochastic`]).

use std::borrow::Cow;

use rekindle_hub::{Dtype, TensorView, write_f32};
use rekindle_quant::{QuantConfig, QuantFormat};

use super::quantization::LoadIn;
use crate::{Error, LoadOptions, ModelConfig};

/// The format that `asked` stands for in training: scales in codes could not follow the weights.
pub(crate) fn format(asked: LoadIn) -> LoadIn {
    match asked {
        LoadIn::FourBit(None) => LoadIn::FourBit(Some(QuantConfig { double_quant: false, ..QuantConfig::default() })),
        other => other,
    }
}

/// Returns true if trained weights have no f32 copy.
///
/// # Errors
/// [`Error::Argument`] where that is asked for and cannot be had.
pub(crate) fn in_place(options: &LoadOptions, is_quantized: bool, config: &ModelConfig) -> Result<bool, Error> {
    let LoadOptions { device, full_finetuning, stochastic_rounding, load_in, .. } = options;
    if !full_finetuning {
        if *stochastic_rounding {
            return Err(Error::Argument(
                "stochastic_rounding applies to trained weights, but the weights are frozen; set full_finetuning = \
                 true, or remove it"
                    .to_owned(),
            ));
        }
        return Ok(false);
    }
    if !is_quantized && !stochastic_rounding {
        return Ok(false);
    }
    let asked = load_in.map(format).and_then(LoadIn::format);
    if let Some(format @ QuantFormat::Fp8(_)) = asked {
        return Err(fp8("load_in_fp8 = true", format));
    }
    if asked.is_some_and(|format| !format.is_trainable()) {
        return Err(coded_scales("the format that was asked for"));
    }
    let limits = device.limits();
    if !limits.trains_in_place {
        return Err(Error::Argument(
            "full_finetuning without f32 weights (stochastic_rounding, load_in_4bit or load_in_8bit) needs the CPU or \
             CUDA; use one of them, or remove these keys"
                .to_owned(),
        ));
    }
    let multiple = limits.in_place_cols_multiple;
    let is_odd = |n: &usize| !n.is_multiple_of(multiple);
    let odd = config.parameters().into_iter().find(|tensor| tensor.shape.last().is_some_and(is_odd));
    match odd {
        None => Ok(true),
        Some(needed) => Err(Error::Argument(format!(
            "tensor \"{}\" has shape {:?}; on CUDA, weights that are trained without an f32 copy need rows of a \
             multiple of {multiple} elements; remove stochastic_rounding, load_in_4bit and load_in_8bit",
            needed.name, needed.shape
        ))),
    }
}

/// Returns the error for a weight of the checkpoint whose scales cannot change with its values.
pub(crate) fn untrainable(name: &str, format: QuantFormat) -> Error {
    match format {
        QuantFormat::Mxfp4 => Error::Argument(format!(
            "tensor \"{name}\" of the checkpoint is in MXFP4, which does not support training; use a 16-bit checkpoint, or \
             train an adapter"
        )),
        QuantFormat::Fp8(_) => fp8(&format!("tensor \"{name}\" of the checkpoint"), format),
        _ => coded_scales(&format!("tensor \"{name}\" of the checkpoint")),
    }
}

fn fp8(what: &str, format: QuantFormat) -> Error {
    Error::Argument(format!(
        "{what}: {format} does not support full_finetuning; use a 16-bit checkpoint without load_in_fp8, or train an adapter"
    ))
}

/// Returns the error for doubly quantized scales, which cannot change with the weights.
fn coded_scales(what: &str) -> Error {
    Error::Argument(format!(
        "{what} has doubly quantized scales, which do not support training; use the 16-bit checkpoint with \
         load_in_4bit and double_quant = false, or train an adapter"
    ))
}

/// The tensor's values in bf16, as they are or rounded to nearest.
pub(crate) fn bf16_bytes<'a>(view: &TensorView<'a>) -> Result<Cow<'a, [u8]>, Error> {
    if view.dtype == Dtype::BF16 {
        return Ok(view.row_major());
    }
    Ok(Cow::Owned(rounded(&view.to_f32()?)))
}

/// Values in bf16, rounded to nearest.
pub(crate) fn rounded(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(2 * values.len());
    write_f32(&mut bytes, Dtype::BF16, values).expect("memory takes what is written");
    bytes
}

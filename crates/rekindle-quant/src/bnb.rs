//! The bitsandbytes tensors of a checkpoint: their keys, their JSON and their stored types.
//!
//! A 4-bit weight `q_proj.weight` is stored under these keys ([`FourBitWeight`]):
//!
//! | key | stored as | holds |
//! |---|---|---|
//! | `q_proj.weight` | `quant_storage`, u8 `[⌈n/2⌉, 1]` by default | packed codes |
//! | `q_proj.weight.absmax` | f32 or, doubly quantized, u8 `[blocks]` | scales |
//! | `q_proj.weight.quant_map` | f32 `[16]` | the code table |
//! | `q_proj.weight.nested_absmax`, `.nested_quant_map` | f32 `[⌈blocks/256⌉]`, `[256]` | double quantization |
//! | `q_proj.weight.quant_state.bitsandbytes__nf4` (`__fp4`) | u8, JSON | shape, dtype, blocksize, offset |
//!
//! and an 8-bit one under these ([`read_int8`], [`write_int8`]):
//!
//! | key | stored as | holds |
//! |---|---|---|
//! | `q_proj.weight` | i8 `[out, in]` | codes |
//! | `q_proj.SCB` | f32 `[out]` | scales |
//! | `q_proj.weight_format` | u8 `[]` | 0, row-major |
//!
//! [`StoredWeight`] and [`QuantizationConfig`] also know the formats [`mxfp4`](crate::mxfp4) and [`fp8`].
//!
//! [`QuantizationConfig`] is the corresponding section of the checkpoint's config.json.
//!
//! This module opens no files: readers take a function that looks up tensors by key, and writers return tensors.

mod config;
mod four_bit;
mod int8;
mod quant_state;
mod raw;
mod skip;
mod stored;

pub use config::QuantizationConfig;
pub(crate) use config::{Keys, shown};
pub use four_bit::FourBitWeight;
pub use int8::{read_int8, write_int8};
pub use raw::RawTensor;
pub(crate) use skip::SkipPattern;
pub use stored::StoredWeight;

use crate::QuantType;
use crate::fp8;
use crate::mxfp4::{BLOCKS, SCALES};

/// Returns the weight that `key` belongs to if `key` is a companion tensor of a quantized weight.
///
/// `…q_proj.weight.absmax`, `…q_proj.weight_blocks`, `…q_proj.weight_scale` and `…q_proj.SCB` belong to `…q_proj.weight`.
pub fn owner(key: &str) -> Option<String> {
    let beside = [BLOCKS, SCALES].into_iter().chain(fp8::WEIGHT_SUFFIXES).find_map(|suffix| key.strip_suffix(suffix));
    if let Some(weight) = beside.filter(|weight| weight.ends_with(".weight")) {
        return Some(weight.to_owned());
    }
    let four_bit = FOUR_BIT_SUFFIXES.into_iter().find_map(|suffix| key.strip_suffix(suffix));
    let four_bit = four_bit
        .or_else(|| QuantType::ALL.into_iter().find_map(|quant_type| key.strip_suffix(quant_state_suffix(quant_type))));
    let of_module = INT8_SUFFIXES.into_iter().chain(fp8::MODULE_SUFFIXES);
    let module = || of_module.clone().find_map(|suffix| key.strip_suffix(suffix));
    four_bit.map(str::to_owned).or_else(|| module().map(|module| format!("{module}.weight")))
}

/// Returns the keys that the tensors of a weight may have in any format, its own first.
pub fn keys(weight: &str) -> impl Iterator<Item = String> + use<'_> {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let four_bit = FOUR_BIT_SUFFIXES.into_iter().chain(QuantType::ALL.map(quant_state_suffix));
    let beside =
        four_bit.chain([BLOCKS, SCALES]).chain(fp8::WEIGHT_SUFFIXES).map(move |suffix| format!("{weight}{suffix}"));
    let of_module =
        INT8_SUFFIXES.into_iter().chain(fp8::MODULE_SUFFIXES).map(move |suffix| format!("{module}{suffix}"));
    core::iter::once(weight.to_owned()).chain(beside).chain(of_module)
}

const ABSMAX: &str = ".absmax";
const QUANT_MAP: &str = ".quant_map";
const NESTED_ABSMAX: &str = ".nested_absmax";
const NESTED_QUANT_MAP: &str = ".nested_quant_map";
const FOUR_BIT_SUFFIXES: [&str; 4] = [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP];
const SCB: &str = ".SCB";
const WEIGHT_FORMAT: &str = ".weight_format";
const INT8_SUFFIXES: [&str; 2] = [SCB, WEIGHT_FORMAT];

const fn quant_state_suffix(quant_type: QuantType) -> &'static str {
    match quant_type {
        QuantType::Nf4 => ".quant_state.bitsandbytes__nf4",
        QuantType::Fp4 => ".quant_state.bitsandbytes__fp4",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_their_weight() {
        let keys: Vec<String> = keys("a.weight").collect();
        assert_eq!(keys[0], "a.weight");
        assert!(keys[1..].iter().all(|key| owner(key).as_deref() == Some("a.weight")), "{keys:?}");
        for key in ["a.weight_blocks", "a.weight_scales", "a.weight_scale_inv", "a.weight_scale", "a.input_scale"] {
            assert_eq!(owner(key).as_deref(), Some("a.weight"), "{key}");
        }
        for key in ["a.weight.absmax", "a.weight.nested_quant_map", "a.weight.quant_state.bitsandbytes__fp4", "a.SCB"] {
            assert_eq!(owner(key).as_deref(), Some("a.weight"), "{key}");
        }
        for key in ["a.weight", "a.bias", "absmax", "a.weight.quant_state.bitsandbytes__int4"] {
            assert_eq!(owner(key), None, "{key}");
        }
    }
}

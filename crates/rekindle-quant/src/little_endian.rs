//! Conversion of elements as stored in a file: little-endian and possibly unaligned.

use half::f16;

use crate::element::not_a_float;
use crate::{Dtype, Element, Error};

/// Number of elements copied to aligned storage at a time.
const GROUP: usize = 256;

/// Converts f32 to f32, which is a copy.
#[inline(always)]
pub(crate) fn le_f32_to_f32(from: &[[u8; 4]], to: &mut [f32]) {
    for (wide, &bytes) in to.iter_mut().zip(from) {
        *wide = f32::from_le_bytes(bytes);
    }
}

/// Converts f16 to f32.
#[inline(always)]
pub(crate) fn le_f16_to_f32(from: &[[u8; 2]], to: &mut [f32]) {
    for (from, to) in from.chunks(GROUP).zip(to.chunks_mut(GROUP)) {
        let mut aligned = [f16::ZERO; GROUP];
        for (half, &bytes) in aligned.iter_mut().zip(from) {
            *half = f16::from_le_bytes(bytes);
        }
        f16::to_f32_slice(&aligned[..from.len()], to);
    }
}

/// Converts bf16 to f32.
#[inline(always)]
pub(crate) fn le_bf16_to_f32(from: &[[u8; 2]], to: &mut [f32]) {
    for (wide, &bytes) in to.iter_mut().zip(from) {
        *wide = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    }
}

/// Converts a whole tensor to f32; bytes beyond the last whole element are left out.
///
/// # Errors
/// [`Error::Dtype`].
pub(crate) fn to_f32(bytes: &[u8], dtype: Dtype) -> Result<Vec<f32>, Error> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    match dtype {
        Dtype::F32 => le_f32_to_f32(bytes.as_chunks().0, &mut values),
        Dtype::F16 => le_f16_to_f32(bytes.as_chunks().0, &mut values),
        Dtype::BF16 => le_bf16_to_f32(bytes.as_chunks().0, &mut values),
        other => return Err(not_a_float(other)),
    }
    Ok(values)
}

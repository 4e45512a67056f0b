//! Conversion of elements as stored in a file: little-endian and possibly unaligned.

use half::f16;

use crate::Element;

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

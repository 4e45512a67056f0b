//! Elements as they lie in a file: little-endian, at any address.

use half::f16;

use crate::Element;

/// Elements that are given the alignment of their type together.
const GROUP: usize = 256;

/// Widens f32, which only copies them.
#[inline(always)]
pub(crate) fn widen_f32(from: &[[u8; 4]], to: &mut [f32]) {
    for (wide, &bytes) in to.iter_mut().zip(from) {
        *wide = f32::from_le_bytes(bytes);
    }
}

/// Widens f16.
#[inline(always)]
pub(crate) fn widen_f16(from: &[[u8; 2]], to: &mut [f32]) {
    for (from, to) in from.chunks(GROUP).zip(to.chunks_mut(GROUP)) {
        let mut aligned = [f16::ZERO; GROUP];
        for (half, &bytes) in aligned.iter_mut().zip(from) {
            *half = f16::from_le_bytes(bytes);
        }
        f16::widen(&aligned[..from.len()], to);
    }
}

/// Widens bf16.
#[inline(always)]
pub(crate) fn widen_bf16(from: &[[u8; 2]], to: &mut [f32]) {
    for (wide, &bytes) in to.iter_mut().zip(from) {
        *wide = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    }
}

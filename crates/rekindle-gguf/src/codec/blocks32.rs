//! The types with blocks of 32 elements and f16 factors: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! | type | bytes | layout | x ≈ |
//! |---|---|---|---|
//! | Q8_0 | 34 | d; 32 × i8 | d·q |
//! | Q4_0 | 18 | d; 16 × u8 | d·(q − 8) |
//! | Q4_1 | 20 | d; m; 16 × u8 | d·q + m |
//! | Q5_0 | 22 | d; u32 of high bits; 16 × u8 | d·(q − 16) |
//! | Q5_1 | 24 | d; m; u32 of high bits; 16 × u8 | d·q + m |
//!
//! Byte j holds element j in its low and element j + 16 in its high half; bit j of the u32 is the fifth bit of element j.

use super::search::{Trials, largest, scale_min, symmetric};
use super::{f16_at, put_f16};

const N: usize = 32;

/// The scales that Q4_1 and Q5_1 try if there are importances.
const TRIALS: Trials = Trials { first: -0.9, step: 0.05, tries: 36, absolute: false };

/// Rounds to the nearest integer, halves away from zero, for |x| below 2²².
#[inline(always)]
fn round_half_away(x: f32) -> i32 {
    const BELOW_HALF: f32 = 0.499_999_97;
    (x + BELOW_HALF.copysign(x)) as i32
}

#[inline(always)]
pub(super) fn quantize_q8_0(x: &[f32], out: &mut [u8]) {
    let d = largest(x).abs() / 127.0;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    put_f16(out, 0, d);
    for (slot, &x) in out[2..].iter_mut().zip(x) {
        // Halves are rounded away from zero.
        *slot = (round_half_away(x * inverse) as i8).cast_unsigned();
    }
}

#[inline(always)]
pub(super) fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (slot, &q) in out.iter_mut().zip(&block[2..]) {
        *slot = f32::from(q.cast_signed()) * d;
    }
}

/// Returns w·√(σ² + x²) for a block, with the row's mean square σ².
#[inline(always)]
fn weights(x: &[f32], importance: &[f32], sigma2: f32) -> [f32; N] {
    std::array::from_fn(|j| importance[j] * (sigma2 + x[j] * x[j]).sqrt())
}

/// Rounds to codes 0 … 2·`levels` − 1 around `levels`, with a scale that maps the largest element to −`levels`.
#[inline(always)]
fn centered(x: &[f32], importance: Option<(&[f32], f32)>, levels: u8, codes: &mut [u8; N]) -> f32 {
    if let Some((importance, sigma2)) = importance {
        return symmetric(x, Some(&weights(x, importance, sigma2)), codes, i32::from(levels));
    }
    let d = largest(x) / -f32::from(levels);
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    for (slot, &x) in codes.iter_mut().zip(x) {
        *slot = ((x * inverse + (f32::from(levels) + 0.5)) as u8).min(2 * levels - 1);
    }
    d
}

/// Rounds to codes 0 … `levels` between the smallest and the largest element. Returns the scale and the minimum.
#[inline(always)]
fn ranged(x: &[f32], importance: Option<(&[f32], f32)>, levels: u8, codes: &mut [u8; N]) -> (f32, f32) {
    if let Some((importance, sigma2)) = importance {
        let found = scale_min(x, &weights(x, importance, sigma2), codes, levels, TRIALS);
        return (found.scale, -found.min);
    }
    let (mut min, mut max) = (f32::MAX, -f32::MAX);
    for &x in x {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
    }
    let d = (max - min) / f32::from(levels);
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    for (slot, &x) in codes.iter_mut().zip(x) {
        *slot = (((x - min) * inverse + 0.5) as u8).min(levels);
    }
    (d, min)
}

#[inline(always)]
fn put_nibbles(codes: &[u8; N], out: &mut [u8]) {
    for (j, slot) in out[..N / 2].iter_mut().enumerate() {
        *slot = (codes[j] & 15) | ((codes[j + N / 2] & 15) << 4);
    }
}

#[inline(always)]
fn put_high_bits(codes: &[u8; N], out: &mut [u8]) {
    let bits = codes.iter().enumerate().fold(0_u32, |bits, (j, code)| bits | (u32::from(code >> 4) << j));
    out[..4].copy_from_slice(&bits.to_le_bytes());
}

/// Returns code j of a block, with the nibbles and the fifth bits.
#[inline(always)]
fn code_at(nibbles: &[u8], high: u32, j: usize) -> u8 {
    let low = if j < N / 2 { nibbles[j] & 15 } else { nibbles[j - N / 2] >> 4 };
    low | ((((high >> j) & 1) as u8) << 4)
}

#[inline(always)]
fn high_bits(block: &[u8]) -> u32 {
    u32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

#[inline(always)]
pub(super) fn quantize_q4_0(x: &[f32], importance: Option<(&[f32], f32)>, out: &mut [u8]) {
    let mut codes = [0; N];
    put_f16(out, 0, centered(x, importance, 8, &mut codes));
    put_nibbles(&codes, &mut out[2..]);
}

#[inline(always)]
pub(super) fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (j, slot) in out.iter_mut().enumerate() {
        *slot = (f32::from(code_at(&block[2..], 0, j)) - 8.0) * d;
    }
}

#[inline(always)]
pub(super) fn quantize_q4_1(x: &[f32], importance: Option<(&[f32], f32)>, out: &mut [u8]) {
    let mut codes = [0; N];
    let (d, m) = ranged(x, importance, 15, &mut codes);
    put_f16(out, 0, d);
    put_f16(out, 2, m);
    put_nibbles(&codes, &mut out[4..]);
}

#[inline(always)]
pub(super) fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (j, slot) in out.iter_mut().enumerate() {
        *slot = f32::from(code_at(&block[4..], 0, j)) * d + m;
    }
}

#[inline(always)]
pub(super) fn quantize_q5_0(x: &[f32], importance: Option<(&[f32], f32)>, out: &mut [u8]) {
    let mut codes = [0; N];
    put_f16(out, 0, centered(x, importance, 16, &mut codes));
    put_high_bits(&codes, &mut out[2..]);
    put_nibbles(&codes, &mut out[6..]);
}

#[inline(always)]
pub(super) fn decode_q5_0(block: &[u8], out: &mut [f32]) {
    let (d, high) = (f16_at(block, 0), high_bits(&block[2..]));
    for (j, slot) in out.iter_mut().enumerate() {
        *slot = (f32::from(code_at(&block[6..], high, j)) - 16.0) * d;
    }
}

#[inline(always)]
pub(super) fn quantize_q5_1(x: &[f32], importance: Option<(&[f32], f32)>, out: &mut [u8]) {
    let mut codes = [0; N];
    let (d, m) = ranged(x, importance, 31, &mut codes);
    put_f16(out, 0, d);
    put_f16(out, 2, m);
    put_high_bits(&codes, &mut out[4..]);
    put_nibbles(&codes, &mut out[8..]);
}

#[inline(always)]
pub(super) fn decode_q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, high) = (f16_at(block, 0), f16_at(block, 2), high_bits(&block[4..]));
    for (j, slot) in out.iter_mut().enumerate() {
        *slot = f32::from(code_at(&block[8..], high, j)) * d + m;
    }
}

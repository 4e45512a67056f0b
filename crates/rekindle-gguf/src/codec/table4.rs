//! The types whose 4-bit codes index a table: IQ4_NL and MXFP4.
//!
//! | type | bytes | layout | x ≈ |
//! |---|---|---|---|
//! | IQ4_NL | 18 | f16 d; 16 × u8 | d·table\[q\] |
//! | MXFP4 | 17 | u8 e; 16 × u8 | 2^(e − 127)·E2M1\[q\] |
//!
//! Byte j holds element j in its low and element j + 16 in its high half.

use super::search::{ZERO, largest};
use super::{f16_at, put_f16};

const N: usize = 32;

/// The values of IQ4_NL.
const IQ4_NL: [f32; 16] = [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

/// Twice the values of E2M1, the positive ones first.
const E2M1: [f32; 16] = [0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.];

/// Returns the index of the nearest value of the ascending [`IQ4_NL`]; of two at the same distance, the upper one.
#[inline(always)]
fn nearest(x: f32) -> usize {
    if x <= IQ4_NL[0] {
        return 0;
    }
    if x >= IQ4_NL[15] {
        return 15;
    }
    let above = IQ4_NL.partition_point(|&value| value <= x);
    if x - IQ4_NL[above - 1] < IQ4_NL[above] - x { above - 1 } else { above }
}

/// Searches the scale with the largest (Σ w·q·x)² / Σ w·q² among 16.
#[inline(always)]
fn iq4_nl_scale(x: &[f32], importance: Option<&[f32]>) -> f32 {
    let mut mean = x.iter().fold(0.0_f32, |sum, x| sum + x * x);
    mean *= 2.0 / N as f32;
    let w: [f32; N] = std::array::from_fn(|j| match importance {
        Some(importance) => importance[j] * (mean + x[j] * x[j]).sqrt(),
        None => x[j] * x[j],
    });
    let max = largest(x);
    if max.abs() < ZERO {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut sum_qx, mut sum_qq) = (0.0_f32, 0.0_f32);
        for (&x, &w) in x.iter().zip(&w) {
            let q = IQ4_NL[nearest(inverse * x)];
            sum_qx += w * q * x;
            sum_qq += w * q * q;
        }
        (sum_qx, sum_qq)
    };
    let (sum_qx, sum_qq) = sums(1.0 / (-max / IQ4_NL[0]));
    let mut scale = if sum_qq > 0.0 { sum_qx / sum_qq } else { 0.0 };
    let mut best = scale * sum_qx;
    for trial in -7..=7 {
        let (sum_qx, sum_qq) = sums((trial as f32 + IQ4_NL[0]) / max);
        if sum_qq > 0.0 && sum_qx * sum_qx > best * sum_qq {
            scale = sum_qx / sum_qq;
            best = scale * sum_qx;
        }
    }
    scale
}

#[inline(always)]
pub(super) fn quantize_iq4_nl(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let scale = iq4_nl_scale(x, importance);
    put_f16(out, 0, scale);
    let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
    for (j, slot) in out[2..].iter_mut().enumerate() {
        *slot = nearest(inverse * x[j]) as u8 | ((nearest(inverse * x[j + N / 2]) as u8) << 4);
    }
}

#[inline(always)]
pub(super) fn decode_iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (j, &byte) in block[2..].iter().enumerate() {
        out[j] = d * IQ4_NL[usize::from(byte & 15)];
        out[j + N / 2] = d * IQ4_NL[usize::from(byte >> 4)];
    }
}

/// Returns half of 2^(e − 127), exactly.
#[inline(always)]
fn half_power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

#[inline(always)]
pub(super) fn quantize_mxfp4(x: &[f32], out: &mut [u8]) {
    let max = largest(x).abs();
    // In f64 and rounded to f32 as the logarithm in f32 is: just below a power of two it is that power.
    let exponent = if max > 0.0 { (f64::from(max).log2() as f32).floor() as i32 - 2 + 127 } else { 0 };
    let e = exponent.clamp(0, 254) as u8;
    let d = half_power(e);
    let code = |x: f32| {
        let (mut best, mut best_error) = (0_u8, (E2M1[0] * d - x).abs());
        for (index, value) in E2M1.iter().enumerate().skip(1) {
            let error = (value * d - x).abs();
            if error < best_error {
                (best, best_error) = (index as u8, error);
            }
        }
        best
    };
    out[0] = e;
    for (j, slot) in out[1..].iter_mut().enumerate() {
        *slot = code(x[j]) | (code(x[j + N / 2]) << 4);
    }
}

#[inline(always)]
pub(super) fn decode_mxfp4(block: &[u8], out: &mut [f32]) {
    let d = half_power(block[0]);
    for (j, &byte) in block[1..].iter().enumerate() {
        out[j] = E2M1[usize::from(byte & 15)] * d;
        out[j + N / 2] = E2M1[usize::from(byte >> 4)] * d;
    }
}

//! The K-quants: blocks of 256 elements in groups of 16 or 32, whose scales are quantized too.
//!
//! | type | bytes | layout | x ≈ |
//! |---|---|---|---|
//! | Q2_K | 84 | 16 × (u4 scale, u4 min); 64 × 4 codes; f16 d; f16 dmin | d·scale·q − dmin·min |
//! | Q3_K | 110 | 256 high bits; 64 × 4 codes; 16 × u6 scale; f16 d | d·(scale − 32)·(q − 4) |
//! | Q4_K | 144 | f16 d; f16 dmin; 8 × (u6 scale, u6 min); 128 × 2 codes | d·scale·q − dmin·min |
//! | Q5_K | 176 | f16 d; f16 dmin; 8 × (u6 scale, u6 min); 256 high bits; 128 × 2 codes | d·scale·q − dmin·min |
//! | Q6_K | 210 | 128 × 2 codes; 64 × 4 high bits; 16 × i8 scale; f16 d | d·scale·(q − 32) |
//!
//! Codes are rounded once more with the quantized scales.

use super::lanes::{LANES, scale_min, symmetric, transposed};
use super::search::{ScaleMin, Trials, ZERO, descent, largest, positive, round};
use super::{f16_at, put_f16};

const N: usize = 256;

/// The trials with importances.
const WEIGHTED: Trials = Trials { first: -0.9, step: 0.05, tries: 36, absolute: false };

/// Returns w·√(σ² + x²).
#[inline(always)]
fn weights(x: &[f32], importance: &[f32], sigma2: f32) -> [f32; N] {
    std::array::from_fn(|l| importance[l] * (sigma2 + x[l] * x[l]).sqrt())
}

/// Searches the scales of 16 groups of 16.
#[inline(always)]
fn symmetric_groups(x: &[f32], w: Option<&[f32]>, codes: &mut [u8; N], levels: i32, scales: &mut [f32; 16]) {
    const PART: usize = LANES * 16;
    for (part, codes) in codes.chunks_mut(PART).enumerate() {
        let w = w.map(|w| transposed::<16>(&w[part * PART..]));
        let found = symmetric(&transposed::<16>(&x[part * PART..]), w.as_ref(), codes, levels);
        scales[part * LANES..][..LANES].copy_from_slice(&found);
    }
}

#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x)
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}

/// Returns the largest of values that are not negative.
#[inline(always)]
fn max_of(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |max, value| if value > max { value } else { max })
}

/// Rounds a group with its final scale and minimum; a scale of 0 leaves the codes.
#[inline(always)]
fn requantize(x: &[f32], codes: &mut [u8], d: f32, min: f32, levels: i32) {
    if d != 0.0 {
        for (slot, &x) in codes.iter_mut().zip(x) {
            *slot = round((x + min) / d).clamp(0, levels) as u8;
        }
    }
}

/// Rounds a group with its final scale to codes around `levels`; a scale of 0 leaves the codes.
#[inline(always)]
fn requantize_centered(x: &[f32], codes: &mut [u8], d: f32, levels: i32) {
    if d != 0.0 {
        for (slot, &x) in codes.iter_mut().zip(x) {
            *slot = (round(x / d).clamp(-levels, levels - 1) + levels) as u8;
        }
    }
}

/// Puts the low two bits of 256 codes into 64 bytes: byte l of 32 holds l, l + 32, l + 64 and l + 96 of its half.
#[inline(always)]
fn put_pairs(codes: &[u8; N], shift: u32, out: &mut [u8]) {
    for (half, out) in codes.as_chunks::<128>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for (l, slot) in out.iter_mut().enumerate() {
            *slot = (0..4).fold(0, |byte, part| byte | (((half[l + 32 * part] >> shift) & 3) << (2 * part)));
        }
    }
}

/// Returns the two bits of element i that [`put_pairs`] stored.
#[inline(always)]
fn pair_at(bytes: &[u8], i: usize) -> u8 {
    (bytes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32))) & 3
}

#[inline(always)]
pub(super) fn quantize_q2_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const TRIALS: Trials = Trials { first: -0.5, step: 0.1, tries: 15, absolute: true };
    const G: usize = 16;
    let mut codes = [0_u8; N];
    let mut found = [ScaleMin::default(); N / G];
    let mut group_weights = [0.0; N / G];
    let sigma2 = sum_of_squares(x) / N as f32;
    let (w, trials) = match importance {
        Some(importance) => (weights(x, importance, sigma2), WEIGHTED),
        None => (std::array::from_fn(|l| x[l].abs()), TRIALS),
    };
    for (slot, w) in group_weights.iter_mut().zip(w.chunks(G)) {
        *slot = sum(w);
    }
    const PART: usize = LANES * G;
    for (part, codes) in codes.chunks_mut(PART).enumerate() {
        let (x, w) = (transposed::<G>(&x[part * PART..]), transposed::<G>(&w[part * PART..]));
        found[part * LANES..][..LANES].copy_from_slice(&scale_min(&x, &w, codes, 3, trials));
    }
    let (d, dmin) = if importance.is_some() {
        let (mut scales, mut mins) = ([0; N / G], [0; N / G]);
        let d = positive(&found.map(|found| found.scale), &group_weights, &mut scales, 15);
        let dmin = positive(&found.map(|found| found.min), &group_weights, &mut mins, 15);
        for (slot, (scale, min)) in out.iter_mut().zip(scales.into_iter().zip(mins)) {
            *slot = scale | (min << 4);
        }
        (d, dmin)
    } else {
        let (max_scale, max_min) = (max_of(found.iter().map(|f| f.scale)), max_of(found.iter().map(|f| f.min)));
        for (slot, found) in out.iter_mut().zip(found) {
            let scale = if max_scale > 0.0 { round(15.0 / max_scale * found.scale) } else { 0 };
            let min = if max_min > 0.0 { round(15.0 / max_min * found.min) } else { 0 };
            *slot = scale as u8 | ((min as u8) << 4);
        }
        (max_scale / 15.0, max_min / 15.0)
    };
    put_f16(out, 80, d);
    put_f16(out, 82, dmin);
    let (d, dmin) = (f16_at(out, 80), f16_at(out, 82));
    for (j, (x, codes)) in x.chunks(G).zip(codes.chunks_mut(G)).enumerate() {
        requantize(x, codes, d * f32::from(out[j] & 15), dmin * f32::from(out[j] >> 4), 3);
    }
    put_pairs(&codes, 0, &mut out[16..80]);
}

#[inline(always)]
pub(super) fn decode_q2_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (i, slot) in out.iter_mut().enumerate() {
        let scales = block[i / 16];
        let (scale, min) = (d * f32::from(scales & 15), dmin * f32::from(scales >> 4));
        *slot = scale * f32::from(pair_at(&block[16..80], i)) - min;
    }
}

/// Puts 16 6-bit scales into 12 bytes: low halves of 0 … 7 and 8 … 15, then the high bits of j, j + 4, j + 8, j + 12.
#[inline(always)]
fn put_q3_scales(scales: &[u8; 16], out: &mut [u8]) {
    out[..12].fill(0);
    for (j, &scale) in scales.iter().enumerate() {
        out[j % 8] |= (scale & 15) << (4 * (j / 8));
        out[8 + j % 4] |= (scale >> 4) << (2 * (j / 4));
    }
}

#[inline(always)]
fn q3_scale_at(scales: &[u8], j: usize) -> i8 {
    let low = (scales[j % 8] >> (4 * (j / 8))) & 15;
    let high = (scales[8 + j % 4] >> (2 * (j / 4))) & 3;
    (low | (high << 4)).cast_signed() - 32
}

#[inline(always)]
pub(super) fn quantize_q3_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const G: usize = 16;
    let mut codes = [0_u8; N];
    let mut scales = [0.0; N / G];
    let mut stored = [0_u8; N / G];
    let d = if let Some(importance) = importance {
        let sigma2 = 2.0 * sum_of_squares(x) / N as f32;
        let mut group_weights = [0.0; N / G];
        let w = weights(x, importance, sigma2);
        for (slot, w) in group_weights.iter_mut().zip(w.chunks(G)) {
            *slot = sum(w);
        }
        symmetric_groups(x, Some(&w), &mut codes, 4, &mut scales);
        super::search::symmetric(&scales, Some(&group_weights), &mut stored, 32)
    } else {
        for ((scale, x), codes) in scales.iter_mut().zip(x.chunks(G)).zip(codes.chunks_mut(G)) {
            *scale = descent(x, codes, 4);
        }
        let max = largest(&scales);
        if max == 0.0 {
            0.0
        } else {
            let inverse = -32.0 / max;
            stored = scales.map(|scale| (round(inverse * scale).clamp(-32, 31) + 32) as u8);
            1.0 / inverse
        }
    };
    put_q3_scales(&stored, &mut out[96..108]);
    put_f16(out, 108, d);
    let d = f16_at(out, 108);
    for (j, (x, codes)) in x.chunks(G).zip(codes.chunks_mut(G)).enumerate() {
        requantize_centered(x, codes, d * f32::from(q3_scale_at(&out[96..108], j)), 4);
    }
    out[..32].fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[i % 32] |= (code >> 2) << (i / 32);
    }
    put_pairs(&codes, 0, &mut out[32..96]);
}

#[inline(always)]
pub(super) fn decode_q3_k(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 108);
    for (i, slot) in out.iter_mut().enumerate() {
        let high = (block[i % 32] >> (i / 32)) & 1;
        let code = (pair_at(&block[32..96], i) | (high << 2)).cast_signed() - 4;
        *slot = d * f32::from(q3_scale_at(&block[96..108], i / 16)) * f32::from(code);
    }
}

/// Puts 8 pairs of 6-bit scales and minima into 12 bytes. Bytes 0 … 3 hold scales and 4 … 7 minima of the first four;
/// bytes 8 … 11 the low halves of the last four, whose high bits are on top of the others.
#[inline(always)]
fn put_k4_scales(scales: &[u8; 8], mins: &[u8; 8], out: &mut [u8]) {
    for j in 0..4 {
        out[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        out[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        out[j + 8] = (scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4);
    }
}

/// Returns scale and minimum j that [`put_k4_scales`] stored.
#[inline(always)]
fn k4_scales_at(bytes: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (bytes[j] & 63, bytes[j + 4] & 63);
    }
    let low = bytes[j + 4];
    ((low & 15) | ((bytes[j - 4] >> 6) << 4), (low >> 4) | ((bytes[j] >> 6) << 4))
}

/// Quantizes to groups of 32 with 6-bit scales and minima, which are written to the first 16 bytes of `out`.
#[inline(always)]
fn groups_of_32(x: &[f32], importance: Option<&[f32]>, levels: u8, trials: Trials, out: &mut [u8]) -> [u8; N] {
    const G: usize = 32;
    let mut codes = [0_u8; N];
    let mut found = [ScaleMin::default(); N / G];
    let mut group_weights = [0.0; N / G];
    let sigma2 = 2.0 * sum_of_squares(x) / N as f32;
    let (w, trials) = match importance {
        Some(importance) => (weights(x, importance, sigma2), WEIGHTED),
        None => {
            let mut w = [0.0; N];
            for (w, x) in w.chunks_mut(G).zip(x.chunks(G)) {
                let rms = (sum_of_squares(x) / G as f32).sqrt();
                w.iter_mut().zip(x).for_each(|(w, x)| *w = rms + x.abs());
            }
            (w, trials)
        }
    };
    for (slot, w) in group_weights.iter_mut().zip(w.chunks(G)) {
        *slot = sum(w);
    }
    found.copy_from_slice(&scale_min(&transposed::<G>(x), &transposed::<G>(&w), &mut codes, levels, trials));
    let (mut scales, mut mins) = ([0; N / G], [0; N / G]);
    let (d, dmin) = if importance.is_some() {
        let d = positive(&found.map(|found| found.scale), &group_weights, &mut scales, 63);
        (d, positive(&found.map(|found| found.min), &group_weights, &mut mins, 63))
    } else {
        let (max_scale, max_min) = (max_of(found.iter().map(|f| f.scale)), max_of(found.iter().map(|f| f.min)));
        let inverse_scale = if max_scale > 0.0 { 63.0 / max_scale } else { 0.0 };
        let inverse_min = if max_min > 0.0 { 63.0 / max_min } else { 0.0 };
        scales = found.map(|found| (round(inverse_scale * found.scale) as u8).min(63));
        mins = found.map(|found| (round(inverse_min * found.min) as u8).min(63));
        (max_scale / 63.0, max_min / 63.0)
    };
    put_f16(out, 0, d);
    put_f16(out, 2, dmin);
    put_k4_scales(&scales, &mins, &mut out[4..16]);
    let (d, dmin) = (f16_at(out, 0), f16_at(out, 2));
    for (j, (x, codes)) in x.chunks(G).zip(codes.chunks_mut(G)).enumerate() {
        requantize(x, codes, d * f32::from(scales[j]), dmin * f32::from(mins[j]), i32::from(levels));
    }
    codes
}

/// Puts the low halves of 256 codes into 128 bytes: byte l of 32 holds l and l + 32 of its 64.
#[inline(always)]
fn put_nibbles(codes: &[u8; N], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for (l, slot) in out.iter_mut().enumerate() {
            *slot = (codes[l] & 15) | ((codes[l + 32] & 15) << 4);
        }
    }
}

#[inline(always)]
pub(super) fn quantize_q4_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const TRIALS: Trials = Trials { first: -1.0, step: 0.1, tries: 20, absolute: false };
    let codes = groups_of_32(x, importance, 15, TRIALS, out);
    put_nibbles(&codes, &mut out[16..144]);
}

#[inline(always)]
pub(super) fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    decode_groups_of_32(block, out, &block[16..144], |_, _| 0);
}

#[inline(always)]
pub(super) fn quantize_q5_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const TRIALS: Trials = Trials { first: -0.5, step: 0.1, tries: 15, absolute: false };
    let codes = groups_of_32(x, importance, 31, TRIALS, out);
    out[16..48].fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[16 + i % 32] |= (code >> 4) << (i / 32);
    }
    put_nibbles(&codes, &mut out[48..176]);
}

#[inline(always)]
pub(super) fn decode_q5_k(block: &[u8], out: &mut [f32]) {
    let high = &block[16..48];
    decode_groups_of_32(block, out, &block[48..176], |j, l| ((high[l] >> j) & 1) << 4);
}

/// Decodes groups of 32; `high(j, l)` is the fifth bit of element l of group j.
#[inline(always)]
fn decode_groups_of_32(block: &[u8], out: &mut [f32], nibbles: &[u8], high: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for (j, out) in out.chunks_mut(32).enumerate() {
        let (scale, min) = k4_scales_at(&block[4..16], j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let bytes = &nibbles[32 * (j / 2)..][..32];
        for (l, (slot, byte)) in out.iter_mut().zip(bytes).enumerate() {
            let low = (byte >> (4 * (j % 2))) & 15;
            *slot = scale * f32::from(low | high(j, l)) - min;
        }
    }
}

#[inline(always)]
pub(super) fn quantize_q6_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const G: usize = 16;
    let mut codes = [0_u8; N];
    let mut scales = [0.0; N / G];
    symmetric_groups(x, importance, &mut codes, 32, &mut scales);
    let max = largest(&scales);
    if max.abs() < ZERO {
        out.fill(0);
        return;
    }
    let inverse = -128.0 / max;
    put_f16(out, 208, 1.0 / inverse);
    let d = f16_at(out, 208);
    for (j, (x, codes)) in x.chunks(G).zip(codes.chunks_mut(G)).enumerate() {
        let scale = round(inverse * scales[j]).min(127) as i8;
        out[192 + j] = scale.cast_unsigned();
        requantize_centered(x, codes, d * f32::from(scale), 32);
    }
    for (half, codes) in codes.as_chunks::<128>().0.iter().enumerate() {
        let low = &mut out[64 * half..][..64];
        for l in 0..64 {
            low[l] = (codes[l] & 15) | ((codes[l + 64] & 15) << 4);
        }
    }
    put_pairs(&codes, 4, &mut out[128..192]);
}

#[inline(always)]
pub(super) fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 208);
    for (i, slot) in out.iter_mut().enumerate() {
        let (half, l) = (i / 128, i % 128);
        let low = (block[64 * half + l % 64] >> (4 * (l / 64))) & 15;
        let code = (low | (pair_at(&block[128..192], i) << 4)).cast_signed() - 32;
        *slot = d * f32::from(block[192 + i / 16].cast_signed()) * f32::from(code);
    }
}

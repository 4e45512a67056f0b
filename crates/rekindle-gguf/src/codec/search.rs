//! The searches for scales that the quantizers share.
//!
//! Each tries several scales, rounds the elements to codes, and keeps the scale with the least weighted squared error.
//! Sums are in f32 in the order of the elements, so that the results are those of llama.cpp to the bit.

/// The largest absolute value below which a group counts as all zeros.
pub(super) const ZERO: f32 = 1e-15;

/// Rounds to the nearest integer, ties to even, for |x| below 2²².
///
/// Adding 1.5·2²³ leaves the integer in the low bits of the mantissa. This vectorizes on every instruction set.
#[inline(always)]
pub(super) fn round(x: f32) -> i32 {
    let bits = (x + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Returns the element with the largest absolute value, the first of several; 0 for an empty slice.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let mut largest = 0.0_f32;
    for &x in x {
        if x.abs() > largest.abs() {
            largest = x;
        }
    }
    largest
}

/// A scale and a minimum: x ≈ scale·code − min, with min ≥ 0.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ScaleMin {
    pub(super) scale: f32,
    pub(super) min: f32,
}

/// The scales that [`scale_min`] tries: (first + step·t + levels) / (max − min), with the best minimum so far, for t = 0 … tries.
#[derive(Clone, Copy)]
pub(super) struct Trials {
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) tries: usize,
    /// True to minimize absolute instead of squared errors.
    pub(super) absolute: bool,
}

/// Searches the scale and the minimum of codes 0 … `levels` that minimize Σ w·|x − (scale·code − min)|².
///
/// Each trial rounds with its scale, then solves the weighted least squares for scale and minimum.
#[inline(always)]
pub(super) fn scale_min(x: &[f32], w: &[f32], codes: &mut [u8], levels: u8, trials: Trials) -> ScaleMin {
    let levels_f = f32::from(levels);
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x = sum_w * x[0];
    for (&x, &w) in x[1..].iter().zip(&w[1..]) {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max <= min {
        codes.fill(0);
        return ScaleMin { scale: 0.0, min: -min };
    }
    let code = |x: f32, inverse: f32, min: f32| round(inverse * (x - min)).clamp(0, i32::from(levels)) as u8;
    let error_of = |x: &[f32], w: &[f32], codes: &[u8], scale: f32, min: f32| {
        let mut error = 0.0_f32;
        for ((&x, &w), &code) in x.iter().zip(w).zip(codes) {
            let difference = scale * f32::from(code) + min - x;
            error += w * if trials.absolute { difference.abs() } else { difference * difference };
        }
        error
    };
    let inverse = levels_f / (max - min);
    for (slot, &x) in codes.iter_mut().zip(x) {
        *slot = code(x, inverse, min);
    }
    let mut best = ScaleMin { scale: 1.0 / inverse, min };
    let mut best_error = error_of(x, w, codes, best.scale, best.min);
    let mut tried = [0_u8; 32];
    let tried = &mut tried[..x.len()];
    for trial in 0..=trials.tries {
        // Trials start from the best minimum so far.
        let inverse = (trials.first + trials.step * trial as f32 + levels_f) / (max - best.min);
        for (slot, &x) in tried.iter_mut().zip(x) {
            *slot = code(x, inverse, best.min);
        }
        let (mut sum_l, mut sum_ll, mut sum_xl) = (0.0_f32, 0.0_f32, 0.0_f32);
        for ((&x, &w), &code) in x.iter().zip(w).zip(&*tried) {
            let code = f32::from(code);
            sum_l += w * code;
            sum_ll += w * code * code;
            sum_xl += w * code * x;
        }
        let determinant = sum_w * sum_ll - sum_l * sum_l;
        if determinant > 0.0 {
            let mut scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut min = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
            if min > 0.0 {
                min = 0.0;
                scale = sum_xl / sum_ll;
            }
            let error = error_of(x, w, tried, scale, min);
            if error < best_error {
                codes.copy_from_slice(tried);
                best_error = error;
                best = ScaleMin { scale, min };
            }
        }
    }
    ScaleMin { scale: best.scale, min: -best.min }
}

/// Searches the scale of codes −`levels` … `levels` − 1, stored with `levels` added, that maximizes (Σ w·x·l)² / Σ w·l².
/// Without `w`, the weights are x².
#[inline(always)]
pub(super) fn symmetric(x: &[f32], w: Option<&[f32]>, codes: &mut [u8], levels: i32) -> f32 {
    let max = largest(x);
    if max.abs() < ZERO {
        codes.fill(0);
        return 0.0;
    }
    let code = |x: f32, inverse: f32| round(inverse * x).clamp(-levels, levels - 1);
    let sums = |inverse: f32| {
        let (mut sum_xl, mut sum_ll) = (0.0_f32, 0.0_f32);
        for (index, &x) in x.iter().enumerate() {
            let l = code(x, inverse) as f32;
            let w = w.map_or(x * x, |w| w[index]);
            sum_xl += w * x * l;
            sum_ll += w * l * l;
        }
        (sum_xl, sum_ll)
    };
    let mut inverse = -levels as f32 / max;
    let (sum_xl, sum_ll) = sums(inverse);
    let mut scale = if sum_ll != 0.0 { sum_xl / sum_ll } else { 0.0 };
    let mut best = scale * sum_xl;
    for trial in (-9..=9).filter(|trial| *trial != 0) {
        let tried = -(levels as f32 + 0.1 * trial as f32) / max;
        let (sum_xl, sum_ll) = sums(tried);
        if sum_ll > 0.0 && sum_xl * sum_xl > best * sum_ll {
            inverse = tried;
            scale = sum_xl / sum_ll;
            best = scale * sum_xl;
        }
    }
    for (slot, &x) in codes.iter_mut().zip(x) {
        *slot = (code(x, inverse) + levels) as u8;
    }
    scale
}

/// Searches the scale of codes −`levels` … `levels` − 1 by coordinate descent with the weights x²: up to five passes
/// choose each code anew, given the others. Codes are stored with `levels` added.
#[inline(always)]
pub(super) fn descent(x: &[f32], stored: &mut [u8], levels: i32) -> f32 {
    let max = largest(x);
    if max.abs() < ZERO {
        stored.fill(0);
        return 0.0;
    }
    let inverse = -levels as f32 / max;
    let mut codes = [0_i32; 16];
    let codes = &mut codes[..x.len()];
    let (mut sum_xl, mut sum_ll) = (0.0_f32, 0.0_f32);
    for (slot, &x) in codes.iter_mut().zip(x) {
        let code = round(inverse * x).clamp(-levels, levels - 1);
        *slot = code;
        let (w, code) = (x * x, code as f32);
        sum_xl += w * x * code;
        sum_ll += w * code * code;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (slot, &x) in codes.iter_mut().zip(x) {
            let (w, old) = (x * x, *slot as f32);
            let mut without_xl = sum_xl - w * x * old;
            if without_xl > 0.0 {
                let mut without_ll = sum_ll - w * old * old;
                let code = round(x * without_ll / without_xl).clamp(-levels, levels - 1);
                if code != *slot {
                    let new = code as f32;
                    without_xl += w * x * new;
                    without_ll += w * new * new;
                    if without_ll > 0.0 && without_xl * without_xl * sum_ll > sum_xl * sum_xl * without_ll {
                        *slot = code;
                        (sum_xl, sum_ll) = (without_xl, without_ll);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (slot, code) in stored.iter_mut().zip(codes) {
        *slot = (*code + levels) as u8;
    }
    if sum_ll > 0.0 { sum_xl / sum_ll } else { 0.0 }
}

/// Searches the scale of codes 0 … `levels` for values x ≥ 0 that minimizes Σ w·(x − scale·code)²: eight trials around
/// the largest value, then up to five passes of coordinate descent.
#[inline(always)]
pub(super) fn positive(x: &[f32], w: &[f32], codes: &mut [u8], levels: u8) -> f32 {
    let max = x.iter().fold(0.0_f32, |max, &x| if max > x { max } else { x });
    if max < ZERO {
        codes.fill(0);
        return 0.0;
    }
    let levels_f = f32::from(levels);
    let code = |x: f32, inverse: f32| round(inverse * x).min(i32::from(levels));
    let error_of = |inverse: f32| {
        let scale = 1.0 / inverse;
        let mut error = 0.0_f32;
        for (&x, &w) in x.iter().zip(w) {
            let difference = x - scale * code(x, inverse) as f32;
            error += w * difference * difference;
        }
        error
    };
    let mut inverse = levels_f / max;
    let mut best = error_of(inverse);
    for trial in (-4..=4).filter(|trial| *trial != 0) {
        let tried = (0.1 * trial as f32 + levels_f) / max;
        let error = error_of(tried);
        if error < best {
            best = error;
            inverse = tried;
        }
    }
    let (mut sum_xl, mut sum_ll) = (0.0_f32, 0.0_f32);
    for ((slot, &x), &w) in codes.iter_mut().zip(x).zip(w) {
        let l = code(x, inverse);
        *slot = l as u8;
        sum_xl += w * x * l as f32;
        sum_ll += w * l as f32 * l as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((slot, &x), &w) in codes.iter_mut().zip(x).zip(w) {
            let old = f32::from(*slot);
            let mut without_xl = sum_xl - w * x * old;
            let mut without_ll = sum_ll - w * old * old;
            if without_xl > 0.0 && without_ll > 0.0 {
                let l = round(x * without_ll / without_xl).min(i32::from(levels));
                if l != i32::from(*slot) {
                    without_xl += w * x * l as f32;
                    without_ll += w * l as f32 * l as f32;
                    if without_xl * without_xl * sum_ll > sum_xl * sum_xl * without_ll {
                        *slot = l as u8;
                        (sum_xl, sum_ll) = (without_xl, without_ll);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    if sum_ll > 0.0 { sum_xl / sum_ll } else { 0.0 }
}

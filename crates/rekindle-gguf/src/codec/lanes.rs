//! The searches of [`search`](super::search) over eight groups at a time.
//!
//! A lane is a group: sums over its elements keep their order, so that the results have the same bits, and every step
//! is one instruction for several groups. `lanes_are_the_plain_searches` compares both.

use super::search::{ScaleMin, Trials, ZERO, round};

/// Groups that are searched at a time.
pub(super) const LANES: usize = 8;

/// A value of each group.
type Lane = [f32; LANES];

/// Returns element i of eight consecutive groups at i.
#[inline(always)]
pub(super) fn transposed<const G: usize>(x: &[f32]) -> [Lane; G] {
    let mut out = [[0.0; LANES]; G];
    for (lane, group) in x.chunks_exact(G).enumerate().take(LANES) {
        for (slot, &x) in out.iter_mut().zip(group) {
            slot[lane] = x;
        }
    }
    out
}

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> Lane {
    core::array::from_fn(f)
}

#[inline(always)]
fn clamped(x: f32, low: i32, high: i32) -> f32 {
    round(x).clamp(low, high) as f32
}

/// Searches scales and minima as [`scale_min`](super::search::scale_min()) does. Codes are written group by group.
#[inline(always)]
pub(super) fn scale_min<const G: usize>(
    x: &[Lane; G],
    w: &[Lane; G],
    codes: &mut [u8],
    levels: u8,
    trials: Trials,
) -> [ScaleMin; LANES] {
    let (top, levels_f) = (i32::from(levels), f32::from(levels));
    let (mut min, mut max, mut sum_w) = (x[0], x[0], w[0]);
    let mut sum_x = each(|l| w[0][l] * x[0][l]);
    for (x, w) in x[1..].iter().zip(&w[1..]) {
        for l in 0..LANES {
            min[l] = if x[l] < min[l] { x[l] } else { min[l] };
            max[l] = if x[l] > max[l] { x[l] } else { max[l] };
            sum_w[l] += w[l];
            sum_x[l] += w[l] * x[l];
        }
    }
    let min = each(|l| if min[l] > 0.0 { 0.0 } else { min[l] });
    let error_of = |rounded: &[Lane; G], scale: &Lane, min: &Lane| {
        let mut error = [0.0; LANES];
        for ((x, w), code) in x.iter().zip(w).zip(rounded) {
            for l in 0..LANES {
                let difference = scale[l] * code[l] + min[l] - x[l];
                error[l] += w[l] * if trials.absolute { difference.abs() } else { difference * difference };
            }
        }
        error
    };
    let rounded = |inverse: &Lane, low: &Lane| {
        let mut out = [[0.0; LANES]; G];
        for (out, x) in out.iter_mut().zip(x) {
            for l in 0..LANES {
                out[l] = clamped(inverse[l] * (x[l] - low[l]), 0, top);
            }
        }
        out
    };
    // The codes of a group follow from the inverse scale and the minimum that they were rounded with.
    let mut inverse_of_codes = each(|l| levels_f / (max[l] - min[l]));
    let mut low_of_codes = min;
    let mut best_scale = each(|l| 1.0 / inverse_of_codes[l]);
    let mut best_min = min;
    let mut best_error = error_of(&rounded(&inverse_of_codes, &min), &best_scale, &best_min);
    for trial in 0..=trials.tries {
        let inverse = each(|l| (trials.first + trials.step * trial as f32 + levels_f) / (max[l] - best_min[l]));
        let tried = rounded(&inverse, &best_min);
        let (mut sum_l, mut sum_ll, mut sum_xl) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for ((x, w), code) in x.iter().zip(w).zip(&tried) {
            for l in 0..LANES {
                let weighted = w[l] * code[l];
                sum_l[l] += weighted;
                sum_ll[l] += weighted * code[l];
                sum_xl[l] += weighted * x[l];
            }
        }
        let determinant = each(|l| sum_w[l] * sum_ll[l] - sum_l[l] * sum_l[l]);
        let free = each(|l| (sum_ll[l] * sum_x[l] - sum_l[l] * sum_xl[l]) / determinant[l]);
        let scale = each(|l| {
            let both = (sum_w[l] * sum_xl[l] - sum_x[l] * sum_l[l]) / determinant[l];
            if free[l] > 0.0 { sum_xl[l] / sum_ll[l] } else { both }
        });
        let min = each(|l| if free[l] > 0.0 { 0.0 } else { free[l] });
        let error = error_of(&tried, &scale, &min);
        for l in 0..LANES {
            if determinant[l] > 0.0 && error[l] < best_error[l] {
                inverse_of_codes[l] = inverse[l];
                low_of_codes[l] = best_min[l];
                best_error[l] = error[l];
                best_scale[l] = scale[l];
                best_min[l] = min[l];
            }
        }
    }
    let rounded = rounded(&inverse_of_codes, &low_of_codes);
    for (lane, codes) in codes.chunks_exact_mut(G).enumerate().take(LANES) {
        let is_constant = max[lane] <= low_of_codes[lane].min(min[lane]);
        for (slot, rounded) in codes.iter_mut().zip(&rounded) {
            *slot = if is_constant { 0 } else { rounded[lane] as u8 };
        }
    }
    std::array::from_fn(|l| {
        if max[l] <= min[l] {
            ScaleMin { scale: 0.0, min: -min[l] }
        } else {
            ScaleMin { scale: best_scale[l], min: -best_min[l] }
        }
    })
}

/// Searches scales as [`symmetric`](super::search::symmetric()) does, with weights x² where `w` is `None`.
#[inline(always)]
pub(super) fn symmetric<const G: usize>(x: &[Lane; G], w: Option<&[Lane; G]>, codes: &mut [u8], levels: i32) -> Lane {
    let mut max = [0.0_f32; LANES];
    for x in x {
        for l in 0..LANES {
            max[l] = if x[l].abs() > max[l].abs() { x[l] } else { max[l] };
        }
    }
    let own = each_of(x, |x| x * x);
    let w = w.unwrap_or(&own);
    let sums = |inverse: &Lane| {
        let (mut sum_xl, mut sum_ll) = ([0.0; LANES], [0.0; LANES]);
        for (x, w) in x.iter().zip(w) {
            for l in 0..LANES {
                let code = clamped(inverse[l] * x[l], -levels, levels - 1);
                sum_xl[l] += w[l] * x[l] * code;
                sum_ll[l] += w[l] * code * code;
            }
        }
        (sum_xl, sum_ll)
    };
    let mut inverse = each(|l| -levels as f32 / max[l]);
    let (sum_xl, sum_ll) = sums(&inverse);
    let mut scale = each(|l| if sum_ll[l] != 0.0 { sum_xl[l] / sum_ll[l] } else { 0.0 });
    let mut best = each(|l| scale[l] * sum_xl[l]);
    for trial in (-9..=9).filter(|trial| *trial != 0) {
        let tried = each(|l| -(levels as f32 + 0.1 * trial as f32) / max[l]);
        let (sum_xl, sum_ll) = sums(&tried);
        for l in 0..LANES {
            if sum_ll[l] > 0.0 && sum_xl[l] * sum_xl[l] > best[l] * sum_ll[l] {
                inverse[l] = tried[l];
                scale[l] = sum_xl[l] / sum_ll[l];
                best[l] = scale[l] * sum_xl[l];
            }
        }
    }
    for (lane, codes) in codes.chunks_exact_mut(G).enumerate().take(LANES) {
        let is_zero = max[lane].abs() < ZERO;
        for (slot, x) in codes.iter_mut().zip(x) {
            let code = round(inverse[lane] * x[lane]).clamp(-levels, levels - 1) + levels;
            *slot = if is_zero { 0 } else { code as u8 };
        }
    }
    each(|l| if max[l].abs() < ZERO { 0.0 } else { scale[l] })
}

#[inline(always)]
fn each_of<const G: usize>(x: &[Lane; G], f: impl Fn(f32) -> f32) -> [Lane; G] {
    let mut out = [[0.0; LANES]; G];
    for (out, x) in out.iter_mut().zip(x) {
        *out = each(|l| f(x[l]));
    }
    out
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::super::search;
    use super::*;

    fn compare<const G: usize>(x: &[f32], w: &[f32]) {
        let (xt, wt) = (transposed::<G>(x), transposed::<G>(w));
        let trials = Trials { first: -0.9, step: 0.05, tries: 36, absolute: false };
        for trials in [trials, Trials { first: -0.5, step: 0.1, tries: 15, absolute: true }] {
            let (mut plain, mut lanes) = (vec![9; 8 * G], vec![7; 8 * G]);
            let found = scale_min(&xt, &wt, &mut lanes, 15, trials);
            for (lane, found) in found.iter().enumerate() {
                let part = lane * G..(lane + 1) * G;
                let expected =
                    search::scale_min(&x[part.clone()], &w[part.clone()], &mut plain[part.clone()], 15, trials);
                let bits = |found: &ScaleMin| (found.scale.to_bits(), found.min.to_bits());
                assert_eq!(bits(found), bits(&expected));
                assert_eq!(lanes[part.clone()], plain[part]);
            }
        }
        for weights in [None, Some(w)] {
            let (mut plain, mut lanes) = (vec![9; 8 * G], vec![7; 8 * G]);
            let found = symmetric(&xt, weights.map(|_| &wt), &mut lanes, 32);
            for (lane, found) in found.iter().enumerate() {
                let part = lane * G..(lane + 1) * G;
                let weights = weights.map(|w| &w[part.clone()]);
                let expected = search::symmetric(&x[part.clone()], weights, &mut plain[part.clone()], 32);
                assert_eq!(found.to_bits(), expected.to_bits());
                assert_eq!(lanes[part.clone()], plain[part]);
            }
        }
    }

    #[test]
    fn lanes_are_the_plain_searches() {
        let mut random = ChaCha8Rng::seed_from_u64(8);
        for round in 0..500 {
            let mut x = [0.0_f32; 256];
            let mut w = [0.0_f32; 256];
            for (at, (x, w)) in x.iter_mut().zip(&mut w).enumerate() {
                let scale = [1.0, 0.0, 1e-6, 30.0][(at / 16 + round) % 4];
                let shift = [0.0, 1.0, -1.0][(at / 32 + round) % 3];
                *x = (random.random::<f32>() - 0.5 + shift) * scale;
                *w = random.random::<f32>();
            }
            compare::<16>(&x[..128], &w[..128]);
            compare::<32>(&x, &w);
        }
    }
}

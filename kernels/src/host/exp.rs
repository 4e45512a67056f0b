//! `e^x` and functions of it as straight-line arithmetic, so that loops over them vectorize.

/// `e^x` within 2 ulp for x ≤ 88; 0 below −87.3 (where f32 turns subnormal), clamped above.
///
/// Cody–Waite reduction x = n·ln 2 + r with |r| ≤ ln 2 / 2, a degree-6 Taylor–minimax polynomial in r,
/// and n put into the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    /// 1.5 · 2²³: adding it leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped.mul_add(core::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_2e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    let value = p.mul_add(r * r, r) + 1.0;
    // n ∈ [−126, 128]; scaling in two steps keeps 2^128 · m finite and the bits in range.
    let n = n as i32;
    let half = n >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let result = value * scale(half) * scale(n - half);
    if x < -87.336_54 { 0.0 } else { result }
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent within 2 ulp.
///
/// Near 0 an odd polynomial, fitted to tanh's relative error on |x| ≤ 0.625; beyond it 1 − 2 / (e^2|x| + 1), which would
/// cancel near 0.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.718_963e-3f32;
    p = p.mul_add(z, 2.065_312_5e-2);
    p = p.mul_add(z, -5.374_466e-2);
    p = p.mul_add(z, 1.333_151_3e-1);
    p = p.mul_add(z, -3.333_328_7e-1);
    let near = (x * z).mul_add(p, x);
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { near } else { far }
}

/// Summed in `f32` before they go to an `f64`: a vocabulary is too long for one `f32` sum.
const BLOCK: usize = 1024;

/// Replaces x by e^(x − max); returns max and the sum.
#[inline(always)]
pub(crate) fn exp_shifted(row: &mut [f32]) -> (f32, f32) {
    let max = max(row);
    let mut sum = 0f64;
    for block in row.chunks_mut(BLOCK) {
        let mut lanes = [0f32; 16];
        let mut chunks = block.chunks_exact_mut(16);
        for chunk in &mut chunks {
            for i in 0..16 {
                chunk[i] = exp(chunk[i] - max);
                lanes[i] += chunk[i];
            }
        }
        let mut tail = 0f32;
        for x in chunks.into_remainder() {
            *x = exp(*x - max);
            tail += *x;
        }
        sum += f64::from(lanes.iter().sum::<f32>() + tail);
    }
    (max, sum as f32)
}

/// Returns the max and the sum of [`exp_shifted`] in the same bits, and Σ e^(x − max)·(x − max).
#[inline(always)]
pub(crate) fn exp_sums(row: &[f32]) -> (f32, f32, f32) {
    /// Below this, [`exp`] is 0.
    const LEAST: f32 = -88.0;
    let max = max(row);
    let (mut sum, mut shifted) = (0f64, 0f64);
    for block in row.chunks(BLOCK) {
        let (mut lanes, mut shifted_lanes) = ([0f32; 16], [0f32; 16]);
        let mut chunks = block.chunks_exact(16);
        for chunk in &mut chunks {
            for i in 0..16 {
                let x = chunk[i] - max;
                let e = exp(x);
                lanes[i] += e;
                shifted_lanes[i] = e.mul_add(x.max(LEAST), shifted_lanes[i]);
            }
        }
        let (mut tail, mut shifted_tail) = (0f32, 0f32);
        for &x in chunks.remainder() {
            let e = exp(x - max);
            tail += e;
            shifted_tail += e * (x - max).max(LEAST);
        }
        sum += f64::from(lanes.iter().sum::<f32>() + tail);
        shifted += f64::from(shifted_lanes.iter().sum::<f32>() + shifted_tail);
    }
    (max, sum as f32, shifted as f32)
}

#[inline(always)]
fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(16);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().fold(tail, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests {
    use super::{exp, exp_shifted, exp_sums, tanh};

    #[test]
    fn sums_are_those_of_the_exponentials() {
        for n in [1, 15, 16, 1024, 3001] {
            let row: Vec<f32> = (0..n).map(|i| (i * 7919 % 101) as f32 / 5.0 - 200.0 * (i % 7 / 6) as f32).collect();
            let mut exps = row.clone();
            let (max, sum) = exp_shifted(&mut exps);
            let (same_max, same_sum, shifted) = exp_sums(&row);
            assert_eq!((max, sum), (same_max, same_sum));
            let want: f64 = row.iter().map(|&x| f64::from(x - max)).map(|x| x.exp() * x).sum();
            assert!((f64::from(shifted) - want).abs() <= 1e-6 * want.abs().max(1.0), "{shifted} not {want}");
        }
    }

    #[test]
    fn within_two_ulp() {
        let mut x = -87.3f32;
        while x < 88.7 {
            let want = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
            assert!((f64::from(exp(x)) - want).abs() <= 2.0 * ulp, "exp({x}) = {} not {want}", exp(x));
            x += 0.003_7;
        }
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_within_two_ulp() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let want = f64::from(x).tanh();
            let ulp = f64::from(f32::from_bits((want.abs() as f32).to_bits() + 1)) - f64::from(want.abs() as f32);
            assert!((f64::from(tanh(x)) - want).abs() <= 2.0 * ulp, "tanh({x}) = {} not {want}", tanh(x));
            x += 0.000_37;
        }
        assert_eq!([tanh(0.0), tanh(200.0), tanh(-200.0)], [0.0, 1.0, -1.0]);
        assert_eq!(tanh(1e-20), 1e-20);
    }
}

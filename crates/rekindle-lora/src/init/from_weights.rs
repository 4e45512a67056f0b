//! Initial factors computed from the weight: PiSSA, OLoRA and LoftQ.
//!
//! PiSSA and OLoRA move a part of W into the adapter and leave the rest as the base, so that the sum is still W. LoftQ
//! starts from the quantization error of W. All cores work on one weight, so initialize one weight at a time.
//!
//! Measured at r = 16 on two shared Xeon cores, for weights of 2,560 × 9,728 and 9,728 × 2,560: PiSSA 1.3 and 2.1 s,
//! `"pissa_niter_4"` 0.5 and 0.8 s, OLoRA 0.2 and 0.3 s. On a weight with a decaying spectrum, the residual of PiSSA equals
//! that of 100 rounds to six digits.

use rand_chacha::ChaCha8Rng;

use super::stream;
use super::svd::{Triplets, leading, orthonormal, randomized, transposed_times};
use crate::merge::merge;
use crate::{InitLoraWeights, LoraConfig, LoraFactors};

/// Initial factors and their base: base + s·B·A = W up to rounding, or approximately for LoftQ.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSplit {
    /// A `[r, in]` and B `[out, r]`.
    pub factors: LoraFactors,
    /// The base that replaces W, `[out, in]`.
    pub base: Vec<f32>,
}

impl WeightSplit {
    /// Subtracts s·B·A of known `factors` from W; the base is bit-identical to that of the first time.
    pub fn again(w: &[f32], shape: [usize; 2], factors: &LoraFactors, scale: f64) -> Self {
        let mut base = w.to_vec();
        merge(&mut base, shape, factors, -scale, None);
        Self { factors: factors.clone(), base }
    }
}

/// Returns the factors that `init_lora_weights` subtracts from the weight W of the linear `module`, or `None` for a method
/// that leaves W unchanged.
///
/// With s = `config.scale_of(module)` and W's singular triplets u, σ, v, largest first:
///
/// - `"pissa"` (arXiv:2404.02948): A = √(σ/s)·vᵀ, B = u·√(σ/s) of the first r;
/// - `"pissa_niter_N"`: the same by N rounds of randomized subspace iteration, faster and less exact;
/// - `"olora"` (arXiv:2406.01775): with W = Q·R, B = the first r columns of Q and A = the first r rows of R. The scale is
///   not divided out: where s is not 1, the base keeps (1 − s)·B·A.
///
/// In all of them base = W − s·B·A.
///
/// # Shapes
/// W and base `[out, in]` row-major, A `[r, in]`, B `[out, r]`. If r exceeds the shorter side of W, the rest
/// of A and B is zero.
///
/// # Dtypes
/// W is `f32`. If a side has at most 128 elements, the triplets are computed in `f64`, otherwise from products in `f32`. A
/// and B are rounded to `f32`, and base = W − s·B·A uses the rounded values.
///
/// Equal to PEFT up to the common sign of a row of A and its column of B. The random numbers of `"pissa_niter_N"` are not
/// PyTorch's. Tested against `tests/goldens/lora-options`.
///
/// # Panics
/// If W is not `out · in` long or not finite.
pub fn split_weight(config: &LoraConfig, module: &str, w: &[f32], shape: [usize; 2]) -> Option<WeightSplit> {
    let (r, scale) = (config.rank_of(module), config.scale_of(module));
    let mut rng = stream(config, module);
    check(w, shape);
    let factors = match config.init_lora_weights {
        InitLoraWeights::Pissa => halves(&leading(w, shape, r, &mut rng), shape, r, scale),
        InitLoraWeights::PissaNiter(rounds) => {
            halves(&randomized(w, shape, r, rounds as usize, &mut rng), shape, r, scale)
        }
        InitLoraWeights::Olora => olora(w, shape, r),
        _ => return None,
    };
    Some(WeightSplit::again(w, shape, &factors, scale))
}

/// Returns LoftQ's factors (arXiv:2310.08659, algorithm 1) for the linear `module` with weight W: `iterations` times, at
/// least once, base = q(W − s·B·A), then s·B·A = the best approximation of rank r to W − base. The sum is closer to W than
/// q(W) alone.
///
/// q is `encode_decode`, which quantizes and dequantizes. After one iteration, base is q(W).
///
/// Shapes and dtypes are those of [`split_weight`]. Equal to PEFT's `"loftq"` if s = 1. For other scales, PEFT starts with s times
/// the approximation, which is not closer to W.
///
/// # Panics
/// If W or what `encode_decode` returns is not `out · in` long or not finite.
pub fn loftq(
    config: &LoraConfig,
    module: &str,
    w: &[f32],
    shape: [usize; 2],
    iterations: usize,
    mut encode_decode: impl FnMut(&[f32]) -> Vec<f32>,
) -> WeightSplit {
    let (r, scale) = (config.rank_of(module), config.scale_of(module));
    let mut rng: ChaCha8Rng = stream(config, module);
    check(w, shape);
    let mut base = encode_decode(w);
    for iteration in 1.. {
        check(&base, shape);
        let missed: Vec<f32> = w.iter().zip(&base).map(|(w, base)| w - base).collect();
        let factors = halves(&leading(&missed, shape, r, &mut rng), shape, r, scale);
        if iteration >= iterations {
            return WeightSplit { factors, base };
        }
        let mut target = w.to_vec();
        merge(&mut target, shape, &factors, -scale, None);
        base = encode_decode(&target);
    }
    unreachable!("it returns after `iterations`")
}

/// Returns the adapter on W that equals `now` on the base of `start`: W + s·B·A = base + s·B_now·A_now with
///
/// A = [A_now; A_start], B = [B_now, −B_start],
///
/// of rank r_now + r_start and the same s. DoRA's magnitude is unchanged, because the sum is the same.
///
/// Equal to what PEFT saves with `path_initial_model_for_weight_conversion`.
///
/// # Panics
/// If the two do not belong to the same linear.
pub fn to_plain(now: &LoraFactors, start: &LoraFactors) -> LoraFactors {
    assert_eq!(now.a.len() * start.r, start.a.len() * now.r, "both A's have the same width");
    assert_eq!(now.b.len() * start.r, start.b.len() * now.r, "both B's have the same height");
    let rows = now.b.chunks_exact(now.r).zip(start.b.chunks_exact(start.r));
    LoraFactors {
        r: now.r + start.r,
        a: [now.a.as_slice(), &start.a].concat(),
        b: rows.flat_map(|(now, start)| now.iter().copied().chain(start.iter().map(|b| -b))).collect(),
        magnitude: now.magnitude.clone(),
    }
}

/// Returns OLoRA's factors. The first r columns of Q depend only on the first r columns of W, and those rows of R are Qᵀ·W.
fn olora(w: &[f32], [out, input]: [usize; 2], r: usize) -> LoraFactors {
    let columns = (0..r.min(input).min(out)).map(|j| (0..out).map(|i| f64::from(w[i * input + j])).collect());
    let q = orthonormal(columns.collect());
    let rows = transposed_times(w, [out, input], &q);
    // R is upper triangular: what the product leaves below the diagonal is rounding.
    let a = |row: usize, column: usize| if column < row { 0.0 } else { rows[row][column] };
    factors([out, input], r, q.len(), a, |row, column| q[column][row])
}

/// Splits the singular values of s·B·A evenly: A and B each get their square roots.
fn halves(Triplets { u, s, v }: &Triplets, shape: [usize; 2], r: usize, scale: f64) -> LoraFactors {
    let half: Vec<f64> = s.iter().map(|s| (s / scale).sqrt()).collect();
    factors(shape, r, s.len(), |row, column| half[row] * v[row][column], |row, column| u[column][row] * half[column])
}

/// Returns A and B from their elements for ranks below `k`, with zeros from there to `r`.
pub(crate) fn factors(
    [out, input]: [usize; 2],
    r: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> LoraFactors {
    let a = (0..r * input).map(|at| (at / input, at % input)).map(|(i, j)| if i < k { a(i, j) as f32 } else { 0.0 });
    let b = (0..out * r).map(|at| (at / r, at % r)).map(|(i, j)| if j < k { b(i, j) as f32 } else { 0.0 });
    LoraFactors { r, a: a.collect(), b: b.collect(), magnitude: None }
}

fn check(w: &[f32], [out, input]: [usize; 2]) {
    assert_eq!(w.len(), out * input, "W is [{out}, {input}]");
    assert!(w.iter().all(|w| w.is_finite()), "W is finite");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [[usize; 2]; 2] = [[24, 10], [10, 24]];
    const MODULE: &str = "q_proj";

    /// A configuration of rank `r` whose scale is `scale`.
    fn config(r: usize, scale: f64, init: InitLoraWeights) -> LoraConfig {
        LoraConfig::new(r).lora_alpha(scale * r as f64).init_lora_weights(init)
    }

    fn start(w: &[f32], shape: [usize; 2], r: usize, scale: f64, init: InitLoraWeights) -> WeightSplit {
        split_weight(&config(r, scale, init), MODULE, w, shape).unwrap()
    }

    fn weight(shape: [usize; 2]) -> Vec<f32> {
        (0..shape[0] * shape[1]).map(|i| ((i * i) as f32 * 0.7).sin() * 2.0).collect()
    }

    /// base + s·B·A.
    fn sum(start: &WeightSplit, shape: [usize; 2], scale: f64) -> Vec<f32> {
        let mut sum = start.base.clone();
        merge(&mut sum, shape, &start.factors, scale, None);
        sum
    }

    fn distance(x: &[f32], y: &[f32]) -> f64 {
        x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt()
    }

    fn length(x: &[f32]) -> f64 {
        distance(x, &vec![0.0; x.len()])
    }

    /// One sign an element, one mean a row.
    fn one_bit(w: &[f32], input: usize) -> Vec<f32> {
        let mean = |row: &[f32]| row.iter().map(|w| w.abs()).sum::<f32>() / input as f32;
        w.chunks_exact(input).flat_map(|row| row.iter().map(|w| mean(row).copysign(*w))).collect()
    }

    fn times(x: &[f32], sign: f32) -> Vec<f32> {
        x.iter().map(|x| x * sign).collect()
    }

    fn assert_near(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?}, not {want:?}");
    }

    #[test]
    fn pissa_of_a_diagonal_by_hand() {
        // σ = 8, 2, 1; s = 2: the first triplet is √(8/2) = 2 on either side, the base keeps the others.
        let w = [0.0, 2.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let WeightSplit { factors: LoraFactors { a, b, .. }, base } = start(&w, [3, 3], 1, 2.0, InitLoraWeights::Pissa);
        let sign = a[0].signum();
        assert_near(&times(&a, sign), &[2.0, 0.0, 0.0]);
        assert_near(&times(&b, sign), &[0.0, 2.0, 0.0]);
        assert_near(&base, &[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn olora_by_hand() {
        // W = [[3, 1], [4, 2]]: q = (3, 4)/5 and its row of R is (25, 11)/5, up to a common sign.
        let w = [3.0, 1.0, 4.0, 2.0];
        let WeightSplit { factors: LoraFactors { a, b, .. }, base } = start(&w, [2, 2], 1, 1.0, InitLoraWeights::Olora);
        let sign = a[0].signum();
        assert_near(&times(&a, sign), &[5.0, 2.2]);
        assert_near(&times(&b, sign), &[0.6, 0.8]);
        assert_near(&base, &[0.0, 1.0 - 1.32, 0.0, 2.0 - 1.76]);
    }

    #[test]
    fn the_sum_is_still_the_weight_and_less_is_left_with_every_rank() {
        let methods = [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(2), InitLoraWeights::Olora];
        for (shape, scale) in SHAPES.into_iter().zip([0.5, 4.0]) {
            let w = weight(shape);
            for init in &methods {
                let mut left = length(&w);
                // 12 is more than the shorter side: all of W is in PiSSA's adapter, and the rows left over are zero.
                for r in [1, 4, 12] {
                    let start = start(&w, shape, r, scale, init.clone());
                    // Each of r products, at most 6 here, is rounded to 2⁻²⁴, and base once more.
                    let gap = sum(&start, shape, scale).iter().zip(&w).map(|(x, w)| (x - w).abs()).fold(0.0, f32::max);
                    assert!(gap < 1e-5, "{init:?} {shape:?} {r} {gap}");
                    assert_eq!([start.factors.a.len(), start.factors.b.len()], [r * shape[1], shape[0] * r]);
                    assert_eq!(r > 10, start.factors.a[r * shape[1] - shape[1]..].iter().all(|&a| a == 0.0));
                    if *init != InitLoraWeights::Olora {
                        assert!(length(&start.base) < left, "{init:?} {r}: {} of {left}", length(&start.base));
                        left = length(&start.base);
                    }
                }
                assert!(*init == InitLoraWeights::Olora || left < 1e-4, "{init:?}: {left}");
            }
        }
    }

    #[test]
    fn rounds_bring_the_randomized_start_to_the_exact_one() {
        let shape = [24, 10];
        // Every column 0.6 times the one before, so that the singular values fall as fast.
        let w: Vec<f32> = weight(shape).iter().enumerate().map(|(i, w)| w * 0.6f32.powi(i as i32 % 10)).collect();
        let exact = start(&w, shape, 3, 1.0, InitLoraWeights::Pissa);
        let error = |n| distance(&start(&w, shape, 3, 1.0, InitLoraWeights::PissaNiter(n)).base, &exact.base);
        assert!(error(0) > error(2) && error(2) > error(40) && error(40) < 1e-5, "{} {}", error(2), error(40));
        // The base that is left has the least length of all.
        assert!(length(&exact.base) < length(&start(&w, shape, 3, 1.0, InitLoraWeights::Olora).base));
    }

    #[test]
    fn loftq_is_nearer_than_its_codes_with_every_round() {
        for (shape, scale) in SHAPES.into_iter().zip([1.0, 2.0]) {
            let w = weight(shape);
            let mut last = distance(&one_bit(&w, shape[1]), &w);
            for iterations in [1, 5] {
                let mut calls = Vec::new();
                let config = config(4, scale, InitLoraWeights::Loftq);
                let start = loftq(&config, MODULE, &w, shape, iterations, |w| {
                    calls.push(one_bit(w, shape[1]));
                    calls[calls.len() - 1].clone()
                });
                assert_eq!((calls.len(), &calls[iterations - 1]), (iterations, &start.base));
                let error = distance(&sum(&start, shape, scale), &w);
                assert!(error < last, "{error} {last}");
                last = error;
            }
        }
    }

    #[test]
    fn a_trained_adapter_is_put_back_on_the_original() {
        let shape = [24, 10];
        let w = weight(shape);
        let start = start(&w, shape, 3, 2.0, InitLoraWeights::Pissa);
        let mut now = start.factors.clone();
        now.a.iter_mut().zip(1..).for_each(|(a, i)| *a += (i as f32).sin() * 0.01);
        let mut changed = start.base.clone();
        merge(&mut changed, shape, &now, 2.0, None);
        let mut original = w;
        merge(&mut original, shape, &to_plain(&now, &start.factors), 2.0, None);
        assert!(distance(&changed, &original) < 1e-5);
        let one = |a: [f32; 2], b: [f32; 2]| LoraFactors { r: 1, a: a.to_vec(), b: b.to_vec(), magnitude: None };
        let both = to_plain(&one([1.0, 2.0], [3.0, 4.0]), &one([5.0, 6.0], [7.0, 8.0]));
        assert_eq!((both.r, both.a, both.b), (2, vec![1.0, 2.0, 5.0, 6.0], vec![3.0, -7.0, 4.0, -8.0]));
    }
}

//! What holds whatever the numbers are.

mod common;

use burn::tensor::{DType, Device, Tensor};
use common::attention::Attention;
use common::{Case, F32_FLOOR, Layout, Oracle, Place, grad, judge, noise, values};
use rekindle_kernels::dropout::{self, Key, Token};
use rekindle_kernels::{ParamsBuilder, Path, attention, from_f32, swiglu, to_f32};

const F32: DType = DType::F32;

/// Runs a test on both paths.
fn on_both_paths(test: impl Fn()) {
    test();
    Path::portable_only(test);
}

fn cpu() -> Place {
    Place::new(Device::flex(), F32, Layout::Owned)
}

#[test]
fn a_document_does_not_reach_its_neighbours() {
    on_both_paths(|| {
        let before = Attention::new(&[40, 131, 1, 30], 4, 2, 24, F32);
        let mut after = Attention::new(&[40, 131, 1, 30], 4, 2, 24, F32);
        let changed = 40..171;
        let (wide, narrow) = before.shapes();
        for (values, width) in
            [(&mut after.q, wide[1]), (&mut after.k, narrow[1]), (&mut after.v, narrow[1]), (&mut after.d_o, wide[1])]
        {
            for value in &mut values[changed.start * width..changed.end * width] {
                *value = 1.0 - 3.0 * *value;
            }
        }
        let results = |case: &Attention| {
            let (saved, dq, dk, dv) = case.run(&cpu());
            [saved.o, saved.lse.transpose(), dq, dk, dv].map(|t| (t.dims()[1], to_f32(t)))
        };
        for ((width, before), (_, after)) in results(&before).into_iter().zip(results(&after)) {
            let (inside, outside): (Vec<usize>, Vec<usize>) =
                (0..before.len()).partition(|i| changed.contains(&(i / width)));
            assert!(outside.iter().all(|&i| before[i].to_bits() == after[i].to_bits()), "a neighbour changed");
            assert!(inside.iter().filter(|&&i| before[i] == after[i]).count() < inside.len() / 100);
        }
    });
}

#[test]
fn later_tokens_do_not_reach_earlier_ones() {
    on_both_paths(|| {
        let whole = Attention::new(&[200], 2, 1, 24, F32);
        let mut cut = Attention::new(&[200], 2, 1, 24, F32);
        let (wide, narrow) = whole.shapes();
        // Keys and values from token 150 on are others; the queries before that may not notice.
        cut.k[150 * narrow[1]..].fill(0.5);
        cut.v[150 * narrow[1]..].fill(-0.5);
        let o = |case: &Attention| to_f32(case.run(&cpu()).0.o);
        let (whole, cut) = (o(&whole), o(&cut));
        assert_eq!(whole[..150 * wide[1]], cut[..150 * wide[1]]);
        assert_ne!(whole[150 * wide[1]..], cut[150 * wide[1]..]);
    });
}

#[test]
fn documents_without_tokens_change_nothing() {
    on_both_paths(|| {
        let plain = Attention::new(&[3, 2], 2, 1, 8, F32).ours(&cpu());
        assert_eq!(Attention::new(&[0, 3, 0, 0, 2, 0], 2, 1, 8, F32).ours(&cpu()), plain);
    });
}

#[test]
fn cached_attention_gives_the_last_rows() {
    let case = Attention::new(&[300], 4, 2, 24, F32);
    let (wide, narrow) = case.shapes();
    let last = |new: usize, dtype: DType| {
        let o = case.naive(dtype).swap_remove(0).1;
        vec![("o", o[(300 - new) * wide[1]..].to_vec())]
    };
    on_both_paths(|| {
        for new in [1, 5, 130, 300] {
            let place = Place::new(Device::flex(), F32, Layout::Columns);
            let q = place.matrix(&case.q[(300 - new) * wide[1]..], [new, wide[1]]);
            let (k, v) = (place.matrix(&case.k, narrow), place.matrix(&case.v, narrow));
            let o = attention::forward_cached(&q, &k, &v, case.heads);
            let what = format!("{new} new tokens");
            judge(&what, &vec![("o", values(o))], &last(new, F32), &last(new, DType::F64), 2.0, F32_FLOOR);
        }
    });
}

#[test]
fn swiglu_saturates_without_nan() {
    on_both_paths(|| {
        let row = |values: [f32; 4]| cpu().matrix(&values, [1, 4]);
        let (gate, up) = (row([-1e4, -100.0, 100.0, 1e4]), row([2.0, -3.0, 2.0, -3.0]));
        let act = swiglu::forward(&gate, &up);
        assert_eq!(flushed(act), [0.0, 0.0, 200.0, -3e4]);
        let (dgate, dup) = swiglu::backward(&row([1.0; 4]), gate, up);
        assert_eq!(flushed(dgate), [0.0, 0.0, 2.0, -3.0]);
        assert_eq!(flushed(dup), [0.0, 0.0, 100.0, 1e4]);
    });
}

/// With the exponential clamped at e^±88, silu(−10⁴) is −6e-35 at most: zero for every purpose.
fn flushed(tensor: Tensor<2>) -> Vec<f32> {
    to_f32(tensor).into_iter().map(|x| if x.abs() < 1e-34 { 0.0 } else { x }).collect()
}

#[test]
fn the_norm_of_gradients() {
    // Three chunks of 16,384 and values of very different sizes.
    let values: Vec<f32> = noise(1, 40_000).iter().enumerate().map(|(i, x)| x * 10f32.powi(i as i32 % 7 - 3)).collect();
    let truth = values.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let naive = f64::from(values.iter().map(|g| g * g).sum::<f32>().sqrt());
    let norm = || {
        let mut builder = ParamsBuilder::default();
        let at = builder.push("w", &[40, 1000], true, &vec![0.0; 40_000]);
        let mut grads = builder.build(&Device::flex(), F32).zero_grads();
        grads.add(at, from_f32(values.clone(), [40, 1000], &Device::flex(), F32));
        grads.norm()
    };
    // A sum of n squares in f64: n units of 2⁻⁵³ at most, half of that after the root.
    assert!((norm() - truth).abs() <= 40_000.0 * 2f64.powi(-54) * truth);
    let portable = Path::portable_only(norm);
    assert!((portable - truth).abs() <= 2.0 * (naive - truth).abs() + F32_FLOOR * truth, "{portable} not {truth}");
    assert_eq!(ParamsBuilder::default().build(&Device::flex(), F32).zero_grads().norm(), 0.0);
}

#[test]
fn dropout_is_linear() {
    let tokens: Vec<Token> = (0..37).map(|t| Token { row: t / 20, position: t % 20 }).collect();
    let key = Key { p: 0.375, seed: 11, step: 3, tokens: &tokens };
    let shape = [37, 29];
    let (x, dy) = (noise(1, 37 * 29), noise(2, 37 * 29));
    let apply = |values: &[f32]| to_f32(dropout::apply(&cpu().matrix(values, shape), key, 5));
    let mask = apply(&[1.0; 37 * 29]);
    assert!(mask.iter().all(|&m| m == 0.0 || m == 1.6), "1 / (1 − 0.375) = 1.6");
    assert!(mask.contains(&0.0) && mask.contains(&1.6));
    let by_mask: Vec<f32> = x.iter().zip(&mask).map(|(x, m)| x * m).collect();
    assert_eq!(apply(&x), by_mask);

    let oracle = Oracle::new(F32);
    let leaf = oracle.leaf(&x, shape);
    let y = dropout::apply(&leaf, key, 5);
    let grads = (y * oracle.constant(&dy, shape)).sum().backward();
    let by_hand: Vec<f64> = apply(&dy).into_iter().map(f64::from).collect();
    assert_eq!(grad(&leaf, &grads), by_hand, "the gradient is the same function");

    let low: Tensor<2> = from_f32(x.clone(), shape, &Device::flex(), DType::BF16);
    let kept = to_f32(dropout::apply(&low, key, 5));
    assert!(kept.iter().zip(&by_mask).all(|(a, b)| (*a == 0.0) == (*b == 0.0)), "the dtype does not move the mask");
    assert_eq!(to_f32(dropout::apply(&cpu().matrix(&x, shape), Key { p: 0.0, ..key }, 5)), x);
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let case = Attention::new(&[150, 61], 4, 2, 24, F32);
    assert_eq!(case.ours(&cpu()), case.ours(&cpu()));
    let case = common::linear_cross_entropy::LinearCrossEntropy::new([90, 33, 70], F32, |t| t % 4 != 2);
    assert_eq!(case.ours(&cpu()), case.ours(&cpu()));
}

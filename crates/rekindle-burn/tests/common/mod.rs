//! Shared parts of the tests: reproducible numbers, plain formulas and the rule by which results are judged.
#![allow(dead_code, reason = "each test program uses a part of this")]

use burn::tensor::{DType, Device, Tensor, TensorData};

/// The CPU with Burn's autodiff.
pub(crate) fn device() -> Device {
    Device::flex().autodiff()
}

/// Returns reproducible numbers in (−1, 1).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A tensor without autodiff.
pub(crate) fn plain<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
    tensor(&noise(seed, shape.iter().product()), shape, &Device::flex(), DType::F32)
}

pub(crate) fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    let data = TensorData::new(values.to_vec(), shape).try_cast(dtype).expect("floats cast to floats");
    Tensor::from_data(data, (device, dtype))
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data_as::<f64>().try_into_vec().expect("cast to f64 just before")
}

pub(crate) fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let values = tensor.into_data().try_into_vec::<f32>().expect("the tests compute in f32");
    values.into_iter().map(f32::to_bits).collect()
}

/// The result of `f` and the gradients of its inputs, with a fixed gradient of the result. Inputs are made from noise.
pub(crate) fn run<const N: usize>(
    dtype: DType,
    shapes: [[usize; 3]; N],
    f: impl Fn([Tensor<3>; N]) -> Tensor<3>,
) -> Vec<Vec<f64>> {
    let mut seed = 0;
    let leaves = shapes.map(|shape| {
        seed += 1;
        tensor(&noise(seed, shape.iter().product()), shape, &device(), dtype).require_grad()
    });
    let y = f(leaves.clone());
    let dy = tensor(&noise(99, y.dims().iter().product()), y.dims(), &device(), dtype);
    let grads = (y.clone() * dy).sum().backward();
    let gradients = leaves.iter().map(|leaf| values(leaf.grad(&grads).expect("every input gets a gradient")));
    core::iter::once(values(y)).chain(gradients).collect()
}

/// Requires of `ours` at most twice the error of the formula in `f32`, against the formula in `f64`, plus four units in the
/// last place of the largest value.
pub(crate) fn judge<const N: usize>(
    what: &str,
    shapes: [[usize; 3]; N],
    ours: impl Fn([Tensor<3>; N]) -> Tensor<3>,
    formula: impl Fn([Tensor<3>; N]) -> Tensor<3>,
) {
    let (ours, naive, truth) =
        (run(DType::F32, shapes, ours), run(DType::F32, shapes, &formula), run(DType::F64, shapes, &formula));
    for (part, ((ours, naive), truth)) in ours.iter().zip(&naive).zip(&truth).enumerate() {
        let error = naive.iter().zip(truth).fold(0.0, |e: f64, (n, t)| e.max((n - t).abs()));
        let largest = truth.iter().fold(0.0, |m: f64, t| m.max(t.abs()));
        let bound = 2.0 * error + 4.0 * f64::from(f32::EPSILON) * largest;
        assert_eq!(ours.len(), truth.len(), "{what}: length of part {part}");
        for (i, (got, want)) in ours.iter().zip(truth).enumerate() {
            // Written so that a NaN fails.
            assert!((got - want).abs() <= bound, "{what}: part {part} [{i}] is {got}, not {want} (bound {bound:e})");
        }
    }
}

//! Shared parts of the operations' tests: repeatable inputs, the ways an operation is run, and the rule
//! by which a result is judged.
//!
//! A [`Case`] is one operation on one set of inputs. It is computed three times: by the crate, and twice by
//! a plain formula in Burn's operations with Burn's own gradients, in `f64` (the truth) and in the dtype
//! under test (the naive result).
// Each test binary uses a part of this.
#![allow(dead_code)]

pub(crate) mod attention;
pub(crate) mod causal_conv;
pub(crate) mod center;
pub(crate) mod embedding;
pub(crate) mod experts;
pub(crate) mod fp8;
pub(crate) mod gated_activation;
pub(crate) mod gated_delta;
pub(crate) mod gated_norm;
pub(crate) mod grouped;
pub(crate) mod linear;
pub(crate) mod linear_cross_entropy;
pub(crate) mod optimizer;
pub(crate) mod output_gate;
pub(crate) mod paged_attention;
pub(crate) mod properties;
pub(crate) mod quantized;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod stacked;

mod place;

use burn::tensor::{DType, Device as BurnDevice, Tensor as BurnTensor, TensorData};
use rekindle_kernels::{Backend, Device, Tensor, to_f32};

pub(crate) use place::{Layout, Place};

/// Results by name: forward values and gradients.
pub(crate) type Results = Vec<(&'static str, Vec<f64>)>;

/// One operation on one set of inputs.
pub(crate) trait Case: std::fmt::Debug {
    /// Computes the plain formula and Burn's gradients in `dtype`.
    fn naive(&self, dtype: DType) -> Results;

    /// Computes the results by the crate.
    fn ours(&self, place: &Place) -> Results;

    /// Computes Burn's gradients of the crate's forward, if it can be differentiated.
    fn differentiated(&self) -> Option<Results> {
        None
    }
}

/// Checks a case in `f32` on the CPU: both paths, every layout of the operands, and Burn's gradients of
/// the portable forward.
pub(crate) fn check(case: &impl Case) {
    check_in(case, &Layout::ALL);
}

/// [`check`] in some layouts, for cases that are large.
pub(crate) fn check_in(case: &impl Case, layouts: &[Layout]) {
    let (truth, naive) = (case.naive(DType::F64), case.naive(DType::F32));
    for &layout in layouts {
        let place = || Place::new(Device::cpu(), DType::F32, layout);
        let cpu = place();
        judge(&format!("{case:?} cpu {layout:?}"), &case.ours(&cpu), &naive, &truth, 2.0, F32_FLOOR);
        cpu.assert_unchanged();
        let portable = place();
        let results = Backend::portable_only(|| case.ours(&portable));
        judge(&format!("{case:?} portable {layout:?}"), &results, &naive, &truth, 2.0, F32_FLOOR);
        portable.assert_unchanged();
    }
    if let Some(results) = case.differentiated() {
        judge(&format!("{case:?} differentiated"), &results, &naive, &truth, 2.0, F32_FLOOR);
    }
}

/// Columns that results leave room for where a device has a use for it.
pub(crate) const ROOM: usize = 5;

/// Four units in the last place of the largest value: what a few roundings of the largest term cost, for
/// results in which the naive computation happens to be exact.
pub(crate) const F32_FLOOR: f64 = 4.0 * (f32::EPSILON as f64);

/// The dtypes of 16 bits, with what rounding to them once costs, in units of the value: the floor in these dtypes.
pub(crate) const LOW_DTYPES: [(DType, f64); 2] = [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)];

/// The house rule: no element is further from the truth than `factor` times the worst element of the naive
/// result is, plus `floor` times the largest true value. Returns the largest error of `got` in units of
/// the naive result's.
pub(crate) fn judge(what: &str, got: &Results, naive: &Results, truth: &Results, factor: f64, floor: f64) -> f64 {
    let named = |results: &Results, name: &str| -> Vec<f64> {
        let found = results.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("{what}: no result {name}")).1.clone()
    };
    for (name, _) in truth {
        named(got, name);
    }
    let mut worst = 0.0f64;
    for (name, got) in got {
        let (naive, truth) = (named(naive, name), named(truth, name));
        assert_eq!((got.len(), naive.len()), (truth.len(), truth.len()), "{what}: length of {name}");
        let naive_error = naive.iter().zip(&truth).fold(0.0, |e: f64, (n, t)| e.max((n - t).abs()));
        let largest = truth.iter().fold(0.0, |m: f64, t| m.max(t.abs()));
        let bound = factor * naive_error + floor * largest;
        for (i, (g, t)) in got.iter().zip(&truth).enumerate() {
            // Written so that a NaN fails.
            let within = (g - t).abs() <= bound;
            assert!(within, "{what}: {name}[{i}] is {g}, not {t}: off by {:e} of {bound:e}", (g - t).abs());
            if naive_error > 0.0 {
                worst = worst.max((g - t).abs() / naive_error);
            }
        }
    }
    worst
}

/// The device of the plain formulas: the CPU with Burn's autodiff.
pub(crate) struct Oracle {
    device: BurnDevice,
    dtype: DType,
}

impl Oracle {
    pub(crate) fn new(dtype: DType) -> Self {
        Self { device: BurnDevice::flex().autodiff(), dtype }
    }

    /// A tensor whose gradient is wanted.
    pub(crate) fn leaf<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> BurnTensor<D> {
        self.constant(values, shape).require_grad()
    }

    /// A tensor without a gradient.
    pub(crate) fn constant<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> BurnTensor<D> {
        let data = TensorData::new(values.to_vec(), shape).try_cast(self.dtype).expect("floats cast to floats");
        BurnTensor::from_data(data, (&self.device, self.dtype))
    }
}

/// The values of a tensor on the host.
pub(crate) fn values<const D: usize>(tensor: impl Into<Tensor<D>>) -> Vec<f64> {
    match tensor.into() {
        Tensor::Burn(tensor) => tensor.into_data_as::<f64>().try_into_vec().expect("cast to f64 just before"),
        other @ (Tensor::Cuda(_) | Tensor::Meta(_)) => widened(to_f32(other)),
    }
}

/// The same numbers.
pub(crate) fn widened(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

/// The gradient of a leaf on the host.
pub(crate) fn grad<const D: usize>(leaf: &BurnTensor<D>, grads: &burn::tensor::Gradients) -> Vec<f64> {
    values(leaf.grad(grads).expect("the leaf takes part in the loss"))
}

/// Repeatable numbers in (−1, 1).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

/// `values` as `dtype` holds them, so that the truth starts from the same inputs.
pub(crate) fn rounded(values: Vec<f32>, dtype: DType) -> Vec<f32> {
    let n = values.len();
    to_f32(rekindle_kernels::from_f32(values, [n], &Device::cpu(), dtype))
}

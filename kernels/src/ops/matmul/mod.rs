//! Matrix products, named by which operand is transposed: `nt` is `a · bᵀ`.
//!
//! Weights keep PyTorch's `[out, in]`, so a linear layer is `y = nt(x, w)`, its input gradient
//! `dx = nn(dy, w)` and its weight gradient `dw = tn(dy, x)`. The `_add` forms compute
//! `y + alpha · product` in the same pass, into `y`'s memory where they own it.
//!
//! # Dtypes
//! Operands share one float dtype; accumulation is `f32` on [`Backend::Cpu`].

pub(crate) mod cpu;
pub(crate) mod cuda;
mod few_rows;
mod grads;
pub(crate) mod meta;
pub(crate) mod portable;

use burn::tensor::Tensor as BurnTensor;

use crate::runtime;
use crate::{Backend, Tensor};

/// `a · bᵀ`: `[m, k] × [n, k] → [m, n]`.
pub fn nt(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    product(a, b, Form::Nt)
}

/// `y + alpha · a · bᵀ`.
pub fn nt_add(y: Tensor<2>, alpha: f32, a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    add(y, alpha, a, b, Form::Nt)
}

/// `a · bᵀ + bias`, the bias added to every row.
pub fn nt_bias(a: &Tensor<2>, b: &Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    match Backend::of(a) {
        Backend::Cpu | Backend::Portable => nt_add(broadcast_rows(bias.burn(), a.dims()[0]).into(), 1.0, a, b),
        Backend::Cuda => cuda::product_bias(a.cuda(), b.cuda(), runtime::Form::Nt, bias.cuda()).into(),
        // On the CPU the sum begins with the bias in every row.
        Backend::Meta => meta::product(a.meta(), b.meta(), Form::Nt).into(),
    }
}

/// `a · b`: `[m, k] × [k, n] → [m, n]`.
pub fn nn(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    product(a, b, Form::Nn)
}

/// `y + alpha · a · b`.
pub fn nn_add(y: Tensor<2>, alpha: f32, a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    add(y, alpha, a, b, Form::Nn)
}

/// `aᵀ · b`: `[k, m] × [k, n] → [m, n]`.
pub fn tn(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    product(a, b, Form::Tn)
}

/// `bias` in every one of `rows` rows: `[n] → [rows, n]`, the start of a product with bias.
pub(crate) fn broadcast_rows(bias: &BurnTensor<1>, rows: usize) -> BurnTensor<2> {
    let [n] = bias.dims();
    bias.clone().reshape([1, n]).repeat_dim(0, rows)
}

/// The operand of a product that is read transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Nt,
    Nn,
    Tn,
}

impl Form {
    /// `(m, n, k)` of the product of operands of these shapes.
    pub(crate) fn sizes(self, a: [usize; 2], b: [usize; 2]) -> (usize, usize, usize) {
        let (m, k, kb, n) = match self {
            Self::Nt => (a[0], a[1], b[1], b[0]),
            Self::Nn => (a[0], a[1], b[0], b[1]),
            Self::Tn => (a[1], a[0], b[0], b[1]),
        };
        assert_eq!(k, kb, "inner sizes of {self:?} product of {a:?} and {b:?}");
        (m, n, k)
    }
}

impl From<Form> for runtime::Form {
    fn from(form: Form) -> Self {
        match form {
            Form::Nt => Self::Nt,
            Form::Nn => Self::Nn,
            Form::Tn => Self::Tn,
        }
    }
}

fn product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    match Backend::of(a) {
        Backend::Cpu => cpu::product(a.burn(), b.burn(), form).into(),
        Backend::Portable => portable::product(a.burn(), b.burn(), form).into(),
        Backend::Cuda => cuda::product(a.cuda(), b.cuda(), form.into()).into(),
        Backend::Meta => meta::product(a.meta(), b.meta(), form).into(),
    }
}

fn add(y: Tensor<2>, alpha: f32, a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    // y may be f32 beside operands of 16 bits.
    let backend = if y.dtype() == a.dtype() { Backend::of(&y) } else { Backend::of(a) };
    match backend {
        Backend::Cpu => cpu::product_add(y.into_burn(), alpha, a.burn(), b.burn(), form).into(),
        Backend::Portable => portable::product_add(y.into_burn(), alpha, a.burn(), b.burn(), form).into(),
        Backend::Cuda => cuda::product_add(y.into_cuda(), alpha, a.cuda(), b.cuda(), form.into()).into(),
        Backend::Meta => meta::product_add(y.into_meta(), a.meta(), b.meta(), form).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, from_f32, to_f32};
    use burn::tensor::DType;

    /// A plain triple loop in f64.
    fn naive(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), form: Form) -> Vec<f64> {
        let at = |i: usize, p: usize| f64::from(if form == Form::Tn { a[p * m + i] } else { a[i * k + p] });
        let bt = |p: usize, j: usize| f64::from(if form == Form::Nt { b[j * k + p] } else { b[p * n + j] });
        (0..m * n).map(|ij| (0..k).map(|p| at(ij / n, p) * bt(p, ij % n)).sum()).collect()
    }

    #[test]
    fn every_form_matches_a_plain_loop() {
        let device = Device::cpu();
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (129, 33, 65), (1, 70, 40), (257, 16, 31)] {
            let a = crate::host::tests::noise(1, m * k);
            let b = crate::host::tests::noise(2, n * k);
            for form in [Form::Nt, Form::Nn, Form::Tn] {
                let (sa, sb) = match form {
                    Form::Nt => ([m, k], [n, k]),
                    Form::Nn => ([m, k], [k, n]),
                    Form::Tn => ([k, m], [k, n]),
                };
                let ta = from_f32(a.clone(), sa, &device, DType::F32);
                let tb = from_f32(b.clone(), sb, &device, DType::F32);
                let want = naive(&a, &b, (m, n, k), form);
                let got = to_f32(product(&ta, &tb, form));
                let portable = to_f32(Backend::portable_only(|| product(&ta, &tb, form)));
                // |error| of a length-k f32 dot product of numbers below 1 is under k · 2⁻²³.
                let bound = k as f64 * 2f64.powi(-23) + 1e-7;
                for ((g, p), w) in got.iter().zip(&portable).zip(&want) {
                    assert!((f64::from(*g) - w).abs() <= bound, "{form:?} {m}×{n}×{k}: {g} {w}");
                    assert!((f64::from(*p) - w).abs() <= bound, "{form:?} {m}×{n}×{k}: {p} {w}");
                }
                let y = from_f32(vec![1.0; m * n], [m, n], &device, DType::F32);
                let sum = to_f32(add(y, 0.5, &ta, &tb, form));
                for (s, w) in sum.iter().zip(&want) {
                    assert!((f64::from(*s) - (1.0 + 0.5 * w)).abs() <= bound + 1e-6);
                }
            }
        }
    }

    #[test]
    fn column_slices_are_read_where_they_are() {
        let device = Device::cpu();
        let wide = from_f32((0..12).map(|i| i as f32).collect(), [3, 4], &device, DType::F32);
        let part = wide.columns(1, 2);
        let eye = from_f32(vec![1.0, 0.0, 0.0, 1.0], [2, 2], &device, DType::F32);
        assert_eq!(to_f32(nt(&part, &eye)), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    }
}

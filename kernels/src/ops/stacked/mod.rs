//! Frozen weights of linears that read the same input, with the low-rank factors of an adapter or without, as one matrix:
//! the linears are then one product forward and one backward.
//!
//! With W the weights W_j one below another, A the factors A_j likewise, and S block by block s_j·B_j, in the rows of
//! W_j and the columns of A_j's rows:
//! Y = \[X, X·Aᵀ\]·\[W, S\]ᵀ, dXA = dY·S, dX = \[dY, dXA\]·\[W; A\].
//! Without factors, Y = X·Wᵀ and dX = dY·W.
//! So y_j = x·W_jᵀ + s_j·(x·A_jᵀ)·B_jᵀ costs R = Σ r_j more terms in each sum, where a product of its own would read and
//! write all of Y, and again all of dX, once more.
//!
//! # Shapes
//! x `[tokens, in]`, W `[Σ out, in]`, A `[R, in]`, S `[Σ out, R]`, y `[tokens, Σ out]`; R is rounded up to a multiple of
//! 8, with zeros.
//!
//! # Memory
//! Dense weights are moved into the matrix, and each remains addressable as rows of it. Quantized weights of one 4-bit
//! format are made adjacent, so that one kernel reads them all where x has a few rows; products of more rows decode the
//! group into scratch memory.
//!
//! X·Aᵀ lies beside X in the same rows, and dXA beside dY: whoever makes x and dy leaves
//! [`Stacked::rank`] spare columns. Without them they are copied.

mod cuda;

use crate::runtime::{self, Array};
use crate::tensor::cuda_dtype;
use crate::{ParamRef, ParamsBuilder, QuantizedWeight, Tensor, Weight};

/// Stacked weights of one group of linears, on a CUDA device.
#[derive(Clone, Debug)]
pub struct Stacked {
    stack: cuda::Stacked,
    /// Rows of each weight.
    outs: Vec<usize>,
}

/// One linear of a group.
#[derive(Debug)]
pub struct StackedLinear<'a> {
    /// W_j, `[out, in]`. A dense one lies in the stack afterwards.
    pub weight: &'a mut Weight,
    /// One row of `out`.
    pub bias: Option<&'a Weight>,
    /// A_j, B_j and s_j, if it is adapted.
    pub factors: Option<(ParamRef, ParamRef, f32)>,
}

impl Stacked {
    /// Stacks frozen weights without factors.
    ///
    /// `None` for what has no such product: other devices, trained weights and biases, and dense weights beside quantized
    /// ones.
    pub fn of_weights(linears: Vec<(&mut Weight, Option<&Weight>)>) -> Option<Self> {
        let part = |(weight, bias)| StackedLinear { weight, bias, factors: None };
        Self::place(linears.into_iter().map(part).collect(), None)
    }

    /// Stacks frozen weights and the factors, which follow the parameters from the building of `params` on.
    ///
    /// `None` as for [`of_weights`](Self::of_weights).
    pub fn new(parts: Vec<StackedLinear<'_>>, params: &mut ParamsBuilder) -> Option<Self> {
        Self::place(parts, Some(params))
    }

    fn place(mut parts: Vec<StackedLinear<'_>>, params: Option<&mut ParamsBuilder>) -> Option<Self> {
        let biases = parts.iter().filter_map(|part| part.bias).map(frozen).collect::<Option<Vec<Array>>>()?;
        if !(biases.is_empty() || biases.len() == parts.len()) {
            return None;
        }
        let bias = (!biases.is_empty()).then(|| Array::side_by_side(&biases, 0));
        let rank = parts.iter().filter_map(|part| part.factors).map(|(a, ..)| a.dims()[0]).sum();
        let outs: Vec<usize> = parts.iter().map(|part| part.weight.dims()[0]).collect();
        let stack = if parts.iter().all(|part| frozen(part.weight).is_some()) {
            let arrays = parts.iter_mut().filter_map(|part| match part.weight {
                Weight::Frozen(Tensor::Cuda(array)) => Some(array),
                _ => None,
            });
            cuda::Stacked::dense(&mut arrays.collect::<Vec<_>>(), bias, rank)
        } else {
            let quantized = parts.iter_mut().map(|part| match part.weight {
                Weight::Quantized(weight) => Some(weight),
                _ => None,
            });
            let mut quantized = quantized.collect::<Option<Vec<_>>>()?;
            let joined = QuantizedWeight::adjoin(&mut quantized);
            let arrays = quantized.iter().map(|weight| weight.cuda().cloned()).collect::<Option<Vec<_>>>()?;
            let dtype = params.as_ref().map_or(runtime::DType::F32, |params| cuda_dtype(params.dtype()));
            cuda::Stacked::quantized(arrays, joined, bias, rank, dtype)
        };
        if let Some(params) = params {
            let (mut row, mut column) = (0, 0);
            for (part, &out) in parts.iter().zip(&outs) {
                if let Some((a, b, scale)) = part.factors {
                    let [r, _] = a.dims();
                    params.copy_to(a, 1.0, &stack.a().row_range(column, r));
                    params.copy_to(b, scale, &stack.s().row_range(row, out).columns(column, r));
                    column += r;
                }
                row += out;
            }
        }
        Some(Self { stack, outs })
    }

    /// Returns R, the number of spare columns that x and dy should have.
    pub fn rank(&self) -> usize {
        self.stack.rank()
    }

    /// The results y_j, and X·Aᵀ, which goes through `dropped` in the place of x if it is given. `onto` is added to the
    /// result of a group of one.
    ///
    /// # Panics
    /// Without factors, as [`backward`](Self::backward) does.
    pub fn forward(
        &self,
        x: &Tensor<2>,
        dropped: Option<&Tensor<2>>,
        onto: Option<Tensor<2>>,
    ) -> (Vec<Tensor<2>>, Tensor<2>) {
        let (y, xa) = self.stack.forward(x.cuda(), dropped.map(Tensor::cuda), onto.map(Tensor::into_cuda));
        (self.split(&y), xa.into())
    }

    /// The results x·W_jᵀ of the weights alone, without the factors. `onto` is added to the result of a group of one.
    pub fn forward_base(&self, x: &Tensor<2>, onto: Option<Tensor<2>>) -> Vec<Tensor<2>> {
        self.split(&self.stack.forward_base(x.cuda(), onto.map(Tensor::into_cuda)))
    }

    /// dY·W, the gradient to x of [`forward_base`](Self::forward_base).
    pub fn backward_base(&self, dys: &[Tensor<2>]) -> Tensor<2> {
        let dys: Vec<Array> = dys.iter().map(|dy| dy.cuda().clone()).collect();
        self.stack.backward_base(&Array::side_by_side(&dys, 0)).into()
    }

    /// Each weight's columns of Y.
    fn split(&self, y: &Array) -> Vec<Tensor<2>> {
        let mut column = 0;
        let part = |&out: &usize| {
            column += out;
            y.columns(column - out, out).into()
        };
        self.outs.iter().map(part).collect()
    }

    /// dXA, and dX if it is wanted: with what comes through A, or without.
    pub fn backward(&self, dys: &[Tensor<2>], dx: InputGradient) -> (Tensor<2>, Option<Tensor<2>>) {
        let dys: Vec<Array> = dys.iter().map(|dy| dy.cuda().clone()).collect();
        let (dy, dxa) = self.stack.backward_factors(&Array::side_by_side(&dys, self.rank()));
        let dx = match dx {
            InputGradient::No => None,
            InputGradient::Base => Some(self.stack.backward_base(&dy)),
            InputGradient::Whole => Some(self.stack.backward(&dy)),
        };
        (dxa.into(), dx.map(Tensor::from))
    }
}

/// The array of a frozen dense weight on a CUDA device.
fn frozen(weight: &Weight) -> Option<Array> {
    match weight {
        Weight::Frozen(Tensor::Cuda(array)) => Some(array.clone()),
        _ => None,
    }
}

/// The gradient to x that is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// None.
    No,
    /// dY·W.
    Base,
    /// dY·W + dXA·A.
    Whole,
}

//! Frozen weights of linears that read the same input, with the low-rank factors of an adapter or without, as one matrix:
//! the linears are then one product forward and one backward.
//!
//! With W the weights W_j one below another, A the factors A_j likewise, and S block by block s_j·B_j, in the rows of
//! W_j and the columns of A_j's rows:
//! Y = \[X, X·Aᵀ\]·\[W, S\]ᵀ + b, dXA = dY·S, dX = \[dY, dXA\]·\[W; A\].
//! Without factors, Y = X·Wᵀ + b and dX = dY·W.
//! So y_j = x·W_jᵀ + s_j·(x·A_jᵀ)·B_jᵀ + b_j costs R = Σ r_j more terms in each sum, where a product of its own would read
//! and write all of Y, and again all of dX, once more.
//!
//! With magnitudes m_j, the linears are DoRA's (arXiv:2402.09353): Z = \[X̃, X̃·Aᵀ\]·\[W, S\]ᵀ with X̃ = dropout(X), and
//! Y = g ∘ Z + (X − X̃)·Wᵀ + b with g = m / ‖W + S·A‖ for each row of the matrix, which a gradient takes for a constant but
//! for m. The norm is not computed from rows of W + S·A but as
//! ‖w + s·A‖² = ‖w‖² + 2·s·(A·wᵀ) + s·(A·Aᵀ)·sᵀ, whose first term is computed once. Gains are computed again when the
//! parameters change, not in every pass.
//!
//! # Shapes
//! x `[tokens, in]`, W `[Σ out, in]`, A `[R, in]`, S `[Σ out, R]`, y and z `[tokens, Σ out]`; R is rounded up to a multiple
//! of 8, with zeros.
//!
//! # Dtypes
//! Products in the compute dtype with f32 sums. Norms and gains are f32, W·Aᵀ and A·Aᵀ are f32 results of products in the
//! compute dtype.
//!
//! # Gradients
//! To x, X·Aᵀ, and with magnitudes dm = Σ_rows dy ∘ z / ‖W + S·A‖ and dZ = g ∘ dY, in one pass over dY and Z. Saved: X·Aᵀ, and
//! Z where there are magnitudes. Trained biases have the column sums of dY.
//!
//! # Memory
//! Dense weights are moved into the matrix, and each remains addressable as rows of it. Quantized weights of one 4-bit
//! format are made adjacent, so that one kernel reads them all where x has a few rows; products of more rows decode the
//! group into scratch memory.
//!
//! X·Aᵀ lies beside X in the same rows, and dXA beside dY: whoever makes x and dy leaves
//! [`Stacked::rank`] spare columns. Without them they are copied.

mod cuda;
mod magnitudes;

use std::sync::Arc;

use self::magnitudes::{MagnitudeRows, Magnitudes};
use crate::ops::fp8::Fp8Products;
use crate::runtime::{self, Array, MemoryUse, elementwise};
use crate::tensor::cuda_dtype;
use crate::{Grads, ParamRef, ParamsBuilder, QuantizedWeight, Tensor, Weight, to_f32};

/// Stacked weights of one group of linears, on a CUDA device.
#[derive(Clone, Debug)]
pub struct Stacked {
    stack: cuda::Stacked,
    /// Rows of each weight.
    outs: Vec<usize>,
    /// Biases of the weights alone, `[1, Σ out]`.
    base_bias: Option<Array>,
    /// Biases with those that are trained in their place.
    bias: Option<Array>,
    magnitudes: Option<Magnitudes>,
}

/// One linear of a group.
#[derive(Debug)]
pub struct StackedLinear<'a> {
    /// W_j, `[out, in]`. A dense one lies in the stack afterwards.
    pub weight: &'a mut Weight,
    /// One row of `out`, frozen.
    pub bias: Option<&'a Weight>,
    /// The bias that is trained in the place of `bias`.
    pub trained_bias: Option<ParamRef>,
    /// The factors, if it is adapted.
    pub factors: Option<StackedFactors>,
}

/// The factors of one linear.
#[derive(Clone, Copy, Debug)]
pub struct StackedFactors {
    /// A_j, `[r, in]`.
    pub a: ParamRef,
    /// B_j, `[out, r]`.
    pub b: ParamRef,
    /// s_j.
    pub scale: f32,
    /// m_j, one row of `out`.
    pub magnitude: Option<ParamRef>,
}

/// Tensors that [`Stacked::forward`] saves for the backward.
#[derive(Clone, Debug)]
pub struct StackedSaved {
    /// X·Aᵀ, where there are factors.
    pub xa: Option<Tensor<2>>,
    /// Z, where there are magnitudes.
    pub z: Option<Tensor<2>>,
}

impl Stacked {
    /// Stacks frozen weights without factors.
    ///
    /// `None` for what has no such product: other devices, trained weights, and dense weights beside quantized ones. With
    /// `fp8`, products of weights that [`refusal`](crate::fp8::refusal) has nothing against are in fp8.
    pub fn of_weights(linears: Vec<(&mut Weight, Option<&Weight>)>, fp8: Option<Fp8Products>) -> Option<Self> {
        let part = |(weight, bias)| StackedLinear { weight, bias, trained_bias: None, factors: None };
        Self::place(linears.into_iter().map(part).collect(), None, fp8)
    }

    /// Stacks frozen weights and what is trained beside them, which follows the parameters from the building of `params`
    /// on.
    ///
    /// `None` as for [`of_weights`](Self::of_weights).
    pub fn new(parts: Vec<StackedLinear<'_>>, params: &mut ParamsBuilder, fp8: Option<Fp8Products>) -> Option<Self> {
        Self::place(parts, Some(params), fp8)
    }

    fn place(
        mut parts: Vec<StackedLinear<'_>>,
        params: Option<&mut ParamsBuilder>,
        fp8: Option<Fp8Products>,
    ) -> Option<Self> {
        let rank = parts.iter().filter_map(|part| part.factors).map(|factors| factors.a.dims()[0]).sum();
        let outs: Vec<usize> = parts.iter().map(|part| part.weight.dims()[0]).collect();
        let biases = parts.iter().map(|part| part.bias.map(|bias| frozen(bias).ok_or(()))).map(Option::transpose);
        let biases = biases.collect::<Result<Vec<Option<Array>>, ()>>().ok()?;
        let dtype = params.as_ref().map_or(runtime::DType::F32, |params| cuda_dtype(params.dtype()));
        let stack = if parts.iter().all(|part| frozen(part.weight).is_some()) {
            let arrays = parts.iter_mut().filter_map(|part| match part.weight {
                Weight::Frozen(Tensor::Cuda(array)) => Some(array),
                _ => None,
            });
            cuda::Stacked::dense(&mut arrays.collect::<Vec<_>>(), rank)
        } else {
            let quantized = parts.iter_mut().map(|part| match part.weight {
                Weight::Quantized(weight) => Some(weight),
                _ => None,
            });
            let mut quantized = quantized.collect::<Option<Vec<_>>>()?;
            let joined = QuantizedWeight::adjoin(&mut quantized);
            let in_fp8 = fp8.map(|products| (QuantizedWeight::adjoin_fp8(&mut quantized), products));
            let arrays = quantized.iter().map(|weight| weight.cuda().cloned()).collect::<Option<Vec<_>>>()?;
            let stack = cuda::Stacked::quantized(arrays, joined, rank, dtype);
            match in_fp8 {
                None => stack,
                Some((joined, products)) => stack.in_fp8(joined.expect("what is not in fp8 was refused"), products),
            }
        };
        let base_bias = side_by_side(&stack, &biases, &outs, None);
        let mut stacked = Self { stack, outs, bias: base_bias.clone(), base_bias, magnitudes: None };
        if let Some(params) = params {
            stacked.follow(&parts, &biases, params);
        }
        Some(stacked)
    }

    /// Makes the matrix, biases and gains follow the parameters.
    fn follow(&mut self, parts: &[StackedLinear<'_>], biases: &[Option<Array>], params: &mut ParamsBuilder) {
        let dtype = cuda_dtype(params.dtype());
        if parts.iter().any(|part| part.trained_bias.is_some()) {
            self.bias = side_by_side(&self.stack, biases, &self.outs, Some(dtype));
        }
        let (mut first, mut column) = (0, 0);
        let (mut with_magnitude, mut refs) = (Vec::new(), Vec::new());
        for (part, &out) in parts.iter().zip(&self.outs) {
            if let (Some(at), Some(bias)) = (part.trained_bias, &self.bias) {
                params.copy_to(at, 1.0, &bias.columns(first, out));
            }
            if let Some(StackedFactors { a, b, scale, magnitude }) = part.factors {
                let [r, _] = a.dims();
                params.copy_to(a, 1.0, &self.stack.a().row_range(column, r));
                params.copy_to(b, scale, &self.stack.s().row_range(first, out).columns(column, r));
                with_magnitude.extend(magnitude.map(|magnitude| MagnitudeRows { magnitude, first, out, column, r }));
                refs.extend([a, b].into_iter().chain(magnitude).map(ParamRef::range));
                column += r;
            }
            first += out;
        }
        if let (false, Some(start), Some(end)) = (
            with_magnitude.is_empty(),
            refs.iter().map(|range| range.start).min(),
            refs.iter().map(|range| range.end).max(),
        ) {
            let (magnitudes, update) = Magnitudes::new(&self.stack, with_magnitude, start..end, dtype);
            self.magnitudes = Some(magnitudes);
            params.derive(Arc::new(update));
        }
    }

    /// Returns R, the number of spare columns that x and dy should have.
    pub fn rank(&self) -> usize {
        self.stack.rank()
    }

    /// The results y_j, with X·Aᵀ from `dropped` in the place of x if it is given. `onto` is added to the result of a group
    /// of one.
    pub fn forward(
        &self,
        x: &Tensor<2>,
        dropped: Option<&Tensor<2>>,
        onto: Option<Tensor<2>>,
    ) -> (Vec<Tensor<2>>, StackedSaved) {
        let (bias, onto) = (self.bias.as_ref(), onto.map(Tensor::into_cuda));
        let Some(magnitudes) = &self.magnitudes else {
            let (y, xa) = self.stack.forward(x.cuda(), dropped.map(Tensor::cuda), bias, onto);
            return (self.split(&y), StackedSaved { xa: xa.map(Tensor::from), z: None });
        };
        let (z, xa) = self.stack.forward(dropped.unwrap_or(x).cuda(), None, None, None);
        let xa = xa.map(|xa| if dropped.is_some() { elementwise::copy(&xa) } else { xa });
        let beside = dropped.map(|dropped| {
            let difference = x.clone().plus(&dropped.clone().scale(-1.0));
            self.stack.forward_base(difference.cuda(), None, None)
        });
        let y = magnitudes.apply(&z, bias, beside.as_ref(), onto);
        (self.split(&y), StackedSaved { xa: xa.map(Tensor::from), z: Some(z.into()) })
    }

    /// The results x·W_jᵀ + b_j of the frozen weights and biases alone. `onto` is added to the result of a group of one.
    pub fn forward_base(&self, x: &Tensor<2>, onto: Option<Tensor<2>>) -> Vec<Tensor<2>> {
        self.split(&self.stack.forward_base(x.cuda(), self.base_bias.as_ref(), onto.map(Tensor::into_cuda)))
    }

    /// dY·W, the gradient to x of [`forward_base`](Self::forward_base).
    pub fn backward_base(&self, dys: &[Tensor<2>]) -> Tensor<2> {
        self.stack.backward_base(&joined(dys, 0)).into()
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

    /// The gradients to z_j, for the z that [`forward`](Self::forward) saved. Adds those of the magnitudes.
    ///
    /// # Panics
    /// Without magnitudes.
    pub fn backward_magnitudes(&self, dys: &[Tensor<2>], z: &Tensor<2>, grads: &Grads) -> Vec<Tensor<2>> {
        let magnitudes = self.magnitudes.as_ref().expect("there are magnitudes where z is saved");
        self.split(&magnitudes.backward(&joined(dys, 0), z.cuda(), self.rank(), grads))
    }

    /// dXA, and dX if it is wanted: with what comes through A, or without.
    ///
    /// # Panics
    /// Without factors.
    pub fn backward(&self, dys: &[Tensor<2>], dx: InputGradient) -> (Tensor<2>, Option<Tensor<2>>) {
        let (dy, dxa) = self.stack.backward_factors(&joined(dys, self.rank()));
        let dx = match dx {
            InputGradient::No => None,
            InputGradient::Base => Some(self.stack.backward_base(&dy)),
            InputGradient::Whole => Some(self.stack.backward(&dy)),
        };
        (dxa.into(), dx.map(Tensor::from))
    }
}

/// ‖w‖² of every row of a frozen weight on a CUDA device, in f32, with one decoded copy of a quantized weight; `None` for any
/// other weight.
pub fn row_norms_squared(weight: &Weight) -> Option<Vec<f32>> {
    let norms = match weight {
        Weight::Frozen(Tensor::Cuda(weight)) => magnitudes::row_norms(weight),
        Weight::Quantized(weight) => magnitudes::row_norms(&weight.cuda()?.decode(runtime::DType::F32, None)),
        Weight::Sharded(weight) => return row_norms_squared(&weight.gather()),
        Weight::Frozen(_) | Weight::Trained(_) => return None,
    };
    Some(to_f32(Tensor::<1>::Cuda(norms)))
}

/// Gradients as one matrix with `pad_cols` spare columns.
fn joined(dys: &[Tensor<2>], pad_cols: usize) -> Array {
    let dys: Vec<Array> = dys.iter().map(|dy| dy.cuda().clone()).collect();
    Array::side_by_side(&dys, pad_cols)
}

/// Biases as one row `[1, Σ out]`, zeros where there is none; `None` if there is none at all and no `dtype` is given.
fn side_by_side(
    stack: &cuda::Stacked,
    biases: &[Option<Array>],
    outs: &[usize],
    dtype: Option<runtime::DType>,
) -> Option<Array> {
    let dtype = biases.iter().flatten().map(Array::dtype).next().or(dtype)?;
    let row = Array::zeros(&stack.cuda(), [1, stack.out()], dtype, MemoryUse::Weights);
    let mut first = 0;
    for (bias, &out) in biases.iter().zip(outs) {
        if let Some(bias) = bias {
            elementwise::copy_into(bias, &row.columns(first, out));
        }
        first += out;
    }
    Some(row)
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

//! Magnitudes of the rows of a stack, on CUDA: gains that follow the parameters; see `magnitude.cu`.

use core::ops::Range;

use super::cuda::Stacked;
use crate::ops::matmul::cuda as matmul;
use crate::params::DerivedValues;
use crate::runtime::op::{blocks, check_dims, int, kernel, piece_grid};
use crate::runtime::{Array, DType, Form, MemoryUse, args, elementwise, entry, reduce};
use crate::{Grads, ParamRef};

/// Rows whose part of the gradient of a magnitude one block sums.
const CHUNK: usize = 64;

/// The rows of a stack that have magnitudes m: y = m / ‖W + S·A‖ ∘ z.
#[derive(Clone, Debug)]
pub(crate) struct Magnitudes {
    linears: Vec<MagnitudeRows>,
    /// m / ‖·‖ of each row, f32 `[1, Σ out]`; 1 for rows without a magnitude.
    gain: Array,
    /// 1 / ‖·‖ of each row, as `gain`; 0 for rows without a magnitude.
    reciprocal: Array,
}

/// The rows of one linear with a magnitude.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MagnitudeRows {
    /// m, `[1, out]`.
    pub(crate) magnitude: ParamRef,
    /// The rows in the stack.
    pub(crate) first: usize,
    pub(crate) out: usize,
    /// The columns of S.
    pub(crate) column: usize,
    pub(crate) r: usize,
}

/// The gains of a stack as functions of its factors and magnitudes.
#[derive(Debug)]
pub(crate) struct GainUpdate {
    stack: Stacked,
    magnitudes: Magnitudes,
    /// ‖w‖² of each row of W, f32 `[1, Σ out]`.
    norms: Array,
    /// The parameters that gains depend on.
    reads: Range<usize>,
    dtype: DType,
}

impl Magnitudes {
    /// Gains of a stack, and their update, which the parameters have to be given. `reads` is the range of the stack's
    /// parameters and `dtype` that of products.
    pub(crate) fn new(
        stack: &Stacked,
        linears: Vec<MagnitudeRows>,
        reads: Range<usize>,
        dtype: DType,
    ) -> (Self, GainUpdate) {
        let out = stack.out();
        let cuda = stack.cuda();
        let vector = |values: &[f32]| Array::from_f32(&cuda, values, [1, out], DType::F32, MemoryUse::FusedWeights);
        let magnitudes = Self { linears, gain: vector(&vec![1.0; out]), reciprocal: vector(&vec![0.0; out]) };
        let norms = row_norms(&stack.base_weight(dtype));
        let update = GainUpdate { stack: stack.clone(), magnitudes: magnitudes.clone(), norms, reads, dtype };
        (magnitudes, update)
    }

    /// `onto + beside + gain ∘ z + bias`, in the memory of `onto` where it may be.
    pub(crate) fn apply(&self, z: &Array, bias: Option<&Array>, beside: Option<&Array>, onto: Option<Array>) -> Array {
        let z = z.aligned();
        let bias = bias.map(Array::aligned);
        let beside = beside.map(Array::aligned);
        let onto = onto.map(|onto| if onto.is_aligned() { onto } else { elementwise::copy(&onto) });
        let y = match &onto {
            Some(onto) if onto.is_unique() => onto.clone(),
            _ => Array::empty(z.cuda(), z.dims(), z.dtype(), MemoryUse::Activations),
        };
        for (name, addend) in [("the sum", &onto), ("the addend", &beside)] {
            addend.iter().for_each(|addend| check_dims(name, addend, z.dims()));
        }
        let [bias, onto_ptr, beside_ptr] =
            [&bias, &onto, &beside].map(|array| array.as_ref().map_or(0, |array| array.ptr()));
        let ld = |array: &Option<Array>| int(array.as_ref().map_or(0, Array::ld));
        kernel(z.cuda(), entry!("magnitude.cu", "magnitude_fwd"), z.dtype()).launch(
            piece_grid(&z),
            [256, 1, 1],
            0,
            args![
                z.ptr(),
                self.gain.ptr(),
                bias,
                onto_ptr,
                beside_ptr,
                y.ptr(),
                int(z.rows()),
                int(z.cols()),
                int(z.ld()),
                ld(&onto),
                ld(&beside),
                int(y.ld())
            ],
        );
        y
    }

    /// `gain ∘ dy` with `pad_cols` spare columns; adds the gradients of the magnitudes.
    pub(crate) fn backward(&self, dy: &Array, z: &Array, pad_cols: usize, grads: &Grads) -> Array {
        let (dy, z) = (dy.aligned(), z.aligned());
        check_dims("z", &z, dy.dims());
        let dz = Array::padded(dy.cuda(), dy.dims(), pad_cols, dy.dtype(), MemoryUse::Activations);
        let partial = reduce::partials(&dy, CHUNK);
        kernel(dy.cuda(), entry!("magnitude.cu", "magnitude_bwd"), dy.dtype()).launch(
            reduce::column_grid(&dy, CHUNK),
            [32, 8, 1],
            0,
            args![
                dy.ptr(),
                z.ptr(),
                self.gain.ptr(),
                self.reciprocal.ptr(),
                dz.ptr(),
                partial.ptr(),
                int(dy.rows()),
                int(dy.cols()),
                int(dy.ld()),
                int(z.ld()),
                int(dz.ld()),
                int(CHUNK)
            ],
        );
        let sums = Array::zeros(dy.cuda(), [1, dy.cols()], DType::F32, MemoryUse::Scratch);
        reduce::sum_partials(&partial, &sums);
        for MagnitudeRows { magnitude, first, out, .. } in &self.linears {
            elementwise::accumulate(&grads.array(*magnitude).flattened(), &sums.columns(*first, *out));
        }
        dz
    }
}

impl DerivedValues for GainUpdate {
    fn reads(&self) -> Range<usize> {
        self.reads.clone()
    }

    fn update(&self, values: &Array) {
        let Self { stack, magnitudes: Magnitudes { linears, gain, reciprocal }, norms, dtype, .. } = self;
        let (a, s) = (stack.a(), stack.s());
        let [rank, _] = a.dims();
        let scratch = |dims| Array::empty(values.cuda(), dims, DType::F32, MemoryUse::Scratch);
        let (wa, gram) = (scratch([stack.out(), rank]), scratch([rank; 2]));
        matmul::product_into(&wa, &stack.base_weight(*dtype), &a, Form::Nt);
        matmul::product_into(&gram, &a, &a, Form::Nt);
        for &MagnitudeRows { magnitude, first, out, column, r } in linears {
            let s = s.row_range(first, out).columns(column, r);
            let wa = wa.row_range(first, out).columns(column, r);
            let gram = gram.row_range(column, r).columns(column, r);
            let [norms, gain, reciprocal] = [norms, gain, reciprocal].map(|vector| vector.columns(first, out).ptr());
            kernel(values.cuda(), entry!("magnitude.cu", "magnitude_gain"), s.dtype()).launch(
                [blocks(out.div_ceil(8)), 1, 1],
                [256, 1, 1],
                0,
                args![
                    norms,
                    wa.ptr(),
                    gram.ptr(),
                    s.ptr(),
                    values.part(magnitude.range().start, [1, out]).ptr(),
                    gain,
                    reciprocal,
                    int(out),
                    int(r),
                    int(wa.ld()),
                    int(gram.ld()),
                    int(s.ld())
                ],
            );
        }
    }
}

/// ‖w‖² of each row, f32 `[1, rows]`.
pub(crate) fn row_norms(w: &Array) -> Array {
    let w = w.aligned();
    let norms = Array::empty(w.cuda(), [1, w.rows()], DType::F32, MemoryUse::FusedWeights);
    kernel(w.cuda(), entry!("magnitude.cu", "row_norms"), w.dtype()).launch(
        [blocks(w.rows().div_ceil(8)), 1, 1],
        [256, 1, 1],
        0,
        args![w.ptr(), norms.ptr(), int(w.rows()), int(w.cols()), int(w.ld())],
    );
    norms
}

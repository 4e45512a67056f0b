//! Frozen weights that read the same input, with the low-rank factors of an adapter beside and below them; see [`super`].

use crate::ops::fp8::Fp8Products;
use crate::ops::fp8::cuda::{self as fp8, LowRank};
use crate::ops::matmul::cuda::{self as matmul, factors, factors::Addends};
use crate::ops::quantized::cuda::few_rows;
use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::{Array, Cuda, DType, Form, MemoryUse, elementwise};

/// Columns and rows for factors come in multiples of this many, so that rows begin at 16 bytes.
const STEP: usize = 8;

/// `[[W, S], [A, 0]]` of weights W_j one below another; W alone without factors.
#[derive(Clone, Debug)]
pub(crate) struct Stacked {
    base: Base,
    out: usize,
    input: usize,
    /// Columns of S and rows of A; those beyond the factors' own are zero.
    rank: usize,
}

#[derive(Clone, Debug)]
enum Base {
    /// The whole, `[Σ out + rank, in + rank]`.
    Dense(Array),
    Quantized {
        parts: Vec<QuantizedArray>,
        /// The parts that the kernel for a few rows of x reads: a single one where they are adjacent in memory.
        adjacent: Vec<QuantizedArray>,
        factors: Option<Factors>,
        /// All parts as one weight, where products are in fp8.
        fp8: Option<Box<(QuantizedArray, Fp8Products)>>,
    },
}

/// The factors beside a quantized weight.
#[derive(Clone, Debug)]
struct Factors {
    /// `[Σ out, rank]`.
    s: Array,
    /// `[rank, in]`.
    a: Array,
}

impl Stacked {
    /// Moves the weights into one matrix; the factors, of `rank` rows in all, are zero.
    ///
    /// The weights pass through scratch memory, so that the matrix can use the memory that they occupied: the matrices of a
    /// model then replace its weights and need no more memory.
    pub(crate) fn dense(weights: &mut [&mut Array], rank: usize) -> Self {
        let [first, rest @ ..] = &*weights else { panic!("there is something to stack") };
        let (cuda, input, dtype) = (first.cuda().clone(), first.cols(), first.dtype());
        let out = weights.iter().map(|weight| weight.rows()).sum();
        let rank = rank.next_multiple_of(STEP);
        if rank == 0 && rest.is_empty() {
            return Self { base: Base::Dense((*first).clone()), out, input, rank };
        }
        let usage = if rank == 0 { MemoryUse::Weights } else { MemoryUse::FusedWeights };
        let move_into = |weights: &mut [&mut Array], matrix: &Array| {
            let mut row = 0;
            for weight in weights {
                let place = matrix.row_range(row, weight.rows());
                elementwise::copy_into(weight, &place);
                row += weight.rows();
                **weight = place;
            }
        };
        move_into(weights, &Array::empty(&cuda, [out, input], dtype, usage));
        let dims = [out + rank, input + rank];
        let whole =
            if rank == 0 { Array::empty(&cuda, dims, dtype, usage) } else { Array::zeros(&cuda, dims, dtype, usage) };
        move_into(weights, &whole.columns(0, input));
        Self { base: Base::Dense(whole), out, input, rank }
    }

    /// Quantized weights, which are decoded one below another where they are used. `joined` are all of them as one weight,
    /// and `dtype` is that of the factors.
    pub(crate) fn quantized(
        parts: Vec<QuantizedArray>,
        joined: Option<QuantizedArray>,
        rank: usize,
        dtype: DType,
    ) -> Self {
        let first = parts.first().expect("there is something to stack");
        let (cuda, [_, input]) = (first.cuda().clone(), first.dims());
        let out = parts.iter().map(|part| part.dims()[0]).sum();
        let rank = rank.next_multiple_of(STEP);
        let zeros = |dims| Array::zeros(&cuda, dims, dtype, MemoryUse::FusedWeights);
        let factors = (rank > 0).then(|| Factors { s: zeros([out, rank]), a: zeros([rank, input]) });
        let adjacent = joined.map_or_else(|| parts.clone(), |joined| vec![joined]);
        Self { base: Base::Quantized { parts, adjacent, factors, fp8: None }, out, input, rank }
    }

    /// The device that the weights are on.
    pub(crate) fn cuda(&self) -> Cuda {
        match &self.base {
            Base::Dense(whole) => whole.cuda().clone(),
            Base::Quantized { parts, .. } => parts[0].cuda().clone(),
        }
    }

    /// Σ out.
    pub(crate) fn out(&self) -> usize {
        self.out
    }

    /// Multiplies in fp8. `joined` is all fp8 weights as one.
    pub(crate) fn in_fp8(mut self, joined: QuantizedArray, products: Fp8Products) -> Self {
        if let Base::Quantized { fp8, .. } = &mut self.base {
            *fp8 = Some(Box::new((joined, products)));
        }
        self
    }

    /// The weight of products in fp8, for those that `wanted` takes.
    fn fp8(&self, wanted: impl Fn(Fp8Products) -> bool) -> Option<&QuantizedArray> {
        let Base::Quantized { fp8: Some(fp8), .. } = &self.base else { return None };
        let (joined, products) = &**fp8;
        wanted(*products).then_some(joined)
    }

    /// Returns the number of spare columns that x and dy should have.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// S, `[Σ out, rank]`.
    ///
    /// # Panics
    /// Without factors.
    pub(crate) fn s(&self) -> Array {
        match &self.base {
            Base::Dense(whole) => whole.row_range(0, self.out).columns(self.input, self.rank),
            Base::Quantized { factors, .. } => factors.as_ref().expect("there are factors").s.clone(),
        }
    }

    /// A, `[rank, in]`.
    ///
    /// # Panics
    /// Without factors.
    pub(crate) fn a(&self) -> Array {
        match &self.base {
            Base::Dense(whole) => whole.row_range(self.out, self.rank).columns(0, self.input),
            Base::Quantized { factors, .. } => factors.as_ref().expect("there are factors").a.clone(),
        }
    }

    /// `(onto + [x, xa]·[W, S]ᵀ + bias, xa)` with xa = dropped·Aᵀ, which lies in the spare columns of x if there are enough.
    /// `bias` is `[1, Σ out]`. Without factors there is no xa.
    pub(crate) fn forward(
        &self,
        x: &Array,
        dropped: Option<&Array>,
        bias: Option<&Array>,
        onto: Option<Array>,
    ) -> (Array, Option<Array>) {
        let rank = self.rank;
        if rank == 0 {
            return (self.forward_base(x, bias, onto), None);
        }
        let x = Array::side_by_side(core::slice::from_ref(x), rank);
        let addends = Addends { bias, onto: onto.as_ref() };
        if let (Base::Dense(whole), None) = (&self.base, dropped)
            && let Some((y, xa)) = factors::product(whole, self.out, &x, addends)
        {
            return (y, Some(xa));
        }
        let both = x.with_padding(rank);
        let xa = both.columns(self.input, rank);
        matmul::product_into(&xa, dropped.unwrap_or(&x), &self.a(), Form::Nt);
        if let Some(weight) = self.fp8(|_| true) {
            let low_rank = LowRank { x: &xa, w: &self.s() };
            return (fp8::forward(&x, weight, Some(low_rank), bias, onto, rank), Some(xa));
        }
        if factors::takes(&x, self.out, addends)
            && let Some(y) = self.few_rows(&x, None, None, rank)
        {
            factors::add(&y, &xa, &self.s(), addends);
            return (y, Some(xa));
        }
        if let Some(y) = self.few_rows(&x, bias, onto.as_ref(), rank) {
            return (matmul::product_add(y, 1.0, &xa, &self.s(), Form::Nt), Some(xa));
        }
        let w = match &self.base {
            Base::Dense(whole) => whole.row_range(0, self.out),
            Base::Quantized { parts, .. } => self.decoded(parts, x.dtype(), Some(&self.s()), None),
        };
        let y = matmul::linear(&both, &w, Form::Nt, bias, onto, rank);
        (y, Some(xa))
    }

    /// `onto + x·Wᵀ + bias`, without the factors.
    pub(crate) fn forward_base(&self, x: &Array, bias: Option<&Array>, onto: Option<Array>) -> Array {
        if let Some(weight) = self.fp8(|_| true) {
            return fp8::forward(x, weight, None, bias, onto, 0);
        }
        if let Some(y) = self.few_rows(x, bias, onto.as_ref(), 0) {
            return y;
        }
        matmul::linear(x, &self.base_weight(x.dtype()), Form::Nt, bias, onto, 0)
    }

    /// `onto + x·Wᵀ + bias` of a few rows with quantized weights, without decoding them; `None` for anything else.
    fn few_rows(&self, x: &Array, bias: Option<&Array>, onto: Option<&Array>, pad_cols: usize) -> Option<Array> {
        let Base::Quantized { adjacent: parts, .. } = &self.base else { return None };
        if !parts.iter().all(|part| few_rows::takes(x, part)) {
            return None;
        }
        if let Some(onto) = onto.filter(|onto| onto.dtype() != x.dtype()) {
            return Some(elementwise::add_narrow(onto.clone(), &self.few_rows(x, bias, None, 0)?));
        }
        let y = Array::padded(x.cuda(), [x.rows(), self.out], pad_cols, x.dtype(), MemoryUse::Activations);
        let mut first = 0;
        for part in parts {
            let rows = part.dims()[0];
            let columns = |array: &Array| array.columns(first, rows);
            few_rows::linear(&columns(&y), x, part, bias.map(columns).as_ref(), onto.map(columns).as_ref());
            first += rows;
        }
        Some(y)
    }

    /// `dy·S`, in the spare columns of dy if there are enough; and the dy that has it.
    pub(crate) fn backward_factors(&self, dy: &Array) -> (Array, Array) {
        let dy = Array::side_by_side(core::slice::from_ref(dy), self.rank);
        let dxa = dy.with_padding(self.rank).columns(self.out, self.rank);
        matmul::product_into(&dxa, &dy, &self.s(), Form::Nn);
        (dy, dxa)
    }

    /// `[dy, dxa]·[W; A]` for a dy with dxa in its spare columns, as [`Stacked::backward_factors`] leaves it.
    pub(crate) fn backward(&self, dy: &Array) -> Array {
        if let Some(weight) = self.fp8(|products| products == Fp8Products::ForwardAndBackward) {
            let dxa = dy.with_padding(self.rank).columns(self.out, self.rank);
            return fp8::backward(dy, weight, Some(LowRank { x: &dxa, w: &self.a() }));
        }
        let w = match &self.base {
            Base::Dense(whole) => whole.columns(0, self.input),
            Base::Quantized { parts, .. } => self.decoded(parts, dy.dtype(), None, Some(&self.a())),
        };
        matmul::product(&dy.with_padding(self.rank), &w, Form::Nn)
    }

    /// `dy·W`, without the factors.
    pub(crate) fn backward_base(&self, dy: &Array) -> Array {
        if let Some(weight) = self.fp8(|products| products == Fp8Products::ForwardAndBackward) {
            return fp8::backward(dy, weight, None);
        }
        matmul::product(dy, &self.base_weight(dy.dtype()), Form::Nn)
    }

    /// W, `[Σ out, in]`, decoded where it is quantized.
    pub(crate) fn base_weight(&self, dtype: DType) -> Array {
        match &self.base {
            Base::Dense(whole) => whole.row_range(0, self.out).columns(0, self.input),
            Base::Quantized { parts, .. } => self.decoded(parts, dtype, None, None),
        }
    }

    /// The decoded W, with S beside it or A below it.
    fn decoded(&self, parts: &[QuantizedArray], dtype: DType, s: Option<&Array>, a: Option<&Array>) -> Array {
        let (beside, below) = (s.map_or(0, Array::cols), a.map_or(0, Array::rows));
        let dims = [self.out + below, self.input + beside];
        let whole = Array::empty(parts[0].cuda(), dims, dtype, MemoryUse::DecodedWeights);
        let mut row = 0;
        for part in parts {
            let rows = part.dims()[0];
            part.decode(dtype, Some(whole.row_range(row, rows).columns(0, self.input)));
            row += rows;
        }
        if let Some(s) = s {
            elementwise::copy_into(s, &whole.row_range(0, self.out).columns(self.input, beside));
        }
        if let Some(a) = a {
            elementwise::copy_into(a, &whole.row_range(self.out, below));
        }
        whole
    }
}

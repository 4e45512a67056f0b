//! A linear with or without an adapter: the pair on plain tensors, and its node.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::{Device, Grads, QuantizedWeight, Tensor, matmul};

use crate::Adapter;
use crate::device::{burn, operations_on, rows, unrows, vector};
use crate::node::record;

/// The weight of a linear of Burn.
pub(crate) enum LinearWeight {
    /// `[in, out]`, as Burn keeps it.
    Dense(BurnTensor<2>),
    /// `[out, in]`, frozen.
    Quantized(QuantizedWeight),
}

/// Records y = x·W + b + s·(x·A)·B, with A `[in, r]` and B `[r, out]` as Burn keeps them.
pub(crate) fn record_linear<const D: usize>(
    x: BurnTensor<D>,
    weight: LinearWeight,
    bias: Option<BurnTensor<1>>,
    adapter: Option<&Adapter>,
) -> BurnTensor<D> {
    let shape = x.dims();
    let (dense, quantized, [input, out]) = match weight {
        LinearWeight::Dense(weight) => {
            let dims = weight.dims();
            (Some(weight), None, dims)
        }
        LinearWeight::Quantized(weight) => {
            let [out, input] = weight.dims();
            (None, Some(weight), [input, out])
        }
    };
    assert_eq!(shape[D - 1], input, "the last axis of x {shape:?} is d_input = {input}");
    let scale = adapter.map_or(0.0, |adapter| adapter.scale as f32);
    let (a, b) = adapter.map(|adapter| (adapter.a.val(), adapter.b.val())).unzip();
    let dtype = |tensor: &Option<BurnTensor<2>>| tensor.as_ref().map_or(x.dtype(), BurnTensor::dtype);
    let dtypes = [dtype(&dense), bias.as_ref().map_or(x.dtype(), BurnTensor::dtype), dtype(&a), dtype(&b)];
    let bias = bias.map(BurnTensor::into_dispatch);
    let [dense, a, b] = [dense, a, b].map(|tensor| tensor.map(BurnTensor::into_dispatch));
    let inputs = [Some(x.into_dispatch()), dense, bias, a, b];
    BurnTensor::from_dispatch(record(inputs, move |inputs, [want_x, weight, bias, a, b]| {
        let wanted = Wanted { x: want_x, weight, bias, a, b };
        let [Some(x), dense, bias, a, b] = inputs else { unreachable!("x was given") };
        let x = rows::<D>(x);
        let compute = x.dtype();
        let stored = |tensor| Matrix::new(tensor, compute);
        let base = match (dense, quantized) {
            (_, Some(weight)) => Base::Quantized(weight),
            (Some(weight), None) => Base::Dense(stored(weight)),
            (None, None) => unreachable!("a linear has a weight"),
        };
        let bias = bias.map(|bias| vector(bias).cast(compute));
        let factors = a.zip(b).map(|(a, b)| Factors { a: stored(a), b: stored(b), scale });
        let (y, xa) = forward(&x, &base, bias.as_ref(), factors.as_ref());
        let x = (wanted.weight || wanted.a).then_some(x);
        let pullback = move |dy| {
            let grads = backward(&rows::<D>(dy), x.as_ref(), xa.as_ref(), &base, factors.as_ref(), wanted);
            let [weight, bias, a, b] = dtypes;
            [
                grads.x.map(|dx| unrows(dx, shape)),
                grads.weight.map(|grad| grad.cast(weight).into_dispatch()),
                grads.bias.map(|grad| burn(grad.cast(bias).row_vector()).into_dispatch()),
                grads.a.map(|grad| grad.cast(a).into_dispatch()),
                grads.b.map(|grad| grad.cast(b).into_dispatch()),
            ]
        };
        let mut shape = shape;
        shape[D - 1] = out;
        (unrows(y, shape), Box::new(pullback))
    }))
}

/// A matrix of a linear, and its orientation in memory.
pub(crate) struct Matrix {
    values: Tensor<2>,
    /// True for Burn's `[in, out]`, false for `[out, in]`.
    is_burns: bool,
}

impl Matrix {
    /// Reads Burn's `[in, out]` without a copy: untransposed on CUDA, whose matrices are row-major, and transposed
    /// elsewhere, where the operations of this project take `[out, in]`.
    fn new(tensor: DispatchTensor, dtype: DType) -> Self {
        let tensor = BurnTensor::<2>::from_dispatch(tensor);
        match operations_on(&tensor.device()) {
            Device::Cuda(_) => Self { values: rows::<2>(tensor.into_dispatch()).cast(dtype), is_burns: true },
            _ => Self { values: Tensor::from(tensor.transpose().cast(dtype)), is_burns: false },
        }
    }

    /// Returns x·W.
    fn product(&self, x: &Tensor<2>) -> Tensor<2> {
        if self.is_burns { matmul::nn(x, &self.values) } else { matmul::nt(x, &self.values) }
    }

    /// Returns y + alpha·x·W.
    fn add_product(&self, y: Tensor<2>, alpha: f32, x: &Tensor<2>) -> Tensor<2> {
        let add = if self.is_burns { matmul::nn_add } else { matmul::nt_add };
        add(y, alpha, x, &self.values)
    }

    /// Returns dy·Wᵀ.
    fn product_back(&self, dy: &Tensor<2>) -> Tensor<2> {
        if self.is_burns { matmul::nt(dy, &self.values) } else { matmul::nn(dy, &self.values) }
    }

    /// Returns dx + dy·Wᵀ.
    fn add_product_back(&self, dx: Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
        let add = if self.is_burns { matmul::nt_add } else { matmul::nn_add };
        add(dx, 1.0, dy, &self.values)
    }

    /// Returns the gradient alpha·xᵀ·dy of the matrix.
    fn gradient(&self, alpha: f32, x: &Tensor<2>, dy: &Tensor<2>) -> MatrixGrad {
        let (a, b) = if self.is_burns { (x, dy) } else { (dy, x) };
        let (mut grads, at) = Grads::of_matrix([a.dims()[1], b.dims()[1]], &a.device());
        grads.add_tn(at, alpha, a, b);
        MatrixGrad { values: grads.matrix(at), is_burns: self.is_burns }
    }
}

/// The gradient of a [`Matrix`], in its orientation.
pub(crate) struct MatrixGrad {
    values: Tensor<2>,
    is_burns: bool,
}

impl MatrixGrad {
    fn cast(self, dtype: DType) -> Self {
        Self { values: self.values.cast(dtype), ..self }
    }

    fn into_dispatch(self) -> DispatchTensor {
        let values = burn(self.values);
        if self.is_burns { values.into_dispatch() } else { values.transpose().into_dispatch() }
    }
}

/// A weight.
pub(crate) enum Base {
    Dense(Matrix),
    Quantized(QuantizedWeight),
}

/// The factors of an adapter in the dtype of x.
pub(crate) struct Factors {
    a: Matrix,
    b: Matrix,
    scale: f32,
}

/// The inputs of [`backward`] that get a gradient.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) x: bool,
    pub(crate) weight: bool,
    pub(crate) bias: bool,
    pub(crate) a: bool,
    pub(crate) b: bool,
}

/// The gradients of [`backward`]: to x in its dtype, those of parameters in `f32`.
#[derive(Default)]
pub(crate) struct LinearGrads {
    pub(crate) x: Option<Tensor<2>>,
    pub(crate) weight: Option<MatrixGrad>,
    /// `[1, out]`.
    pub(crate) bias: Option<Tensor<2>>,
    pub(crate) a: Option<MatrixGrad>,
    pub(crate) b: Option<MatrixGrad>,
}

impl Base {
    fn nt(&self, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        match (self, bias) {
            (Self::Quantized(weight), _) => weight.nt(x, bias),
            (Self::Dense(weight), None) => weight.product(x),
            (Self::Dense(weight), Some(bias)) if weight.is_burns => weight.product(x).add_row(bias),
            (Self::Dense(weight), Some(bias)) => matmul::nt_bias(x, &weight.values, bias),
        }
    }

    fn nn(&self, dy: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.nn(dy, None),
            Self::Dense(weight) => weight.product_back(dy),
        }
    }
}

/// Returns y = x·W + b + s·(x·A)·B and x·A, in the order of `rekindle_lora::LinearGroup`.
pub(crate) fn forward(
    x: &Tensor<2>,
    base: &Base,
    bias: Option<&Tensor<1>>,
    factors: Option<&Factors>,
) -> (Tensor<2>, Option<Tensor<2>>) {
    let y = base.nt(x, bias);
    let Some(Factors { a, b, scale }) = factors else { return (y, None) };
    let xa = a.product(x); // [tokens, r]
    (b.add_product(y, *scale, &xa), Some(xa))
}

/// Returns the gradients for dy. `xa` is that of [`forward`]; x is read for the gradients of W and A.
pub(crate) fn backward(
    dy: &Tensor<2>,
    x: Option<&Tensor<2>>,
    xa: Option<&Tensor<2>>,
    base: &Base,
    factors: Option<&Factors>,
    wanted: Wanted,
) -> LinearGrads {
    let mut grads = LinearGrads { x: wanted.x.then(|| base.nn(dy)), ..LinearGrads::default() };
    if let (Some(Factors { a, b, scale }), Some(xa)) = (factors, xa) {
        let dxa = (wanted.x || wanted.a).then(|| b.product_back(dy).scale(*scale)); // [tokens, r]
        if let Some(dxa) = &dxa {
            grads.x = grads.x.map(|dx| a.add_product_back(dx, dxa));
            grads.a = x.filter(|_| wanted.a).map(|x| a.gradient(1.0, x, dxa));
        }
        grads.b = wanted.b.then(|| b.gradient(*scale, xa, dy));
    }
    if let Base::Dense(weight) = base {
        grads.weight = x.filter(|_| wanted.weight).map(|x| weight.gradient(1.0, x, dy));
    }
    grads.bias = wanted.bias.then(|| {
        let (mut sum, at) = Grads::of_matrix([1, dy.dims()[1]], &dy.device());
        sum.add_row_sum(at, dy);
        sum.matrix(at)
    });
    grads
}

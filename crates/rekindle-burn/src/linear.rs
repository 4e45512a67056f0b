//! A linear with or without an adapter: the pair on plain tensors, and its node.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::{Grads, QuantizedWeight, Tensor, matmul};

use crate::Adapter;
use crate::node::{record, rows, unrows, vector};

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
        // Burn's `[in, out]` read as `[out, in]`, without a copy.
        let turned = |tensor| Tensor::from(BurnTensor::<2>::from_dispatch(tensor).transpose().cast(compute));
        let base = match (dense, quantized) {
            (_, Some(weight)) => Base::Quantized(weight),
            (Some(weight), None) => Base::Dense(turned(weight)),
            (None, None) => unreachable!("a linear has a weight"),
        };
        let bias = bias.map(|bias| Tensor::from(BurnTensor::from(vector(bias)).cast(compute)));
        let factors = a.zip(b).map(|(a, b)| Factors { a: turned(a), b: turned(b), scale });
        let (y, xa) = forward(&x, &base, bias.as_ref(), factors.as_ref());
        let x = (wanted.weight || wanted.a).then_some(x);
        let pullback = move |dy| {
            let grads = backward(&rows::<D>(dy), x.as_ref(), xa.as_ref(), &base, factors.as_ref(), wanted);
            let [weight, bias, a, b] = dtypes;
            [
                grads.x.map(|dx| unrows(dx, shape)),
                grads.weight.map(|grad| turned_back(grad, weight)),
                grads.bias.map(|grad| BurnTensor::from(grad).squeeze_dim::<1>(0).cast(bias).into_dispatch()),
                grads.a.map(|grad| turned_back(grad, a)),
                grads.b.map(|grad| turned_back(grad, b)),
            ]
        };
        let mut shape = shape;
        shape[D - 1] = out;
        (unrows(y, shape), Box::new(pullback))
    }))
}

/// A gradient `[out, in]` in Burn's orientation.
fn turned_back(grad: Tensor<2>, dtype: DType) -> DispatchTensor {
    BurnTensor::from(grad).transpose().cast(dtype).into_dispatch()
}

/// A weight `[out, in]`.
pub(crate) enum Base {
    Dense(Tensor<2>),
    Quantized(QuantizedWeight),
}

/// The factors of an adapter: A `[r, in]` and B `[out, r]` in the dtype of x.
pub(crate) struct Factors {
    pub(crate) a: Tensor<2>,
    pub(crate) b: Tensor<2>,
    pub(crate) scale: f32,
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
    /// `[out, in]`.
    pub(crate) weight: Option<Tensor<2>>,
    /// `[1, out]`.
    pub(crate) bias: Option<Tensor<2>>,
    /// `[r, in]`.
    pub(crate) a: Option<Tensor<2>>,
    /// `[out, r]`.
    pub(crate) b: Option<Tensor<2>>,
}

impl Base {
    fn nt(&self, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        match (self, bias) {
            (Self::Quantized(weight), _) => weight.nt(x, bias),
            (Self::Dense(weight), None) => matmul::nt(x, weight),
            (Self::Dense(weight), Some(bias)) => matmul::nt_bias(x, weight, bias),
        }
    }

    fn nn(&self, dy: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.nn(dy, None),
            Self::Dense(weight) => matmul::nn(dy, weight),
        }
    }
}

/// Returns y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ and x·Aᵀ, in the order of `rekindle_lora::LinearGroup`.
pub(crate) fn forward(
    x: &Tensor<2>,
    base: &Base,
    bias: Option<&Tensor<1>>,
    factors: Option<&Factors>,
) -> (Tensor<2>, Option<Tensor<2>>) {
    let y = base.nt(x, bias);
    let Some(Factors { a, b, scale }) = factors else { return (y, None) };
    let xa = matmul::nt(x, a); // [tokens, r]
    (matmul::nt_add(y, *scale, &xa, b), Some(xa))
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
    let product = |alpha, a: &Tensor<2>, b: &Tensor<2>| {
        let (mut grads, at) = Grads::of_matrix([a.dims()[1], b.dims()[1]], &a.device());
        grads.add_tn(at, alpha, a, b);
        grads.matrix(at)
    };
    let mut grads = LinearGrads { x: wanted.x.then(|| base.nn(dy)), ..LinearGrads::default() };
    if let (Some(Factors { a, b, scale }), Some(xa)) = (factors, xa) {
        let dxa = (wanted.x || wanted.a).then(|| matmul::nn(dy, b).scale(*scale)); // [tokens, r]
        if let Some(dxa) = &dxa {
            grads.x = grads.x.map(|dx| matmul::nn_add(dx, 1.0, dxa, a));
            grads.a = x.filter(|_| wanted.a).map(|x| product(1.0, dxa, x));
        }
        grads.b = wanted.b.then(|| product(*scale, dy, xa));
    }
    grads.weight = x.filter(|_| wanted.weight).map(|x| product(1.0, dy, x));
    grads.bias = wanted.bias.then(|| {
        let (mut sum, at) = Grads::of_matrix([1, dy.dims()[1]], &dy.device());
        sum.add_row_sum(at, dy);
        sum.matrix(at)
    });
    grads
}

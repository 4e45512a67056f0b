//! The gated norm in Burn ops; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

pub(crate) fn forward(x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let (n, _) = normalized(x, weight, eps);
    let n = n.cast(x.dtype()) * weight.clone().unsqueeze::<2>();
    let z = heads(z, weight);
    (n.cast(DType::F32) * (z.clone() * sigmoid(z))).reshape(x.dims()).cast(x.dtype())
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    z: &Tensor<2>,
    weight: &Tensor<1>,
    eps: f64,
) -> (Tensor<2>, Tensor<2>) {
    let (n, rstd) = normalized(x, weight, eps);
    let w = weight.clone().cast(DType::F32).unsqueeze::<2>();
    let (z, dy) = (heads(z, weight), heads(dy, weight));
    let s = sigmoid(z.clone());
    let slope = s.clone() * (z.clone() * (s.clone().neg() + 1.0) + 1.0);
    let dz = dy.clone() * w.clone() * n.clone() * slope;
    let g = dy * (z * s) * w;
    let along = (g.clone() * n.clone()).mean_dim(1);
    let dx = (g - n * along) * rstd;
    (dx.reshape(x.dims()).cast(x.dtype()), dz.reshape(x.dims()).cast(x.dtype()))
}

pub(crate) fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<1> {
    let (n, _) = normalized(x, weight, eps);
    let z = heads(z, weight);
    (heads(dy, weight) * (z.clone() * sigmoid(z)) * n).sum_dim(0).squeeze_dim(0)
}

/// n `[tokens · heads, width]` and rstd, in f32.
fn normalized(x: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> (Tensor<2>, Tensor<2>) {
    let x = heads(x, weight);
    let rstd = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip(); // [tokens · heads, 1]
    (x * rstd.clone(), rstd)
}

/// `[tokens, heads · width] → [tokens · heads, width]` in f32.
fn heads(t: &Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    let ([rows, columns], [width]) = (t.dims(), weight.dims());
    t.clone().cast(DType::F32).reshape([rows * columns / width, width])
}

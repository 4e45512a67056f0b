//! The causal convolution in Burn ops, one document at a time; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::Sequences;

pub(crate) fn forward(x: &Tensor<2>, weight: &Tensor<2>, sequences: &Sequences, past: Option<&Tensor<2>>) -> Tensor<2> {
    let outs: Vec<_> = sequences
        .documents()
        .map(|(start, length)| {
            let rows = padded(x.clone().narrow(0, start, length), weight, past);
            let p = sum(&rows, weight, length);
            (p.clone() * sigmoid(p)).cast(x.dtype())
        })
        .collect();
    if outs.is_empty() { x.clone() } else { Tensor::cat(outs, 0) }
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    sequences: &Sequences,
    weight_grad: bool,
) -> (Tensor<2>, Option<Tensor<2>>) {
    let [channels, width] = weight.dims();
    let mut dxs = Vec::new();
    let mut dw = weight_grad.then(|| Tensor::<2>::zeros([channels, width], (&x.device(), DType::F32)));
    for (start, length) in sequences.documents() {
        let rows = padded(x.clone().narrow(0, start, length), weight, None);
        let p = sum(&rows, weight, length);
        let s = sigmoid(p.clone());
        let slope = s.clone() * (p * (s.neg() + 1.0) + 1.0);
        let dp = dy.clone().narrow(0, start, length).cast(DType::F32) * slope;
        let after = Tensor::cat(vec![dp.clone(), zeros(width - 1, &dp)], 0);
        let taps = (0..width).map(|i| after.clone().narrow(0, i, length) * tap(weight, width - 1 - i));
        let dx = taps.reduce(|a, b| a + b).expect("a convolution has a tap");
        dxs.push(dx.cast(x.dtype()));
        dw = dw.map(|dw| {
            let columns = (0..width).map(|i| {
                let sums = (dp.clone() * rows.clone().narrow(0, i, length)).sum_dim(0);
                sums.reshape([channels, 1])
            });
            dw + Tensor::cat(columns.collect(), 1)
        });
    }
    (if dxs.is_empty() { x.clone() } else { Tensor::cat(dxs, 0) }, dw)
}

/// The rows of a document behind those before it, in f32.
fn padded(x: Tensor<2>, weight: &Tensor<2>, past: Option<&Tensor<2>>) -> Tensor<2> {
    let before = weight.dims()[1] - 1;
    let x = x.cast(DType::F32);
    let past = past.map_or_else(|| zeros(before, &x), |past| past.clone().cast(DType::F32));
    Tensor::cat(vec![past, x], 0)
}

/// p of a document, from the rows of [`padded`].
fn sum(rows: &Tensor<2>, weight: &Tensor<2>, length: usize) -> Tensor<2> {
    let taps = (0..weight.dims()[1]).map(|i| rows.clone().narrow(0, i, length) * tap(weight, i));
    taps.reduce(|a, b| a + b).expect("a convolution has a tap")
}

/// A column of the weights as a row in f32.
fn tap(weight: &Tensor<2>, i: usize) -> Tensor<2> {
    let [channels, _] = weight.dims();
    weight.clone().cast(DType::F32).narrow(1, i, 1).reshape([1, channels])
}

fn zeros(rows: usize, like: &Tensor<2>) -> Tensor<2> {
    Tensor::zeros([rows, like.dims()[1]], (&like.device(), DType::F32))
}

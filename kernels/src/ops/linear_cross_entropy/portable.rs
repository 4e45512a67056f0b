//! One chunk of head and loss in Burn ops; see [`super`].

use burn::tensor::{DType, Int, Tensor, TensorData};

pub(crate) fn forward(h: &Tensor<2>, weight: &Tensor<2>, targets: &[u32]) -> Vec<f32> {
    let (logits, max, sum) = exponentials(h, weight);
    host(losses(logits, max, sum, &column(targets, h)))
}

pub(crate) fn forward_dlogits(h: &Tensor<2>, weight: &Tensor<2>, targets: &[u32], scale: f32) -> (Vec<f32>, Tensor<2>) {
    let (logits, max, sum) = exponentials(h, weight);
    let at = column(targets, h);
    let nll = losses(logits.clone(), max.clone(), sum.clone(), &at);
    let softmax = (logits - max).exp() / sum;
    let device = h.device();
    let minus = Tensor::full([targets.len(), 1], -1.0, (&device, DType::F32));
    let dlogits = softmax.scatter(1, at, minus, burn::tensor::IndexingUpdateOp::Add) * scale;
    (host(nll), dlogits.cast(h.dtype()))
}

/// Logits, their maximum and the sum of shifted exponentials, row by row.
fn exponentials(h: &Tensor<2>, weight: &Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let logits = crate::ops::matmul::portable::product(h, weight, crate::ops::matmul::Form::Nt).cast(DType::F32); // [rows, vocab]
    let max = logits.clone().max_dim(1).detach();
    let sum = (logits.clone() - max.clone()).exp().sum_dim(1);
    (logits, max, sum)
}

/// `log Σ e^x − x[target]`, `[rows, 1]`.
fn losses(logits: Tensor<2>, max: Tensor<2>, sum: Tensor<2>, at: &Tensor<2, Int>) -> Tensor<2> {
    sum.log() + max - logits.gather(1, at.clone())
}

fn column(targets: &[u32], like: &Tensor<2>) -> Tensor<2, Int> {
    let targets: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let rows = targets.len();
    Tensor::from_data(TensorData::new(targets, [rows, 1]), (&like.device().inner(), DType::I32))
}

fn host(nll: Tensor<2>) -> Vec<f32> {
    nll.into_data_dtype(DType::F32).try_into_vec::<f32>().expect("cast to f32 just before")
}

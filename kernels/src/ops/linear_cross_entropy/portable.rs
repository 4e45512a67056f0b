//! One chunk of head and loss in Burn ops; see [`super`].

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};

use super::LmHead;
use super::token_log_probs::RowStatistics;
use crate::ops::matmul::{Form, portable::product};
use crate::tensor::on_wgpu;

pub(super) fn forward(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Vec<f32> {
    on_wgpu!(super::wgpu::forward(h, head, targets));
    let Exponentials { logits, max, exps: _, sum } = Exponentials::of(h, head);
    host(sum.log() + max - logits.gather(1, indices(targets, h)))
}

/// The losses, and the gradient of `Σ weights · nll` to h·Wᵀ.
pub(super) fn forward_dlogits(h: &Tensor<2>, head: &LmHead, targets: &[u32], weights: &[f32]) -> (Vec<f32>, Tensor<2>) {
    on_wgpu!(super::wgpu::forward_dlogits(h, head, targets, weights));
    let Exponentials { logits, max, exps, sum } = Exponentials::of(h, head);
    let nll = sum.clone().log() + max - logits.clone().gather(1, indices(targets, h));
    let dlogits = gradient(logits, exps / sum, head, targets, weights);
    (host(nll), dlogits.cast(h.dtype()))
}

pub(super) fn statistics(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Vec<RowStatistics> {
    on_wgpu!(super::wgpu::statistics(h, head, targets));
    let Exponentials { logits, max, exps, sum } = Exponentials::of(h, head);
    let logit = logits.clone().gather(1, indices(targets, h));
    // e^(x − max) is 0 below −104.
    let shifted = (exps * (logits - max.clone()).clamp_min(-104.0)).sum_dim(1);
    let values = host(Tensor::cat(vec![logit, max, sum, shifted], 1)); // [rows, 4]
    let row = |&[logit, max, sum, shifted]: &[f32; 4]| RowStatistics { logit, max, sum, shifted };
    values.as_chunks().0.iter().map(row).collect()
}

/// The gradient of `Σ weights · nll` to h·Wᵀ, from the statistics of the rows.
pub(super) fn dlogits(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[u32],
    weights: &[f32],
    statistics: &[RowStatistics],
) -> Tensor<2> {
    on_wgpu!(super::wgpu::dlogits(h, head, targets, weights, statistics));
    let logits = logits(h, head);
    let max = column(statistics.iter().map(|row| row.max).collect(), h);
    let sum = column(statistics.iter().map(|row| row.sum).collect(), h);
    let softmax = (logits.clone() - max).exp() / sum;
    gradient(logits, softmax, head, targets, weights).cast(h.dtype())
}

/// Logits with their maximum, the shifted exponentials and their sum, row by row.
struct Exponentials {
    logits: Tensor<2>,
    max: Tensor<2>,
    exps: Tensor<2>,
    sum: Tensor<2>,
}

impl Exponentials {
    fn of(h: &Tensor<2>, head: &LmHead) -> Self {
        let logits = logits(h, head);
        let max = logits.clone().max_dim(1).detach();
        let exps = (logits.clone() - max.clone()).exp();
        let sum = exps.clone().sum_dim(1);
        Self { logits, max, exps, sum }
    }
}

/// `[rows, vocab]`, in f32.
fn logits(h: &Tensor<2>, head: &LmHead) -> Tensor<2> {
    let mut logits = product(h, head.weight.burn(), Form::Nt).cast(DType::F32);
    if head.multiplier != 1.0 {
        logits = logits * head.multiplier;
    }
    match head.softcap {
        None => logits,
        Some(cap) => (logits / cap).tanh() * cap,
    }
}

fn gradient(logits: Tensor<2>, softmax: Tensor<2>, head: &LmHead, targets: &[u32], weights: &[f32]) -> Tensor<2> {
    let minus = column(vec![-1.0; targets.len()], &softmax);
    let at = indices(targets, &softmax);
    let dlogits = softmax.scatter(1, at, minus, IndexingUpdateOp::Add) * column(weights.to_vec(), &logits);
    match head.softcap {
        None => dlogits,
        // d(c·tanh(z / c))/dz = 1 − tanh²(z / c).
        Some(cap) => {
            let tanh = logits / cap;
            dlogits * ((tanh.clone() * tanh).neg() + 1.0)
        }
    }
}

/// `[rows, 1]` beside another tensor.
fn indices(targets: &[u32], like: &Tensor<2>) -> Tensor<2, Int> {
    let targets: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let rows = targets.len();
    Tensor::from_data(TensorData::new(targets, [rows, 1]), (&like.device().inner(), DType::I32))
}

/// Returns f32 values as a column, `[rows, 1]`.
fn column(values: Vec<f32>, like: &Tensor<2>) -> Tensor<2> {
    let rows = values.len();
    Tensor::from_data(TensorData::new(values, [rows, 1]), (&like.device(), DType::F32))
}

fn host(values: Tensor<2>) -> Vec<f32> {
    values.into_data_dtype(DType::F32).try_into_vec::<f32>().expect("cast to f32 just before")
}

//! The head and the loss together: nll = −log softmax(h · Wᵀ) at the target, without ever holding all logits.
//!
//! Only rows whose target counts are touched. They go through in chunks: logits, log-sum-exp, and, when
//! gradients are wanted, dlogits = grad_scale · (softmax − onehot) in place, dh = dlogits · W and
//! dW += dlogitsᵀ · h (the idea of Wijmans et al., arXiv:2411.09009, and of Liger's fused linear cross-entropy).
//!
//! # Shapes
//! h, dh `[tokens, hidden]`; W `[vocab, hidden]`; targets `[tokens]`, −100 = not counted.
//!
//! # Dtypes
//! Logits and everything after them in `f32`.

use burn::tensor::Tensor;

use crate::tensors::indices;
use crate::{Grads, ParamRef, Path, cpu, portable};

/// The target of a row that does not count.
pub const IGNORED: i32 = -100;

/// Logits held at once, but never fewer than 64 rows of them: 8 Mi values, 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

/// The negative log-likelihood of every target, 0 where it does not count, `[tokens]`.
pub fn forward(h: &Tensor<2>, weight: &Tensor<2>, targets: &[i32]) -> Vec<f32> {
    let rows = counted(targets);
    let mut nll = vec![0.0; targets.len()];
    for chunk in rows.chunks(chunk_rows(weight)) {
        let (h, targets) = pick(h, targets, chunk);
        let losses = match Path::of(&h) {
            Path::Cpu => cpu::linear_cross_entropy::forward(&h, weight, &targets),
            Path::Portable => portable::linear_cross_entropy::forward(&h, weight, &targets),
        };
        scatter(&mut nll, chunk, losses);
    }
    nll
}

/// As [`forward`], and the gradient of `grad_scale · Σ nll` to h; that to W goes to `weight_grad`.
pub fn forward_backward(
    h: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[i32],
    grad_scale: f32,
    mut weight_grad: Option<(&mut Grads, ParamRef)>,
) -> (Vec<f32>, Tensor<2>) {
    let rows = counted(targets);
    let mut nll = vec![0.0; targets.len()];
    let mut parts = Vec::new();
    for chunk in rows.chunks(chunk_rows(weight)) {
        let (hidden, targets) = pick(h, targets, chunk);
        let (losses, dlogits) = match Path::of(&hidden) {
            Path::Cpu => cpu::linear_cross_entropy::forward_dlogits(&hidden, weight, &targets, grad_scale),
            Path::Portable => portable::linear_cross_entropy::forward_dlogits(&hidden, weight, &targets, grad_scale),
        };
        scatter(&mut nll, chunk, losses);
        parts.push(crate::matmul::nn(&dlogits, weight));
        if let Some((grads, param)) = weight_grad.as_mut() {
            grads.add_tn(*param, 1.0, &dlogits, &hidden);
        }
    }
    if rows.len() == targets.len() && !rows.is_empty() {
        return (nll, Tensor::cat(parts, 0));
    }
    let device = h.device();
    let zeros = Tensor::zeros(h.dims(), (&device, h.dtype()));
    if rows.is_empty() {
        return (nll, zeros);
    }
    let dh = Tensor::cat(parts, 0);
    let dh = zeros.select_assign(0, indices(rows.iter().copied(), h), dh, burn::tensor::IndexingUpdateOp::Add);
    (nll, dh)
}

/// Rows of one chunk of logits: bounded by their size, a multiple of 64 where more than one chunk is needed.
fn chunk_rows(weight: &Tensor<2>) -> usize {
    (CHUNK_LOGITS / weight.dims()[0]).max(64) / 64 * 64
}

fn counted(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&t| targets[t] != IGNORED).collect()
}

fn pick(h: &Tensor<2>, targets: &[i32], rows: &[usize]) -> (Tensor<2>, Vec<u32>) {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    let hidden = if last - first + 1 == rows.len() {
        h.clone().narrow(0, first, rows.len())
    } else {
        h.clone().select(0, indices(rows.iter().copied(), h))
    };
    (hidden, rows.iter().map(|&t| targets[t] as u32).collect())
}

fn scatter(nll: &mut [f32], rows: &[usize], losses: Vec<f32>) {
    for (&row, loss) in rows.iter().zip(losses) {
        nll[row] = loss;
    }
}

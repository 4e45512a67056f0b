//! The output layer and the loss together: log p_t of each target, p = softmax of the logits of an [`LmHead`], and the
//! gradient of Σ w_t·nll_t with nll_t = −log p_t, without ever holding all logits.
//!
//! Only rows that have a target are computed. They go through in chunks: logits, the sums of their softmax, and the
//! gradient dx = w_t · multiplier · (1 − tanh²) · (p − onehot) to x = h·Wᵀ in the place of the logits (the factor 1 − tanh²
//! only with a softcap), then dh = dx·W and dW += dxᵀ·h (the idea of Wijmans et al., arXiv:2411.09009, and of Liger's
//! fused linear cross-entropy).
//!
//! There are two ways to a gradient. [`forward_backward`] is for weights that are known before the forward, and computes
//! the logits once. [`log_probs`], and later [`backward`] with weights that depend on its result, computes them twice; the
//! gradients of both are bit-identical on one device for the same weights. A loss L that is a function of log-probabilities has
//! the weights w_t = ∂L/∂nll_t = −∂L/∂log p_t.
//!
//! # Shapes
//! h, dh `[tokens, hidden]`; W `[vocab, hidden]`; targets and weights `[tokens]`, target −100 = none.
//!
//! # Dtypes
//! Logits and everything after them in `f32`; products in the dtype of h.
//!
//! # Gradients
//! To h and W, through the nll alone: entropies and arg-max flags have none. [`log_probs`] saves 16 bytes a token.

mod chunks;
mod cpu;
mod cuda;
mod head;
mod losses;
mod meta;
mod portable;
mod token_log_probs;
mod token_weights;
#[cfg(feature = "wgpu")]
mod wgpu;

use crate::{Backend, Grads, ParamRef, Tensor};
use chunks::chunks;

pub use head::LmHead;
pub use losses::Losses;
pub use token_log_probs::{LogProbValues, TokenLogProbs};
pub use token_weights::TokenWeights;

/// The target of a row that has none.
pub const IGNORED: i32 = -100;

/// Returns the losses of `targets`, `[tokens]`.
pub fn forward(h: &Tensor<2>, head: &LmHead, targets: &[i32]) -> Losses {
    let on_host = |chunk: fn(&burn::tensor::Tensor<2>, &LmHead, &[u32]) -> Vec<f32>| {
        let counted = counted(targets);
        let chunks = chunks(h.burn(), head, targets, &counted);
        let nll = chunks.flat_map(|part| chunk(&part.hidden, head, &part.targets)).collect();
        Losses::scattered(targets, nll)
    };
    match Backend::of(h) {
        Backend::Cpu => on_host(cpu::forward),
        Backend::Portable => on_host(portable::forward),
        Backend::Cuda => Losses(losses::Storage::Cuda(cuda::forward(h.cuda(), head, targets))),
        Backend::Meta => {
            meta::forward(h.meta(), head, targets);
            Losses::zeros(targets)
        }
    }
}

/// Returns the losses of [`forward`] and the gradient of Σ w_t·nll_t to h; adds that to W to `weight_grad`.
///
/// # Panics
/// If there are not as many weights as targets.
pub fn forward_backward(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[i32],
    weights: TokenWeights<'_>,
    weight_grad: Option<(&mut Grads, ParamRef)>,
) -> (Losses, Tensor<2>) {
    let counted = counted(targets);
    let weights = weights.of_rows(&counted, targets.len(), head.multiplier);
    match Backend::of(h) {
        backend @ (Backend::Cpu | Backend::Portable) => {
            let chunk = if backend == Backend::Cpu { cpu::forward_dlogits } else { portable::forward_dlogits };
            let mut nll = Vec::with_capacity(counted.len());
            let dlogits = |part: &chunks::Chunk| {
                let (losses, dlogits) = chunk(&part.hidden, head, &part.targets, &weights[part.range.clone()]);
                nll.extend(losses);
                dlogits
            };
            let dh = chunks::gradient(h.burn(), head, targets, &counted, dlogits, weight_grad);
            (Losses::scattered(targets, nll), dh.into())
        }
        Backend::Cuda => {
            let dw = weight_grad.map(|(grads, at)| grads.array(at));
            let (nll, dh) = cuda::forward_backward(h.cuda(), head, targets, &weights, dw.as_ref());
            (Losses(losses::Storage::Cuda(nll)), dh.into())
        }
        Backend::Meta => (Losses::zeros(targets), meta::backward(h.meta(), head, targets, weight_grad).into()),
    }
}

/// Returns the log-probability of each target, with the entropy of its distribution and whether it is the most likely
/// token.
pub fn log_probs(h: &Tensor<2>, head: &LmHead, targets: &[i32]) -> TokenLogProbs {
    use token_log_probs::{RowStatistics, Storage};
    let on_host = |chunk: fn(&burn::tensor::Tensor<2>, &LmHead, &[u32]) -> Vec<RowStatistics>| {
        let counted = counted(targets);
        let chunks = chunks(h.burn(), head, targets, &counted);
        Storage::Host(chunks.flat_map(|part| chunk(&part.hidden, head, &part.targets)).collect())
    };
    let rows = match Backend::of(h) {
        Backend::Cpu => on_host(cpu::statistics),
        Backend::Portable => on_host(portable::statistics),
        Backend::Cuda => Storage::Cuda(cuda::statistics(h.cuda(), head, targets)),
        Backend::Meta => {
            meta::forward(h.meta(), head, targets);
            Storage::Host(vec![RowStatistics::SINGLE; counted(targets).len()])
        }
    };
    TokenLogProbs { targets: targets.to_vec(), rows }
}

/// Returns the gradient of Σ w_t·nll_t to h, for the h, the head and the targets that `saved` was computed with; adds that
/// to W to `weight_grad`. Recomputes the logits.
///
/// # Panics
/// If there are not as many weights as targets.
pub fn backward(
    h: &Tensor<2>,
    head: &LmHead,
    saved: &TokenLogProbs,
    weights: TokenWeights<'_>,
    weight_grad: Option<(&mut Grads, ParamRef)>,
) -> Tensor<2> {
    let targets = &saved.targets;
    let counted = counted(targets);
    let weights = weights.of_rows(&counted, targets.len(), head.multiplier);
    match (Backend::of(h), &saved.rows) {
        (backend @ (Backend::Cpu | Backend::Portable), token_log_probs::Storage::Host(rows)) => {
            let chunk = if backend == Backend::Cpu { cpu::dlogits } else { portable::dlogits };
            let dlogits = |part: &chunks::Chunk| {
                let range = part.range.clone();
                chunk(&part.hidden, head, &part.targets, &weights[range.clone()], &rows[range])
            };
            chunks::gradient(h.burn(), head, targets, &counted, dlogits, weight_grad).into()
        }
        (Backend::Cuda, token_log_probs::Storage::Cuda(rows)) => {
            let dw = weight_grad.map(|(grads, at)| grads.array(at));
            cuda::backward(h.cuda(), head, targets, &weights, rows, dw.as_ref()).into()
        }
        (Backend::Meta, _) => meta::backward(h.meta(), head, targets, weight_grad).into(),
        (Backend::Cpu | Backend::Portable | Backend::Cuda, _) => crate::tensor::two_devices(),
    }
}

/// The rows that have a target.
fn counted(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&t| targets[t] != IGNORED).collect()
}

//! Causal depthwise convolution with SiLU, over documents that lie one after another.
//!
//! p[t, c] = Σ_{i < width} w[c, width − 1 − i] · x[t − i, c], where x is zero before the start of t's document, and
//! y = silu(p) (the short convolution of Mamba, Gu & Dao, arXiv:2312.00752; transformers' `causal_conv1d_fn`).
//!
//! dp = dy ∘ silu'(p); dx[t, c] = Σ_i w[c, width − 1 − i] · dp[t + i, c] inside the document;
//! dw[c, width − 1 − i] = Σ_t dp[t, c] · x[t − i, c].
//!
//! # Shapes
//! x, y `[tokens, channels]`; w `[channels, width]`.
//!
//! # Gradients
//! To x and, on demand, to w. Saved: x alone; the backward recomputes p.

mod cpu;
mod cuda;
mod meta;
mod portable;

use super::gated_delta::Sequences;
use crate::{Backend, Tensor};

/// Returns y.
pub fn forward(x: &Tensor<2>, weight: &Tensor<2>, sequences: &Sequences) -> Tensor<2> {
    check(x, weight);
    match Backend::of(x) {
        Backend::Cpu => cpu::forward(x.burn(), weight.burn(), sequences, None).into(),
        Backend::Portable => portable::forward(x.burn(), weight.burn(), sequences, None).into(),
        Backend::Cuda => cuda::forward(x.cuda(), weight.cuda(), Some(sequences.cuda()), None).into(),
        Backend::Meta => meta::forward(x.meta(), weight.meta()).into(),
    }
}

/// Returns y of the next tokens of one document; `past` `[width − 1, channels]` is x of the tokens before them, zeros before
/// the document's start.
pub fn forward_cached(x: &Tensor<2>, weight: &Tensor<2>, past: &Tensor<2>) -> Tensor<2> {
    check(x, weight);
    let [tokens, channels] = x.dims();
    assert_eq!(past.dims(), [weight.dims()[1] - 1, channels], "shape of the inputs before");
    let sequences = || Sequences::new(&[0, tokens as u32], &x.device());
    match Backend::of(x) {
        Backend::Cpu => cpu::forward(x.burn(), weight.burn(), &sequences(), Some(past.burn())).into(),
        Backend::Portable => portable::forward(x.burn(), weight.burn(), &sequences(), Some(past.burn())).into(),
        Backend::Cuda => cuda::forward(x.cuda(), weight.cuda(), None, Some(past.cuda())).into(),
        Backend::Meta => meta::forward(x.meta(), weight.meta()).into(),
    }
}

/// Returns the gradient to x and, if `weight_grad`, to w, in `f32` on CUDA.
pub fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    sequences: &Sequences,
    weight_grad: bool,
) -> (Tensor<2>, Option<Tensor<2>>) {
    check(x, weight);
    match Backend::of(x) {
        Backend::Cpu => {
            let (dx, dw) = cpu::backward(dy.burn(), x.burn(), weight.burn(), sequences, weight_grad);
            (dx.into(), dw.map(Into::into))
        }
        Backend::Portable => {
            let (dx, dw) = portable::backward(dy.burn(), x.burn(), weight.burn(), sequences, weight_grad);
            (dx.into(), dw.map(Into::into))
        }
        Backend::Cuda => {
            let (dx, dw) = cuda::backward(dy.cuda(), x.cuda(), weight.cuda(), sequences.cuda(), weight_grad);
            (dx.into(), dw.map(Into::into))
        }
        Backend::Meta => {
            let (dx, dw) = meta::backward(dy.meta(), x.meta(), weight.meta(), sequences, weight_grad);
            (dx.into(), dw.map(Into::into))
        }
    }
}

fn check(x: &Tensor<2>, weight: &Tensor<2>) {
    assert_eq!(x.dims()[1], weight.dims()[0], "channels of the convolution");
}

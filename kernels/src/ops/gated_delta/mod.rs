//! The gated delta rule, the recurrence of linear attention in Qwen3-Next and Qwen3.5, over documents that lie one after
//! another.
//!
//! A value head has a state S `[key_dim, value_dim]`, zero at the start of every document, and reads the key head of its
//! group. With q̂ = key_dim^-½ · q / √(Σq² + 1e-6), k̂ = k / √(Σk² + 1e-6), β = σ(b), g = −e^A · softplus(a + dt_bias), each
//! token computes S ← e^g·S, S ← S + k̂ ⊗ β(v − Sᵀk̂), o = Sᵀq̂ (Yang et al., arXiv:2412.06464; transformers'
//! `torch_recurrent_gated_delta_rule`).
//!
//! It is computed in chunks of 64 tokens. With G the sum of g up to a token of the chunk, D_ij = e^(G_i − G_j) for j ≤ i,
//! γ = e^G, c_j = e^(G_end − G_j), L = tril₋₁(β ∘ D ∘ K̂K̂ᵀ) and P = tril(D ∘ Q̂K̂ᵀ):
//! Δ = (I + L)⁻¹·β(V − γ ∘ K̂S), O = γ ∘ Q̂S + PΔ, S' = γ_end S + (c ∘ K̂)ᵀΔ.
//!
//! Backward, with E the gradient to S': dΔ = PᵀdO + (c ∘ K̂)E, dV = β ∘ (I + L)⁻ᵀdΔ, B = tril(dO·Δᵀ) ∘ D,
//! M = −tril₋₁(dV·Δᵀ) ∘ D, dQ̂ = γ ∘ dO·Sᵀ + BK̂, dK̂ = dR + dW with dR = −γ ∘ dV·Sᵀ + MK̂ and
//! dW = c ∘ ΔEᵀ + BᵀQ̂ + MᵀK̂, dS = γ_end E + Q̂ᵀ(γ ∘ dO) − K̂ᵀ(γ ∘ dV). With the parts of dQ̂, dR and
//! dW that come through a state marked by *, and H = B ∘ Q̂K̂ᵀ + M ∘ K̂K̂ᵀ, the gates get
//! dg_t = γ_end⟨S, E⟩ + Σ_{i ≥ t} (q̂_i·dQ̂*_i + k̂_i·dR*_i) + Σ_{j < t} k̂_j·dW*_j + Σ_{j < t ≤ i} H_ij, in which nothing cancels,
//! and db_i = (1 − β_i)·(v_i·dV_i + k̂_i·dR_i). For 16-bit operands CUDA sums dG_i = q̂_i·dQ̂_i + k̂_i·(dR_i − dW_i) from
//! t on instead of the last three terms.
//!
//! # Shapes
//! qkv `[tokens, 2 · key_heads · key_dim + value_heads · value_dim]`, queries first; a, b `[tokens, value_heads]`;
//! a_log, dt_bias `[value_heads]`; o `[tokens, value_heads · value_dim]`; a state
//! `[value_heads · key_dim, value_dim]`.
//!
//! # Dtypes
//! Gates, states and sums in `f32`; on CUDA, products of 16-bit operands round states and Δ to the operands' dtype.
//!
//! # Gradients
//! To every operand. Saved: the operands alone. The backward recomputes the states and holds one for each chunk.

mod cpu;
mod cuda;
mod meta;
mod portable;

use burn::tensor::Tensor as BurnTensor;
pub(crate) use cuda::Chunks as CudaChunks;

use crate::runtime::Array;
use crate::tensor::MetaTensor;
use crate::{Backend, Device, Tensor};

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;

/// Added to the sum of squares of queries and keys.
const EPS: f64 = 1e-6;

/// Heads of a gated delta layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaHeads {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values and states; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Channels of a query or key.
    pub key_dim: usize,
    /// Channels of a value.
    pub value_dim: usize,
}

impl DeltaHeads {
    /// Returns the width of all queries, and of all keys.
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Returns the width of all values.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Returns the width of queries, keys and values together.
    pub fn width(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Returns whether `device` computes these heads: on CUDA, heads have 16, 32, 64 or 128 channels.
    pub fn supported_by(&self, device: &Device) -> bool {
        match device {
            Device::Burn(_) | Device::Meta(_) => true,
            Device::Cuda(_) => [self.key_dim, self.value_dim].iter().all(|dim| cuda::DIMS.contains(dim)),
        }
    }

    /// Value heads that share a key head.
    fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }
}

/// The borders of a batch's documents, made once for all layers.
#[derive(Clone, Debug)]
pub struct Sequences {
    cu_seqlens: Vec<u32>,
    /// The chunks on a CUDA device.
    cuda: Option<cuda::Chunks>,
}

impl Sequences {
    /// Documents with these cumulative lengths, from 0 to the number of tokens.
    pub fn new(cu_seqlens: &[u32], device: &Device) -> Self {
        let cuda = match device {
            Device::Burn(_) | Device::Meta(_) => None,
            Device::Cuda(cuda) => Some(cuda::Chunks::new(cuda, cu_seqlens)),
        };
        Self { cu_seqlens: cu_seqlens.to_vec(), cuda }
    }

    /// First token and length of each document that has tokens.
    pub(crate) fn documents(&self) -> impl Iterator<Item = (usize, usize)> {
        let borders = self.cu_seqlens.windows(2);
        borders.map(|w| (w[0] as usize, (w[1] - w[0]) as usize)).filter(|&(_, length)| length > 0)
    }

    pub(crate) fn cuda(&self) -> &cuda::Chunks {
        self.cuda.as_ref().expect("the operands of one operation lie on one device")
    }

    fn tokens(&self) -> usize {
        self.cu_seqlens.last().map_or(0, |&n| n as usize)
    }
}

/// The operands.
#[derive(Clone, Debug)]
pub struct DeltaInputs {
    /// Queries, keys and values, side by side.
    pub qkv: Tensor<2>,
    /// The logits of β.
    pub b: Tensor<2>,
    /// The decay's input.
    pub a: Tensor<2>,
    /// The logarithm of the decay's rate.
    pub a_log: Tensor<1>,
    /// Added to `a`.
    pub dt_bias: Tensor<1>,
}

/// The gradients to [`DeltaInputs`].
#[derive(Clone, Debug)]
pub struct DeltaGrads {
    /// To queries, keys and values.
    pub qkv: Tensor<2>,
    /// To the logits of β.
    pub b: Tensor<2>,
    /// To the decay's input.
    pub a: Tensor<2>,
    /// To the logarithm of the decay's rate, in `f32` on CUDA.
    pub a_log: Tensor<1>,
    /// To the addend of `a`, in `f32` on CUDA.
    pub dt_bias: Tensor<1>,
}

/// Returns o.
pub fn forward(inputs: &DeltaInputs, heads: DeltaHeads, sequences: &Sequences) -> Tensor<2> {
    check(inputs, heads);
    assert_eq!(sequences.tokens(), inputs.qkv.dims()[0], "cu_seqlens end at the last token");
    match Backend::of(&inputs.qkv) {
        Backend::Cpu => cpu::forward(&inputs.burn(), heads, sequences, None).0.into(),
        Backend::Portable => portable::forward(&inputs.burn(), heads, sequences, None).0.into(),
        Backend::Cuda => cuda::forward(&inputs.cuda(), heads, sequences.cuda()).into(),
        Backend::Meta => meta::forward(&inputs.meta(), heads, sequences).into(),
    }
}

/// Returns the gradients for `d_o`, the gradient to o.
pub fn backward(d_o: &Tensor<2>, inputs: &DeltaInputs, heads: DeltaHeads, sequences: &Sequences) -> DeltaGrads {
    check(inputs, heads);
    match Backend::of(d_o) {
        Backend::Cpu => cpu::backward(d_o.burn(), &inputs.burn(), heads, sequences).into(),
        Backend::Portable => portable::backward(d_o.burn(), &inputs.burn(), heads, sequences).into(),
        Backend::Cuda => cuda::backward(d_o.cuda(), &inputs.cuda(), heads, sequences.cuda()).into(),
        Backend::Meta => meta::backward(d_o.meta(), &inputs.meta(), heads, sequences).into(),
    }
}

/// Returns o of the next tokens of one document and its state after them, in `f32`; `state` is that before them, and `None`
/// at the document's start. One token is a step of the recurrence.
pub fn forward_cached(inputs: &DeltaInputs, heads: DeltaHeads, state: Option<Tensor<2>>) -> (Tensor<2>, Tensor<2>) {
    check(inputs, heads);
    let sequences = Sequences::new(&[0, inputs.qkv.dims()[0] as u32], &inputs.qkv.device());
    match Backend::of(&inputs.qkv) {
        Backend::Cpu => {
            crate::tensor::pair(cpu::forward(&inputs.burn(), heads, &sequences, state.map(Tensor::into_burn)))
        }
        Backend::Portable => {
            crate::tensor::pair(portable::forward(&inputs.burn(), heads, &sequences, state.map(Tensor::into_burn)))
        }
        Backend::Cuda => {
            let state = state.map(Tensor::into_cuda);
            crate::tensor::pair(cuda::forward_cached(&inputs.cuda(), heads, sequences.cuda(), state))
        }
        Backend::Meta => {
            let o = meta::forward(&inputs.meta(), heads, &sequences);
            let new = || o.f32_sized([heads.value_heads * heads.key_dim, heads.value_dim]);
            let state = state.map_or_else(new, Tensor::into_meta);
            crate::tensor::pair((o, state))
        }
    }
}

/// [`DeltaInputs`] in the tensors of a backend: matrices and vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InputsIn<'a, M, V> {
    pub(crate) qkv: &'a M,
    pub(crate) b: &'a M,
    pub(crate) a: &'a M,
    pub(crate) a_log: &'a V,
    pub(crate) dt_bias: &'a V,
}

/// [`DeltaGrads`] in the tensors of a backend.
pub(crate) struct GradsIn<M, V> {
    pub(crate) qkv: M,
    pub(crate) b: M,
    pub(crate) a: M,
    pub(crate) a_log: V,
    pub(crate) dt_bias: V,
}

impl DeltaInputs {
    fn burn(&self) -> InputsIn<'_, BurnTensor<2>, BurnTensor<1>> {
        let Self { qkv, b, a, a_log, dt_bias } = self;
        InputsIn { qkv: qkv.burn(), b: b.burn(), a: a.burn(), a_log: a_log.burn(), dt_bias: dt_bias.burn() }
    }

    fn cuda(&self) -> InputsIn<'_, Array, Array> {
        let Self { qkv, b, a, a_log, dt_bias } = self;
        InputsIn { qkv: qkv.cuda(), b: b.cuda(), a: a.cuda(), a_log: a_log.cuda(), dt_bias: dt_bias.cuda() }
    }

    fn meta(&self) -> InputsIn<'_, MetaTensor, MetaTensor> {
        let Self { qkv, b, a, a_log, dt_bias } = self;
        InputsIn { qkv: qkv.meta(), b: b.meta(), a: a.meta(), a_log: a_log.meta(), dt_bias: dt_bias.meta() }
    }
}

impl<M: Into<Tensor<2>>, V: Into<Tensor<1>>> From<GradsIn<M, V>> for DeltaGrads {
    fn from(GradsIn { qkv, b, a, a_log, dt_bias }: GradsIn<M, V>) -> Self {
        Self { qkv: qkv.into(), b: b.into(), a: a.into(), a_log: a_log.into(), dt_bias: dt_bias.into() }
    }
}

fn check(inputs: &DeltaInputs, heads: DeltaHeads) {
    let [tokens, width] = inputs.qkv.dims();
    assert_eq!(width, heads.width(), "width of queries, keys and values");
    assert_eq!(inputs.a.dims(), [tokens, heads.value_heads], "shape of a");
    assert_eq!(inputs.b.dims(), [tokens, heads.value_heads], "shape of b");
    assert_eq!(inputs.a_log.dims(), [heads.value_heads], "shape of a_log");
    assert_eq!(inputs.dt_bias.dims(), [heads.value_heads], "shape of dt_bias");
    assert_eq!(heads.value_heads % heads.key_heads, 0, "{} value heads share keys", heads.value_heads);
}

//! The layers against the pairs of `rekindle-kernels`, to the bit, and against Burn's gradients of plain formulas.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use common::{bits, device, judge, noise, plain};
use rekindle_burn::{
    FlashAttention, FlashAttentionConfig, LinearCrossEntropyConfig, RmsNorm, RmsNormConfig, RotaryEmbeddingConfig,
    SwiGluConfig,
};
use rekindle_kernels::attention::{self, Documents, Heads, Saved};
use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::linear_cross_entropy::{self, LmHead};
use rekindle_kernels::rms_norm::{self, Gain};
use rekindle_kernels::{Device as Place, Tensor as Ours};

/// A leaf with a gradient, from the same numbers as [`plain`].
fn leaf<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
    common::tensor(&noise(seed, shape.iter().product()), shape, &device(), DType::F32).require_grad()
}

/// A norm whose factor is part of a graph.
fn norm(gamma: Tensor<3>, one_plus: bool) -> RmsNorm {
    let [_, _, n] = gamma.dims();
    RmsNorm { gamma: Param::initialized(ParamId::new(), gamma.reshape([n])), epsilon: 1e-5, one_plus }
}

#[test]
fn rms_norm_has_the_gradients_of_its_formula() {
    for one_plus in [false, true] {
        judge(
            "rms_norm",
            [[2, 3, 33], [1, 1, 33]],
            |[x, gamma]| norm(gamma, one_plus).forward(x),
            |[x, gamma]| {
                let rstd = (x.clone().powi_scalar(2).mean_dim(2) + 1e-5).sqrt().recip();
                x * rstd * if one_plus { gamma + 1.0 } else { gamma }
            },
        );
    }
}

#[test]
fn rms_norm_has_the_bits_of_its_pair() {
    let (x, gamma, dy) = (leaf(1, [5, 24]), leaf(2, [24]), plain(3, [5, 24]));
    let layer = RmsNorm { gamma: Param::initialized(ParamId::new(), gamma.clone()), epsilon: 1e-6, one_plus: false };
    let y = layer.forward(x.clone());
    let grads = (y.clone() * dy.clone()).sum().backward();

    let (x_plain, gain) = (Ours::from(plain(1, [5, 24])), Gain::Plain(plain(2, [24]).into()));
    let (y_pair, rstd) = rms_norm::forward(&x_plain, &gain, 1e-6, 0);
    let dy = Ours::from(dy);
    assert_eq!(bits(y), bits(y_pair.into()));
    let dx = rms_norm::backward(&dy, &x_plain, &gain, &rstd, None, 0);
    assert_eq!(bits(x.grad(&grads).unwrap()), bits(dx.into()));
    let dgamma = rms_norm::weight_grad(&dy, &x_plain, &rstd);
    assert_eq!(bits(gamma.grad(&grads).unwrap()), bits(dgamma.into()));
}

#[test]
fn swiglu_has_the_gradients_of_its_formula_and_the_bits_of_its_pair() {
    let layer = SwiGluConfig::new().init();
    let shape = [2, 3, 17];
    judge("swiglu", [shape, shape], |[g, u]| layer.forward(g, u), |[g, u]| activation::silu(g) * u);

    let (gate, up, dy) = (leaf(1, [4, 9]), leaf(2, [4, 9]), plain(3, [4, 9]));
    let y = layer.forward(gate.clone(), up.clone());
    let grads = (y.clone() * dy.clone()).sum().backward();
    let (g, u) = (Ours::from(plain(1, [4, 9])), Ours::from(plain(2, [4, 9])));
    assert_eq!(bits(y), bits(gated_activation::forward(Activation::Silu, &g, &u, 0).into()));
    let (dgate, dup, _) = gated_activation::backward(Activation::Silu, dy.into(), g, u);
    assert_eq!(bits(gate.grad(&grads).unwrap()), bits(dgate.into()));
    assert_eq!(bits(up.grad(&grads).unwrap()), bits(dup.into()));
}

/// Rotation in Burn's operations, of heads of 8 channels.
fn rotate(x: Tensor<3>, rotary: usize, interleaved: bool) -> Tensor<3> {
    let ([batch, seq, width], device, dtype) = (x.dims(), x.device(), x.dtype());
    let (heads, half) = (width / 8, rotary / 2);
    // Frequencies are f32, angles f64.
    let angle = |p: usize, i: usize| p as f64 * f64::from(100f64.powf(-2.0 * i as f64 / rotary as f64) as f32);
    let angles: Vec<f64> = (0..seq * half).map(|at| angle(at / half, at % half)).collect();
    let angles = TensorData::new(angles, [1, seq, 1, half]).try_cast(dtype).unwrap();
    let angles = Tensor::<4>::from_data(angles, (&device, dtype));
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let x = x.reshape([batch, seq, heads, 8]);
    let rest = x.clone().slice([0..batch, 0..seq, 0..heads, rotary..8]);
    let rotated = x.slice([0..batch, 0..seq, 0..heads, 0..rotary]);
    let part = |index: usize| {
        if interleaved {
            let pairs = rotated.clone().reshape([batch, seq, heads * half, 2]);
            return pairs.narrow(3, index, 1).reshape([batch, seq, heads, half]);
        }
        rotated.clone().narrow(3, index * half, half)
    };
    let (a, b) = (part(0), part(1));
    let (y1, y2) = (a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin);
    let y = if interleaved {
        Tensor::stack::<5>(vec![y1, y2], 4).reshape([batch, seq, heads, rotary])
    } else {
        Tensor::cat(vec![y1, y2], 3)
    };
    let parts = if rotary == 8 { vec![y] } else { vec![y, rest] };
    Tensor::cat(parts, 3).reshape([batch, seq, width])
}

#[test]
fn rotary_embedding_has_the_gradients_of_its_formula() {
    for (rotary, interleaved) in [(8, false), (8, true), (4, false)] {
        let config = RotaryEmbeddingConfig::new(8).with_theta(100.0).with_rotary_dim(Some(rotary));
        let layer = config.with_interleaved(interleaved).init();
        judge(
            &format!("rotary {rotary} {interleaved}"),
            [[2, 6, 16]],
            |[x]| layer.forward(x),
            |[x]| rotate(x, rotary, interleaved),
        );
    }
}

#[test]
fn rotary_embedding_takes_positions_of_packed_documents() {
    let layer = RotaryEmbeddingConfig::new(8).init();
    let x = plain(1, [7, 16]);
    let packed = layer.forward_at(x.clone(), &[0, 1, 2, 0, 1, 2, 3]);
    let first = layer.forward(x.clone().narrow(0, 0, 3).unsqueeze()).squeeze_dim::<2>(0);
    let second = layer.forward(x.narrow(0, 3, 4).unsqueeze()).squeeze_dim::<2>(0);
    assert_eq!(bits(packed), bits(Tensor::cat(vec![first, second], 0)));
}

fn attention(window: Option<usize>, softcap: Option<f32>) -> FlashAttention {
    FlashAttentionConfig::new(4, 2, 8).with_window(window).with_softcap(softcap).init()
}

/// Causal attention of 4 query heads and 2 key/value heads of 8 channels, with all scores.
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, window: Option<usize>, softcap: Option<f32>) -> Tensor<3> {
    let ([batch, seq, _], device, dtype) = (q.dims(), q.device(), q.dtype());
    let heads = |x: Tensor<3>, n: usize| {
        let x = x.reshape([batch, seq, n, 1, 8]).repeat_dim(3, 4 / n);
        x.reshape([batch, seq, 4, 8]).swap_dims(1, 2) // [batch, heads, seq, 8]
    };
    let (q, k, v) = (heads(q, 4), heads(k, 2), heads(v, 2));
    let mut scores = q.matmul(k.swap_dims(2, 3)) * 8f64.sqrt().recip();
    if let Some(softcap) = softcap {
        scores = (scores / softcap).tanh() * softcap;
    }
    let sees = |i: usize, j: usize| j <= i && window.is_none_or(|window| i - j < window);
    let mask: Vec<f32> = (0..seq * seq).map(|at| if sees(at / seq, at % seq) { 0.0 } else { -1e9 }).collect();
    let scores = scores + common::tensor(&mask, [1, 1, seq, seq], &device, dtype);
    activation::softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([batch, seq, 32])
}

#[test]
fn attention_has_the_gradients_of_its_formula() {
    for (window, softcap) in [(None, None), (Some(3), None), (None, Some(2.0))] {
        judge(
            &format!("attention {window:?} {softcap:?}"),
            [[2, 5, 32], [2, 5, 16], [2, 5, 16]],
            |[q, k, v]| attention(window, softcap).forward(q, k, v),
            |[q, k, v]| attend(q, k, v, window, softcap),
        );
    }
}

#[test]
fn packed_attention_has_the_bits_of_its_pair_and_of_its_documents() {
    let cu_seqlens = [0, 3, 9, 11];
    let (q, k, v, d_o) = (leaf(1, [11, 32]), leaf(2, [11, 16]), leaf(3, [11, 16]), plain(4, [11, 32]));
    let o = attention(None, None).forward_packed(q.clone(), k.clone(), v.clone(), &cu_seqlens);
    let grads = (o.clone() * d_o.clone()).sum().backward();

    let heads = Heads::new(4, 2, 8, 1.0 / 8f32.sqrt());
    let documents = Documents::new(&cu_seqlens, heads, &Place::cpu(), DType::F32);
    let [q1, k1, v1] = [(1, 32), (2, 16), (3, 16)].map(|(seed, width)| Ours::from(plain(seed, [11, width])));
    let (o1, lse) = attention::forward(&q1, &k1, &v1, None, heads, &documents, 0);
    assert_eq!(bits(o.clone()), bits(o1.clone().into()));
    let saved = Saved { q: q1, k: k1, v: v1, o: o1, lse };
    let pair = attention::backward(&d_o.into(), &saved, None, heads, &documents, 0);
    assert_eq!(bits(q.grad(&grads).unwrap()), bits(pair.q.into()));
    assert_eq!(bits(k.grad(&grads).unwrap()), bits(pair.k.into()));
    assert_eq!(bits(v.grad(&grads).unwrap()), bits(pair.v.into()));

    let document = |x: &Tensor<2>| x.clone().narrow(0, 3, 6).unsqueeze::<3>();
    let alone = attention(None, None).forward(document(&q), document(&k), document(&v));
    assert_eq!(bits(o.narrow(0, 3, 6)), bits(alone.squeeze_dim::<2>(0)));
}

#[test]
#[should_panic(expected = "cu_seqlens [0, 3, 2, 4] rise from 0 to the 4 tokens of q")]
fn borders_that_fall_are_refused() {
    let [q, kv] = [plain(1, [4, 32]), plain(2, [4, 16])];
    let _ = attention(None, None).forward_packed(q, kv.clone(), kv, &[0, 3, 2, 4]);
}

const TARGETS: [i32; 6] = [3, -100, 0, 10, 7, -100];

fn targets(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(TARGETS.to_vec(), [2, 3]), (device, DType::I32))
}

#[test]
fn cross_entropy_has_the_gradients_of_its_formula() {
    for softcap in [None, Some(1.5f32)] {
        let loss = LinearCrossEntropyConfig::new().with_multiplier(0.5).with_softcap(softcap).init();
        judge(
            &format!("cross-entropy {softcap:?}"),
            [[2, 3, 7], [1, 11, 7]],
            |[h, w]| loss.forward(h, w.squeeze_dim::<2>(0), targets(&device())).reshape([1, 1, 1]),
            |[h, w]| {
                let mut logits = h.reshape([6, 7]).matmul(w.squeeze_dim::<2>(0).transpose()) * 0.5;
                if let Some(cap) = softcap {
                    logits = (logits / cap).tanh() * cap;
                }
                let logs = activation::log_softmax(logits, 1);
                let of = |(row, &target): (usize, &i32)| {
                    (target >= 0).then(|| logs.clone().slice([row..row + 1, target as usize..target as usize + 1]))
                };
                let terms: Vec<Tensor<2>> = TARGETS.iter().enumerate().filter_map(of).collect();
                (Tensor::cat(terms, 0).sum() * -0.25).reshape([1, 1, 1])
            },
        );
    }
}

#[test]
fn cross_entropy_has_the_bits_of_its_pair() {
    let (h, w) = (leaf(1, [6, 7]), leaf(2, [11, 7]));
    let loss = LinearCrossEntropyConfig::new().init();
    let value = loss.forward(h.clone(), w.clone(), targets(&device()));
    let grads = value.clone().backward();
    let head = LmHead::new(plain(2, [11, 7]).into());
    let (losses, dh) =
        linear_cross_entropy::forward_backward(&plain(1, [6, 7]).into(), &head, &TARGETS, 0.25.into(), None);
    assert_eq!(bits(value.clone()), [((losses.sum() / 4.0) as f32).to_bits()]);
    assert_eq!(bits(h.grad(&grads).unwrap()), bits(dh.into()));
    // Without gradients it is the same loss.
    let untracked = loss.forward(h.detach(), w.detach(), targets(&device()));
    assert_eq!(bits(untracked), bits(value));
}

#[test]
fn an_input_without_autodiff_is_a_constant() {
    let layer = RmsNormConfig::new(8).init(&device());
    let y = layer.forward(plain(1, [3, 8]));
    let grads = y.sum().backward();
    assert!(layer.gamma.val().grad(&grads).is_some());
    // On a plain device there is no graph, and the values are the same.
    let inference = layer.valid();
    assert_eq!(bits(inference.forward(plain(1, [3, 8]))), bits(layer.forward(plain(1, [3, 8]))));
}

#[test]
fn a_parameter_used_twice_gets_the_sum_of_its_gradients() {
    let (x, other) = (plain(1, [3, 8]), plain(2, [3, 8]));
    let layer = RmsNormConfig::new(8).init(&device());
    let grad = |inputs: &[&Tensor<2>]| {
        let sum = inputs.iter().map(|x| layer.forward((*x).clone()).sum()).reduce(|a, b| a + b).unwrap();
        layer.gamma.val().grad(&sum.backward()).unwrap()
    };
    assert_eq!(bits(grad(&[&x, &other])), bits(grad(&[&x]) + grad(&[&other])));
}

#[test]
fn a_frozen_factor_gets_no_gradient() {
    let layer = RmsNormConfig::new(8).init(&device()).no_grad();
    let x = leaf(1, [3, 8]);
    let grads = layer.forward(x.clone()).sum().backward();
    assert!(x.grad(&grads).is_some());
    assert!(layer.gamma.val().grad(&grads).is_none());
}

#[test]
fn balanced_checkpointing_gives_the_same_gradients() {
    let grad = |device: Device| {
        let x = common::tensor(&noise(1, 24), [3, 8], &device, DType::F32).require_grad();
        let layer = RmsNormConfig::new(8).init(&device);
        // Burn recomputes the operations before and after the layer.
        let y = (layer.forward(x.clone().exp()) + 1.0).powi_scalar(2).sum();
        bits(x.grad(&y.backward()).unwrap())
    };
    assert_eq!(grad(device().gradient_checkpointing()), grad(device()));
}

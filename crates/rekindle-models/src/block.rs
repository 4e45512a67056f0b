//! One decoder block, forward and backward.
//!
//! h₂ = x + o_proj(attention(rope(norm(q)), rope(norm(k)), v)), with q, k, v of input_layernorm(x);
//! y = h₂ + down_proj(silu(gate) ∘ up), with gate, up of post_attention_layernorm(h₂).

mod kept;

use core::ops::Range;

use rekindle_kernels::attention::{self, Documents, Heads};
use rekindle_kernels::rope::{self, Angles, Norm};
use rekindle_kernels::{Grads, Params, Tensor, Weight, rms_norm, swiglu};
use rekindle_lora::{Dropout, LinearGroup};

pub(crate) use kept::Kept;

use crate::cache::LayerCache;
use kept::Middle;

/// A decoder block's weights.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) input_layernorm: Weight,
    pub(crate) qkv: LinearGroup,
    /// Norms of queries and keys, `[head_dim]` each.
    pub(crate) qk_norm: Option<(Weight, Weight)>,
    pub(crate) o: LinearGroup,
    pub(crate) post_attention_layernorm: Weight,
    pub(crate) gate_up: LinearGroup,
    pub(crate) down: LinearGroup,
    pub(crate) heads: Heads,
    pub(crate) eps: f64,
}

/// What all blocks share while a batch goes through.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) params: &'a Params,
    pub(crate) angles: &'a Angles,
    /// `None` while decoding.
    pub(crate) documents: Option<&'a Documents>,
    pub(crate) dropout: Option<Dropout<'a>>,
}

impl Context<'_> {
    fn documents(&self) -> &Documents {
        self.documents.expect("a whole batch says where its documents are")
    }
}

/// What a block keeps for its backward. SwiGLU's output is made again there.
pub(crate) struct Saved {
    front: Front,
    down: rekindle_lora::Saved,
}

/// A block up to the products that SwiGLU takes, and what the backward needs of it.
struct Front {
    /// `[tokens, hidden]`.
    x: Tensor<2>,
    rstd: Tensor<1>,
    /// x normalized; made again if it is not kept.
    n: Option<Tensor<2>>,
    qkv: rekindle_lora::Saved,
    /// q and k before their norms, with the norms' rstd.
    qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
    attention: attention::Saved,
    o: rekindle_lora::Saved,
    /// `[tokens, hidden]`.
    h2: Tensor<2>,
    rstd2: Tensor<1>,
    /// h₂ normalized; made again if it is not kept.
    n2: Option<Tensor<2>>,
    gate_up: rekindle_lora::Saved,
    /// `[tokens, intermediate]`.
    gate: Tensor<2>,
    /// `[tokens, intermediate]`.
    up: Tensor<2>,
}

impl Saved {
    /// What is kept for the backward without a hold on SwiGLU's output.
    pub(crate) fn kept(self) -> Self {
        Self { down: self.down.detached(), ..self }
    }
}

impl Block {
    /// Whether anything in here is trained.
    pub(crate) fn is_trained(&self) -> bool {
        let qk = self.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        let mut norms = qk.chain([&self.input_layernorm, &self.post_attention_layernorm]);
        self.groups().into_iter().any(LinearGroup::is_trained) || norms.any(|w| w.trained().is_some())
    }

    /// Where its parameters lie when all weights are trained: one after another.
    pub(crate) fn trained_range(&self) -> Range<usize> {
        let linears = self.groups().into_iter().flat_map(LinearGroup::linears);
        let qk = self.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        let weights = linears.flat_map(|linear| core::iter::once(&linear.weight).chain(&linear.bias));
        let weights = weights.chain(qk).chain([&self.input_layernorm, &self.post_attention_layernorm]);
        let ranges: Vec<Range<usize>> = weights.filter_map(|w| w.trained()).map(|at| at.range()).collect();
        let (start, end) = (ranges.iter().map(|r| r.start).min(), ranges.iter().map(|r| r.end).max());
        let whole = start.unwrap_or(0)..end.unwrap_or(0);
        debug_assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), whole.len(), "a block lies in one piece");
        whole
    }

    /// The groups of linears in the order of the forward pass.
    pub(crate) fn groups(&self) -> [&LinearGroup; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// As [`groups`](Self::groups).
    pub(crate) fn groups_mut(&mut self) -> [&mut LinearGroup; 4] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }

    /// Columns that the gradient to the block's output should have room for.
    pub(crate) fn room(&self) -> usize {
        self.o.room().max(self.down.room())
    }

    /// The block's output for x `[tokens, hidden]`.
    pub(crate) fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, Saved) {
        let front = self.front(ctx, x, None);
        let act = swiglu::forward(&front.gate, &front.up, self.down.room());
        let (y, down) = self.down.forward_onto(ctx.params, &act, ctx.dropout, &front.h2);
        (y, Saved { front, down })
    }

    /// What the forward saved, again; the block's output is computed only where nothing was kept of its last linear.
    pub(crate) fn resume(&self, ctx: Context<'_>, kept: Kept) -> Saved {
        match kept.take() {
            (x, middle, Some(down)) => Saved { front: self.front(ctx, x, middle), down },
            (x, _, None) => self.forward(ctx, x).1,
        }
    }

    fn front(&self, ctx: Context<'_>, x: Tensor<2>, middle: Option<Middle<Tensor<2>>>) -> Front {
        let norm = self.input_layernorm.vector(ctx.params);
        let (n, rstd) = rms_norm::forward(&x, &norm, self.eps, self.qkv.room());
        let Projected { q, k, v, qkv, qk } = self.project(ctx, &n);
        let n = Some(n).filter(|_| self.qkv.keeps_input());
        let norm2 = self.post_attention_layernorm.vector(ctx.params);
        let room = self.gate_up.room();
        let (Middle { o, lse, saved_o, h2 }, n2, rstd2) = match middle {
            Some(middle) => {
                let (n2, rstd2) = rms_norm::forward(&middle.h2, &norm2, self.eps, room);
                (middle, n2, rstd2)
            }
            None => {
                let (o, lse) = attention::forward(&q, &k, &v, self.heads, ctx.documents(), self.o.room());
                let (delta, saved_o) = one(self.o.forward(ctx.params, &o, ctx.dropout));
                let (h2, n2, rstd2) = rms_norm::add_forward(&x, delta, &norm2, self.eps, room);
                (Middle { o, lse, saved_o, h2 }, n2, rstd2)
            }
        };
        let (gate, up, gate_up) = two(self.gate_up.forward(ctx.params, &n2, ctx.dropout));
        let n2 = Some(n2).filter(|_| self.gate_up.keeps_input());
        let attention = attention::Saved { q, k, v, o, lse };
        Front { x, rstd, n, qkv, qk, attention, o: saved_o, h2, rstd2, n2, gate_up, gate, up }
    }

    /// The block's output for the next tokens of one document, whose earlier keys and values are in `cache`.
    pub(crate) fn decode(&self, ctx: Context<'_>, x: Tensor<2>, cache: &mut LayerCache) -> Tensor<2> {
        let (n, _) = rms_norm::forward(&x, &self.input_layernorm.vector(ctx.params), self.eps, self.qkv.room());
        let Projected { q, k, v, .. } = self.project(ctx, &n);
        let (k, v) = cache.append(k, v);
        let o = attention::forward_cached(&q, &k, &v, self.heads);
        let (delta, _) = one(self.o.forward(ctx.params, &o, None));
        let norm2 = self.post_attention_layernorm.vector(ctx.params);
        let (h2, n2, _) = rms_norm::add_forward(&x, delta, &norm2, self.eps, self.gate_up.room());
        let (gate, up, _) = two(self.gate_up.forward(ctx.params, &n2, None));
        let act = swiglu::forward(&gate, &up, self.down.room());
        self.down.forward_onto(ctx.params, &act, None, &h2).0
    }

    /// Adds the gradients of what is trained; returns the gradient to x if `want_dx`.
    pub(crate) fn backward(
        &self,
        ctx: Context<'_>,
        saved: Saved,
        dy: Tensor<2>,
        grads: &mut Grads,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let params = ctx.params;
        let Saved { front, down } = saved;
        let Front { x, rstd, n, qkv, qk, attention, o, h2, rstd2, n2, gate_up, gate, up } = front;

        let dys = core::slice::from_ref(&dy);
        let (d_act, pending) = self.down.backward_input(params, grads, &down, dys, ctx.dropout, true);
        let (d_gate, d_up, act) = swiglu::backward(d_act.expect("asked for"), gate, up);
        self.down.backward_params(grads, &act, &down, dys, pending, ctx.dropout);
        drop((act, down));
        let norm2 = self.post_attention_layernorm.vector(params);
        let n2 = n2.unwrap_or_else(|| rms_norm::recompute(&h2, &norm2, &rstd2));
        let dn2 = backward(&self.gate_up, ctx, grads, &n2, &gate_up, &[d_gate, d_up]);
        drop((n2, gate_up));
        if let Some(at) = self.post_attention_layernorm.trained() {
            grads.add(at, rms_norm::weight_grad(&dn2, &h2, &rstd2).as_row());
        }
        let dh2 = rms_norm::backward(&dn2, &h2, &norm2, &rstd2, Some(dy), self.room());
        drop((dn2, h2));

        let d_o = backward(&self.o, ctx, grads, &attention.o, &o, core::slice::from_ref(&dh2));
        drop(o);
        let (dq, dk, dv) = attention::backward(&d_o, &attention, self.heads, ctx.documents(), self.qkv.room());
        drop((attention, d_o));
        let (dq, dk) = self.turn_back(ctx, [dq, dk], &dv, qk, grads);
        let norm1 = self.input_layernorm.vector(params);
        let n = n.unwrap_or_else(|| rms_norm::recompute(&x, &norm1, &rstd));
        let want_dn = want_dx || self.input_layernorm.trained().is_some();
        let dn = self.qkv.backward(params, grads, &n, &qkv, &[dq, dk, dv], ctx.dropout, want_dn)?;
        if let Some(at) = self.input_layernorm.trained() {
            grads.add(at, rms_norm::weight_grad(&dn, &x, &rstd).as_row());
        }
        want_dx.then(|| rms_norm::backward(&dn, &x, &norm1, &rstd, Some(dh2), self.room()))
    }

    /// q, k, v of the normalized input, q and k normalized and turned.
    fn project(&self, ctx: Context<'_>, n: &Tensor<2>) -> Projected {
        let (ys, qkv) = self.qkv.forward(ctx.params, n, ctx.dropout);
        let [q, k, v] = ys.try_into().expect("q, k and v");
        let head_dim = self.heads.head_dim;
        let Some(norms) = self.norms(ctx.params) else {
            let [(q, _), (k, _)] = rope::forward_qk(q, k, &v, head_dim, None, ctx.angles);
            return Projected { q, k, v, qkv, qk: None };
        };
        let before = (q.clone(), k.clone());
        let [(q, rstd_q), (k, rstd_k)] = rope::forward_qk(q, k, &v, head_dim, Some(&norms), ctx.angles);
        let saved = |x, rstd: Option<Tensor<1>>| (x, rstd.expect("a norm leaves its rstd"));
        Projected { q, k, v, qkv, qk: Some([saved(before.0, rstd_q), saved(before.1, rstd_k)]) }
    }

    /// The gradients to q and k as the linears made them.
    fn turn_back(
        &self,
        ctx: Context<'_>,
        dqk: [Tensor<2>; 2],
        dv: &Tensor<2>,
        qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
        grads: &mut Grads,
    ) -> (Tensor<2>, Tensor<2>) {
        let head_dim = self.heads.head_dim;
        let (Some(norms), Some([q, k]), Some(weights)) = (self.norms(ctx.params), qk, &self.qk_norm) else {
            let [(dq, _), (dk, _)] = rope::backward_qk(dqk, dv, head_dim, None, ctx.angles, false);
            return (dq, dk);
        };
        let trained = [&weights.0, &weights.1].map(Weight::trained);
        let saved = [(&norms[0], q.0, &q.1), (&norms[1], k.0, &k.1)];
        let wanted = trained.iter().any(Option::is_some);
        let [(dq, dw_q), (dk, dw_k)] = rope::backward_qk(dqk, dv, head_dim, Some(saved), ctx.angles, wanted);
        for (at, dw) in trained.into_iter().zip([dw_q, dw_k]) {
            if let (Some(at), Some(dw)) = (at, dw) {
                grads.add(at, dw.as_row());
            }
        }
        (dq, dk)
    }

    fn norms(&self, params: &Params) -> Option<[Norm; 2]> {
        let norm = |weight: &Weight| Norm { weight: weight.vector(params), eps: self.eps };
        self.qk_norm.as_ref().map(|(q, k)| [norm(q), norm(k)])
    }
}

struct Projected {
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    qkv: rekindle_lora::Saved,
    qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
}

fn one((ys, saved): (Vec<Tensor<2>>, rekindle_lora::Saved)) -> (Tensor<2>, rekindle_lora::Saved) {
    let [y] = ys.try_into().expect("a group of one");
    (y, saved)
}

fn two((ys, saved): (Vec<Tensor<2>>, rekindle_lora::Saved)) -> (Tensor<2>, Tensor<2>, rekindle_lora::Saved) {
    let [a, b] = ys.try_into().expect("a group of two");
    (a, b, saved)
}

/// The backward of a group whose input's gradient is always needed.
fn backward(
    group: &LinearGroup,
    ctx: Context<'_>,
    grads: &mut Grads,
    x: &Tensor<2>,
    saved: &rekindle_lora::Saved,
    dys: &[Tensor<2>],
) -> Tensor<2> {
    group.backward(ctx.params, grads, x, saved, dys, ctx.dropout, true).expect("asked for")
}

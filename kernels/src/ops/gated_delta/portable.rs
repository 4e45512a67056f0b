//! The gated delta rule in Burn ops, a chunk of a document at a time and all heads together; the formulas stand in
//! [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::{CHUNK, DeltaHeads, EPS, GradsIn, InputsIn, Sequences};

type Inputs<'a> = InputsIn<'a, Tensor<2>, Tensor<1>>;

/// `(o, states)`; the states before the first token and after the last are those of one document.
pub(crate) fn forward(
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    sequences: &Sequences,
    start: Option<Tensor<2>>,
) -> (Tensor<2>, Tensor<2>) {
    let DeltaHeads { value_heads, key_dim, value_dim, .. } = heads;
    let shape = [value_heads, key_dim, value_dim];
    let device = inputs.qkv.device();
    let zeros = || Tensor::<3>::zeros(shape, (&device, DType::F32));
    let start = start.map(|state| state.reshape(shape));
    let mut end = zeros();
    let mut outs = Vec::new();
    for (first, length) in sequences.documents() {
        let mut state = start.clone().unwrap_or_else(zeros);
        for offset in (0..length).step_by(CHUNK) {
            let chunk = Chunk::new(inputs, heads, first + offset, CHUNK.min(length - offset));
            let delta = chunk.delta(&state);
            let o = chunk.q.clone().matmul(state.clone()) * chunk.gamma() + chunk.scores.clone().matmul(delta.clone());
            outs.push(join(o, inputs.qkv.dtype()));
            state = chunk.advance(state, delta);
        }
        end = state;
    }
    if outs.is_empty() {
        let o = Tensor::zeros([0, heads.value_width()], (&device, inputs.qkv.dtype()));
        return (o, end.reshape([value_heads * key_dim, value_dim]));
    }
    (Tensor::cat(outs, 0), end.reshape([value_heads * key_dim, value_dim]))
}

pub(crate) fn backward(
    d_o: &Tensor<2>,
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    sequences: &Sequences,
) -> GradsIn<Tensor<2>, Tensor<1>> {
    let DeltaHeads { key_heads, value_heads, key_dim, value_dim } = heads;
    let dtype = d_o.dtype();
    let (mut qkv, mut b, mut a) = (Vec::new(), Vec::new(), Vec::new());
    let zeros = || Tensor::<1>::zeros([value_heads], (&d_o.device(), DType::F32));
    let (mut a_log, mut dt_bias) = (zeros(), zeros());
    for (first, length) in sequences.documents() {
        let zeros = || Tensor::<3>::zeros([value_heads, key_dim, value_dim], (&d_o.device(), DType::F32));
        let (mut state, mut states) = (zeros(), Vec::new());
        for offset in (0..length).step_by(CHUNK) {
            let chunk = Chunk::new(inputs, heads, first + offset, CHUNK.min(length - offset));
            let delta = chunk.delta(&state);
            let next = chunk.advance(state.clone(), delta.clone());
            states.push((offset, state, delta));
            state = next;
        }
        let mut end = zeros();
        let mut of_document = Vec::new();
        for (offset, state, delta) in states.into_iter().rev() {
            let rows = CHUNK.min(length - offset);
            let chunk = Chunk::new(inputs, heads, first + offset, rows);
            let grad = split(d_o.clone().narrow(0, first + offset, rows), value_heads);
            let (gamma, to_end) = (chunk.gamma(), chunk.to_end());
            let d_delta =
                turn(chunk.scores.clone()).matmul(grad.clone()) + chunk.k.clone().matmul(end.clone()) * to_end.clone();
            let dv = turn(chunk.solve.clone()).matmul(d_delta) * chunk.beta.clone();
            let by_queries = grad.clone().matmul(turn(delta.clone())) * chunk.decay.clone();
            let by_keys = (dv.clone().matmul(turn(delta.clone())) * chunk.decay.clone()).tril(-1).neg();
            let asked = grad.clone().matmul(turn(state.clone())) * gamma.clone();
            let read = (dv.clone().matmul(turn(state.clone())) * gamma.clone()).neg();
            let at_end = delta.matmul(turn(end.clone())) * to_end;
            let last = gamma.clone().narrow(1, rows - 1, 1); // [heads, 1, 1]
            // What the gates get: through states, and through the decays between two tokens.
            let ones = ones_below(rows, &chunk.cum);
            let dot = |a: &Tensor<3>, b: &Tensor<3>| (a.clone() * b.clone()).sum_dim(2); // [heads, rows, 1]
            let from = turn(ones.clone()).matmul(dot(&chunk.q, &asked) + dot(&chunk.k, &read));
            let earlier = ones.clone().tril(-1);
            let before = earlier.clone().matmul(dot(&chunk.k, &at_end));
            let pairs = by_queries.clone() * chunk.q.clone().matmul(turn(chunk.k.clone()))
                + by_keys.clone() * chunk.k.clone().matmul(turn(chunk.k.clone()));
            let across = turn((pairs.matmul(turn(earlier)) * ones).sum_dim(1));
            let along = (state * end.clone()).sum_dim(1).sum_dim(2) * last.clone();
            let by_rate = (from + before + across + along) * chunk.rate.clone(); // rate: [heads, 1, 1]
            let dq = asked + by_queries.clone().matmul(chunk.k.clone());
            let reader = read + by_keys.clone().matmul(chunk.k.clone());
            let writer = turn(by_queries).matmul(chunk.q.clone()) + turn(by_keys).matmul(chunk.k.clone());
            let read = dot(&chunk.k, &reader);
            let value = (chunk.v.clone() * dv.clone()).sum_dim(2);
            let db = (chunk.beta.clone().neg() + 1.0) * (value + read);
            let da = by_rate.clone() * sigmoid(chunk.x.clone());
            a_log = a_log + (by_rate * softplus(chunk.x.clone())).sum_dim(1).reshape([value_heads]);
            dt_bias = dt_bias + da.clone().sum_dim(1).reshape([value_heads]);
            end = end * last + turn(chunk.q.clone()).matmul(grad * gamma.clone())
                - turn(chunk.k.clone()).matmul(dv.clone() * gamma);
            let dq = chunk.through_norm(0, dq, inputs, heads);
            let dk = chunk.through_norm(1, reader + at_end + writer, inputs, heads);
            let row = Tensor::cat(vec![dq, dk, join(dv, DType::F32)], 1).cast(dtype);
            of_document.push((row, join(db, dtype), join(da, dtype)));
        }
        for (row, db, da) in of_document.into_iter().rev() {
            qkv.push(row);
            b.push(db);
            a.push(da);
        }
    }
    assert_eq!(key_heads * heads.group(), value_heads, "value heads share key heads evenly");
    if qkv.is_empty() {
        let zeros = |like: &Tensor<2>| like.zeros_like();
        return GradsIn { qkv: zeros(inputs.qkv), b: zeros(inputs.b), a: zeros(inputs.a), a_log, dt_bias };
    }
    GradsIn { qkv: Tensor::cat(qkv, 0), b: Tensor::cat(b, 0), a: Tensor::cat(a, 0), a_log, dt_bias }
}

/// The quantities of a chunk's tokens for all value heads, `[heads, rows, …]` in f32.
struct Chunk {
    first: usize,
    rows: usize,
    /// Q̂ and K̂, repeated for the value heads of their group.
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    /// −e^A `[heads, 1, 1]`.
    rate: Tensor<3>,
    /// a + dt_bias.
    x: Tensor<3>,
    beta: Tensor<3>,
    /// G.
    cum: Tensor<3>,
    /// D, zero above the diagonal.
    decay: Tensor<3>,
    /// (I + L)⁻¹.
    solve: Tensor<3>,
    /// P.
    scores: Tensor<3>,
}

impl Chunk {
    fn new(inputs: &Inputs<'_>, heads: DeltaHeads, first: usize, rows: usize) -> Self {
        let DeltaHeads { value_heads, key_dim, .. } = heads;
        let normalized = |part: usize| {
            let x = keys(inputs, heads, part, first, rows);
            let norm = (x.clone() * x.clone()).sum_dim(2).add_scalar(EPS).sqrt();
            repeated(x / norm, heads)
        };
        let (q, k) = (normalized(0) * (key_dim as f64).powf(-0.5), normalized(1));
        let values = inputs.qkv.clone().narrow(1, 2 * heads.key_width(), heads.value_width());
        let v = split(values.narrow(0, first, rows), value_heads);
        let of_heads = |t: &Tensor<1>| t.clone().cast(DType::F32).reshape([value_heads, 1, 1]);
        let rate = of_heads(inputs.a_log).exp().neg();
        let x = split(inputs.a.clone().narrow(0, first, rows), value_heads) + of_heads(inputs.dt_bias);
        let beta = sigmoid(split(inputs.b.clone().narrow(0, first, rows), value_heads));
        let g = softplus(x.clone()) * rate.clone();
        let ones = ones_below(rows, &g);
        // Element (i, j) sums g after j and up to i: a difference of two large sums would lose the small ones.
        let between = ones.clone().matmul(g.clone() * ones.clone().tril(-1));
        let decay = between.exp().tril(0);
        let cum = ones.matmul(g);
        let scores = q.clone().matmul(turn(k.clone())) * decay.clone();
        let lower = (k.clone().matmul(turn(k.clone())) * decay.clone() * beta.clone()).tril(-1);
        let solve = inverse(lower);
        Self { first, rows, q, k, v, rate, x, beta, cum, decay, solve, scores }
    }

    fn gamma(&self) -> Tensor<3> {
        self.cum.clone().exp()
    }

    /// c.
    fn to_end(&self) -> Tensor<3> {
        turn(self.decay.clone().narrow(1, self.rows - 1, 1))
    }

    /// Δ from the state before the chunk.
    fn delta(&self, state: &Tensor<3>) -> Tensor<3> {
        let past = self.k.clone().matmul(state.clone()) * self.gamma();
        self.solve.clone().matmul((self.v.clone() - past) * self.beta.clone())
    }

    /// The state after the chunk.
    fn advance(&self, state: Tensor<3>, delta: Tensor<3>) -> Tensor<3> {
        let last = self.gamma().narrow(1, self.rows - 1, 1);
        state * last + turn(self.k.clone()).matmul(delta * self.to_end())
    }

    /// The gradient to queries (`part` 0) or keys (1) from that to Q̂ or K̂, `[rows, key_heads · key_dim]`.
    fn through_norm(&self, part: usize, grad: Tensor<3>, inputs: &Inputs<'_>, heads: DeltaHeads) -> Tensor<2> {
        let DeltaHeads { key_heads, key_dim, .. } = heads;
        let grad = grad.reshape([key_heads, heads.group(), self.rows, key_dim]).sum_dim(1).squeeze_dim::<3>(1);
        let factor = if part == 0 { (key_dim as f64).powf(-0.5) } else { 1.0 };
        let x = keys(inputs, heads, part, self.first, self.rows);
        let r = (x.clone() * x.clone()).sum_dim(2).add_scalar(EPS).sqrt().recip();
        let n = x * r.clone();
        let along = (n.clone() * grad.clone()).sum_dim(2);
        join((grad - n * along) * r * factor, DType::F32)
    }
}

/// Queries (`part` 0) or keys (1) of some tokens, `[key_heads, rows, key_dim]`.
fn keys(inputs: &Inputs<'_>, heads: DeltaHeads, part: usize, first: usize, rows: usize) -> Tensor<3> {
    let columns = inputs.qkv.clone().narrow(1, part * heads.key_width(), heads.key_width());
    split(columns.narrow(0, first, rows), heads.key_heads)
}

/// Key heads, each once for every value head of its group.
fn repeated(t: Tensor<3>, heads: DeltaHeads) -> Tensor<3> {
    let [key_heads, rows, width] = t.dims();
    t.unsqueeze_dim::<4>(1).repeat_dim(1, heads.group()).reshape([key_heads * heads.group(), rows, width])
}

/// (I + L)⁻¹ of a strictly lower triangular L `[heads, n, n]`: of both halves of the diagonal, and −A₂·L₂₁·A₁ below.
fn inverse(lower: Tensor<3>) -> Tensor<3> {
    let [heads, n, _] = lower.dims();
    if n == 1 {
        return lower + 1.0;
    }
    let half = n / 2;
    let block = |r: core::ops::Range<usize>, c| lower.clone().slice([0..heads, r, c]);
    let (first, second) = (inverse(block(0..half, 0..half)), inverse(block(half..n, half..n)));
    let below = second.clone().matmul(block(half..n, 0..half)).matmul(first.clone()).neg();
    let above = block(0..half, half..n); // zeros
    Tensor::cat(vec![Tensor::cat(vec![first, above], 2), Tensor::cat(vec![below, second], 2)], 1)
}

/// Ones on and below the diagonal, `[1, rows, rows]`, beside `like`.
fn ones_below(rows: usize, like: &Tensor<3>) -> Tensor<3> {
    Tensor::<3>::ones([1, rows, rows], (&like.device(), DType::F32)).tril(0).repeat_dim(0, like.dims()[0])
}

fn turn(t: Tensor<3>) -> Tensor<3> {
    t.swap_dims(1, 2)
}

fn softplus(x: Tensor<3>) -> Tensor<3> {
    x.clone().clamp_min(0.0) + x.abs().neg().exp().log1p()
}

/// `[rows, heads · width] → [heads, rows, width]` in f32.
fn split(t: Tensor<2>, heads: usize) -> Tensor<3> {
    let [rows, width] = t.dims();
    t.cast(DType::F32).reshape([rows, heads, width / heads]).swap_dims(0, 1)
}

/// The inverse of [`split`], in `dtype`.
fn join(t: Tensor<3>, dtype: DType) -> Tensor<2> {
    let [heads, rows, width] = t.dims();
    t.swap_dims(0, 1).reshape([rows, heads * width]).cast(dtype)
}

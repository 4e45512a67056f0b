//! One decoder block, in sizes; the twin of `crate::block`.

use super::ledger::{Held, Ledger, Use};
use super::{F32, Tokens};
use crate::ModelConfig;
use crate::names::Projection;

/// Elements of a weight in codes that are decoded at a time on the CPU.
const DECODED: usize = 512 * 1024;

/// Queries whose scores a thread holds.
const QUERIES: usize = 128;

/// What there is to a linear besides its shape.
pub(super) struct Adapted {
    /// The rank of its adapter, 0 without one.
    pub(super) r: usize,
    /// Whether it has a magnitude.
    pub(super) magnitude: bool,
    /// Whether its weight is in codes.
    pub(super) coded: bool,
}

/// A linear of a group.
struct LinearShape {
    input: usize,
    out: usize,
    biased: bool,
    adapted: Adapted,
}

/// Linears that read the same input.
struct Group(Vec<LinearShape>);

/// A block's groups.
pub(super) struct BlockShape {
    qkv: Group,
    o: Group,
    gate_up: Group,
    down: Group,
    trained: bool,
}

/// One pass of a batch.
pub(super) struct Pass<'a> {
    pub(super) ledger: &'a Ledger,
    pub(super) config: &'a ModelConfig,
    pub(super) element: usize,
    pub(super) threads: usize,
    pub(super) dropout: bool,
    pub(super) tokens: Tokens,
}

/// What a block keeps for its backward.
pub(super) struct Saved<'l> {
    x: Held<'l>,
    /// `None` where it is computed again.
    front: Option<Front<'l>>,
    down: Vec<Held<'l>>,
}

struct Front<'l> {
    rstd: Held<'l>,
    qkv: Vec<Held<'l>>,
    /// Before the norms.
    qk: Vec<Held<'l>>,
    /// q, k, v, o and lse.
    attention: Vec<Held<'l>>,
    o: Vec<Held<'l>>,
    h2: [Held<'l>; 2],
    gate_up: Vec<Held<'l>>,
    gate: Held<'l>,
    up: Held<'l>,
}

impl BlockShape {
    pub(super) fn new(
        c: &ModelConfig,
        layer: usize,
        trained: bool,
        adapted: impl Fn(&str, [usize; 2]) -> Adapted,
    ) -> Self {
        let group = |projections: &[Projection]| {
            Group(
                projections
                    .iter()
                    .map(|projection| {
                        let dims @ [out, input] = projection.shape(c);
                        let adapted = adapted(&projection.module(layer), dims);
                        LinearShape { input, out, biased: projection.has_bias(c), adapted }
                    })
                    .collect(),
            )
        };
        let mut shape = Self {
            qkv: group(&[Projection::Q, Projection::K, Projection::V]),
            o: group(&[Projection::O]),
            gate_up: group(&[Projection::Gate, Projection::Up]),
            down: group(&[Projection::Down]),
            trained,
        };
        shape.trained |= [&shape.qkv, &shape.o, &shape.gate_up, &shape.down].iter().any(|group| group.rank() > 0);
        shape
    }

    pub(super) fn is_trained(&self) -> bool {
        self.trained
    }
}

impl Group {
    fn rank(&self) -> usize {
        self.0.iter().map(|linear| linear.adapted.r).sum()
    }
}

impl Saved<'_> {
    /// What stays when most is computed again.
    pub(super) fn reduced(self) -> Self {
        Self { front: None, ..self }
    }
}

impl<'l> Pass<'l> {
    /// An activation of so many columns that passes through.
    pub(super) fn passing(&self, columns: usize) -> Held<'l> {
        self.ledger.hold(Use::Scratch, self.tokens.all * columns * self.element)
    }

    fn saved(&self, columns: usize) -> Held<'l> {
        self.ledger.hold(Use::SavedActivations, self.tokens.all * columns * self.element)
    }

    fn statistics(&self, columns: usize) -> Held<'l> {
        self.ledger.hold(Use::SavedActivations, self.tokens.all * columns * F32)
    }

    /// The block's output, and what is kept.
    pub(super) fn forward(&self, shape: &BlockShape, x: Held<'l>) -> (Held<'l>, Saved<'l>) {
        let front = self.front(shape);
        let act = self.passing(self.config.intermediate_size);
        let (y, down) = self.group(&shape.down, false);
        drop(act);
        let [y] = <[Held<'l>; 1]>::try_from(y).expect("a group of one");
        (y, Saved { x: x.becoming(Use::SavedActivations), front: Some(front), down })
    }

    /// What the forward saved, again.
    pub(super) fn resume(&self, shape: &BlockShape, saved: Saved<'l>) -> Saved<'l> {
        if shape.down.0[0].adapted.magnitude {
            let Saved { x, down, .. } = saved;
            drop(down);
            return self.forward(shape, x).1;
        }
        Saved { front: Some(self.front(shape)), ..saved }
    }

    fn front(&self, shape: &BlockShape) -> Front<'l> {
        let c = self.config;
        let (n, rstd) = (self.passing(c.hidden_size), self.statistics(1));
        let (projected, qkv) = self.group(&shape.qkv, true);
        let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads);
        let (q, k) = (heads * c.head_dim, kv_heads * c.head_dim);
        let mut attention = projected;
        let mut qk = Vec::new();
        if c.qk_norm {
            let turned = [self.saved(q), self.statistics(heads), self.saved(k), self.statistics(kv_heads)];
            let v = attention.pop();
            qk = core::mem::take(&mut attention);
            attention.extend(v);
            attention.extend(turned);
        }
        drop(n);
        let scores = self.scores(1);
        attention.extend([self.saved(q), self.statistics(heads)]);
        drop(scores);
        let (delta, o) = self.group(&shape.o, true);
        // The sum with the block's input lies where the result lay.
        let [h2] = <[Held<'l>; 1]>::try_from(delta).expect("a group of one");
        let (rstd2, n2) = (self.statistics(1), self.passing(c.hidden_size));
        let (gate_and_up, gate_up) = self.group(&shape.gate_up, true);
        drop(n2);
        let [gate, up] = <[Held<'l>; 2]>::try_from(gate_and_up).expect("a group of two");
        Front { rstd, qkv, qk, attention, o, h2: [h2, rstd2], gate_up, gate, up }
    }

    /// The gradient to the block's input, if it is wanted.
    pub(super) fn backward(
        &self,
        shape: &BlockShape,
        saved: Saved<'l>,
        dy: Held<'l>,
        want_dx: bool,
    ) -> Option<Held<'l>> {
        let c = self.config;
        let Saved { x, front, down } = saved;
        let Front { rstd, qkv, qk, attention, o, h2, gate_up, gate, up } = front.expect("it was computed again");
        let (d_act, pending) = self.backward_input(&shape.down, true);
        let act = self.passing(c.intermediate_size);
        // The gradients to gate and up lie where these lay.
        let (d_gate, d_up) = (gate.becoming(Use::Scratch), up.becoming(Use::Scratch));
        drop(d_act);
        self.backward_params(&shape.down);
        drop((act, down, pending));
        let n2 = self.passing(c.hidden_size);
        let (dn2, pending) = self.backward_input(&shape.gate_up, true);
        self.backward_params(&shape.gate_up);
        drop((d_gate, d_up, pending, n2, gate_up));
        // Onto dy.
        let dh2 = dy;
        drop((dn2, h2));
        let (d_o, pending) = self.backward_input(&shape.o, true);
        self.backward_params(&shape.o);
        drop((pending, o));
        let (q, k) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let scores = self.scores(2);
        let dqkv = [self.passing(q), self.passing(k), self.passing(k)];
        drop((scores, attention, d_o));
        if c.qk_norm {
            drop([self.passing(q)]);
            drop(qk);
        }
        let n = self.passing(c.hidden_size);
        let (dn, pending) = self.backward_input(&shape.qkv, want_dx);
        self.backward_params(&shape.qkv);
        drop((pending, dqkv, n, qkv, x, rstd));
        drop(dn);
        want_dx.then_some(dh2)
    }

    /// Results and what is kept of a group's forward; `kept` says whether the results stay for the backward.
    fn group(&self, group: &Group, kept: bool) -> (Vec<Held<'l>>, Vec<Held<'l>>) {
        let input = group.0.first().map_or(0, |linear| linear.input);
        let dropped = self.dropped(group, input);
        let mut saved = vec![self.saved(group.rank())];
        let results = group.0.iter().map(|linear| {
            let y = if kept { self.saved(linear.out) } else { self.passing(linear.out) };
            let _scratch = self.decoded(linear);
            let _bias = linear.biased.then(|| self.ledger.hold(Use::Scratch, linear.out * self.element));
            if linear.adapted.magnitude {
                saved.push(self.saved(linear.out));
            }
            y
        });
        let results = results.collect();
        drop(dropped);
        (results, saved)
    }

    /// The gradients to the input and to x·Aᵀ.
    fn backward_input(&self, group: &Group, want_dx: bool) -> (Option<Held<'l>>, Vec<Held<'l>>) {
        let input = group.0.first().map_or(0, |linear| linear.input);
        let mut pending = vec![self.passing(group.rank())];
        let mut dx = None;
        for linear in &group.0 {
            if linear.adapted.magnitude {
                // dy by the factors, kept for the parameters, and dy by z on the way there.
                drop([self.passing(linear.out), self.passing(linear.out)]);
                pending.push(self.passing(linear.out));
            }
            if want_dx {
                dx.get_or_insert_with(|| self.passing(input));
                let _scratch = self.decoded(linear);
            }
        }
        if group.0.len() > 1 {
            // The parts lie beside one another before they are one matrix.
            drop(self.passing(group.rank()));
        }
        if want_dx && self.dropout && group.rank() > 0 {
            let _through = [self.passing(input), self.passing(input), self.passing(input)];
        }
        (dx, pending)
    }

    fn backward_params(&self, group: &Group) {
        let input = group.0.first().map_or(0, |linear| linear.input);
        drop(self.dropped(group, input));
    }

    /// The input with a part dropped, and the mask on the way there.
    fn dropped(&self, group: &Group, input: usize) -> Option<Held<'l>> {
        (self.dropout && group.rank() > 0).then(|| {
            let _mask = self.ledger.hold(Use::Scratch, self.tokens.all * input * F32);
            self.passing(input)
        })
    }

    /// Scratch memory that a weight in codes is decoded into.
    fn decoded(&self, linear: &LinearShape) -> Option<Held<'l>> {
        let rows = (DECODED / linear.input.max(1)).clamp(1, linear.out.max(1));
        linear.adapted.coded.then(|| self.ledger.hold(Use::Scratch, rows * linear.input * F32))
    }

    /// Matrices of scores that the threads hold, and the gradients to keys and values of a document.
    fn scores(&self, matrices: usize) -> Held<'l> {
        let scores = matrices * QUERIES.min(self.tokens.longest) * self.tokens.longest;
        let rows = if matrices > 1 { 2 * self.tokens.longest * self.config.head_dim } else { 0 };
        self.ledger.hold(Use::Scratch, self.threads * F32 * (scores + rows))
    }
}

//! The gated delta rule over several documents.

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::gated_delta::{self, DeltaHeads, DeltaInputs, Sequences};
use rekindle_kernels::{Device, Tensor, from_f32, to_f32};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

pub(crate) struct GatedDelta {
    pub(crate) heads: DeltaHeads,
    pub(crate) cu_seqlens: Vec<u32>,
    qkv: Vec<f32>,
    b: Vec<f32>,
    a: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    d_o: Vec<f32>,
}

impl GatedDelta {
    /// Decays from a few per cent to e⁻⁸ a token. With less, the gradients to the decays are sums over whole documents in which
    /// most terms cancel, and the order of a sum decides its error.
    pub(crate) fn new(lengths: &[usize], [key_heads, value_heads]: [usize; 2], dims: [usize; 2], dtype: DType) -> Self {
        let [key_dim, value_dim] = dims;
        let heads = DeltaHeads { key_heads, value_heads, key_dim, value_dim };
        let tokens: usize = lengths.iter().sum();
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(lengths.iter().scan(0, |end, length| {
            *end += *length as u32;
            Some(*end)
        }));
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        let rates = (0..value_heads).map(|h| (0.2 + 7.0 * h as f32 / value_heads as f32).ln()).collect();
        Self {
            heads,
            cu_seqlens,
            qkv: input(1, tokens * heads.width(), 1.0),
            b: input(2, tokens * value_heads, 3.0),
            a: input(3, tokens * value_heads, 2.0),
            a_log: rounded(rates, dtype),
            dt_bias: input(4, value_heads, 1.0),
            d_o: input(5, tokens * heads.value_width(), 1.0),
        }
    }

    fn tokens(&self) -> usize {
        *self.cu_seqlens.last().expect("starts with 0") as usize
    }

    fn graph(&self, dtype: DType, rule: impl Fn(&[BurnTensor<2>; 3], &[BurnTensor<1>; 2]) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (tokens, heads) = (self.tokens(), self.heads);
        let matrices = [
            oracle.leaf(&self.qkv, [tokens, heads.width()]),
            oracle.leaf(&self.b, [tokens, heads.value_heads]),
            oracle.leaf(&self.a, [tokens, heads.value_heads]),
        ];
        let vectors = [&self.a_log, &self.dt_bias].map(|values| oracle.leaf(values, [heads.value_heads]));
        let o = rule(&matrices, &vectors);
        let grads = (o.clone() * oracle.constant(&self.d_o, [tokens, heads.value_width()])).sum().backward();
        vec![
            ("o", values(o)),
            ("dqkv", grad(&matrices[0], &grads)),
            ("db", grad(&matrices[1], &grads)),
            ("da", grad(&matrices[2], &grads)),
            ("da_log", grad(&vectors[0], &grads)),
            ("ddt_bias", grad(&vectors[1], &grads)),
        ]
    }

    /// The recurrence, one token after another.
    fn plain(&self, [qkv, b, a]: &[BurnTensor<2>; 3], [a_log, dt_bias]: &[BurnTensor<1>; 2]) -> BurnTensor<2> {
        let DeltaHeads { key_heads, value_heads, key_dim, value_dim } = self.heads;
        let tokens = self.tokens();
        let key_width = self.heads.key_width();
        let normalized = |part: usize| {
            let x = qkv.clone().narrow(1, part * key_width, key_width).reshape([tokens, key_heads, key_dim]);
            let norm = (x.clone() * x.clone()).sum_dim(2).add_scalar(1e-6).sqrt();
            let repeated = (x / norm).unsqueeze_dim::<4>(2).repeat_dim(2, value_heads / key_heads);
            repeated.reshape([tokens, value_heads, key_dim])
        };
        let (q, k) = (normalized(0) * (key_dim as f64).powf(-0.5), normalized(1));
        let v = qkv.clone().narrow(1, 2 * key_width, self.heads.value_width());
        let v = v.reshape([tokens, value_heads, value_dim]);
        let x = a.clone() + dt_bias.clone().unsqueeze::<2>();
        let softplus = x.clone().exp().log1p();
        let decay = (softplus * a_log.clone().exp().unsqueeze::<2>()).neg().exp();
        let beta = sigmoid(b.clone());
        let mut outs = Vec::new();
        for w in self.cu_seqlens.windows(2) {
            let mut state = BurnTensor::<3>::zeros([value_heads, key_dim, value_dim], (&qkv.device(), qkv.dtype()));
            for t in w[0] as usize..w[1] as usize {
                let of = |x: &BurnTensor<2>| x.clone().narrow(0, t, 1).reshape([value_heads, 1, 1]);
                let column = |x: &BurnTensor<3>| x.clone().narrow(0, t, 1).reshape([value_heads, key_dim, 1]);
                let value = v.clone().narrow(0, t, 1).reshape([value_heads, 1, value_dim]);
                state = state * of(&decay);
                let past = (state.clone() * column(&k)).sum_dim(1);
                state = state + column(&k) * ((value - past) * of(&beta));
                outs.push((state.clone() * column(&q)).sum_dim(1).reshape([1, value_heads * value_dim]));
            }
        }
        BurnTensor::cat(outs, 0)
    }

    pub(crate) fn inputs(&self, place: &Place) -> DeltaInputs {
        let (tokens, heads) = (self.tokens(), self.heads);
        DeltaInputs {
            qkv: place.matrix(&self.qkv, [tokens, heads.width()]),
            b: place.matrix(&self.b, [tokens, heads.value_heads]),
            a: place.matrix(&self.a, [tokens, heads.value_heads]),
            a_log: place.vector(&self.a_log),
            dt_bias: place.vector(&self.dt_bias),
        }
    }
}

impl Case for GatedDelta {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |matrices, vectors| self.plain(matrices, vectors))
    }

    fn ours(&self, place: &Place) -> Results {
        let inputs = self.inputs(place);
        let sequences = Sequences::new(&self.cu_seqlens, &place.device);
        let o = gated_delta::forward(&inputs, self.heads, &sequences);
        let d_o = place.matrix(&self.d_o, [self.tokens(), self.heads.value_width()]);
        let grads = gated_delta::backward(&d_o, &inputs, self.heads, &sequences);
        vec![
            ("o", values(o)),
            ("dqkv", values(grads.qkv)),
            ("db", values(grads.b)),
            ("da", values(grads.a)),
            ("da_log", values(grads.a_log)),
            ("ddt_bias", values(grads.dt_bias)),
        ]
    }

    fn differentiated(&self) -> Option<Results> {
        let sequences = Sequences::new(&self.cu_seqlens, &Device::cpu());
        Some(self.graph(DType::F32, |[qkv, b, a], [a_log, dt_bias]| {
            let [qkv, b, a] = [qkv, b, a].map(|t| Tensor::from(t.clone()));
            let [a_log, dt_bias] = [a_log, dt_bias].map(|t| Tensor::from(t.clone()));
            gated_delta::forward(&DeltaInputs { qkv, b, a, a_log, dt_bias }, self.heads, &sequences).into()
        }))
    }
}

impl std::fmt::Debug for GatedDelta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let DeltaHeads { key_heads, value_heads, key_dim, value_dim } = self.heads;
        let ends = &self.cu_seqlens[1..];
        write!(f, "gated delta {key_heads}/{value_heads} heads of {key_dim}/{value_dim}, documents to {ends:?}")
    }
}

/// Tokens one at a time, and a document in two parts, through the state: the results and the state of the whole document,
/// within `bound` of the largest.
pub(crate) fn states_continue_a_document(device: &Device, dtype: DType, dims: [usize; 2], bound: f32) {
    let case = GatedDelta::new(&[150], [2, 4], dims, dtype);
    let place = Place::new(device.clone(), dtype, super::Layout::Owned);
    let (inputs, heads) = (case.inputs(&place), case.heads);
    let (whole, last) = gated_delta::forward_cached(&inputs, heads, None);
    let (whole, last) = (to_f32(whole), to_f32(last));
    let single: Vec<usize> = vec![1; 150];
    for parts in [&[75, 75][..], &[1, 149], &[64, 64, 22], &single] {
        let (mut outs, mut state, mut first) = (Vec::new(), None, 0);
        for &rows in parts {
            let part = |t: &Tensor<2>| from_rows(t, first, rows, &place);
            let inputs = DeltaInputs {
                qkv: part(&inputs.qkv),
                b: part(&inputs.b),
                a: part(&inputs.a),
                a_log: inputs.a_log.clone(),
                dt_bias: inputs.dt_bias.clone(),
            };
            let (o, after) = gated_delta::forward_cached(&inputs, heads, state);
            outs.extend(to_f32(o));
            state = Some(after);
            first += rows;
        }
        let state = to_f32(state.expect("there are parts"));
        for (what, got, want) in [("o", &outs, &whole), ("state", &state, &last)] {
            let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                assert!((g - w).abs() <= bound * largest, "{parts:?}: {what}[{i}] is {g}, not {w}");
            }
            assert_eq!(got.len(), want.len());
        }
    }
}

fn from_rows(t: &Tensor<2>, first: usize, rows: usize, place: &Place) -> Tensor<2> {
    let [_, width] = t.dims();
    let values = to_f32(t.clone())[first * width..][..rows * width].to_vec();
    from_f32(values, [rows, width], &place.device, place.dtype)
}

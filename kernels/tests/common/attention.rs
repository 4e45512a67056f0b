//! Attention over several documents.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::attention::{self, AttentionGrads, Documents, Heads, Saved};
use rekindle_kernels::{Device, Tensor};

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

pub(crate) struct Attention {
    pub(crate) heads: Heads,
    pub(crate) sinks: Option<Vec<f32>>,
    dtype: DType,
    pub(crate) cu_seqlens: Vec<u32>,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) d_o: Vec<f32>,
}

impl Attention {
    /// Scores spread over (−4, 4), so that the softmax is far from uniform.
    pub(crate) fn new(lengths: &[usize], heads: usize, kv_heads: usize, head_dim: usize, dtype: DType) -> Self {
        let tokens: usize = lengths.iter().sum();
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(lengths.iter().scan(0, |end, length| {
            *end += *length as u32;
            Some(*end)
        }));
        let input = |seed, heads: usize, by: f32| {
            rounded(noise(seed, tokens * heads * head_dim).iter().map(|x| x * by).collect(), dtype)
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self {
            heads: Heads::new(heads, kv_heads, head_dim, scale),
            sinks: None,
            dtype,
            cu_seqlens,
            q: input(1, heads, 4.0),
            k: input(2, kv_heads, 1.0),
            v: input(3, kv_heads, 1.0),
            d_o: input(4, heads, 1.0),
        }
    }

    pub(crate) fn window(self, window: usize) -> Self {
        Self { heads: self.heads.with_window(window), ..self }
    }

    pub(crate) fn softcap(self, softcap: f32) -> Self {
        Self { heads: self.heads.with_softcap(softcap), ..self }
    }

    /// With sinks around the size of the scores.
    pub(crate) fn sinks(self) -> Self {
        let sinks = noise(5, self.heads.heads).iter().map(|x| x * 3.0).collect();
        Self { sinks: Some(rounded(sinks, self.dtype)), ..self }
    }

    pub(crate) fn tokens(&self) -> usize {
        *self.cu_seqlens.last().expect("starts with 0") as usize
    }

    fn documents(&self, device: &Device, dtype: DType) -> Documents {
        Documents::new(&self.cu_seqlens, self.heads, device, dtype)
    }

    /// Shapes of q and o, and of k and v.
    pub(crate) fn shapes(&self) -> ([usize; 2], [usize; 2]) {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        ([self.tokens(), heads * head_dim], [self.tokens(), kv_heads * head_dim])
    }

    fn graph(
        &self,
        dtype: DType,
        attend: impl Fn([&BurnTensor<2>; 3], Option<&BurnTensor<1>>, &Oracle) -> (BurnTensor<2>, BurnTensor<2>),
    ) -> Results {
        let oracle = Oracle::new(dtype);
        let (wide, narrow) = self.shapes();
        let (q, k, v) = (oracle.leaf(&self.q, wide), oracle.leaf(&self.k, narrow), oracle.leaf(&self.v, narrow));
        let sinks = self.sinks.as_ref().map(|sinks| oracle.leaf(sinks, [self.heads.heads]));
        let (o, lse) = attend([&q, &k, &v], sinks.as_ref(), &oracle);
        let grads = (o.clone() * oracle.constant(&self.d_o, wide)).sum().backward();
        let mut results = vec![
            ("o", values(o)),
            ("lse", values(lse)),
            ("dq", grad(&q, &grads)),
            ("dk", grad(&k, &grads)),
            ("dv", grad(&v, &grads)),
        ];
        results.extend(sinks.map(|sinks| ("dsinks", grad(&sinks, &grads))));
        results
    }

    /// One head of one document at a time, with the whole matrix of scores.
    fn plain(
        &self,
        [q, k, v]: [&BurnTensor<2>; 3],
        sinks: Option<&BurnTensor<1>>,
        oracle: &Oracle,
    ) -> (BurnTensor<2>, BurnTensor<2>) {
        let Heads { heads, kv_heads, head_dim, scale, window, softcap } = self.heads;
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for w in self.cu_seqlens.windows(2) {
            let (start, length) = (w[0] as usize, (w[1] - w[0]) as usize);
            let part = |t: &BurnTensor<2>, head: usize| {
                t.clone().slice([start..start + length, head * head_dim..(head + 1) * head_dim])
            };
            let sees = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
            let hidden: Vec<f32> = (0..length * length)
                .map(|i| if sees(i / length, i % length) { 0.0 } else { f32::NEG_INFINITY })
                .collect();
            let hidden = oracle.constant(&hidden, [length, length]);
            let (mut of_heads, mut lse_of_heads) = (Vec::new(), Vec::new());
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let mut scores = part(q, head).matmul(part(k, kv_head).transpose()) * scale;
                if let Some(softcap) = softcap {
                    scores = (scores / softcap).tanh() * softcap;
                }
                let scores = scores + hidden.clone();
                let sink = sinks.map(|sinks| sinks.clone().narrow(0, head, 1).reshape([1, 1]));
                let mut max = scores.clone().max_dim(1).detach();
                if let Some(sink) = &sink {
                    max = max.max_pair(sink.clone().detach().expand([length, 1]));
                }
                let exp = (scores - max.clone()).exp();
                let mut sum = exp.clone().sum_dim(1);
                if let Some(sink) = sink {
                    sum = sum + (sink - max.clone()).exp();
                }
                of_heads.push((exp / sum.clone()).matmul(part(v, kv_head)));
                lse_of_heads.push((max + sum.log()).transpose());
            }
            outs.push(BurnTensor::cat(of_heads, 1));
            lses.push(BurnTensor::cat(lse_of_heads, 0));
        }
        (BurnTensor::cat(outs, 0), BurnTensor::cat(lses, 1))
    }

    /// Forward and backward through the crate.
    pub(crate) fn run(&self, place: &Place) -> (Saved, AttentionGrads) {
        let (wide, narrow) = self.shapes();
        let (q, k, v) = (place.matrix(&self.q, wide), place.matrix(&self.k, narrow), place.matrix(&self.v, narrow));
        let documents = self.documents(&place.device, place.dtype);
        let sinks = self.sinks.as_ref().map(|sinks| place.vector(sinks));
        let (o, lse) = attention::forward(&q, &k, &v, sinks.as_ref(), self.heads, &documents, ROOM);
        let saved = Saved { q, k, v, o, lse };
        let d_o = place.matrix(&self.d_o, wide);
        let grads = attention::backward(&d_o, &saved, sinks.as_ref(), self.heads, &documents, ROOM);
        (saved, grads)
    }
}

impl Case for Attention {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |qkv, sinks, oracle| self.plain(qkv, sinks, oracle))
    }

    fn ours(&self, place: &Place) -> Results {
        let (saved, AttentionGrads { q, k, v, sinks }) = self.run(place);
        let mut results = vec![
            ("o", values(saved.o)),
            ("lse", values(saved.lse)),
            ("dq", values(q)),
            ("dk", values(k)),
            ("dv", values(v)),
        ];
        results.extend(sinks.map(|sinks| ("dsinks", values(sinks))));
        results
    }

    fn differentiated(&self) -> Option<Results> {
        let documents = self.documents(&Device::cpu(), DType::F32);
        Some(self.graph(DType::F32, |qkv, sinks, _| {
            let [q, k, v] = qkv.map(|t| Tensor::from(t.clone()));
            let sinks = sinks.map(|sinks| Tensor::from(sinks.clone()));
            let (o, lse) = attention::forward(&q, &k, &v, sinks.as_ref(), self.heads, &documents, 0);
            (o.into(), lse.into())
        }))
    }
}

impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Heads { heads, kv_heads, head_dim, window, softcap, .. } = self.heads;
        let ends = &self.cu_seqlens[1..];
        write!(f, "attention {heads}/{kv_heads} heads of {head_dim}, documents to {ends:?}")?;
        if let Some(window) = window {
            write!(f, ", window {window}")?;
        }
        if let Some(softcap) = softcap {
            write!(f, ", softcap {softcap}")?;
        }
        f.write_str(if self.sinks.is_some() { ", sinks" } else { "" })
    }
}

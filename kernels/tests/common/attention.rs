//! Attention over several documents.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::attention::{self, Documents, Heads, Saved};
use rekindle_kernels::{Device, Tensor};

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

pub(crate) struct Attention {
    pub(crate) heads: Heads,
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
            heads: Heads { heads, kv_heads, head_dim, scale },
            cu_seqlens,
            q: input(1, heads, 4.0),
            k: input(2, kv_heads, 1.0),
            v: input(3, kv_heads, 1.0),
            d_o: input(4, heads, 1.0),
        }
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
        attend: impl Fn(&BurnTensor<2>, &BurnTensor<2>, &BurnTensor<2>, &Oracle) -> (BurnTensor<2>, BurnTensor<2>),
    ) -> Results {
        let oracle = Oracle::new(dtype);
        let (wide, narrow) = self.shapes();
        let (q, k, v) = (oracle.leaf(&self.q, wide), oracle.leaf(&self.k, narrow), oracle.leaf(&self.v, narrow));
        let (o, lse) = attend(&q, &k, &v, &oracle);
        let grads = (o.clone() * oracle.constant(&self.d_o, wide)).sum().backward();
        vec![
            ("o", values(o)),
            ("lse", values(lse)),
            ("dq", grad(&q, &grads)),
            ("dk", grad(&k, &grads)),
            ("dv", grad(&v, &grads)),
        ]
    }

    /// One head of one document at a time, with the whole matrix of scores.
    fn plain(
        &self,
        q: &BurnTensor<2>,
        k: &BurnTensor<2>,
        v: &BurnTensor<2>,
        oracle: &Oracle,
    ) -> (BurnTensor<2>, BurnTensor<2>) {
        let Heads { heads, kv_heads, head_dim, scale } = self.heads;
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for w in self.cu_seqlens.windows(2) {
            let (start, length) = (w[0] as usize, (w[1] - w[0]) as usize);
            let part = |t: &BurnTensor<2>, head: usize| {
                t.clone().slice([start..start + length, head * head_dim..(head + 1) * head_dim])
            };
            let hidden: Vec<f32> =
                (0..length * length).map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 }).collect();
            let hidden = oracle.constant(&hidden, [length, length]);
            let (mut of_heads, mut lse_of_heads) = (Vec::new(), Vec::new());
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let scores = part(q, head).matmul(part(k, kv_head).transpose()) * scale + hidden.clone();
                let max = scores.clone().max_dim(1).detach();
                let exp = (scores - max.clone()).exp();
                let sum = exp.clone().sum_dim(1);
                of_heads.push((exp / sum.clone()).matmul(part(v, kv_head)));
                lse_of_heads.push((max + sum.log()).transpose());
            }
            outs.push(BurnTensor::cat(of_heads, 1));
            lses.push(BurnTensor::cat(lse_of_heads, 0));
        }
        (BurnTensor::cat(outs, 0), BurnTensor::cat(lses, 1))
    }

    /// Forward and backward through the crate: `(saved, dq, dk, dv)`.
    pub(crate) fn run(&self, place: &Place) -> (Saved, Tensor<2>, Tensor<2>, Tensor<2>) {
        let (wide, narrow) = self.shapes();
        let (q, k, v) = (place.matrix(&self.q, wide), place.matrix(&self.k, narrow), place.matrix(&self.v, narrow));
        let documents = self.documents(&place.device, place.dtype);
        let (o, lse) = attention::forward(&q, &k, &v, self.heads, &documents, ROOM);
        let saved = Saved { q, k, v, o, lse };
        let d_o = place.matrix(&self.d_o, wide);
        let (dq, dk, dv) = attention::backward(&d_o, &saved, self.heads, &documents, ROOM);
        (saved, dq, dk, dv)
    }
}

impl Case for Attention {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |q, k, v, oracle| self.plain(q, k, v, oracle))
    }

    fn ours(&self, place: &Place) -> Results {
        let (saved, dq, dk, dv) = self.run(place);
        vec![
            ("o", values(saved.o)),
            ("lse", values(saved.lse)),
            ("dq", values(dq)),
            ("dk", values(dk)),
            ("dv", values(dv)),
        ]
    }

    fn differentiated(&self) -> Option<Results> {
        let documents = self.documents(&Device::cpu(), DType::F32);
        Some(self.graph(DType::F32, |q, k, v, _| {
            let [q, k, v] = [q, k, v].map(|t| Tensor::from(t.clone()));
            let (o, lse) = attention::forward(&q, &k, &v, self.heads, &documents, 0);
            (o.into(), lse.into())
        }))
    }
}

impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let ends = &self.cu_seqlens[1..];
        write!(f, "attention {heads}/{kv_heads} heads of {head_dim}, documents to {ends:?}")
    }
}

//! Attention in Burn ops, one block of queries of one document at a time; see [`super`].

use burn::tensor::{Bool, DType, Tensor};

use super::{AttentionGrads, Document, Heads, QueryBlock, SavedIn};

pub(crate) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> (Tensor<2>, Tensor<2>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    let sinks = sinks.map(|sinks| column(sinks.clone()));
    for block in documents.iter().flat_map(|document| document.blocks(heads)) {
        let (qb, kb, vb) = block.operands(q, k, v, heads);
        let (scores, _) = block.scores(qb, kb, heads); // [heads, queries, keys]
        let mut max = scores.clone().max_dim(2).detach();
        if let Some(sinks) = &sinks {
            max = max.max_pair(sinks.clone().detach());
        }
        let exp = (scores - max.clone()).exp();
        let mut sum = exp.clone().sum_dim(2);
        if let Some(sinks) = &sinks {
            sum = sum + (sinks.clone() - max.clone()).exp();
        }
        let o = (exp / sum.clone()).matmul(vb); // [heads, queries, head_dim]
        outs.push(join(o, q.dtype()));
        lses.push((max + sum.log()).squeeze_dim::<2>(2));
    }
    if outs.is_empty() {
        let device = q.device();
        return (q.clone(), Tensor::zeros([heads.heads, 0], (&device, DType::F32)));
    }
    (Tensor::cat(outs, 0), Tensor::cat(lses, 1))
}

pub(crate) fn backward(
    d_o: &Tensor<2>,
    saved: &SavedIn<'_, Tensor<2>>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> AttentionGrads<Tensor<2>, Tensor<1>> {
    let Heads { heads: n, kv_heads, head_dim, scale, .. } = heads;
    let dtype = d_o.dtype();
    let device = d_o.device();
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    let mut dsinks = sinks.map(|_| Tensor::<1>::zeros([n], (&device, DType::F32)));
    for document in documents.iter().filter(|document| document.queries > 0) {
        let length = document.queries;
        let mut dk = Tensor::<3>::zeros([n, length, head_dim], (&device, DType::F32));
        let mut dv = dk.clone();
        for block in document.blocks(heads) {
            let (qb, kb, vb) = block.operands(saved.q, saved.k, saved.v, heads);
            let lse = saved.lse.clone().narrow(1, block.query, block.rows).unsqueeze_dim::<3>(2);
            let (scores, slope) = block.scores(qb.clone(), kb.clone(), heads);
            let p = (scores - lse.clone()).exp();
            let g = split(d_o.clone().narrow(0, block.query, block.rows), n);
            let o = split(saved.o.clone().narrow(0, block.query, block.rows), n);
            let d = (g.clone() * o).sum_dim(2); // [heads, queries, 1]
            if let (Some(sum), Some(sinks)) = (&mut dsinks, sinks) {
                let part = ((column(sinks.clone()) - lse).exp() * d.clone()).sum_dim(1);
                *sum = sum.clone() - part.squeeze_dims::<1>(&[1, 2]);
            }
            let mut ds = p.clone() * (g.clone().matmul(vb.swap_dims(1, 2)) - d) * scale;
            if let Some(slope) = slope {
                ds = ds * slope;
            }
            dqs.push(join(ds.clone().matmul(kb), dtype));
            let keys = [0..n, block.keys.clone(), 0..head_dim];
            let add = |sum: Tensor<3>, part: Tensor<3>| {
                let old = sum.clone().slice(keys.clone());
                sum.slice_assign(keys.clone(), old + part)
            };
            dk = add(dk, ds.swap_dims(1, 2).matmul(qb));
            dv = add(dv, p.swap_dims(1, 2).matmul(g));
        }
        // Heads that share a key/value head add up.
        let fold = |t: Tensor<3>| {
            let grouped = t.reshape([kv_heads, n / kv_heads, length, head_dim]);
            join(grouped.sum_dim(1).squeeze_dim::<3>(1), dtype)
        };
        dks.push(fold(dk));
        dvs.push(fold(dv));
    }
    if dqs.is_empty() {
        return AttentionGrads { q: d_o.clone(), k: saved.k.clone(), v: saved.v.clone(), sinks: dsinks };
    }
    AttentionGrads { q: Tensor::cat(dqs, 0), k: Tensor::cat(dks, 0), v: Tensor::cat(dvs, 0), sinks: dsinks }
}

impl QueryBlock {
    /// This block's q, k, v as `[heads, rows, head_dim]` in f32, key/value heads repeated for their group.
    fn operands(&self, q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
        let Heads { heads: n, kv_heads, head_dim, .. } = heads;
        let keys = self.keys.len();
        let repeat = |t: &Tensor<2>| {
            let t = split(t.clone().narrow(0, self.key, keys), kv_heads);
            t.unsqueeze_dim::<4>(1).repeat_dim(1, n / kv_heads).reshape([n, keys, head_dim])
        };
        (split(q.clone().narrow(0, self.query, self.rows), n), repeat(k), repeat(v))
    }

    /// Returns the scores, −∞ where a query does not see a key, and with a softcap their derivative by the scores before
    /// it, 1 − tanh².
    fn scores(&self, q: Tensor<3>, k: Tensor<3>, heads: Heads) -> (Tensor<3>, Option<Tensor<3>>) {
        let device = q.device();
        let keys = self.keys.len();
        let scores = q.matmul(k.swap_dims(1, 2)) * heads.scale;
        let (scores, slope) = match heads.softcap {
            None => (scores, None),
            Some(softcap) => {
                let tanh = (scores / softcap).tanh();
                (tanh.clone() * softcap, Some(tanh.square().neg().add_scalar(1.0)))
            }
        };
        let shape = [heads.heads, self.rows, keys];
        let hide = |scores: Tensor<3>, mask: Tensor<2, Bool>| {
            scores.mask_fill(mask.unsqueeze::<3>().expand(shape), f32::NEG_INFINITY)
        };
        // The index of the first query's own key. Burn's masks are true where `fill` goes: off the triangle.
        let own = (keys - self.rows) as i64;
        let scores = hide(scores, Tensor::<2, Bool>::tril_mask([self.rows, keys], own, &device));
        let scores = match self.window {
            None => scores,
            Some(window) => {
                hide(scores, Tensor::<2, Bool>::triu_mask([self.rows, keys], own + 1 - window as i64, &device))
            }
        };
        (scores, slope)
    }
}

/// `[heads] → [heads, 1, 1]` in f32.
fn column(t: Tensor<1>) -> Tensor<3> {
    let [heads] = t.dims();
    t.cast(DType::F32).reshape([heads, 1, 1])
}

/// `[rows, heads · head_dim] → [heads, rows, head_dim]` in f32.
fn split(t: Tensor<2>, heads: usize) -> Tensor<3> {
    let [rows, width] = t.dims();
    t.cast(DType::F32).reshape([rows, heads, width / heads]).swap_dims(0, 1)
}

/// The inverse of [`split`], in `dtype`.
fn join(t: Tensor<3>, dtype: DType) -> Tensor<2> {
    let [heads, rows, head_dim] = t.dims();
    t.swap_dims(0, 1).reshape([rows, heads * head_dim]).cast(dtype)
}

//! Attention in Burn ops, one block of queries of one document at a time; see [`super`].

use burn::tensor::{Bool, DType, Tensor};

use super::{Document, Heads, QUERIES, SavedIn};

pub(crate) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    heads: Heads,
    documents: &[Document],
) -> (Tensor<2>, Tensor<2>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for document in documents {
        for block in blocks(document) {
            let (qb, kb, vb) = block.operands(q, k, v, heads);
            let scores = block.scores(qb, kb, heads); // [heads, queries, keys]
            let max = scores.clone().max_dim(2).detach();
            let exp = (scores - max.clone()).exp();
            let sum = exp.clone().sum_dim(2);
            let o = (exp / sum.clone()).matmul(vb); // [heads, queries, head_dim]
            outs.push(join(o, q.dtype()));
            lses.push((max + sum.log()).squeeze_dim::<2>(2));
        }
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
    heads: Heads,
    cu_seqlens: &[u32],
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let Heads { heads: n, kv_heads, head_dim, scale } = heads;
    let dtype = d_o.dtype();
    let device = d_o.device();
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    for w in cu_seqlens.windows(2).filter(|w| w[0] < w[1]) {
        let (start, length) = (w[0] as usize, (w[1] - w[0]) as usize);
        let document = Document { query: start, key: start, queries: length, past: 0 };
        let mut dk = Tensor::<3>::zeros([n, length, head_dim], (&device, DType::F32));
        let mut dv = dk.clone();
        for block in blocks(&document) {
            let (qb, kb, vb) = block.operands(saved.q, saved.k, saved.v, heads);
            let lse = saved.lse.clone().narrow(1, block.query, block.queries).unsqueeze_dim::<3>(2);
            let p = (block.scores(qb.clone(), kb.clone(), heads) - lse).exp();
            let g = split(d_o.clone().narrow(0, block.query, block.queries), n);
            let o = split(saved.o.clone().narrow(0, block.query, block.queries), n);
            let d = (g.clone() * o).sum_dim(2); // [heads, queries, 1]
            let ds = p.clone() * (g.clone().matmul(vb.swap_dims(1, 2)) - d) * scale;
            dqs.push(join(ds.clone().matmul(kb), dtype));
            let keys = [0..n, 0..block.keys, 0..head_dim];
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
        return (d_o.clone(), saved.k.clone(), saved.v.clone());
    }
    (Tensor::cat(dqs, 0), Tensor::cat(dks, 0), Tensor::cat(dvs, 0))
}

/// A block of queries and the keys that the last of them sees.
struct Block {
    query: usize,
    key: usize,
    queries: usize,
    keys: usize,
}

fn blocks(document: &Document) -> impl Iterator<Item = Block> + use<> {
    let Document { query, key, queries, past } = *document;
    (0..queries).step_by(QUERIES).map(move |first| {
        let count = QUERIES.min(queries - first);
        Block { query: query + first, key, queries: count, keys: past + first + count }
    })
}

impl Block {
    /// This block's q, k, v as `[heads, rows, head_dim]` in f32, key/value heads repeated for their group.
    fn operands(&self, q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
        let Heads { heads: n, kv_heads, head_dim, .. } = heads;
        let repeat = |t: &Tensor<2>| {
            let t = split(t.clone().narrow(0, self.key, self.keys), kv_heads);
            t.unsqueeze_dim::<4>(1).repeat_dim(1, n / kv_heads).reshape([n, self.keys, head_dim])
        };
        (split(q.clone().narrow(0, self.query, self.queries), n), repeat(k), repeat(v))
    }

    /// Scaled scores, −∞ where a key comes after its query.
    fn scores(&self, q: Tensor<3>, k: Tensor<3>, heads: Heads) -> Tensor<3> {
        let device = q.device();
        let scores = q.matmul(k.swap_dims(1, 2)) * heads.scale;
        let shape = [self.queries, self.keys];
        // Burn's mask is true where `fill` goes: off the lower triangle.
        let later = Tensor::<2, Bool>::tril_mask(shape, (self.keys - self.queries) as i64, &device);
        scores.mask_fill(later.unsqueeze::<3>().expand([heads.heads, self.queries, self.keys]), f32::NEG_INFINITY)
    }
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

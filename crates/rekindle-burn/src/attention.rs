//! Causal attention.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use rekindle_kernels::Tensor as Matrix;
use rekindle_kernels::attention::{self, Documents, Heads, Saved};

use crate::device::{operations_on, rows, unrows};
use crate::node::record;

/// Configuration of [`FlashAttention`].
#[derive(Config, Debug)]
pub struct FlashAttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// The factor of the scores, 1 / √head_dim by default.
    pub scale: Option<f32>,
    /// The number of keys that a query sees, the last of which is its own; all up to its own by default.
    pub window: Option<usize>,
    /// c in scores of c·tanh(score / c); none by default.
    pub softcap: Option<f32>,
}

impl FlashAttentionConfig {
    /// Creates the layer.
    ///
    /// # Panics
    /// If `heads` is not a multiple of `kv_heads`.
    pub fn init(&self) -> FlashAttention {
        let Self { heads, kv_heads, head_dim, scale, window, softcap } = *self;
        let grouped = kv_heads > 0 && heads.is_multiple_of(kv_heads);
        assert!(grouped, "heads = {heads} is a multiple of kv_heads = {kv_heads}");
        let scale = scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        FlashAttention { heads, kv_heads, head_dim, scale, window, softcap }
    }
}

/// Causal grouped-query attention without a matrix of all scores (Dao, arXiv:2307.08691):
/// o_i = Σ_{j ≤ i} softmax_j(scale · q_i·k_j) · v_j. Query head h reads key/value head h / (heads / kv_heads).
///
/// # Shapes
/// q, o `[batch, seq, heads · head_dim]`; k, v `[batch, seq, kv_heads · head_dim]`. For packed documents
/// `[tokens, ..]`, whose borders are `cu_seqlens`.
///
/// # Dtypes
/// Scores, softmax and sums in `f32`.
///
/// # Gradients
/// To q, k and v. Saved: q, k, v, o and one number for each query and head; the backward recomputes the scores, a block
/// of queries at a time.
#[derive(Module, Debug)]
pub struct FlashAttention {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    #[module(skip)]
    window: Option<usize>,
    #[module(skip)]
    softcap: Option<f32>,
}

impl FlashAttention {
    /// Returns o, where every row of the batch is a document.
    ///
    /// # Panics
    /// If the shapes are not those of [`FlashAttention`].
    pub fn forward(&self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<3> {
        let [batch, seq, _] = q.dims();
        let cu_seqlens: Vec<u32> = (0..=batch).map(|row| (row * seq) as u32).collect();
        self.attend(q, k, v, &cu_seqlens)
    }

    /// Returns o of packed documents. `cu_seqlens` are their cumulative lengths, from 0 to the number of tokens.
    ///
    /// # Panics
    /// If the shapes are not those of [`FlashAttention`], or `cu_seqlens` is not as described.
    pub fn forward_packed(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, cu_seqlens: &[u32]) -> Tensor<2> {
        let [tokens, _] = q.dims();
        let ends = cu_seqlens.first() == Some(&0) && cu_seqlens.last().is_some_and(|&last| last as usize == tokens);
        assert!(ends && cu_seqlens.is_sorted(), "cu_seqlens {cu_seqlens:?} rise from 0 to the {tokens} tokens of q");
        self.attend(q, k, v, cu_seqlens)
    }

    fn attend<const D: usize>(&self, q: Tensor<D>, k: Tensor<D>, v: Tensor<D>, cu_seqlens: &[u32]) -> Tensor<D> {
        let &Self { heads, kv_heads, head_dim, scale, window, softcap } = self;
        let (wide, narrow) = (q.dims(), k.dims());
        assert_eq!(wide[..D - 1], narrow[..D - 1], "q {wide:?} and k {narrow:?} have the same tokens");
        let heads = Heads { heads, kv_heads, head_dim, scale, window, softcap };
        let device = operations_on(&q.device());
        let documents = Documents::new(cu_seqlens, heads, &device, q.dtype());
        let inputs = [q, k, v].map(|x| Some(x.into_dispatch()));
        Tensor::from_dispatch(record(inputs, move |inputs, wanted| {
            let [Some(q), Some(k), Some(v)] = inputs else { unreachable!("all inputs were given") };
            let [q, k, v]: [Matrix<2>; 3] = [q, k, v].map(rows::<D>);
            let (o, lse) = attention::forward(&q, &k, &v, None, heads, &documents, 0);
            let result = unrows(o.clone(), wide);
            let pullback = move |d_o| {
                let saved = Saved { q, k, v, o, lse };
                let grads = attention::backward(&rows::<D>(d_o), &saved, None, heads, &documents, 0);
                let grads = [(grads.q, wide), (grads.k, narrow), (grads.v, narrow)];
                let mut wanted = wanted.into_iter();
                grads.map(|(grad, shape)| wanted.next()?.then(|| unrows(grad, shape)))
            };
            (result, Box::new(pullback))
        }))
    }
}

//! Rotary position embedding.

use std::sync::{Arc, Mutex, PoisonError};

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use rekindle_kernels::Device;
use rekindle_kernels::rope::{self, Angles, RopeTables, Rotation};
use rekindle_rope::{RopeConfig, Tables};

use crate::device::{operations_on, rows, unrows};
use crate::node::record;

/// Configuration of [`RotaryEmbedding`].
#[derive(Config, Debug)]
pub struct RotaryEmbeddingConfig {
    /// Channels of a head.
    pub head_dim: usize,
    /// The base of the frequencies.
    #[config(default = 10000.0)]
    pub theta: f64,
    /// Channels of a head that are rotated; the others pass through. All by default.
    pub rotary_dim: Option<usize>,
    /// True if channels 2i and 2i + 1 are rotated together, instead of i and i + rotary_dim / 2.
    #[config(default = false)]
    pub interleaved: bool,
}

impl RotaryEmbeddingConfig {
    /// Creates the layer.
    ///
    /// # Panics
    /// If the number of rotated channels is odd or larger than `head_dim`.
    pub fn init(&self) -> RotaryEmbedding {
        let rotary = self.rotary_dim.unwrap_or(self.head_dim);
        let fits = rotary.is_multiple_of(2) && rotary <= self.head_dim;
        assert!(fits, "rotary_dim = {rotary} is even and at most head_dim = {}", self.head_dim);
        let frequency = |i: usize| self.theta.powf(-2.0 * i as f64 / rotary as f64) as f32;
        let frequencies = (0..rotary / 2).map(frequency).collect();
        RotaryEmbedding::new(self.head_dim, self.interleaved, frequencies, 1.0)
    }
}

/// Rotary position embedding (Su et al., arXiv:2104.09864): in each head, channels (x₁, x₂) of a pair become
/// (x₁·cos − x₂·sin, x₂·cos + x₁·sin) of the angle position · theta^(−2i / rotary_dim).
///
/// [`RotaryEmbedding::from_rope`] has the scaled frequencies of a Hugging Face model (linear, dynamic, YaRN, LongRoPE,
/// Llama 3).
///
/// # Shapes
/// x, y `[batch, seq, heads · head_dim]`, or `[tokens, heads · head_dim]` with a position for each token.
///
/// # Dtypes
/// Angles in `f64`, their cosines and sines in `f32`.
///
/// # Gradients
/// To x. Nothing but the angles is saved.
#[derive(Module, Debug)]
pub struct RotaryEmbedding {
    head_dim: usize,
    interleaved: bool,
    #[module(skip)]
    frequencies: Arc<Vec<f32>>,
    attention_factor: f64,
    /// The tables of the longest sequence so far, shared by clones.
    #[module(skip)]
    tables: Arc<Mutex<Arc<Tables>>>,
}

impl RotaryEmbedding {
    /// Creates the layer of a model whose `config.json` was read, for sequences of at most `seq_len` tokens. Heads have
    /// `head_dim` channels; pairs are those of transformers' "rotate half".
    pub fn from_rope(rope: &RopeConfig, head_dim: usize, seq_len: usize) -> Self {
        Self::new(head_dim, false, rope.inv_freq(seq_len), rope.attention_factor())
    }

    fn new(head_dim: usize, interleaved: bool, frequencies: Vec<f32>, attention_factor: f64) -> Self {
        let tables = Arc::new(Mutex::new(Arc::new(Tables::new(&frequencies, attention_factor, 0))));
        Self { head_dim, interleaved, frequencies: Arc::new(frequencies), attention_factor, tables }
    }

    /// Rotates the heads of sequences that begin at position 0.
    ///
    /// # Panics
    /// If the last axis is not a whole number of heads.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let positions: Vec<u32> = (0..batch).flat_map(|_| 0..seq as u32).collect();
        self.rotate(x, &positions)
    }

    /// Rotates the heads of tokens at these positions, such as those of packed documents.
    ///
    /// # Panics
    /// If there is not one position for each token, or the last axis is not a whole number of heads.
    pub fn forward_at(&self, x: Tensor<2>, positions: &[u32]) -> Tensor<2> {
        self.rotate(x, positions)
    }

    fn rotate<const D: usize>(&self, x: Tensor<D>, positions: &[u32]) -> Tensor<D> {
        let (shape, head_dim, interleaved) = (x.dims(), self.head_dim, self.interleaved);
        let width = shape[D - 1];
        assert!(width.is_multiple_of(head_dim), "the width {width} of x is a multiple of head_dim = {head_dim}");
        let tokens = shape[..D - 1].iter().product::<usize>();
        assert_eq!(tokens, positions.len(), "x {shape:?} has a position for each token");
        let angles = self.angles(positions, operations_on(&x.device()));
        Tensor::from_dispatch(record([Some(x.into_dispatch())], move |inputs, _| {
            let [Some(x)] = inputs else { unreachable!("the input was given") };
            let (y, _) = rope::forward(rows::<D>(x), head_dim, None, Some(Rotation { angles: &angles, interleaved }));
            let pullback = move |dy| {
                let rotation = Rotation { angles: &angles, interleaved };
                [Some(unrows(rope::backward(rows::<D>(dy), head_dim, None, Some(rotation), false).0, shape))]
            };
            (unrows(y, shape), Box::new(pullback))
        }))
    }

    /// The angles of tokens, on the device of the tensor that is rotated.
    fn angles(&self, positions: &[u32], device: Device) -> Angles {
        let length = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let tables = self.tables(length);
        let rows = |table: &[f32]| -> Vec<f32> {
            let row = |&position: &u32| &table[position as usize * tables.half..][..tables.half];
            positions.iter().flat_map(row).copied().collect()
        };
        let in_order: Vec<u32> = (0..positions.len() as u32).collect();
        RopeTables::new(rows(&tables.cos), rows(&tables.sin), tables.half, &device).angles(&in_order)
    }

    /// The tables of at least `length` positions. An entry does not depend on the length of its table.
    fn tables(&self, length: usize) -> Arc<Tables> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.seq_len < length {
            *tables = Arc::new(Tables::new(&self.frequencies, self.attention_factor, length.next_power_of_two()));
        }
        Arc::clone(&tables)
    }
}

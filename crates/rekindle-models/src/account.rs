//! What a training step takes on a device whose operations cannot be run without computing: an account of it from shapes.
//!
//! The functions here are `block.rs` and `model.rs` again, with sizes in the place of tensors ([`Held`]): what these
//! keep, drop and write over in place is kept, dropped and written over here, so that the most that is held at a time is
//! found where it is. That they agree is asked of runs under a counting allocator (`tests/tests/memory_plan.rs`).
//!
//! On CUDA there is no need for this: the step itself runs on a planned device.

mod block;
mod ledger;

use std::collections::BTreeMap;

use rekindle_lora::{GradientCheckpointing, LoraConfig, match_targets};

use crate::names::{self, EMBED, HEAD, Needed, Projection};
use crate::outline::Coding;
use crate::{Error, ModelConfig};
use block::{BlockShape, Pass};
pub use ledger::{Bytes, Use};
use ledger::{Held, Ledger};

/// f32 values.
const F32: usize = 4;

/// Logits held at once, and the fewest rows of them; as in `linear_cross_entropy.rs`.
const CHUNK_LOGITS: usize = 8 << 20;
const CHUNK_ROWS: usize = 64;

/// Terms of a sum that the `gemm` crate packs at a time.
const MOST_PACKED: usize = 512;

/// What is trained, of which model.
#[derive(Clone, Copy, Debug)]
pub struct Account<'a> {
    /// The model, with its vocabulary as it will be.
    pub config: &'a ModelConfig,
    /// How linears in codes are coded.
    pub coding: Option<&'a Coding>,
    /// Bytes of a frozen weight and of an activation.
    pub element: usize,
    /// The adapter; without one, all weights are trained.
    pub lora: Option<&'a LoraConfig>,
    /// What becomes of activations.
    pub checkpointing: GradientCheckpointing,
    /// The rotary tables' length.
    pub max_seq_length: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// The tokens of one forward and backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// All of them.
    pub all: usize,
    /// Of the longest document.
    pub longest: usize,
    /// Those whose loss counts.
    pub counted: usize,
}

/// The parameters that are trained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trained {
    /// Number of scalars in each, in order.
    pub sizes: Vec<usize>,
}

impl Trained {
    /// Number of scalars.
    pub fn numel(&self) -> usize {
        self.sizes.iter().sum()
    }
}

impl Account<'_> {
    /// What is trained.
    ///
    /// # Errors
    /// [`Error::Lora`] for an adapter that matches nothing.
    pub fn trained(&self) -> Result<Trained, Error> {
        let mut sizes = Vec::new();
        let Some(lora) = self.lora else {
            sizes.extend(names::needed(self.config).iter().map(|needed| needed.shape.iter().product::<usize>()));
            return Ok(Trained { sizes });
        };
        let modules = self.config.modules();
        let targets = match_targets(lora, &modules.names())?;
        for name in &targets {
            let linear = modules.linear(name).expect("a target is a linear of the model");
            let r = lora.rank_of(name);
            sizes.extend([r * linear.input, r * linear.out]);
            sizes.extend(lora.use_dora.then_some(linear.out));
        }
        sizes.extend(modules.biased(lora.bias, |name| targets.iter().any(|t| t == name)).iter().map(|l| l.out));
        let table = self.config.vocab_size * self.config.hidden_size;
        sizes.extend(modules.saved(lora)?.iter().map(|_| table));
        Ok(Trained { sizes })
    }

    /// The most that is held at a time by one optimizer step, by use; `optimizer` bytes are its state's.
    ///
    /// # Errors
    /// As [`trained`](Self::trained).
    pub fn step(&self, tokens: Tokens, optimizer: usize) -> Result<Bytes, Error> {
        let ledger = Ledger::default();
        let _resident = self.resident(&ledger, optimizer)?;
        let _gradients = ledger.hold(Use::Gradients, F32 * self.trained()?.numel());
        self.pass(&ledger, tokens)?;
        Ok(ledger.peak())
    }

    /// The most that is held at a time while losses of these tokens are asked for, with the optimizer's state beside it.
    ///
    /// # Errors
    /// As [`trained`](Self::trained).
    pub fn evaluation(&self, tokens: Tokens, optimizer: usize) -> Result<Bytes, Error> {
        let ledger = Ledger::default();
        let _resident = self.resident(&ledger, optimizer)?;
        let blocks = self.blocks()?;
        let pass = self.of(&ledger, tokens);
        let _angles = self.angles(&ledger, tokens);
        let mut h = pass.passing(self.config.hidden_size);
        for block in &blocks {
            h = pass.forward(block, h).0;
        }
        let _n = pass.passing(self.config.hidden_size);
        self.losses(&ledger, tokens, false);
        drop(h);
        Ok(ledger.peak())
    }

    /// Weights, parameters and the optimizer's state.
    fn resident<'l>(&self, ledger: &'l Ledger, optimizer: usize) -> Result<Vec<Held<'l>>, Error> {
        let c = self.config;
        let trained = F32 * self.trained()?.numel();
        let tables = 2 * F32 * self.max_seq_length * (c.head_dim / 2);
        let mut held = vec![ledger.hold(Use::Weights, tables), ledger.hold(Use::Optimizer, optimizer)];
        let Some(lora) = self.lora else {
            held.push(ledger.hold(Use::Weights, trained));
            return Ok(held);
        };
        held.push(ledger.hold(Use::Adapters, trained));
        if lora.init_lora_weights.changes_base() {
            // What the adapter took out of the base is kept.
            held.push(ledger.hold(Use::Adapters, trained));
        }
        let weights = names::needed(c).into_iter().map(|Needed { name, shape }| {
            let elements: usize = shape.iter().product();
            let codes =
                Projection::is_linear(&name).then(|| self.codes(&name, [shape[0], elements / shape[0]])).flatten();
            codes.unwrap_or(elements * self.element)
        });
        held.push(ledger.hold(Use::Weights, weights.sum()));
        Ok(held)
    }

    /// Bytes of the weight `name` in codes.
    fn codes(&self, name: &str, dims: [usize; 2]) -> Option<usize> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        self.coding?.bytes(module, dims).map(|(codes, scales)| codes + scales)
    }

    fn pass(&self, ledger: &Ledger, tokens: Tokens) -> Result<(), Error> {
        let blocks = self.blocks()?;
        let hidden = self.config.hidden_size;
        let pass = self.of(ledger, tokens);
        let table_trained = self.table_trained();
        let lowest =
            if table_trained { 0 } else { blocks.iter().position(BlockShape::is_trained).unwrap_or(blocks.len()) };
        let _angles = self.angles(ledger, tokens);
        let mut h = pass.passing(hidden);
        let mut tape = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            // The block's input is its own from here on.
            let (y, saved) = pass.forward(block, h);
            h = y;
            if i >= lowest {
                tape.push(if self.checkpointing.recomputes() { saved.reduced() } else { saved });
            }
        }
        let (n, rstd) = (pass.passing(hidden), pass.passing(1));
        let dn = self.losses(ledger, tokens, true);
        let mut dh = pass.passing(hidden);
        drop((dn, h, n, rstd));
        for (i, block) in blocks.iter().enumerate().skip(lowest).rev() {
            let saved = tape.pop().expect("one entry for every block from the lowest trained");
            let saved = if self.checkpointing.recomputes() { pass.resume(block, saved) } else { saved };
            match pass.backward(block, saved, dh, i > lowest || table_trained) {
                Some(dx) => dh = dx,
                None => return Ok(()),
            }
        }
        if self.lora.is_none() || self.is_saved(EMBED) {
            // A table of zeros for the rows, and the sum with what the gradient was.
            let table = F32 * self.config.vocab_size * hidden;
            let _both = [ledger.hold(Use::Scratch, table), ledger.hold(Use::Scratch, table)];
        }
        drop(dh);
        Ok(())
    }

    fn of<'a>(&'a self, ledger: &'a Ledger, tokens: Tokens) -> Pass<'a> {
        let dropout = self.lora.is_some_and(|lora| lora.lora_dropout > 0.0);
        let Self { config, element, threads, .. } = *self;
        Pass { ledger, config, element, threads, dropout, tokens }
    }

    fn angles<'l>(&self, ledger: &'l Ledger, tokens: Tokens) -> Held<'l> {
        ledger.hold(Use::Scratch, 2 * F32 * tokens.all * (self.config.head_dim / 2))
    }

    /// Head and losses, chunk by chunk; the gradient to the normalized activations if it is wanted.
    fn losses<'l>(&self, ledger: &'l Ledger, tokens: Tokens, backward: bool) -> Option<Held<'l>> {
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size * self.element);
        let chunk = (CHUNK_LOGITS / vocab).max(CHUNK_ROWS) / CHUNK_ROWS * CHUNK_ROWS;
        let mut parts = Vec::new();
        let mut left = tokens.counted;
        while left > 0 {
            let rows = left.min(chunk);
            left -= rows;
            // Rows that do not lie together are copied; those of several documents never do.
            let copied = if tokens.counted < tokens.all { rows } else { 0 };
            let _hidden = ledger.hold(Use::LossChunks, copied * width);
            let _logits = ledger.hold(Use::LossChunks, F32 * rows * vocab);
            // What products bring into their order: each thread the rows, and for the head's gradient all of them the logits.
            let rows_packed = self.threads * F32 * rows * self.config.hidden_size.min(MOST_PACKED);
            let logits_packed = if backward && self.head_trained() { F32 * vocab * rows.min(MOST_PACKED) } else { 0 };
            let _packed = ledger.hold(Use::LossChunks, rows_packed.max(logits_packed));
            if backward {
                parts.push(ledger.hold(Use::LossChunks, rows * width));
            }
        }
        if !backward {
            return None;
        }
        let zeros = (tokens.counted < tokens.all).then(|| ledger.hold(Use::Scratch, tokens.all * width));
        let together = ledger.hold(Use::Scratch, tokens.counted * width);
        drop(parts);
        Some(zeros.unwrap_or(together))
    }

    fn is_saved(&self, weight: &str) -> bool {
        let module = weight.trim_end_matches(".weight");
        let names =
            |lora: &LoraConfig| self.config.modules().saved(lora).is_ok_and(|saved| saved.iter().any(|s| s == module));
        self.lora.is_some_and(names)
    }

    /// Whether the output layer is trained.
    fn head_trained(&self) -> bool {
        let tied = self.config.tie_word_embeddings && self.lora.is_some_and(|lora| lora.ensure_weight_tying);
        self.lora.is_none() || self.is_saved(HEAD) || tied && self.table_trained()
    }

    /// Whether the embedding table is trained.
    fn table_trained(&self) -> bool {
        self.lora.is_none() || self.is_saved(EMBED)
    }

    fn blocks(&self) -> Result<Vec<BlockShape>, Error> {
        let c = self.config;
        let (targets, lora) = match self.lora {
            None => (Vec::new(), None),
            Some(lora) => (match_targets(lora, &c.modules().names())?, Some(lora)),
        };
        let targets: BTreeMap<&str, usize> =
            targets.iter().map(|name| (name.as_str(), lora.map_or(0, |lora| lora.rank_of(name)))).collect();
        let is_coded = |module: &str, dims| self.coding.is_some_and(|coding| coding.bytes(module, dims).is_some());
        let shapes = (0..c.num_hidden_layers).map(|layer| {
            BlockShape::new(c, layer, self.lora.is_none(), |module, dims| block::Adapted {
                r: targets.get(module).copied().unwrap_or(0),
                magnitude: lora.is_some_and(|lora| lora.use_dora) && targets.contains_key(module),
                coded: is_coded(module, dims),
            })
        });
        Ok(shapes.collect())
    }
}

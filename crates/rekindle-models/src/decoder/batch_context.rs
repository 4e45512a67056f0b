//! A batch, ready to go through a decoder.

use rekindle_kernels::attention::{Documents, Heads};
use rekindle_kernels::dropout::{Dropout, Token, Tokens};
use rekindle_kernels::gated_delta::Sequences;
use rekindle_kernels::neftune::Noise;
use rekindle_kernels::rope::Angles;
use rekindle_kernels::{Params, RngKey};

use super::Decoder;
use crate::layers::Context;
use crate::{Batch, RouterPass};

/// The key of a training step's random numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u32,
    /// Noise on the embeddings ([`rekindle_kernels::neftune`]); 0 for none.
    pub neftune_noise_alpha: f32,
}

impl StepKey {
    /// Returns the key of the step's random numbers.
    fn rng(self) -> RngKey {
        RngKey { seed: self.seed, step: self.step }
    }
}

/// A batch with everything that all layers share while it goes through, whatever the parameters are.
#[derive(Debug)]
pub struct BatchContext<'a> {
    pub(super) batch: &'a Batch,
    angles: Vec<Angles>,
    documents: Vec<Documents>,
    /// The documents for gated delta layers, where there are some.
    sequences: Option<Sequences>,
    /// Probability of dropping an element before an adapter.
    lora_dropout: f32,
    random: Option<StepRandomness>,
}

/// The key of a batch's random numbers.
#[derive(Debug)]
struct StepRandomness {
    key: StepKey,
    tokens: Tokens,
    /// The length of each token's document.
    lengths: Vec<u32>,
}

impl<'a> BatchContext<'a> {
    pub(super) fn new(decoder: &Decoder, batch: &'a Batch, lora_dropout: f32, key: Option<StepKey>) -> Self {
        let random = key.filter(|key| lora_dropout > 0.0 || key.neftune_noise_alpha > 0.0);
        let random = random.map(|key| StepRandomness {
            key,
            tokens: Tokens::new(tokens(batch), &decoder.device),
            lengths: if key.neftune_noise_alpha > 0.0 { lengths(batch) } else { Vec::new() },
        });
        let documents = |heads: &Heads| Documents::new(&batch.cu_seqlens, *heads, &decoder.device, decoder.dtype);
        let recurrent = decoder.layers.iter().any(|layer| layer.mixer.attention().is_none());
        Self {
            batch,
            angles: decoder.ropes.iter().map(|tables| tables.angles(&batch.positions)).collect(),
            documents: decoder.layouts.iter().map(documents).collect(),
            sequences: recurrent.then(|| Sequences::new(&batch.cu_seqlens, &decoder.device)),
            lora_dropout,
            random,
        }
    }

    /// The batch itself.
    pub(crate) fn batch(&self) -> &'a Batch {
        self.batch
    }

    /// The context of a pass with these parameters, with adapters or without.
    pub fn context<'c>(&'c self, params: &'c Params, adapters: bool) -> Context<'c> {
        let dropout = self.random.as_ref().filter(|_| adapters && self.lora_dropout > 0.0);
        let dropout =
            dropout.map(|StepRandomness { key, tokens, .. }| Dropout { p: self.lora_dropout, key: key.rng(), tokens });
        Context {
            params,
            ropes: &self.angles,
            documents: &self.documents,
            sequences: self.sequences.as_ref(),
            dropout,
            adapters,
            rows: &[],
            router: RouterPass::Off,
        }
    }

    /// The noise on the embeddings, if there is any.
    pub(super) fn noise(&self) -> Option<Noise<'_>> {
        let random = self.random.as_ref().filter(|random| random.key.neftune_noise_alpha > 0.0);
        random.map(|StepRandomness { key, tokens, lengths }| Noise {
            alpha: key.neftune_noise_alpha,
            key: key.rng(),
            tokens,
            lengths,
        })
    }
}

/// The length of each token's document.
fn lengths(batch: &Batch) -> Vec<u32> {
    batch.documents().flat_map(|document| std::iter::repeat_n(document.len() as u32, document.len())).collect()
}

/// Row and position of each token.
fn tokens(batch: &Batch) -> Vec<Token> {
    batch
        .documents()
        .zip(&batch.rows)
        .flat_map(|(document, &row)| document.map(move |t| (t, row)))
        .map(|(t, row)| Token { row, position: batch.positions[t] })
        .collect()
}

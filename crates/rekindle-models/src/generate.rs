//! Generation with a key/value cache.

use crate::layers::LayerKvCache;
use crate::sample::Sampler;
use crate::{CausalLm, Error};

/// The settings of sampling, and the conditions that end generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The maximum number of new tokens.
    pub max_new_tokens: usize,
    /// The temperature: 0 takes the most likely token; above 0, logits are divided by it before sampling.
    pub temperature: f32,
    /// The number of most likely tokens to sample from; 0 for all.
    pub top_k: usize,
    /// The sum of probabilities that the smallest set of most likely tokens must reach to be sampled from.
    pub top_p: f32,
    /// The minimum probability of a sampled token, as a fraction of the most likely token's; 0 for all.
    pub min_p: f32,
    /// The logits of tokens that prompt or text have already are divided by it where they are positive, and multiplied
    /// where they are negative; 1 changes nothing. Also applies at temperature 0.
    pub repetition_penalty: f32,
    /// Seed of sampling.
    pub seed: u64,
    /// Tokens that end the text.
    pub eos_ids: Vec<u32>,
}

impl Default for GenerationConfig {
    /// 128 tokens, greedy.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            eos_ids: Vec::new(),
        }
    }
}

/// The reason that generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose one of [`GenerationConfig::eos_ids`].
    EndToken,
    /// `max_new_tokens` or the model's `max_seq_length` was reached.
    Length,
    /// The caller stopped it.
    Caller,
}

impl StopReason {
    /// Returns `"end_token"`, `"length"` or `"caller"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndToken => "end_token",
            Self::Length => "length",
            Self::Caller => "caller",
        }
    }
}

impl CausalLm {
    /// Continues `prompt`; `on_token` receives every new token and returns true to continue.
    ///
    /// Returns the new tokens, an end token included.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt, one as long as `max_seq_length`, or numbers out of range;
    /// [`Error::Row`] for ids beyond the vocabulary; [`Error::Device`] when the device fails; [`Error::NonFinite`] for
    /// logits that are infinite or not numbers, from which nothing is chosen.
    pub fn generate(
        &self,
        prompt: &[u32],
        config: &GenerationConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<(Vec<u32>, StopReason), Error> {
        self.check_ids(prompt).map_err(Error::Row)?;
        let mut sampler = Sampler::new(config, prompt)?;
        let limit = self.max_seq_length();
        if prompt.is_empty() || prompt.len() >= limit {
            return Err(Error::Argument(format!(
                "the prompt has {} tokens; it must have 1 to {} (max_seq_length - 1)",
                prompt.len(),
                limit - 1
            )));
        }
        let room = config.max_new_tokens.min(limit - prompt.len());
        let mut caches: Vec<_> = self.decoder.layers.iter().map(|_| LayerKvCache::new(prompt.len() + room)).collect();
        let mut new = Vec::new();
        let mut pending = prompt.to_vec();
        let mut position = 0;
        while new.len() < room {
            let mut logits = self.decode(&pending, position, &mut caches);
            self.device().check()?;
            position += pending.len();
            let Some(id) = sampler.next(&mut logits) else {
                return Err(self.non_finite_logits(&[prompt, &new].concat(), new.len() + 1));
            };
            new.push(id);
            let go_on = on_token(id);
            if config.eos_ids.contains(&id) {
                return Ok((new, StopReason::EndToken));
            }
            if !go_on {
                return Ok((new, StopReason::Caller));
            }
            pending = vec![id];
        }
        Ok((new, StopReason::Length))
    }

    /// Returns the logits after the last of `ids`, which are at `position` and on; appends their keys and values to
    /// `caches`.
    fn decode(&self, ids: &[u32], position: usize, caches: &mut [LayerKvCache]) -> Vec<f32> {
        let n = self.decoder.decode(&self.params, ids, position, caches); // [1, hidden]
        self.decoder.lm_head(&self.params, true).logits(&n)
    }
}

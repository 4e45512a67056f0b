//! Generation with a key/value cache.

use rekindle_kernels::Tensor;
use rekindle_kernels::decode_step::{StepId, StepToken};

use crate::sample::{Sampler, SamplingParams, TokenLimits};
use crate::{CausalLm, DecodeBatch, DecodeStates, DecodeSteps, Error};

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

impl GenerationConfig {
    /// Returns the choice of each token.
    pub fn sampling(&self) -> SamplingParams {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *self;
        SamplingParams { temperature, top_k, top_p, min_p, repetition_penalty, seed, ..SamplingParams::default() }
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
        self.check_prompt(prompt)?;
        let mut sampler = Sampler::new(&config.sampling(), prompt, 0, self.config.vocab_size())?;
        let room = config.max_new_tokens.min(self.max_seq_length() - prompt.len());
        let (mut states, pages) = self.decoder.states_for_one(prompt.len() + room)?;
        let mut steps = DecodeSteps::default();
        let mut new = Vec::new();
        let mut pending = prompt.to_vec();
        let mut past = 0;
        while new.len() < room {
            let draw = sampler.draw_on_device(0).filter(|_| self.has_steps());
            let sampled = match draw {
                Some(draw) => {
                    let drawn = if past == 0 {
                        let hidden = self.decode_last(&pending, past, &pages, &mut states);
                        self.draw(&hidden, &[draw], true)?
                    } else {
                        let token = StepToken { id: StepId::Known(pending[0]), position: past, pages: &pages, draw };
                        self.begin_step(&[token], None, &mut states, &mut steps, true).wait()?
                    };
                    drawn.first().filter(|drawn| drawn.is_finite).map(|drawn| drawn.id)
                }
                None => {
                    let hidden = self.decode_last(&pending, past, &pages, &mut states);
                    let logits = self.logits(&hidden, true);
                    self.device().check()?;
                    sampler.choose(&logits, TokenLimits::default()).ok().map(|sampled| sampled.id)
                }
            };
            let Some(id) = sampled else {
                return Err(self.non_finite_logits(&[prompt, &new].concat(), new.len() + 1));
            };
            sampler.accept(id);
            past += pending.len();
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

    /// Returns the hidden state of the last of some tokens of a single sequence, `[1, hidden]`.
    fn decode_last(&self, ids: &[u32], past: usize, pages: &[u32], states: &mut DecodeStates) -> Tensor<2> {
        let mut batch = DecodeBatch::default();
        batch.push(0, ids, past, pages, ids.len() - 1..ids.len());
        self.decode(&batch, states, true)
    }

    /// Refuses a prompt that this model cannot continue.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt and one as long as `max_seq_length`, [`Error::Row`] for ids beyond the
    /// vocabulary.
    pub fn check_prompt(&self, prompt: &[u32]) -> Result<(), Error> {
        self.check_vocabulary_head()?;
        self.check_ids(prompt).map_err(Error::Row)?;
        let limit = self.max_seq_length();
        if prompt.is_empty() || prompt.len() >= limit {
            return Err(Error::Argument(format!(
                "the prompt has {} tokens; it must have 1 to {} (max_seq_length - 1)",
                prompt.len(),
                limit - 1
            )));
        }
        Ok(())
    }

    /// Returns the normalized hidden states of the tokens of `batch` that are wanted, `[outputs, hidden]`, and adds the
    /// batch's tokens to `states`; see [`Decoder::decode`](crate::Decoder::decode).
    pub fn decode(&self, batch: &DecodeBatch, states: &mut DecodeStates, adapters: bool) -> Tensor<2> {
        self.decoder.decode(&self.params, batch, states, adapters)
    }

    /// Returns the logits of all rows of `hidden` on the host, `[rows · vocab]`. All of them exist at once, so give a few
    /// rows at a time.
    pub fn logits(&self, hidden: &Tensor<2>, adapters: bool) -> Vec<f32> {
        self.decoder.lm_head(&self.params, adapters).logits(hidden)
    }
}

//! The settings and the state of one sample beside its tokens.

use std::sync::Arc;

use rekindle_kernels::decode_step::{Draw, Drawn};
use rekindle_models::{LogSoftmax, Sampler, TokenLimits, Unsampled};

use crate::Error;
use crate::request::{FinishReason, NewToken, PromptToken, TokenConstraint};
use crate::scheduler::SampleId;

/// The part of a request that its samples share.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) prompt_tokens: usize,
    /// New tokens at most, with the limits of the model and the cache.
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) top_log_probs: usize,
    pub(crate) prompt_log_probs: Option<usize>,
    /// The adapter, or the base model.
    pub(crate) adapter: Option<String>,
}

/// A sample that runs or waits.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Its number in the states of the model.
    pub(crate) number: u64,
    pub(crate) settings: Arc<Settings>,
    pub(crate) sampler: Sampler,
    pub(crate) constraint: Option<Box<dyn TokenConstraint>>,
    /// Number of new tokens.
    pub(crate) new_tokens: usize,
    /// The log-probabilities of the prompt so far, if this sample collects them.
    pub(crate) prompt: Option<Vec<Option<PromptToken>>>,
}

impl Sequence {
    /// Chooses the next token from its logits.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<NewToken, Refused> {
        let index = self.new_tokens;
        let allowed = match &mut self.constraint {
            Some(constraint) => Some(constraint.allowed().map_err(Error::Constraint)?),
            None => None,
        };
        let banned = if index < self.settings.min_tokens { self.settings.stop_ids.as_slice() } else { &[] };
        let limits = TokenLimits { allowed: allowed.as_ref(), banned };
        let sampled = self.sampler.next(logits, limits).map_err(|unsampled| match unsampled {
            Unsampled::NonFinite => Refused::NonFinite,
            Unsampled::NothingAllowed => Refused::Error(Error::NothingAllowed { number: index + 1 }),
        })?;
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(sampled.id).map_err(Error::Constraint)?;
        }
        self.new_tokens += 1;
        let softmax = LogSoftmax::new(logits);
        Ok(NewToken {
            index,
            id: sampled.id,
            log_prob: softmax.log_prob(logits[sampled.id as usize]),
            sampling_log_prob: sampled.log_prob,
            top: softmax.top(logits, self.settings.top_log_probs),
        })
    }

    /// Returns the choice of the token `ahead` tokens after the next one for the model's device; `None` if it needs the
    /// logits on the host, or if the sample will have ended.
    pub(crate) fn draw_on_device(&self, ahead: usize) -> Option<Draw> {
        let Settings { min_tokens, stop_ids, top_log_probs, max_tokens, .. } = &*self.settings;
        let index = self.new_tokens + ahead;
        let is_limited = self.constraint.is_some() || index < *min_tokens && !stop_ids.is_empty();
        let has_ended = index >= *max_tokens;
        if is_limited || *top_log_probs > 0 || has_ended { None } else { self.sampler.draw_on_device(ahead as u64) }
    }

    /// Returns true if the next token is the last one whatever it is.
    pub(crate) fn ends_by_length(&self) -> bool {
        self.new_tokens + 1 >= self.settings.max_tokens
    }

    /// Accepts the token that the device chose.
    pub(crate) fn accept(&mut self, drawn: Drawn) -> Result<NewToken, Refused> {
        let Drawn { id, log_prob, sampling_log_prob, is_finite } = drawn;
        if !is_finite {
            return Err(Refused::NonFinite);
        }
        let index = self.new_tokens;
        self.new_tokens += 1;
        self.sampler.accept(id);
        Ok(NewToken { index, id, log_prob, sampling_log_prob, top: Vec::new() })
    }

    /// Returns the reason why the sample ends with this token, if it does.
    pub(crate) fn ends_with(&self, id: u32) -> Option<FinishReason> {
        if self.settings.stop_ids.contains(&id) {
            return Some(FinishReason::Stop(id));
        }
        (self.new_tokens >= self.settings.max_tokens).then_some(FinishReason::Length)
    }

    /// Returns the tokens of the prompt whose successors' log-probabilities are still to come, among `count` tokens from
    /// `start` on, as indices from `start`.
    pub(crate) fn prompt_rows(&self, start: usize, count: usize) -> core::ops::Range<usize> {
        let Some(prompt) = &self.prompt else { return 0..0 };
        // Token i predicts token i + 1.
        let first = prompt.len().saturating_sub(1).max(start);
        let end = (start + count).min(self.settings.prompt_tokens - 1);
        if first < end { first - start..end - start } else { 0..0 }
    }

    /// Adds the log-probability of a token of the prompt from the logits before it.
    pub(crate) fn push_prompt(&mut self, id: u32, logits: &[f32]) {
        let (Some(prompt), Some(top)) = (&mut self.prompt, self.settings.prompt_log_probs) else { return };
        let softmax = LogSoftmax::new(logits);
        let log_prob = softmax.log_prob(logits[id as usize]);
        prompt.push(Some(PromptToken { id, log_prob, top: softmax.top(logits, top) }));
    }
}

/// The reason why no token was chosen.
#[derive(Debug)]
pub(crate) enum Refused {
    /// A logit is not finite; the search for its cause needs the model.
    NonFinite,
    Error(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The use of a row of hidden states.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row {
    /// The next token of this sample is chosen from it.
    Next(SampleId),
    /// It gives the log-probability of this token of the sample's prompt.
    Prompt(SampleId, usize),
}

impl Row {
    /// Returns the sample that the row belongs to.
    pub(crate) fn sample(self) -> SampleId {
        match self {
            Self::Next(id) | Self::Prompt(id, _) => id,
        }
    }
}

//! Answers to prompts during training.

use std::collections::HashMap;

use rekindle_data::{Example, IGNORED, Tokenizer};
use rekindle_engine::{CacheSize, Engine, EngineConfig, Event, FinishReason, Request};
use rekindle_kernels::paged_attention::PAGE;
use rekindle_models::{CausalLm, GenerationConfig};

use crate::{Error, PromptSample};

/// A sampler that continues prompts at each evaluation, greedily and all of them at once.
///
/// The engine computes them with the trained weights. Sampling does not affect training, because it draws no random number.
#[derive(Clone, Debug)]
pub struct Sampler<'a> {
    prompts: Vec<SamplePrompt>,
    generation: GenerationConfig,
    tokenizer: Option<&'a Tokenizer>,
}

/// The beginning of a text, to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplePrompt {
    /// The tokens of the prompt.
    pub ids: Vec<u32>,
    /// The continuation in the row.
    pub expected: Option<Vec<u32>>,
}

impl SamplePrompt {
    /// Returns the tokens before the last span of trained tokens in a row: in a chat, the turns before the last answer.
    /// Returns `None` if a row is trained from its beginning.
    pub fn of_example(example: &Example<'_>) -> Option<Self> {
        let end = example.labels.iter().rposition(|&label| label != IGNORED)? + 1;
        let start = example.labels[..end].iter().rposition(|&label| label == IGNORED)? + 1;
        let expected = Some(example.input_ids[start..end].to_vec());
        Some(Self { ids: example.input_ids[..start].to_vec(), expected })
    }
}

impl<'a> Sampler<'a> {
    /// Returns a sampler that continues each prompt by at most `max_new_tokens` tokens, until one of `eos_ids`. Without
    /// a tokenizer, texts are token ids.
    pub fn new(
        prompts: Vec<SamplePrompt>,
        max_new_tokens: usize,
        eos_ids: &[u32],
        tokenizer: Option<&'a Tokenizer>,
    ) -> Self {
        let generation = GenerationConfig { max_new_tokens, eos_ids: eos_ids.to_vec(), ..GenerationConfig::default() };
        Self { prompts, generation, tokenizer }
    }

    /// Returns true if there are no prompts.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Returns the samples of a model after `step` steps.
    ///
    /// # Errors
    /// [`Error::Model`] for a prompt that is too long for the model, logits that are not finite, or a device that
    /// fails.
    pub fn sample(&self, model: &CausalLm, step: usize) -> Result<Vec<PromptSample>, Error> {
        let answers = self.continuations(model)?;
        let one = |(index, (prompt, (ids, ended))): (usize, (&SamplePrompt, (Vec<u32>, bool)))| PromptSample {
            step,
            sample: index + 1,
            prompt: self.text(&prompt.ids, false),
            expected: prompt.expected.as_ref().map(|ids| self.text(self.answer(ids), true)),
            output: self.text(self.answer(&ids), true),
            new_tokens: ids.len(),
            ended,
        };
        Ok(self.prompts.iter().zip(answers).enumerate().map(one).collect())
    }

    /// Returns the new tokens of each prompt, and true for those that end with an end token.
    fn continuations(&self, model: &CausalLm) -> Result<Vec<(Vec<u32>, bool)>, Error> {
        if self.is_empty() {
            return Ok(Vec::new());
        }
        let length = |prompt: &SamplePrompt| prompt.ids.len() + self.generation.max_new_tokens;
        let pages = self.prompts.iter().map(|prompt| length(prompt).min(model.max_seq_length()).div_ceil(PAGE)).sum();
        let mut engine =
            Engine::new(model, EngineConfig { cache: CacheSize::Pages(pages), ..EngineConfig::default() })?;
        let mut indices = HashMap::new();
        for (index, prompt) in self.prompts.iter().enumerate() {
            let request = Request {
                max_tokens: self.generation.max_new_tokens,
                stop_ids: self.generation.eos_ids.clone(),
                ..Request::new(prompt.ids.clone())
            };
            indices.insert(engine.submit(request)?, index);
        }
        let mut answers = vec![(Vec::new(), false); self.prompts.len()];
        while engine.has_work() {
            for event in engine.step() {
                let index = indices[&event.request()];
                match event {
                    Event::Token { token, .. } => answers[index].0.push(token.id),
                    Event::Finished { reason, .. } => answers[index].1 = matches!(reason, FinishReason::Stop(_)),
                    Event::Failed { error, .. } => return Err(error.into()),
                    Event::Prompt { .. } => {}
                }
            }
        }
        Ok(answers)
    }

    /// Returns the tokens before the first end token. Templates may write more after it, which is never generated.
    fn answer<'i>(&self, ids: &'i [u32]) -> &'i [u32] {
        let end = ids.iter().position(|id| self.generation.eos_ids.contains(id));
        end.map_or(ids, |end| &ids[..end])
    }

    /// Decodes tokens; an `answer` without special tokens.
    fn text(&self, ids: &[u32], answer: bool) -> String {
        let text = self.tokenizer.and_then(|tokenizer| tokenizer.decode(ids, answer).ok());
        text.unwrap_or_else(|| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rekindle_data::RowNumber;

    use super::*;

    #[test]
    fn the_last_answer_is_asked_for() {
        let prompt = |labels: &[i32]| {
            let input_ids = [10, 11, 12, 13, 14, 15];
            SamplePrompt::of_example(&Example {
                input_ids: &input_ids,
                labels,
                row: RowNumber::Line(1),
                path: Path::new("rows"),
                preferred: None,
                margin: None,
            })
        };
        let split =
            |ids: &[u32], expected: &[u32]| Some(SamplePrompt { ids: ids.into(), expected: Some(expected.into()) });
        assert_eq!(prompt(&[IGNORED, 11, 12, IGNORED, 14, IGNORED]), split(&[10, 11, 12, 13], &[14]));
        assert_eq!(prompt(&[IGNORED, IGNORED, 12, 13, 14, 15]), split(&[10, 11], &[12, 13, 14, 15]));
        assert_eq!(prompt(&[10, 11, 12, 13, 14, 15]), None, "a text has no prompt");
        assert_eq!(prompt(&[IGNORED; 6]), None);
        let sampler = Sampler::new(Vec::new(), 8, &[14], None);
        assert_eq!((sampler.answer(&[12, 13, 14, 15]), sampler.answer(&[12, 13])), (&[12, 13][..], &[12, 13][..]));
    }
}

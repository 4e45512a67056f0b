//! The prompts that a model answers during training.

use rekindle_data::{ChatPrompt, Dataset, RowTask, Tokenizer, counted};
use rekindle_train::{SamplePrompt, Sampler, SftConfig};

use crate::{Error, Model};

/// Returns the sampler for each evaluation; `None` if `config` has no prompts.
pub(crate) fn sampler<'a>(
    model: &Model,
    tokenizer: Option<&'a Tokenizer>,
    config: &SftConfig,
    eval: Option<&Dataset>,
) -> Result<Option<Sampler<'a>>, Error> {
    let prompts = prompts(tokenizer, config, eval, model.causal_lm().max_seq_length())?;
    let end_tokens = model.end_tokens(tokenizer)?;
    let sampler = Sampler::new(prompts, config.sample_max_new_tokens, &end_tokens, tokenizer);
    Ok((!sampler.is_empty()).then_some(sampler))
}

/// Returns the prompts of `config`: its own messages, then the prompts of the evaluation set's first rows.
pub(crate) fn prompts(
    tokenizer: Option<&Tokenizer>,
    config: &SftConfig,
    eval: Option<&Dataset>,
    max_seq_length: usize,
) -> Result<Vec<SamplePrompt>, Error> {
    let mut prompts = Vec::new();
    for text in &config.sample_prompts {
        let Some(tokenizer) = tokenizer else {
            return Err(Error::Argument(
                "sample_prompts needs a tokenizer, and the checkpoint has no tokenizer.json; \
                 remove sample_prompts"
                    .to_owned(),
            ));
        };
        let ids = encode(tokenizer, text)?;
        let most = max_seq_length - 1;
        if ids.is_empty() || ids.len() > most {
            let length = counted(ids.len(), "token");
            return Err(Error::Argument(format!(
                "sample_prompts: {text:?} has {length}; it must have 1 to {most} (max_seq_length - 1)"
            )));
        }
        prompts.push(SamplePrompt { ids, expected: None });
    }
    if config.eval_samples > 0 {
        let Some(eval) = eval else {
            return Err(Error::Argument(
                "eval_samples needs evaluation rows; set eval or eval_fraction in \
                 [data]"
                    .to_owned(),
            ));
        };
        let before = prompts.len();
        let is_prompt = eval.task() == RowTask::Prompts;
        let of_rows =
            eval.examples().filter(|example| example.preferred != Some(false)).filter_map(|example| match is_prompt {
                true => Some(SamplePrompt { ids: example.input_ids.to_vec(), expected: None }),
                false => SamplePrompt::of_example(&example),
            });
        prompts.extend(of_rows.take(config.eval_samples));
        if prompts.len() == before {
            return Err(Error::Argument(
                "eval_samples: no evaluation row has a prompt, because each is trained from its first token; set \
                 sample_prompts instead"
                    .to_owned(),
            ));
        }
    }
    Ok(prompts)
}

/// Encodes a user's message up to the answer, or the plain text if there is no chat template.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    if !tokenizer.has_chat_template() {
        return Ok(tokenizer.encode(text, true)?);
    }
    Ok(ChatPrompt::new(None, text).encode(tokenizer)?)
}

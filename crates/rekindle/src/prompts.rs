//! The prompts that are answered while a model is trained.

use rekindle_data::{Dataset, Message, RenderOptions, Tokenizer};
use rekindle_train::{SamplePrompt, Sampler, SftConfig};

use crate::{Error, Model};

/// What `config` asks to be answered at each evaluation: messages of its own, then prompts of the evaluation set's first
/// rows. `None` when it asks for nothing.
pub(crate) fn sampler<'a>(
    model: &Model,
    tokenizer: Option<&'a Tokenizer>,
    config: &SftConfig,
    eval: Option<&Dataset>,
) -> Result<Option<Sampler<'a>>, Error> {
    let mut prompts = Vec::new();
    for text in &config.sample_prompts {
        let Some(tokenizer) = tokenizer else {
            return Err(Error::Argument("sample_prompts are texts; the checkpoint has no tokenizer.json".to_owned()));
        };
        let ids = encode(tokenizer, text)?;
        let most = model.causal_lm().max_seq_length() - 1;
        if ids.is_empty() || ids.len() > most {
            let length = ids.len();
            return Err(Error::Argument(format!(
                "sample_prompts: {text:?} has {length} tokens; it must have 1 to {most} (max_seq_length - 1)"
            )));
        }
        prompts.push(SamplePrompt { ids, expected: None });
    }
    if config.eval_samples > 0 {
        let Some(eval) = eval else {
            return Err(Error::Argument("eval_samples needs rows to evaluate".to_owned()));
        };
        let before = prompts.len();
        let of_rows = eval.examples().filter_map(|example| SamplePrompt::of_example(&example));
        prompts.extend(of_rows.take(config.eval_samples));
        if prompts.len() == before {
            return Err(Error::Argument(
                "eval_samples: every row to evaluate is trained from its beginning, none has a prompt; give \
                 sample_prompts"
                    .to_owned(),
            ));
        }
    }
    let eos_ids = tokenizer.map_or_else(|| model.eos_ids(), |tokenizer| Ok(tokenizer.eos_ids().to_vec()))?;
    let sampler = Sampler::new(prompts, config.sample_max_new_tokens, &eos_ids, tokenizer);
    Ok((!sampler.is_empty()).then_some(sampler))
}

/// A user's message up to where the answer begins, or text as it is where there is no chat template.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    if !tokenizer.has_chat_template() {
        return Ok(tokenizer.encode(text, true)?);
    }
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let rendered = tokenizer.chat_template()?.render(&[Message::new("user", text)], &options)?;
    // The template has written the special tokens already.
    Ok(tokenizer.encode(&rendered, false)?)
}

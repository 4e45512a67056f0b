//! Single answers of a model.

use rekindle::{ChatPrompt, Error, GenerationConfig, Model, Tokenizer};

use crate::failure::Failure;

/// Returns the model's most likely answer.
pub(crate) fn answer(model: &Model, tokenizer: &Tokenizer, question: &str, most: usize) -> Result<String, Failure> {
    let prompt = ChatPrompt::new(None, question).encode(tokenizer).map_err(Error::from)?;
    let eos_ids = model.end_tokens(Some(tokenizer))?;
    let config = GenerationConfig { max_new_tokens: most, eos_ids, ..GenerationConfig::default() };
    Ok(model.generate_text(tokenizer, &prompt, &config, &[], |_| true)?.text)
}

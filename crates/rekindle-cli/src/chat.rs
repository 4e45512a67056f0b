//! One question, one answer.

use rekindle::{Error, GenerationConfig, Message, Model, RenderOptions, Tokenizer};

use crate::failure::Failure;

/// The token ids of a user's message up to where the assistant's turn begins.
pub(crate) fn chat_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Failure> {
    let template = tokenizer.chat_template().map_err(Error::from)?;
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let rendered = template.render(&[Message::new("user", text)], &options).map_err(Error::from)?;
    // The template has written the special tokens already.
    Ok(tokenizer.encode(&rendered, false).map_err(Error::from)?)
}

/// The model's most likely answer.
pub(crate) fn answer(model: &Model, tokenizer: &Tokenizer, question: &str, most: usize) -> Result<String, Failure> {
    let prompt = chat_prompt(tokenizer, question)?;
    let config =
        GenerationConfig { max_new_tokens: most, eos_ids: tokenizer.eos_ids().to_vec(), ..GenerationConfig::default() };
    let generated = model.generate(&prompt, &config, |_| true)?;
    Ok(tokenizer.decode(&generated.ids, true).map_err(Error::from)?)
}

//! The base model's tokenizer: a byte-level BPE trained on the corpus, and its companion files in the Hugging Face
//! layout.

use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

/// The maximum vocabulary size. The corpus needs fewer entries: merging stops at about 1,050, when each word is one
/// token.
const VOCABULARY: usize = 1152;
/// The model's maximum row length in tokens.
const MAX_LENGTH: usize = 256;

/// Padding and end of a document outside chats. Id 0.
const END_OF_TEXT: &str = "<|endoftext|>";
/// Opens a turn. Id 1.
const TURN_START: &str = "<|im_start|>";
/// Closes a turn, and ends a generation. Id 2.
const TURN_END: &str = "<|im_end|>";

const CHAT_TEMPLATE: &str = include_str!("chat_template.jinja");

/// Trains the tokenizer on `texts` and writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
/// `chat_template.jinja` and `generation_config.json` into the folder `out_dir`, which must exist.
///
/// Text is split into single digits and GPT-2's words before bytes are merged. The same texts give the same bytes.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn train(texts: Vec<String>, out_dir: &Path) -> Result<(), Box<dyn Error>> {
    let tokenizer = trained(texts)?;
    fs::write(out_dir.join("tokenizer.json"), tokenizer.to_string(true).map_err(boxed)? + "\n")?;
    fs::write(out_dir.join("chat_template.jinja"), CHAT_TEMPLATE)?;
    let special = json!({"eos_token": TURN_END, "pad_token": END_OF_TEXT});
    let ids = [TURN_END, END_OF_TEXT].map(|token| tokenizer.token_to_id(token));
    for (name, content) in [
        ("tokenizer_config.json", tokenizer_config()),
        ("special_tokens_map.json", special),
        ("generation_config.json", json!({"do_sample": false, "eos_token_id": ids, "pad_token_id": ids[1]})),
    ] {
        fs::write(out_dir.join(name), serde_json::to_string_pretty(&content)? + "\n")?;
    }
    Ok(())
}

fn trained(texts: Vec<String>) -> Result<Tokenizer, Box<dyn Error>> {
    let words = ByteLevel::default().add_prefix_space(false);
    let pieces: Vec<PreTokenizerWrapper> = vec![Digits::new(true).into(), words.into()];
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(pieces)))
        .with_post_processor(Some(ByteLevel::default().trim_offsets(false)))
        .with_decoder(Some(ByteLevel::default()));
    let special = [END_OF_TEXT, TURN_START, TURN_END].map(|token| AddedToken::from(token, true));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    tokenizer.train(&mut trainer, texts.into_iter()).map_err(boxed)?;
    Ok(tokenizer)
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": MAX_LENGTH,
    })
}

fn boxed(error: tokenizers::Error) -> Box<dyn Error> {
    error
}

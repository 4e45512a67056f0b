//! A small byte-level tokenizer with special tokens, and chat templates in the styles of the supported models.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper, TokenizerBuilder};

use crate::Tokenizer;

/// Turns between `<|im_start|>role` and `<|im_end|>`.
pub(crate) const CHATML: &str = include_str!("../tests/templates/chatml.jinja");
/// Header tokens, the BOS in the template, trimmed contents and a date.
pub(crate) const HEADERS: &str = include_str!("../tests/templates/headers.jinja");
/// Like ChatML, with a default system prompt, and tools.
pub(crate) const DEFAULT_SYSTEM: &str = include_str!("../tests/templates/default_system.jinja");
/// Like ChatML, without the reasoning of turns before the last question.
pub(crate) const THINKING: &str = include_str!("../tests/templates/thinking.jinja");
/// Like ChatML, with `{% generation %}` blocks.
pub(crate) const MARKED: &str = include_str!("../tests/templates/marked.jinja");
/// Roles marked by brackets, the BOS and EOS around each pair of turns.
pub(crate) const BRACKETS: &str = include_str!("../tests/templates/brackets.jinja");

/// Special tokens, which follow the 256 bytes and the merges; `<s>` is the first.
pub(crate) const SPECIAL: [&str; 9] = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin|>",
    "<|header|>",
    "<|end_header|>",
    "<|eot|>",
];

/// Returns a checkpoint directory with the template and `<|im_end|>` as end token.
pub(crate) fn tokenizer(template: &str) -> (TempDir, Tokenizer) {
    let dir = checkpoint();
    write(dir.path(), "chat_template.jinja", template);
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("a valid tokenizer");
    (dir, tokenizer)
}

/// Returns a checkpoint directory without a chat template: BOS `<s>`, EOS `<|im_end|>`; the post-processor adds `<s>`.
pub(crate) fn checkpoint() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    save_tokenizer(dir.path(), &["<s>", "$A"]);
    write_json(
        dir.path(),
        "tokenizer_config.json",
        &json!({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}),
    );
    dir
}

/// Writes a `tokenizer.json` whose post-processor adds tokens around a text, as in `["<s>", "$A"]`.
pub(crate) fn save_tokenizer(dir: &Path, around: &[&str]) {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġ", "Ġ"), ("Ċ", "Ċ")];
    let merged = merges.map(|(a, b)| (a.to_owned(), b.to_owned()));
    let vocab = alphabet.into_iter().map(String::from).chain(merged.iter().map(|(a, b)| format!("{a}{b}"))).zip(0..);
    let bpe = BPE::builder().vocab_and_merges(vocab.collect::<tokenizers::models::bpe::Vocab>(), merged.to_vec());
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(bpe.build().expect("merges of known tokens"))
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_decoder(Some(ByteLevel::default()))
        .with_post_processor(None::<PostProcessorWrapper>)
        .build()
        .expect("complete");
    tokenizer.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true))).expect("new tokens");
    let ids = SPECIAL.map(|token| (token.to_owned(), tokenizer.token_to_id(token).expect("just added")));
    let template = TemplateProcessing::builder()
        .try_single(around.to_vec())
        .expect("a valid template")
        .special_tokens(ids.to_vec())
        .build()
        .expect("known tokens");
    // As in real checkpoints: one step trims the offsets, the other adds tokens.
    let trim = PostProcessorWrapper::ByteLevel(ByteLevel::new(false, true, true));
    let steps = vec![trim, PostProcessorWrapper::Template(template)];
    tokenizer.with_post_processor(Some(PostProcessorWrapper::Sequence(
        tokenizers::processors::sequence::Sequence::new(steps),
    )));
    tokenizer.save(dir.join("tokenizer.json"), false).expect("written");
}

pub(crate) fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).expect("written");
}

pub(crate) fn write_json(dir: &Path, name: &str, value: &Value) {
    write(dir, name, &value.to_string());
}

/// Returns a dataset file with these bytes.
pub(crate) fn write_rows(bytes: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, bytes).expect("written");
    (dir, path)
}

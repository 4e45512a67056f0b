use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper};

use crate::encode::end_of_turn;
use crate::error::{Error, Result};
use crate::stream::StreamDecoder;
use crate::template::ChatTemplate;

mod checkpoint;
mod templates;

pub use checkpoint::{chat_template_sources, eos_token_ids};
pub(crate) use templates::NamedTemplate;
use templates::Templates;

/// A checkpoint's tokenizer: text to token ids and back, its special tokens and its chat templates.
///
/// Padding and truncation in `tokenizer.json` are disabled: rows are never padded, and [`Overlong`](crate::Overlong)
/// decides about long rows.
pub struct Tokenizer {
    /// The tokenizer without its post-processor, which would trim spaces from the offsets that loss masks need.
    inner: tokenizers::Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    vocab_size: usize,
    special_ids: HashSet<u32>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    eos_ids: Vec<u32>,
    templates: Templates,
    dir: PathBuf,
}

/// Token ids, and the position of each in the text.
pub(crate) struct Tokenized {
    pub(crate) ids: Vec<u32>,
    /// Byte ranges; `None` for tokens that the post-processor added.
    pub(crate) places: Vec<Option<Range<usize>>>,
}

impl Tokenizer {
    /// Reads a checkpoint directory.
    ///
    /// - `tokenizer.json`: the tokenizer itself.
    /// - `tokenizer_config.json`, then `special_tokens_map.json`: `bos_token`, `eos_token` …
    /// - `chat_template.jinja` and `additional_chat_templates/*.jinja`, else `chat_template` in `tokenizer_config.json`, a
    ///   string or a list of named templates.
    /// - `generation_config.json`, else `config.json`, else `eos_token`: the ids that end a generation.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when `tokenizer.json` is missing, a file is broken or a special token is not in the
    /// vocabulary.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let (mut inner, path) = read_tokenizer(dir)?;
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::tokenizer(&path, error.to_string()))?;

        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab_size == 0 || vocab_size > i32::MAX as usize {
            return Err(Error::tokenizer(&path, format!("a vocabulary of {vocab_size} tokens cannot be used")));
        }
        let special = checkpoint::special_tokens(dir)?;
        let id_of = |name: &str| match special.get(name) {
            None => Ok(None),
            Some(token) => inner.token_to_id(token).map(Some).ok_or_else(|| {
                Error::tokenizer(dir, format!("{name} {token:?} is not in the vocabulary of tokenizer.json"))
            }),
        };
        let (bos_id, eos_id) = (id_of("bos_token")?, id_of("eos_token")?);
        let eos_ids = checkpoint::eos_token_ids(dir)?.unwrap_or_else(|| eos_id.into_iter().collect());
        let templates = Templates::new(checkpoint::chat_templates(dir)?, &special);
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id);
        // Some vocabularies do not say that their end tokens are special.
        let special_ids = special_ids.chain(bos_id).chain(eos_id).chain(eos_ids.iter().copied()).collect();
        Ok(Tokenizer {
            inner,
            post_processor,
            vocab_size,
            special_ids,
            bos_id,
            eos_id: eos_id.or(eos_ids.first().copied()),
            eos_ids,
            templates,
            dir: dir.to_owned(),
        })
    }

    /// Returns the token ids of `text`. Special tokens written in the text become their ids in any case;
    /// `add_special_tokens` adds those that the tokenizer puts around a text, such as its BOS.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encode_with_places(text, add_special_tokens)?.ids)
    }

    /// Returns the token ids of `text` as [`encode`](Self::encode) does, or `None` if there are more than `limit`. Of a much
    /// longer text only the beginning is encoded, because encoding takes many times the text's memory.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_at_most(&self, text: &str, add_special_tokens: bool, limit: usize) -> Result<Option<Vec<u32>>> {
        // A cut changes the tokens around it, so the beginning must have some more.
        const MARGIN: usize = 64;
        let mut end = 8 * (limit + MARGIN);
        while end < text.len() {
            let beginning = &text[..text.floor_char_boundary(end)];
            if self.encode(beginning, add_special_tokens)?.len() > limit + MARGIN {
                return Ok(None);
            }
            end *= 4;
        }
        Ok(Some(self.encode(text, add_special_tokens)?).filter(|ids| ids.len() <= limit))
    }

    /// Returns the text of token ids; unknown ids are omitted, and special tokens with `skip_special`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| self.error(format!("cannot decode {ids:?}: {error}")))
    }

    /// Returns a decoder that decodes ids one at a time.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special)
    }

    /// Returns one more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the id of `bos_token`.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Returns the id that ends a text: `eos_token`, or the first of [`eos_ids`](Self::eos_ids) if there is none.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Returns the ids that end a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Returns the id of a token, by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns true if the checkpoint has a chat template, even if it does not parse.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// Returns the chat template of a conversation without tools.
    ///
    /// # Errors
    /// As [`chat_template_for`](Self::chat_template_for).
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.chat_template_for(None, false)
    }

    /// Returns the chat template that transformers' `apply_chat_template` chooses: the one with this name; without a
    /// name, `tool_use` for a conversation with tools if it exists, else `default`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none or it does not parse, [`Error::Options`] if none has this name.
    pub fn chat_template_for(&self, name: Option<&str>, has_tools: bool) -> Result<&ChatTemplate> {
        self.named_template(name, has_tools)?.template().map_err(|message| self.error(message))
    }

    pub(crate) fn named_template(&self, name: Option<&str>, has_tools: bool) -> Result<&NamedTemplate> {
        self.templates.choose(name, has_tools).map_err(|message| match name {
            Some(_) => Error::Options(message),
            None => self.error(message),
        })
    }

    /// Returns the files of the chat templates.
    pub(crate) fn template_files(&self) -> BTreeSet<&Path> {
        self.templates.iter().map(|template| &*template.path).collect()
    }

    /// Returns the tokenizer's files in the checkpoint, for saving them elsewhere.
    pub fn files(&self) -> Vec<PathBuf> {
        rekindle_hub::companion_files(&self.dir)
    }

    /// Returns the text of a token in the vocabulary, by its id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns true if the id is that of a special token, such as an end token. The vocabulary decides whether
    /// `<think>` is one.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    pub(crate) fn encode_with_places(&self, text: &str, add_special_tokens: bool) -> Result<Tokenized> {
        let fail = |error: tokenizers::Error| self.error(format!("cannot encode a text: {error}"));
        let encoding = self.inner.encode(text, false).map_err(fail)?;
        let places: Vec<Range<usize>> = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        let Some(post_processor) = self.post_processor.as_ref().filter(|_| add_special_tokens) else {
            return Ok(Tokenized { ids: encoding.get_ids().to_vec(), places: places.into_iter().map(Some).collect() });
        };
        let processed = post_processor.process(encoding, None, true).map_err(fail)?;
        Ok(Tokenized { ids: processed.get_ids().to_vec(), places: spread(places, &processed) })
    }

    /// Returns the token with which the chat template ends the assistant's turns, found by rendering a conversation. It
    /// may differ from [`eos_ids`](Self::eos_ids): checkpoints that were never trained on conversations may stop at
    /// another token.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn_of(self.templates.choose(None, false).ok()?)
    }

    /// Returns the tokens with which the checkpoint's chat templates end the assistant's turns.
    pub fn ends_of_turns(&self) -> BTreeSet<u32> {
        self.templates.iter().filter_map(|named| self.end_of_turn_of(named)).collect()
    }

    pub(crate) fn end_of_turn_of(&self, named: &NamedTemplate) -> Option<u32> {
        let template = named.template().ok()?;
        *named.end_of_turn.get_or_init(|| end_of_turn(self, template))
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::tokenizer(&self.dir, message)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("dir", &self.dir)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

fn read_tokenizer(dir: &Path) -> Result<(tokenizers::Tokenizer, PathBuf)> {
    let path = dir.join("tokenizer.json");
    if !path.is_file() {
        let message = if !dir.is_dir() {
            "there is no such directory"
        } else if dir.join("tokenizer.model").is_file() {
            "has a tokenizer.model but no tokenizer.json; save the fast tokenizer of transformers beside it"
        } else {
            "has no tokenizer.json"
        };
        return Err(Error::tokenizer(dir, message));
    }
    let inner = tokenizers::Tokenizer::from_file(&path)
        .map_err(|error| Error::tokenizer(&path, format!("not a tokenizer: {error}")))?;
    Ok((inner, path))
}

/// Assigns each token of `processed` its position; the post-processor adds tokens but neither removes nor reorders any.
fn spread(places: Vec<Range<usize>>, processed: &Encoding) -> Vec<Option<Range<usize>>> {
    let mut places = places.into_iter();
    let added = processed.get_special_tokens_mask();
    added.iter().map(|&added| if added == 1 { None } else { places.next() }).collect()
}

#[cfg(test)]
mod tests;

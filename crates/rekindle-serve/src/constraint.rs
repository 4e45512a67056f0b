//! Restriction of answers to JSON schemas, regular expressions and grammars, as masks over the vocabulary.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

/// White space between the tokens of JSON. Without a limit, a small model may write spaces until it has no tokens left.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// The bytes of a tokenizer's tokens, for constraints.
pub struct Vocabulary {
    factory: ParserFactory,
    env: TokEnv,
    end_tokens: Vec<u32>,
}

/// The form of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that matches a schema.
    JsonSchema(Value),
    /// A regular expression that the whole text matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
}

/// The reasoning before a constrained text, which is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preamble {
    /// There is none.
    None,
    /// The text may begin with this token, and is then free up to the end tag.
    May {
        /// The token that opens the reasoning.
        open: u32,
        /// The end tag.
        end: String,
    },
    /// The text is free up to this end tag.
    Open {
        /// The end tag.
        end: String,
    },
}

/// The state of a constrained text: which tokens may come next.
///
/// ```
/// use std::sync::Arc;
/// use rekindle_serve::{Grammar, Preamble, TokenConstraint, Vocabulary};
///
/// // Token 2 is the end token.
/// let tokens = vec![b"yes".to_vec(), b"no".to_vec(), b"\xff<|end|>".to_vec()];
/// let vocabulary = Arc::new(Vocabulary::new(tokens, &[2])?);
/// let grammar = Grammar::Choice(vec!["yes".into(), "yesno".into()]);
/// let mut constraint = TokenConstraint::new(&vocabulary, &grammar, Preamble::None)?;
/// assert_eq!(constraint.allowed()?, [0b001]);
/// constraint.accept(0)?;
/// assert_eq!(constraint.allowed()?, [0b110]);
/// # Ok::<(), String>(())
/// ```
pub struct TokenConstraint {
    vocabulary: Arc<Vocabulary>,
    matcher: Matcher,
    preamble: Preamble,
    /// The last bytes of an open preamble, as many as its end tag has.
    tail: Vec<u8>,
}

impl Vocabulary {
    /// Returns a vocabulary. Token i has the bytes `tokens[i]`; special tokens begin with the byte 0xFF, and unused ids
    /// are empty. `end_tokens` end a text.
    ///
    /// # Errors
    /// A message if there is no end token, or one is beyond the vocabulary.
    pub fn new(tokens: Vec<Vec<u8>>, end_tokens: &[u32]) -> Result<Self, String> {
        let vocab_size = u32::try_from(tokens.len()).map_err(|_| "the vocabulary is too large".to_owned())?;
        let Some(&first) = end_tokens.first() else {
            return Err("the model has no end token, so that a constrained answer would not end".to_owned());
        };
        if let Some(id) = end_tokens.iter().find(|&&id| id >= vocab_size) {
            return Err(format!("the end token {id} is beyond the vocabulary of {vocab_size} tokens"));
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first), &tokens).with_eos_tokens(end_tokens);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        Ok(Self { factory, env, end_tokens: end_tokens.to_vec() })
    }

    /// Returns the vocabulary of a `tokenizer.json`, for a model with `vocab_size` rows in its embedding.
    ///
    /// # Errors
    /// A message if the tokens' bytes cannot be found, or as [`new`](Self::new).
    pub fn from_tokenizer_json(file: &Value, vocab_size: usize, end_tokens: &[u32]) -> Result<Self, String> {
        let mut tokens = token_bytes_from_tokenizer_json(file)
            .map_err(|error| format!("the bytes of this tokenizer's tokens are unknown: {error}"))?;
        tokens.resize(vocab_size.max(tokens.len()), Vec::new());
        Self::new(tokens, end_tokens)
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> usize {
        self.env.tok_trie().vocab_size()
    }

    /// Returns true if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes of a token, without the mark of special tokens.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let bytes = self.env.tok_trie().token(id);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes)
    }

    /// Returns the id of the token with this text, special or not.
    pub fn id(&self, text: &str) -> Option<u32> {
        let trie = self.env.tok_trie();
        let special = [&[TokTrie::SPECIAL_TOKEN_MARKER], text.as_bytes()].concat();
        trie.token_id(&special).or_else(|| trie.token_id(text.as_bytes()))
    }

    /// Returns true for a special token, which no text contains.
    pub fn is_special(&self, id: u32) -> bool {
        self.env.tok_trie().is_special_token(id)
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Grammar {
    fn compile(&self) -> Result<TopLevelGrammar, String> {
        match self {
            Self::JsonSchema(schema) => {
                let mut schema = match schema {
                    Value::Object(fields) => fields.clone(),
                    Value::Bool(true) => serde_json::Map::new(),
                    _ => return Err("a JSON schema must be an object".to_owned()),
                };
                schema.insert("x-guidance".to_owned(), json_options());
                Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
            }
            Self::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
            Self::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
            }
            Self::Lark(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
        }
    }
}

/// Returns the options of JSON in grammars, the value of `x-guidance` in a schema.
pub(crate) fn json_options() -> Value {
    json!({"whitespace_flexible": true, "whitespace_pattern": WHITE_SPACE})
}

impl TokenConstraint {
    /// Returns a constraint at the beginning of a text.
    ///
    /// # Errors
    /// A message if the grammar is invalid or too large.
    pub fn new(vocabulary: &Arc<Vocabulary>, grammar: &Grammar, preamble: Preamble) -> Result<Self, String> {
        let parser = vocabulary.factory.create_parser(grammar.compile()?);
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Self { vocabulary: vocabulary.clone(), matcher, preamble, tail: Vec::new() }),
        }
    }

    /// Returns the tokens that may come next, as bits of words, the lowest bit first. End tokens are among them where
    /// the text may end.
    ///
    /// # Errors
    /// A message if the parser fails.
    pub fn allowed(&mut self) -> Result<Vec<u32>, String> {
        if let Preamble::Open { .. } = self.preamble {
            let mut mask = self.vocabulary.env.tok_trie().alloc_token_set();
            mask.set_all(true);
            self.vocabulary.end_tokens.iter().for_each(|&id| mask.disallow_token(id));
            return Ok(words(&mask, self.vocabulary.len()));
        }
        let mut mask = self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        if self.vocabulary.end_tokens.iter().any(|&id| mask.is_allowed(id)) {
            self.vocabulary.end_tokens.iter().for_each(|&id| mask.allow_token(id));
        }
        if let Preamble::May { open, .. } = self.preamble {
            mask.allow_token(open);
        }
        Ok(words(&mask, self.vocabulary.len()))
    }

    /// Receives the token that was chosen.
    ///
    /// # Errors
    /// A message if it was not allowed.
    pub fn accept(&mut self, id: u32) -> Result<(), String> {
        match std::mem::replace(&mut self.preamble, Preamble::None) {
            Preamble::May { open, end } if open == id => self.preamble = Preamble::Open { end },
            Preamble::Open { end } => {
                self.tail.extend_from_slice(self.vocabulary.bytes(id));
                let found = self.tail.windows(end.len()).any(|window| window == end.as_bytes());
                let kept = self.tail.len().saturating_sub(end.len());
                self.tail.drain(..kept);
                if !found {
                    self.preamble = Preamble::Open { end };
                }
            }
            _ if self.vocabulary.end_tokens.contains(&id) => {}
            _ => self.matcher.consume_token(id).map_err(|error| error.to_string())?,
        }
        Ok(())
    }
}

/// Returns the bits of the first `len` tokens.
fn words(mask: &llguidance::toktrie::SimpleVob, len: usize) -> Vec<u32> {
    let mut words = mask.as_slice().to_vec();
    words.resize(len.div_ceil(32), 0);
    if !len.is_multiple_of(32)
        && let Some(last) = words.last_mut()
    {
        *last &= (1 << (len % 32)) - 1;
    }
    words
}

impl Clone for TokenConstraint {
    fn clone(&self) -> Self {
        Self {
            vocabulary: self.vocabulary.clone(),
            matcher: self.matcher.deep_clone(),
            preamble: self.preamble.clone(),
            tail: self.tail.clone(),
        }
    }
}

impl fmt::Debug for TokenConstraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenConstraint").field("preamble", &self.preamble).finish_non_exhaustive()
    }
}

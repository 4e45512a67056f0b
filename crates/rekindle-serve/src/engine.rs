//! The interface between the server and a text generation engine.

use serde_json::{Map, Value};
use tokio::sync::mpsc::UnboundedSender;

use crate::chat_format::ChatFormat;
use crate::constraint::{TokenConstraint, Vocabulary};

/// A model that generates text, with its tokenizer and adapters.
///
/// The server calls these methods from several threads. [`submit`](Self::submit) must return quickly; the engine sends
/// the events of a request from its own thread. The other methods may block.
pub trait Engine: Send + Sync + 'static {
    /// Returns the names that a request's `model` may have: the base model first, then its adapters.
    fn models(&self) -> Vec<ServedModel>;

    /// Returns the limits of a request.
    fn limits(&self) -> EngineLimits;

    /// Returns the token ids of a text; `add_special_tokens` adds those that the tokenizer puts around texts.
    ///
    /// # Errors
    /// An error if the text cannot be encoded.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, EngineError>;

    /// Encodes a prompt. May refuse one that exceeds the model's context without encoding all of it.
    ///
    /// # Errors
    /// [`EngineErrorKind::TooLong`], and as [`encode`](Self::encode).
    fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, EngineError> {
        self.encode(text, add_special_tokens)
    }

    /// Returns the text of token ids, which are below [`EngineLimits::vocab_size`].
    ///
    /// # Errors
    /// An error if the tokenizer's decoder fails.
    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, EngineError>;

    /// Returns the bytes of one token, of special tokens too.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// Renders a conversation with the chat template.
    ///
    /// # Errors
    /// An error if there is no chat template, or if it refuses the conversation.
    fn render_chat(&self, chat: &ChatInput) -> Result<RenderedChat, EngineError>;

    /// Returns the form of reasoning and tool calls in the answers of this model.
    fn chat_format(&self) -> ChatFormat;

    /// Returns the bytes of all tokens, for constraints. The engine keeps the vocabulary; only the first call may be slow.
    ///
    /// # Errors
    /// An error if the tokens' bytes are unknown.
    fn vocabulary(&self) -> Result<std::sync::Arc<Vocabulary>, EngineError>;

    /// Queues a request. The events of each sample go to `events` until [`EngineEvent::Finished`] or
    /// [`EngineEvent::Failed`].
    ///
    /// # Errors
    /// An error for a request that the engine cannot run. No event is sent then.
    fn submit(&self, request: EngineRequest, events: EventSink) -> Result<RequestId, EngineError>;

    /// Stops a request and frees its memory; one that has ended is ignored.
    fn abort(&self, id: RequestId);

    /// Loads an adapter under a name. With `replace`, an adapter of this name is replaced: requests that are running end
    /// with the old one.
    ///
    /// # Errors
    /// An error if the name is taken, or the adapter is missing or does not match the model.
    fn load_adapter(&self, name: &str, path: &str, replace: bool) -> Result<(), EngineError>;

    /// Removes an adapter.
    ///
    /// # Errors
    /// An error if no adapter has this name.
    fn unload_adapter(&self, name: &str) -> Result<(), EngineError>;

    /// Returns the state of the engine, for `/metrics`.
    fn stats(&self) -> EngineStats;
}

/// The engine's number of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A name that a request's `model` may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedModel {
    /// The name.
    pub name: String,
    /// The directory or hub name that it was loaded from.
    pub root: String,
    /// The name of the base model, for an adapter.
    pub parent: Option<String>,
}

/// Limits of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// The maximum number of tokens of prompt and answer together.
    pub max_model_len: usize,
    /// The number of rows of the embedding; ids are below it.
    pub vocab_size: usize,
}

/// A conversation to render.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatInput {
    /// The turns, objects with a known `role` and a `content` that is a string, or absent beside `tool_calls`.
    pub messages: Vec<Map<String, Value>>,
    /// Descriptions of tools.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub kwargs: Map<String, Value>,
    /// If true, the prompt ends with the beginning of an assistant turn.
    pub add_generation_prompt: bool,
    /// If true, the prompt ends with the text of the last turn, which the answer continues.
    pub continue_final_message: bool,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The text of the prompt.
    pub text: String,
    /// Its token ids.
    pub ids: Vec<u32>,
}

/// A prompt to continue.
#[derive(Debug)]
pub struct EngineRequest {
    /// The adapter's name; `None` is the base model.
    pub adapter: Option<String>,
    /// Ids of the prompt, not empty and below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// The number of independent samples.
    pub n: usize,
    /// The maximum number of new tokens; prompt and new tokens fit into the model's length. 0 computes the prompt's
    /// log-probabilities only.
    pub max_tokens: usize,
    /// The choice of tokens.
    pub sampling: Sampling,
    /// The end of the text.
    pub stops: Stops,
    /// Omit special tokens in the text.
    pub skip_special_tokens: bool,
    /// Send the log-probability of each new token, with those of this many most likely tokens.
    pub logprobs: Option<usize>,
    /// Send the log-probability of each token of the prompt, with those of this many most likely tokens.
    pub prompt_logprobs: Option<usize>,
    /// The tokens that the text may consist of.
    pub constraint: Option<TokenConstraint>,
}

/// The choice of the next token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// 0 is no limit.
    pub top_k: usize,
    /// 1 is no limit.
    pub top_p: f32,
    /// 0 is no limit.
    pub min_p: f32,
    /// 1 is no penalty.
    pub repetition_penalty: f32,
    /// 0 is no penalty.
    pub presence_penalty: f32,
    /// 0 is no penalty.
    pub frequency_penalty: f32,
    /// Numbers added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// `None` lets the engine choose one. Samples of a request draw independently.
    pub seed: Option<u64>,
}

/// The end of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// Strings that end the text and are cut off.
    pub strings: Vec<String>,
    /// Further tokens that end the text.
    pub ids: Vec<u32>,
    /// End tokens of the model do not end the text.
    pub ignore_eos: bool,
    /// No end before this many tokens.
    pub min_tokens: usize,
    /// Keep the stop string in the text.
    pub include_stop: bool,
}

/// A log-probability with those of the most likely tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The most likely tokens, in descending order.
    pub top: Vec<(u32, f32)>,
}

/// A change of the state of a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEvent {
    /// The log-probabilities of the prompt, one for each of its tokens and `None` for the first. Sent once for all
    /// samples, before other events, if they were asked for.
    Prompt(Vec<Option<TokenLogprob>>),
    /// New tokens and the text that is final with them; either may be empty.
    Tokens {
        /// The text, without incomplete characters and beginnings of stop strings.
        text: String,
        /// The ids.
        ids: Vec<u32>,
        /// One for each id if they were asked for, else empty.
        logprobs: Vec<TokenLogprob>,
    },
    /// The end of the sample.
    Finished {
        /// The reason.
        reason: FinishReason,
        /// The stop string or stop id at the end, other than an end token of the model.
        stop: Option<StopMatch>,
        /// Tokens of the prompt that were in the cache.
        cached_tokens: usize,
    },
    /// The sample failed.
    Failed(EngineError),
}

/// The reason for the end of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop string or a stop id.
    Stop,
    /// The maximum number of tokens.
    Length,
}

/// A stop that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopMatch {
    /// A stop string.
    Text(String),
    /// A stop id.
    Id(u32),
}

/// The destination of a request's events.
#[derive(Clone, Debug)]
pub struct EventSink {
    /// The index of sample 0 among the choices of the HTTP request.
    first: usize,
    sender: UnboundedSender<(usize, EngineEvent)>,
}

impl EventSink {
    pub(crate) fn new(first: usize, sender: UnboundedSender<(usize, EngineEvent)>) -> Self {
        Self { first, sender }
    }

    /// Sends an event of a sample, counted from 0. Returns false if nobody waits for it any more.
    pub fn send(&self, sample: usize, event: EngineEvent) -> bool {
        self.sender.send((self.first + sample, event)).is_ok()
    }
}

/// The state of the engine. Totals count from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests in the batch.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// The used share of the key/value cache, from 0 to 1.
    pub kv_cache_usage: f64,
    /// Total tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Total tokens found in the prefix cache.
    pub prefix_cache_hits: u64,
    /// Total requests whose cache was given to others and recomputed.
    pub preemptions: u64,
}

/// A refusal or failure of the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// The class, which decides the HTTP status.
    pub kind: EngineErrorKind,
    /// The message.
    pub message: String,
}

/// Classes of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineErrorKind {
    /// The request is wrong (400).
    Invalid,
    /// The prompt is longer than the model's context (400).
    TooLong,
    /// There is no adapter of this name (404).
    NotFound,
    /// The queue is full (429).
    Overloaded,
    /// The engine failed (500).
    Internal,
}

impl EngineError {
    /// Returns an error of a class.
    pub fn new(kind: EngineErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Returns an error for a wrong request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(EngineErrorKind::Invalid, message)
    }
}

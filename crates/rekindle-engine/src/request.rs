//! Requests, and the events that answer them.

use rekindle_models::{SamplingParams, TokenLogProb, TokenMask};

use crate::Error;

/// A prompt to continue.
///
/// ```
/// use rekindle_engine::{Request, SamplingParams};
///
/// let request = Request {
///     max_tokens: 32,
///     sampling: SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() },
///     ..Request::new(vec![1, 2, 3])
/// };
/// assert_eq!(request.n, 1);
/// ```
#[derive(Debug)]
pub struct Request {
    /// The tokens to continue; at least 1.
    pub prompt: Vec<u32>,
    /// The number of independent samples of this prompt. Sample i draws from stream i of the seed. Default 1.
    pub n: usize,
    /// The maximum number of new tokens of each sample; 0 computes only `prompt_log_probs`. Default 128.
    pub max_tokens: usize,
    /// The choice of each token. Default greedy.
    pub sampling: SamplingParams,
    /// Tokens that end a sample. Such a token is the last one that the sample returns. Default none.
    pub stop_ids: Vec<u32>,
    /// `stop_ids` cannot be chosen for the first tokens of a sample, as many as this. Default 0.
    pub min_tokens: usize,
    /// The number of most likely tokens to return with each new token. Default 0.
    pub top_log_probs: usize,
    /// If set, the log-probabilities of the prompt's tokens are returned, each with this number of most likely tokens.
    /// Such a request does not reuse cached prefixes. Default `None`.
    pub prompt_log_probs: Option<usize>,
    /// The weights to use. Default [`AdapterChoice::Active`].
    pub adapter: AdapterChoice,
    /// Restricts each token, as a grammar does. Default `None`.
    pub constraint: Option<Box<dyn TokenConstraint>>,
}

impl Request {
    /// Returns a greedy request for 128 tokens.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            n: 1,
            max_tokens: 128,
            sampling: SamplingParams::default(),
            stop_ids: Vec::new(),
            min_tokens: 0,
            top_log_probs: 0,
            prompt_log_probs: None,
            adapter: AdapterChoice::Active,
            constraint: None,
        }
    }
}

/// The adapter of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum AdapterChoice {
    /// The adapter that is active when the request is submitted; the base model if there is none.
    #[default]
    Active,
    /// The base model, even if an adapter is active.
    Base,
    /// The adapter of this name. For an inactive one, the engine must own its model. One batch computes samples with different
    /// adapters; an adapter that all samples of a step have is activated.
    Named(String),
}

/// A rule for the tokens of a sample, such as a grammar.
pub trait TokenConstraint: Send + core::fmt::Debug {
    /// Returns the tokens that may come next. Stop ids must be included where the text may end; a mask without any
    /// token fails the sample.
    ///
    /// # Errors
    /// A sentence that becomes [`Error::Constraint`] and fails the sample.
    fn allowed(&mut self) -> Result<TokenMask, String>;

    /// Receives the token that was chosen.
    ///
    /// # Errors
    /// As [`allowed`](Self::allowed).
    fn accept(&mut self, id: u32) -> Result<(), String>;

    /// Returns a constraint in the same state, for another sample of the request.
    fn fork(&self) -> Box<dyn TokenConstraint>;
}

/// The number of a request, unique in its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A step's result for one request. Each sample ends with exactly one [`Event::Finished`] or [`Event::Failed`].
#[derive(Debug)]
pub enum Event {
    /// The log-probabilities of the prompt's tokens, before the first token of any sample.
    Prompt {
        /// The request.
        request: RequestId,
        /// One for each token of the prompt; the first has no context and is `None`.
        tokens: Vec<Option<PromptToken>>,
    },
    /// A new token.
    Token {
        /// The request.
        request: RequestId,
        /// The sample, from 0 to n − 1.
        sample: usize,
        /// The token.
        token: NewToken,
    },
    /// A sample is complete.
    Finished {
        /// The request.
        request: RequestId,
        /// The sample, from 0 to n − 1.
        sample: usize,
        /// The reason for the end.
        reason: FinishReason,
        /// Tokens that the sample took.
        usage: Usage,
    },
    /// A sample ended with an error.
    Failed {
        /// The request.
        request: RequestId,
        /// The sample, from 0 to n − 1.
        sample: usize,
        /// The reason.
        error: Error,
    },
}

impl Event {
    /// Returns the request.
    pub fn request(&self) -> RequestId {
        match self {
            Self::Prompt { request, .. }
            | Self::Token { request, .. }
            | Self::Finished { request, .. }
            | Self::Failed { request, .. } => *request,
        }
    }

    /// Returns true if the sample of this event ends with it.
    pub fn ends_sample(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed { .. })
    }
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct NewToken {
    /// Its number among the sample's new tokens, from 0.
    pub index: usize,
    /// The token.
    pub id: u32,
    /// ln p of the token in the model's own distribution, before penalties, temperature and filters.
    pub log_prob: f32,
    /// ln p of the token in the distribution that it was drawn from; 0 for greedy choices.
    pub sampling_log_prob: f32,
    /// The most likely tokens of the model's own distribution, `top_log_probs` of them.
    pub top: Vec<TokenLogProb>,
}

/// A token of a prompt, given those before it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    /// The token.
    pub id: u32,
    /// ln p of the token.
    pub log_prob: f32,
    /// The most likely tokens in its place.
    pub top: Vec<TokenLogProb>,
}

/// The reason for the end of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The sample chose this token of [`Request::stop_ids`].
    Stop(u32),
    /// The sample reached `max_tokens`, the model's `max_seq_length`, or the size of the cache.
    Length,
    /// The caller ended it with `abort`.
    Aborted,
}

/// Tokens that a sample took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt whose keys and values were already in the cache when the sample first started.
    pub cached_tokens: usize,
    /// New tokens, including a stop token.
    pub new_tokens: usize,
}

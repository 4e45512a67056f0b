//! An HTTP server with OpenAI's API over any text generation engine.
//!
//! A model is anything that implements [`Engine`]; [`Server`] serves it: chat and text completions with streaming, tools,
//! reasoning, log-probabilities and constrained answers, adapters by name, metrics, and a small chat page at `/`. This
//! crate knows no tensors and no checkpoints.
//!
//! [`Dashboard`] serves a page that shows training runs.
//!
//! A field of a request that is unknown is an error, except for those that do not change the answer.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod answer;
mod chat;
mod chat_format;
mod completions;
mod constraint;
mod dashboard;
mod engine;
mod error;
mod fields;
mod generation;
mod metrics;
mod params;
mod server;
mod sse;
mod state;
mod tokenize;

pub use chat_format::{ChatFormat, ToolFormat};
pub use constraint::{Grammar, Preamble, TokenConstraint, Vocabulary};
pub use dashboard::{Dashboard, DashboardConfig};
pub use engine::{
    ChatInput, Engine, EngineError, EngineErrorKind, EngineEvent, EngineLimits, EngineRequest, EngineStats, EventSink,
    FinishReason, RenderedChat, RequestId, Sampling, ServedModel, StopMatch, Stops, TokenLogprob,
};
pub use server::{Server, ServerStop};
pub use state::ServerConfig;

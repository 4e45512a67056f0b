//! Batched generation with a paged key/value cache.
//!
//! An [`Engine`] runs many requests at once on one model: prompts are computed in chunks beside the single tokens of
//! texts in progress, prompts that begin alike share their keys and values, and a request gives up its memory to older
//! ones and is recomputed later. It computes with the model's own decoder and weights, so sampled tokens come from the
//! model that is trained.
//!
//! On the CPU in f32, the tokens of a request have the same bits whatever else runs, however its prompt is split, and
//! whether it was recomputed. Models with recurrent layers (gated delta) share no prefixes, and their bits also depend on
//! how a sequence was split over steps.
//!
//! ```no_run
//! use rekindle_engine::{Engine, EngineConfig, Event, Request};
//!
//! # fn main() -> Result<(), rekindle_engine::Error> {
//! # let model: rekindle_models::CausalLm = unimplemented!();
//! let mut engine = Engine::new(&model, EngineConfig::default())?;
//! for prompt in [vec![1, 2, 3], vec![4, 5]] {
//!     engine.submit(Request { max_tokens: 16, ..Request::new(prompt) })?;
//! }
//! while engine.has_work() {
//!     for event in engine.step() {
//!         if let Event::Token { request, token, .. } = event {
//!             println!("{request:?}: {}", token.id);
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod config;
mod engine;
mod error;
mod handle;
mod model;
mod pages;
mod request;
mod scheduler;
mod sequence;

pub use config::{CacheSize, EngineConfig};
pub use engine::{Engine, EngineStats};
pub use error::Error;
pub use handle::{EngineHandle, EventSink, RequestStream};
pub use model::EngineModel;
pub use rekindle_models::{SamplingParams, TokenLogProb, TokenMask};
pub use request::{
    AdapterChoice, Event, FinishReason, NewToken, PromptToken, Request, RequestId, TokenConstraint, Usage,
};

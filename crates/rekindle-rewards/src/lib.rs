//! Rewards of completions.
//!
//! A [`Reward`] scores a batch of [`Sample`]s; a [`RewardSet`] holds several of them with weights and gates and returns
//! [`Scores`]. A score is a number or an explicit null: a null is left out of the weighted sum. A reward that fails is an
//! error. It never becomes a 0.
//!
//! ```
//! use rekindle_rewards::{Reward, RewardError, RewardSet, Sample};
//!
//! struct Short;
//!
//! impl Reward for Short {
//!     fn name(&self) -> &str {
//!         "short"
//!     }
//!
//!     fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
//!         Ok(samples.iter().map(|sample| Some(if sample.completion_ids.len() < 4 { 1.0 } else { 0.0 })).collect())
//!     }
//! }
//!
//! # fn main() -> Result<(), RewardError> {
//! let mut rewards = RewardSet::new();
//! rewards.push(Box::new(Short), 0.5)?;
//! let row = serde_json::Map::new();
//! let sample = Sample {
//!     prompt: "2 + 2 =",
//!     completion: " 4",
//!     prompt_ids: &[17, 488, 220, 17, 284],
//!     completion_ids: &[220, 19],
//!     truncated: false,
//!     row: &row,
//!     messages: None,
//! };
//! assert_eq!(rewards.score(&[sample])?.totals, [Some(0.5)]);
//! # Ok(())
//! # }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod command;
mod config;
mod error;
mod exchange;
#[cfg(test)]
mod golden;
mod http;
mod model;
mod reward;
mod rules;
mod schema;
mod set;
mod template;

pub use command::{CommandReward, CommandRewardConfig};
pub use config::{LoadRewardModel, RewardConfig, RewardKind};
pub use error::RewardError;
pub use http::HttpRewardConfig;
pub use model::ModelRewardConfig;
pub use reward::{Reward, Sample};
pub use rules::{
    Choice, Contains, Exact, Extract, Format, Json, JsonFrom, Length, LengthUnit, Numeric, Occurrence, Pattern,
    Repetition, SoftOverlong,
};
pub use set::{RewardColumn, RewardGate, RewardSet, Scores};
pub use template::PYTHON_TEMPLATE;

//! Shared code of the cross-crate tests: goldens, batches of their rows, and comparisons.
//!
//! `goldens/README.md` describes what transformers and PEFT computed and how; the tests in `tests/` compare the crates
//! with it. Everything in this crate panics on failure.

mod compare;
mod golden;
mod poison;
mod ranks;
mod trajectory;
mod written;

pub use compare::{assert_nll, relative_distance, worst_nll};
pub use golden::{Golden, MODELS, Row, RowLosses, goldens, read_json, tensors};
pub use poison::{poison, poisoned};
pub use ranks::on_ranks;
pub use trajectory::{Tolerances, Trajectory};
pub use written::{random_expert_adapter, train_written_adapter};

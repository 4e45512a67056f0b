//! What the cross-crate tests share: the goldens, batches of their rows, and comparisons.
//!
//! `goldens/README.md` says what transformers and PEFT computed and how; the tests in `tests/` hold the
//! crates against it. A failure here is a program error, so everything in this crate panics.

mod compare;
mod golden;
mod poison;
mod trajectory;
mod written;

pub use compare::{assert_nll, relative_distance, worst_nll};
pub use golden::{Golden, MODELS, Row, RowLosses, goldens, read_json, tensors};
pub use poison::{poison, poisoned};
pub use trajectory::{Tolerances, Trajectory};
pub use written::train_written_adapter;

//! Checks of a run before its model is loaded.

use rekindle_train::{Preflight, Timetable};

use crate::prompts::prompts;
use crate::{EncodedRows, Error, RowEncoder};

/// Returns the steps of the run. Refuses what [`SftTrainer::train`](crate::SftTrainer::train) would refuse, as far as that
/// shows without weights: the checks of `run`, and the prompts of its samples, which are `eval`'s first rows unless the
/// configuration has prompts of its own.
///
/// # Errors
/// [`Error::Argument`] for prompts that cannot be answered, [`Error::Train`] for everything else.
pub fn check_run(run: &Preflight<'_>, encoder: &RowEncoder, eval: Option<&EncodedRows>) -> Result<Timetable, Error> {
    let times = run.check()?;
    prompts(encoder.tokenizer(), run.config, eval.map(EncodedRows::dataset), run.max_seq_length)?;
    Ok(times)
}

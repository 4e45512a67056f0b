//! Checks of a run before its model is loaded.

use rekindle_train::{Preflight, Timetable};

use crate::prompts::prompts;
use crate::{EncodedRows, Error, RowEncoder};

/// Checks a run before its model is loaded; returns its steps. Refuses what
/// [`SftTrainer::train`](crate::SftTrainer::train) would refuse, as far as that is known without weights: the checks of
/// `run`, and the prompts of its samples, which come from the first rows of `eval` unless the configuration has
/// prompts.
///
/// # Errors
/// [`Error::Argument`] for invalid prompts, [`Error::Train`] for everything else.
pub(crate) fn check_run(
    run: &Preflight<'_>,
    encoder: &RowEncoder,
    eval: Option<&EncodedRows>,
) -> Result<Timetable, Error> {
    let times = run.check()?;
    prompts(encoder.tokenizer(), run.config, eval.map(EncodedRows::dataset), run.max_seq_length)?;
    Ok(times)
}

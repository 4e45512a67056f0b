//! The records of a run.

use std::path::Path;

use super::Trainer;
use crate::checkpoint::Checkpoint;
use crate::{Error, RecordedUntil, Recorder};

/// Returns the records of a new run, or of a run that resumes from `checkpoint`, with its history.
pub(super) fn open_recorder(
    job: &mut Trainer<'_>,
    total: usize,
    checkpoint: Option<&Checkpoint>,
) -> Result<Option<Recorder>, Error> {
    let Some(dir) = &job.arguments.output_dir else { return Ok(None) };
    let description = std::mem::take(&mut job.description);
    if let Some(checkpoint) = checkpoint {
        // The checkpoint may be in another directory than the output.
        let name = "metrics.jsonl";
        let (here, beside) = (dir.join(name), checkpoint.path.parent().unwrap_or(Path::new(".")).join(name));
        let same = here.canonicalize().is_ok_and(|here| beside.canonicalize().is_ok_and(|beside| here == beside));
        if beside.is_file() && !same {
            let copied = std::fs::create_dir_all(dir).and_then(|()| std::fs::copy(&beside, &here));
            copied.map_err(|source| Error::Io { path: here, source })?;
        }
    }
    let until = checkpoint.map(|Checkpoint { state, .. }| RecordedUntil {
        steps: state.global_step,
        evaluated: state.last_evaluation.unwrap_or(0),
    });
    Ok(Some(Recorder::open(dir, job.config.report_to, total, until, description)?))
}

//! The checkpoint that a run resumes from.

use std::path::{Path, PathBuf};

use rekindle_hub::clear_leftovers;
use serde::{Deserialize, Serialize};

use super::Trainer;
use super::resume_compatibility::RecordedSettings;
use crate::Error;
use crate::checkpoint::{Checkpoint, is_ours};

/// The checkpoint that a run resumes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// The last checkpoint in the output directory; without one, the run starts from the beginning.
    Latest,
    /// This checkpoint.
    From(PathBuf),
}

/// The checkpoint of a run, and its settings.
pub(super) struct Start {
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) settings: RecordedSettings,
    /// Notices for the user.
    pub(super) notes: Vec<String>,
}

impl Start {
    /// Finds the checkpoint and checks that it belongs to this run of `total` steps. Removes files that a killed run
    /// left incomplete.
    pub(super) fn find(job: &Trainer<'_>, total: usize) -> Result<Self, Error> {
        let arguments = &job.arguments;
        if arguments.output_dir.is_none() && arguments.resume.is_none() {
            return Ok(Self { checkpoint: None, settings: RecordedSettings::default(), notes: Vec::new() });
        }
        let settings = RecordedSettings::of(job, total)?;
        if let Some(dir) = &arguments.output_dir {
            clear_leftovers(dir, is_ours)?;
        }
        let output = job.output();
        let Some(path) = output.checkpoint()? else {
            let wanted = arguments.resume.iter().zip(&arguments.output_dir);
            let notes = wanted
                .map(|(_, dir)| format!("{} contains no checkpoint: the run starts from the beginning", dir.display()));
            return Ok(Self { checkpoint: None, settings, notes: notes.collect() });
        };
        let checkpoint = Checkpoint::open(&path)?;
        let notes = settings.check(&path, &checkpoint.state, job)?;
        check_step(&checkpoint, total, &output.checkpoints())?;
        Ok(Self { checkpoint: Some(checkpoint), settings, notes })
    }
}

/// Refuses a checkpoint beyond the run's last step, or before a later checkpoint in the output directory.
pub(super) fn check_step(checkpoint: &Checkpoint, total: usize, there: &[(usize, PathBuf)]) -> Result<(), Error> {
    let (path, done) = (checkpoint.path.clone(), checkpoint.state.global_step);
    if done > total {
        let problem = format!(
            "it is at step {done}, but the run has only {total}; raise max_steps or \
             num_train_epochs"
        );
        return Err(Error::Checkpoint { path, problem });
    }
    if let Some((step, later)) = there.iter().find(|(step, _)| *step > done) {
        let problem = format!(
            "it is at step {done}, and {} at step {step} is a later checkpoint of the same run; remove the later one, \
             or set another output_dir",
            later.display()
        );
        return Err(Error::Checkpoint { path, problem });
    }
    Ok(())
}

/// Returns the path of the best checkpoint: in the output directory, or beside the given checkpoint.
pub(super) fn best_path(checkpoint: &Path, output_dir: &Path, step: usize) -> Result<PathBuf, Error> {
    let beside = checkpoint.parent().unwrap_or(Path::new("."));
    let mut places = [output_dir, beside].map(|dir| Checkpoint::path(dir, step)).into_iter();
    places.find(|path| path.is_dir()).ok_or_else(|| Error::Checkpoint {
        path: Checkpoint::path(output_dir, step),
        problem: "it is missing, although it is the best checkpoint so far; restore it, or set load_best_model_at_end \
             = false"
            .to_owned(),
    })
}

//! The output directory and the results of earlier runs in it.

use std::path::{Path, PathBuf};

use rekindle_hub::remove_atomic;

use super::{Resume, result_name};
use crate::checkpoint::Checkpoint;
use crate::save::{check_checkpoint, check_replaceable};
use crate::{Error, Timetable, TrainerArguments};

/// The output directory of a run, and the treatment of its contents.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutputDir<'a> {
    pub(super) arguments: &'a TrainerArguments,
    /// True if all weights are trained.
    pub(super) full: bool,
}

impl<'a> OutputDir<'a> {
    fn dir(&self) -> Option<&'a Path> {
        self.arguments.output_dir.as_deref()
    }

    /// Returns the checkpoint that the run resumes from. Refuses a directory whose checkpoints or result the run would
    /// replace without `overwrite`.
    pub(super) fn checkpoint(&self) -> Result<Option<PathBuf>, Error> {
        let TrainerArguments { resume, overwrite, .. } = self.arguments;
        if *overwrite && resume.is_some() {
            let problem = "resume and overwrite exclude each other: one keeps the earlier run, the other replaces it";
            return Err(Error::Config(vec![problem.to_owned()]));
        }
        let there = self.checkpoints();
        let path = match (resume, there.last()) {
            (None, None) => None,
            (None, Some(_)) if *overwrite => None,
            (None, Some((_, latest))) => {
                let output_dir = self.dir().unwrap_or(Path::new("")).to_owned();
                return Err(Error::EarlierRun { output_dir, latest: latest.clone() });
            }
            (Some(Resume::Latest), latest) => latest.map(|(_, path)| path.clone()),
            (Some(Resume::From(path)), _) => Some(path.clone()),
        };
        let result = self.dir().map(|dir| dir.join(result_name(self.full)));
        match result.filter(|result| there.is_empty() && !*overwrite && holds_files(result)) {
            Some(result) => Err(Error::FinishedRun { result, resumes: resume.is_some() }),
            None => Ok(path),
        }
    }

    /// Refuses an output directory that cannot be written, before any work is done.
    pub(super) fn check_writable(&self, times: &Timetable) -> Result<(), Error> {
        let Some(dir) = self.dir() else { return Ok(()) };
        check_replaceable(&dir.join(result_name(self.full)), !self.full)?;
        let mut saves = (1..=times.total).filter(|&step| times.saves_after(step));
        saves.try_for_each(|step| check_checkpoint(&Checkpoint::path(dir, step), !self.full))
    }

    /// Removes the checkpoints that the run replaces, so that a later `--resume` does not find them.
    pub(super) fn clear(&self) -> Result<(), Error> {
        if self.arguments.overwrite {
            for (_, path) in self.checkpoints() {
                check_checkpoint(&path, !self.full)?;
                remove_atomic(&path)?;
            }
        }
        Ok(())
    }

    pub(super) fn checkpoints(&self) -> Vec<(usize, PathBuf)> {
        self.dir().map(Checkpoint::list).unwrap_or_default()
    }
}

fn holds_files(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &Path, resume: Option<Resume>, overwrite: bool) -> TrainerArguments {
        TrainerArguments { output_dir: Some(dir.to_owned()), resume, overwrite, ..TrainerArguments::default() }
    }

    #[test]
    fn a_finished_result_is_not_replaced_unasked() {
        let scratch = tempfile::tempdir().unwrap();
        let check = |resume: Option<Resume>, overwrite| {
            OutputDir { arguments: &arguments(scratch.path(), resume, overwrite), full: false }.checkpoint()
        };
        assert_eq!(check(None, false).unwrap(), None);
        std::fs::create_dir(scratch.path().join("adapter")).unwrap();
        assert_eq!(check(None, false).unwrap(), None, "an empty directory is nothing to lose");
        std::fs::write(scratch.path().join("adapter/weights"), "").unwrap();
        let error = check(None, false).unwrap_err().to_string();
        for part in ["adapter is the result of an earlier run", "--overwrite", "another output_dir"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error = check(Some(Resume::Latest), false).unwrap_err().to_string();
        assert!(error.contains("there is no checkpoint to resume from"), "{error}");
        assert_eq!(check(None, true).unwrap(), None);
        assert!(check(Some(Resume::Latest), true).unwrap_err().to_string().contains("exclude each other"));
        let new = arguments(scratch.path(), None, false);
        let full = OutputDir { arguments: &new, full: true };
        assert_eq!(full.checkpoint().unwrap(), None, "a model goes beside an adapter");
    }

    #[test]
    fn checkpoints_are_resumed_or_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let checkpoint = scratch.path().join("checkpoint-3");
        std::fs::create_dir(&checkpoint).unwrap();
        std::fs::write(checkpoint.join("trainer_state.json"), "").unwrap();
        let [new, resumed, replaced] = [(None, false), (Some(Resume::Latest), false), (None, true)]
            .map(|(resume, overwrite)| arguments(scratch.path(), resume, overwrite));
        let [new, resumed, replaced] =
            [&new, &resumed, &replaced].map(|arguments| OutputDir { arguments, full: false });
        assert!(matches!(new.checkpoint(), Err(Error::EarlierRun { .. })));
        assert_eq!(resumed.checkpoint().unwrap(), Some(checkpoint.clone()));
        resumed.clear().unwrap();
        assert!(checkpoint.exists());
        assert_eq!(replaced.checkpoint().unwrap(), None);
        replaced.clear().unwrap();
        assert!(!checkpoint.exists());
    }
}

//! TensorBoard's event files: the metrics of a run as `tensorboard --logdir` shows them.
//!
//! A file named `*tfevents*` is a sequence of records ([`record`]), each the protocol buffer `Event` ([`event`]): first
//! the version of the format, then events, with a wall-clock time and a step. Tags are those of transformers' trainer
//! (`train/loss`, `train/grad_norm`, `train/learning_rate`, `eval/loss`), so that runs of both are comparable. A
//! resumed run adds a file, which begins by invalidating later steps, as `purge_step` of PyTorch's `SummaryWriter`
//! does.
//!
//! `goldens/tensorboard` contains the files that TensorBoard's own writer makes of the same events; ours are
//! byte-identical. TensorBoard 2.21 (`EventAccumulator`) reads every value of `metrics.jsonl`, rounded to f32, and
//! reads a run that was resumed twice as one run, with each step once.

mod event;
mod record;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use event::{Event, What};

use crate::Error;

/// The name that TensorBoard looks for. It reads the files of a directory in the order of their names.
const PREFIX: &str = "events.out.tfevents.";
/// The suffix that distinguishes our files from those of other programs.
const SUFFIX: &str = ".rekindle";

/// A writer of an event file. Every event reaches the file before the next step begins.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl EventFile {
    /// Begins a run's events in `dir`, replacing those of an earlier run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<Self, Error> {
        for path in ours(dir) {
            fs::remove_file(&path).map_err(|source| Error::Io { path, source })?;
        }
        Self::open(dir)
    }

    /// Continues a run after `steps` steps; later steps in earlier files become invalid.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(dir: &Path, steps: usize) -> Result<Self, Error> {
        let mut file = Self::open(dir)?;
        file.write(steps + 1, What::Start)?;
        Ok(file)
    }

    /// Writes values of a step under their tags.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<(), Error> {
        self.write(step, What::Scalars(scalars))
    }

    /// Writes a text of a step, which TensorBoard shows as Markdown.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn text(&mut self, step: usize, tag: &str, text: &str) -> Result<(), Error> {
        self.write(step, What::Text { tag, text })
    }

    fn open(dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
        // The count keeps the order of two files of one second.
        let path = dir.join(format!("{PREFIX}{:010}.{:03}{SUFFIX}", now() as u64, ours(dir).len()));
        let file = File::create(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let mut file = Self { path, out: BufWriter::new(file) };
        file.write(0, What::Version)?;
        Ok(file)
    }

    fn write(&mut self, step: usize, what: What<'_>) -> Result<(), Error> {
        let event = Event { wall_time: now(), step: step as u64, what };
        self.out
            .write_all(&record::encode(&event.encode()))
            .and_then(|()| self.out.flush())
            .map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

/// Returns the seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Returns the event files in `dir` that this program wrote.
fn ours(dir: &Path) -> Vec<PathBuf> {
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().map_or_else(Default::default, |name| name.to_string_lossy());
        name.starts_with(PREFIX) && name.ends_with(SUFFIX)
    };
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dir: &Path) -> Vec<Vec<Vec<u8>>> {
        let mut files = ours(dir);
        files.sort_unstable();
        files.iter().map(|path| record::decode(&fs::read(path).unwrap()).unwrap()).collect()
    }

    #[test]
    fn equals_tensorboards_own_writer() {
        let golden = include_bytes!("../goldens/tensorboard/events.bin");
        let scalars: &[(&str, f64)] = &[("train/loss", 2.5), ("train/learning_rate", 2e-4), ("train/grad_norm", 0.0)];
        let events = [
            (0, What::Version),
            (1, What::Scalars(scalars)),
            (300, What::Scalars(&[("eval/loss", f64::NAN)])),
            (300, What::Text { tag: "samples/1", text: "größer **fett**" }),
            (301, What::Start),
        ];
        let mut bytes = Vec::new();
        for (i, (step, what)) in events.into_iter().enumerate() {
            let event = Event { wall_time: 1_700_000_000.25 + i as f64, step, what };
            bytes.extend(record::encode(&event.encode()));
        }
        assert!(bytes == golden, "{bytes:?}");
        assert_eq!(record::decode(golden).unwrap().len(), 5);
    }

    #[test]
    fn a_new_run_replaces_and_a_resumed_one_adds() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("events.out.tfevents.1.other");
        fs::write(&other, "not ours").unwrap();
        for _ in 0..2 {
            let mut file = EventFile::create(dir.path()).unwrap();
            file.scalars(1, &[("train/loss", 1.0)]).unwrap();
            file.text(1, "samples/1", "text").unwrap();
            assert_eq!(read(dir.path()).iter().map(Vec::len).collect::<Vec<_>>(), [3]);
        }
        EventFile::resume(dir.path(), 7).unwrap();
        let files = read(dir.path());
        assert_eq!(files.iter().map(Vec::len).collect::<Vec<_>>(), [3, 2], "the later file is read last");
        // Step 8, and a session that starts.
        assert!(files[1][1].ends_with(&[0x10, 8, 0x3a, 2, 8, 1]), "{files:?}");
        assert!(other.exists());
    }
}

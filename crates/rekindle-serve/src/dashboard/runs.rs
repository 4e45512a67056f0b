//! The files of runs.

use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

const METRICS: &str = "metrics.jsonl";

/// The file that asks a run to stop.
const STOP: &str = "stop";

/// Bytes of metrics in a response at most.
const PIECE: u64 = 1 << 20;

/// Directories that are searched at most.
const DIRECTORIES: usize = 2000;

/// A run's output directory.
#[derive(Debug)]
pub(super) struct Run {
    /// The path below the dashboard's directory, or the name of that directory.
    pub(super) name: String,
    dir: PathBuf,
    modified: SystemTime,
}

/// Finds the runs in `dir` and in `depth` levels below; the last modified one comes first.
pub(super) fn find_runs(dir: &Path, depth: usize) -> Vec<Run> {
    let own = fs::canonicalize(dir).ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    let mut runs = Vec::new();
    let mut left = DIRECTORIES;
    search(dir, &own.unwrap_or_else(|| "run".to_owned()), "", depth, &mut left, &mut runs);
    runs.sort_by(|a, b| b.modified.cmp(&a.modified).then_with(|| a.name.cmp(&b.name)));
    runs
}

fn search(dir: &Path, name: &str, prefix: &str, depth: usize, left: &mut usize, runs: &mut Vec<Run>) {
    if let Ok(modified) = fs::metadata(dir.join(METRICS)).and_then(|metadata| metadata.modified()) {
        runs.push(Run { name: name.to_owned(), dir: dir.to_owned(), modified });
        return;
    }
    let Some(depth) = depth.checked_sub(1) else { return };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let below = entry.file_name().to_string_lossy().into_owned();
        if *left == 0 || below.starts_with('.') || !entry.path().is_dir() {
            continue;
        }
        *left -= 1;
        let name = format!("{prefix}{below}");
        search(&entry.path(), &name, &format!("{name}/"), depth, left, runs);
    }
}

impl Run {
    pub(super) fn describe(&self) -> Value {
        let (steps, epochs) = self.length();
        let modified = self.modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        json!({
            "name": self.name,
            "running": self.is_running(),
            "stopping": self.dir.join(STOP).exists(),
            "modified": modified,
            "max_steps": steps,
            "num_train_epochs": epochs,
        })
    }

    /// Returns true if a trainer holds the lock of the directory.
    pub(super) fn is_running(&self) -> bool {
        let Ok(dir) = File::open(&self.dir) else { return false };
        matches!(dir.try_lock_shared(), Err(TryLockError::WouldBlock))
    }

    /// Asks the run to stop after the current step, with a checkpoint.
    pub(super) fn stop(&self) -> io::Result<()> {
        fs::write(self.dir.join(STOP), "")
    }

    /// Returns `max_steps` and `num_train_epochs` of the configuration.
    fn length(&self) -> (Option<f64>, Option<f64>) {
        // The first one exists if the second one is the user's run file.
        let files = ["run.resolved.toml", "run.toml"];
        let text = files.iter().find_map(|name| fs::read_to_string(self.dir.join(name)).ok()).unwrap_or_default();
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='))?;
            line.trim().parse().ok()
        };
        (value("max_steps"), value("num_train_epochs"))
    }

    /// Returns the complete lines of the metrics from the byte `from` on, the offset after them, and the generation of the
    /// file. If the file is not that of `generation`, the lines are those from its beginning.
    pub(super) fn read(&self, from: u64, generation: &str) -> io::Result<Value> {
        let file = File::open(self.dir.join(METRICS))?;
        let current = generation_of(&file)?;
        let from = if current == generation { from.min(file.metadata()?.len()) } else { 0 };
        let mut reader = BufReader::new(file);
        reader.seek(SeekFrom::Start(from))?;
        let mut piece = Vec::new();
        reader.by_ref().take(PIECE).read_to_end(&mut piece)?;
        if piece.len() as u64 == PIECE {
            reader.read_until(b'\n', &mut piece)?;
        }
        piece.truncate(piece.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        let offset = from + piece.len() as u64;
        let text = String::from_utf8_lossy(&piece);
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Ok(json!({ "lines": lines, "from": from, "offset": offset, "generation": current }))
    }
}

/// Identifies a file: a new run truncates it, and a resumed run replaces it by a shorter one.
fn generation_of(file: &File) -> io::Result<String> {
    let mut first = String::new();
    BufReader::new(file.try_clone()?).take(PIECE).read_line(&mut first)?;
    let mut hasher = DefaultHasher::new();
    first.ends_with('\n').then_some(first).hash(&mut hasher);
    #[cfg(unix)]
    std::os::unix::fs::MetadataExt::ino(&file.metadata()?).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_read_once_they_are_complete() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(METRICS);
        let mut file = File::create(&path).unwrap();
        writeln!(file, "{{\"step\": 1}}").unwrap();
        write!(file, "{{\"step\": ").unwrap();
        let runs = find_runs(scratch.path(), 1);
        let read = |piece: &Value| {
            let text = |key: &str| piece[key].as_str().unwrap_or_default().to_owned();
            runs[0].read(piece["offset"].as_u64().unwrap_or(0), &text("generation")).unwrap()
        };
        let first = read(&Value::Null);
        assert_eq!(first["lines"], json!([{ "step": 1 }]));
        writeln!(file, "2}}").unwrap();
        let second = read(&first);
        assert_eq!((&second["lines"], &second["from"]), (&json!([{ "step": 2 }]), &first["offset"]));
        assert_eq!(read(&second)["lines"], json!([]));
        // A new run in the same directory.
        fs::write(&path, "{\"step\": 1, \"loss\": 2}\n{\"step\": 2}\n{\"step\": 3}\n{\"step\": 4}\n").unwrap();
        let new = read(&second);
        assert_eq!((new["from"].as_u64(), new["lines"].as_array().unwrap().len()), (Some(0), 4));
    }

    #[test]
    fn runs_are_found_below_a_directory() {
        let scratch = tempfile::tempdir().unwrap();
        for dir in ["a", "b/c", "b/c/inner", "x/y/z", ".hidden"] {
            fs::create_dir_all(scratch.path().join(dir)).unwrap();
            fs::write(scratch.path().join(dir).join(METRICS), "").unwrap();
        }
        let names = |depth| {
            let mut names: Vec<String> = find_runs(scratch.path(), depth).into_iter().map(|run| run.name).collect();
            names.sort();
            names
        };
        assert_eq!(names(1), ["a"]);
        assert_eq!(names(2), ["a", "b/c"], "checkpoints and the like in a run are not searched");
        let alone = find_runs(&scratch.path().join("a"), 2);
        assert_eq!(alone[0].name, "a");
        assert!(!alone[0].is_running());
        let locked = File::open(scratch.path().join("a")).unwrap();
        locked.lock().unwrap();
        assert!(alone[0].is_running());
        fs::write(scratch.path().join("a/run.toml"), "[train]\nmax_steps = 40\nnum_train_epochs = 1.5\n").unwrap();
        assert_eq!(alone[0].length(), (Some(40.0), Some(1.5)));
    }
}

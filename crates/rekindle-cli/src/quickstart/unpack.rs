//! The example's files, embedded in the binary.

use std::fs;
use std::path::{Path, PathBuf};

use rekindle::{Error, write_atomic};

use crate::failure::Failure;

/// The held-out rows.
pub(super) const HELD_OUT: &str = include_str!("../../../../examples/quickstart/heldout.jsonl");

/// A file under `examples/quickstart` with its content.
macro_rules! file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../../../examples/quickstart/", $name)))
    };
}

const FILES: [(&str, &[u8]); 9] = [
    file!("base/config.json"),
    file!("base/generation_config.json"),
    file!("base/model.safetensors"),
    file!("base/tokenizer.json"),
    file!("base/tokenizer_config.json"),
    file!("base/special_tokens_map.json"),
    file!("base/chat_template.jinja"),
    file!("train.jsonl"),
    file!("heldout.jsonl"),
];

const RUN_FILE: &str = include_str!("run.toml");

/// Writes the model, the rows and a run file into `dir`; returns the path of the run file.
///
/// A directory with anything but an earlier quickstart is refused.
pub(super) fn unpack(dir: &Path) -> Result<PathBuf, Failure> {
    check(dir)?;
    let (path, text) = (dir.join("run.toml"), run_file(dir));
    make_dir(&dir.join("base"))?;
    // First of all, since it is what marks the directory as a quickstart's.
    write(&path, text.as_bytes())?;
    for (name, bytes) in FILES {
        write(&dir.join(name), bytes)?;
    }
    Ok(path)
}

fn check(dir: &Path) -> Result<(), Failure> {
    let is_empty = fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none());
    let marker = RUN_FILE.lines().next().unwrap_or_default();
    let is_quickstart = || fs::read_to_string(dir.join("run.toml")).is_ok_and(|text| text.starts_with(marker));
    if is_empty || is_quickstart() {
        return Ok(());
    }
    Err(Failure::Configuration(format!(
        "{} contains other files; choose a new directory with --out \
         DIR",
        dir.display()
    )))
}

/// Returns the commented run file with the paths of `dir`.
fn run_file(dir: &Path) -> String {
    let quoted = |path: &Path| toml::Value::from(path.display().to_string()).to_string();
    let text = RUN_FILE.replace("{dir}", &quoted(dir));
    [("{base}", "base"), ("{train}", "train.jsonl"), ("{eval}", "heldout.jsonl")]
        .into_iter()
        .fold(text, |text, (mark, name)| text.replace(mark, &quoted(&dir.join(name))))
}

fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|source| Failure::File { path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    Ok(write_atomic(path, bytes).map_err(Error::from)?)
}

#[cfg(test)]
mod tests {
    use rekindle::run::{DataPaths, RunConfig};

    use super::*;

    #[test]
    fn the_run_file_is_valid_whatever_the_directory_is_called() {
        for dir in ["demo", "a \"b\" \\c", "/tmp/ü"] {
            let dir = Path::new(dir);
            let config = RunConfig::from_toml(&run_file(dir), &[]).unwrap();
            assert_eq!((config.output_dir.as_path(), config.model.name_or_path), (dir, dir.join("base")));
            assert_eq!(config.data.train, DataPaths::One(dir.join("train.jsonl")));
            assert_eq!(config.data.eval, Some(DataPaths::One(dir.join("heldout.jsonl"))));
        }
    }

    #[test]
    fn unpacks_again_but_not_over_other_files() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("new");
        unpack(&dir).unwrap();
        fs::write(dir.join("base/config.json"), "broken").unwrap();
        unpack(&dir).unwrap();
        for (name, bytes) in FILES {
            assert_eq!(fs::read(dir.join(name)).unwrap(), bytes, "{name}");
        }
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("mine.txt"), "kept").unwrap();
        let failure = unpack(other.path()).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.to_string().contains("--out"), "{failure}");
        assert_eq!(fs::read_dir(other.path()).unwrap().count(), 1);
    }
}

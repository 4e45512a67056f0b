//! The built `rekindle` command over the tiny models of `tests/goldens`: what it prints, writes and returns.

#![allow(missing_docs, clippy::unwrap_used)]

mod adapters;
mod checkpoints;
mod completions;
mod context;
#[cfg(feature = "serve")]
mod dashboard;
mod data;
mod errors;
mod generation;
mod gguf;
#[cfg(feature = "network")]
mod hub;
mod init;
mod metrics;
mod plan;
mod preview;
#[cfg(feature = "network")]
mod push;
mod quantize_errors;
mod quantized;
mod quickstart;
#[cfg(target_os = "linux")]
mod ranks;
mod results;
mod rewards;
#[cfg(feature = "serve")]
mod serve;
#[cfg(unix)]
mod survive;
mod templates;
mod training;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The exit code and the output of a command.
struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Done {
    /// Fails the test unless the command succeeded.
    fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless the command ended with `code`, named each of `parts`, and printed no result.
    fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        for part in parts.iter().chain(&["error: "]) {
            assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }

    /// Returns the output of `generate --json` without times, which differ between runs.
    fn answer(self) -> Value {
        let mut answer = self.json();
        let fields = answer.as_object_mut().unwrap();
        for key in ["prompt_seconds", "tokens_per_second"] {
            assert!(fields.remove(key).is_some(), "{key}");
        }
        answer
    }

    fn json(self) -> Value {
        let done = self.ok();
        assert_eq!(done.stdout.lines().count(), 1, "{}", done.stdout);
        serde_json::from_str(&done.stdout).unwrap()
    }
}

/// Out of the hub's reach, with an empty cache, whatever the environment says.
fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rekindle"));
    for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"] {
        command.env_remove(variable);
    }
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"] {
        command.env_remove(variable);
    }
    for variable in ["RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_RANK", "PET_NNODES", "SKYPILOT_NUM_NODES"] {
        command.env_remove(variable);
    }
    // The port of `discard`, where nobody listens.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", "no/such/cache");
    command.env("REKINDLE_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command
}

fn rekindle<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Done {
    done(command().args(args))
}

fn done(command: &mut Command) -> Done {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A command line without spaces in its words.
fn run(line: &str) -> Done {
    rekindle(line.split_whitespace())
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name).canonicalize().unwrap()
}

fn expect(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(golden(name).join("expect.json")).unwrap()).unwrap()
}

/// A scratch directory with a run file for `qwen3-tied` in it.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        let [model, rows] = ["qwen3-tied", "qwen3-tied/rows.jsonl"].map(golden);
        let out = scratch.path("out");
        let text = format!(
            "output_dir = {out:?}\ndevice = \"cpu\"\n[model]\nname_or_path = {model:?}\n[lora]\nr = 2\n\
             [data]\ntrain = {rows:?}\n[train]\nmax_steps = 2\nper_device_train_batch_size = 2\n"
        );
        fs::write(scratch.path("run.toml"), text).unwrap();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and gives its path.
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name).display().to_string()
    }

    /// `rekindle train` on the run file with more arguments.
    fn train(&self, more: &[&str]) -> Done {
        let file = self.path("run.toml").display().to_string();
        rekindle(["train", &file].iter().chain(more))
    }

    /// Quantizes `qwen3-tied` into the directory named as the format and gives its path.
    fn quantize(&self, to: &str, more: &str) -> String {
        let (model, out) = (golden("qwen3-tied"), self.path(to).display().to_string());
        let done = run(&format!("quantize --model {} --to {to} --out {out} {more}", model.display())).ok();
        assert_eq!(done.stdout, format!("{out}\n"));
        for part in ["packed codes", "scales", "total", "less than at 16 bits"] {
            assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
        }
        out
    }
}

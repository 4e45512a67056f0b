//! Runs that are killed, interrupted or refused, and resumed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Scratch, command};

/// Settings of every run here, in addition to those of [`Scratch`]: random numbers in each step, and two batches.
const JOB: [&str; 6] = [
    "train.max_steps=40",
    "train.gradient_accumulation_steps=2",
    "train.learning_rate=1e-2",
    "lora.lora_dropout=0.1",
    "lora.use_gradient_checkpointing=true",
    "train.save_total_limit=2",
];

/// Numbers from a seed (Marsaglia's xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        for (left, by) in [(true, 13), (false, 7), (true, 17)] {
            self.0 ^= if left { self.0 << by } else { self.0 >> by };
        }
        self.0 % n
    }
}

/// A `rekindle train` that is under way.
struct Running {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    said: String,
}

impl Running {
    fn start(scratch: &Scratch, out: &Path, more: &[&str]) -> Self {
        let mut command = command();
        command.arg("train").arg(scratch.path("run.toml")).arg(format!("output_dir={}", out.display()));
        command.args(JOB).args(more).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, said: String::new() }
    }

    /// Reads on until so many steps were reported; whether it came to that.
    fn steps(&mut self, mut count: u64) -> bool {
        while count > 0 {
            let mut line = String::new();
            if self.stderr.read_line(&mut line).unwrap() == 0 {
                return false;
            }
            count -= u64::from(line.starts_with("step "));
            self.said += &line;
        }
        true
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Returns true once the run has a handler for SIGINT, which a signal would otherwise end at once.
    fn handles_interrupts(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.is_none_or(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << 1) != 0)
    }

    /// Its exit code, and all that it said.
    fn end(mut self) -> (i32, String) {
        while self.steps(1) {}
        (self.child.wait().unwrap().code().unwrap_or(-1), self.said)
    }
}

/// Names and bytes of what lies in a directory.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap_or_default()))
        .collect();
    files.sort();
    files
}

/// Returns the lines of `metrics.jsonl` without times and memory.
fn metrics(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|mut line| {
            for key in ["seconds", "tokens_per_second", "memory", "peak_memory"] {
                line.as_object_mut().unwrap().remove(key);
            }
            line
        })
        .collect()
}

/// The run that nothing stops.
fn whole(scratch: &Scratch) -> std::path::PathBuf {
    let out = scratch.path("whole");
    let (code, said) = Running::start(scratch, &out, &["train.save_steps=20"]).end();
    assert_eq!(code, 0, "{said}");
    out
}

fn assert_same(out: &Path, whole: &Path) {
    let [ours, expected] = [out, whole].map(|dir| contents(&dir.join("adapter")));
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&expected));
    assert!(ours == expected, "other bytes");
    assert_eq!(metrics(out), metrics(whole));
    let hidden: Vec<_> = contents(out).into_iter().map(|(name, _)| name).filter(|n| n.starts_with('.')).collect();
    assert!(hidden.is_empty(), "{hidden:?} is left over");
}

/// Waits until a checkpoint is half-written, if that is soon.
fn wait_for_a_write(out: &Path) {
    let start = Instant::now();
    let is_half = |name: &str| name.starts_with(".checkpoint-");
    while start.elapsed() < Duration::from_millis(500) {
        let mut names = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.file_name());
        if names.any(|name| is_half(&name.to_string_lossy())) {
            return;
        }
    }
}

#[test]
fn ten_kills_change_no_byte_of_the_result() {
    let scratch = Scratch::new();
    let whole = whole(&scratch);
    let out = scratch.path("killed");
    let mut random = Random(3407);
    let (mut kills, mut cut_writes) = (0, 0);
    while kills < 10 {
        let mut run = Running::start(&scratch, &out, &["train.save_steps=1", "--resume"]);
        assert!(run.steps(1 + random.below(3)), "it ended before it was killed: {}", run.said);
        if kills % 2 == 0 {
            std::thread::sleep(Duration::from_micros(random.below(40_000)));
        } else {
            wait_for_a_write(&out);
            std::thread::sleep(Duration::from_micros(random.below(2_000)));
        }
        run.child.kill().unwrap();
        run.child.wait().unwrap();
        kills += 1;
        cut_writes += usize::from(contents(&out).iter().any(|(name, _)| name.starts_with('.')));
    }
    assert!(cut_writes > 0, "no kill came in the middle of a write");
    let (code, said) = Running::start(&scratch, &out, &["train.save_steps=1", "--resume"]).end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("resuming from ") && said.contains("checkpoint-"), "{said}");
    assert_same(&out, &whole);
}

#[test]
fn signals_end_a_run_with_a_checkpoint() {
    let scratch = Scratch::new();
    let whole = whole(&scratch);
    for signal in ["INT", "TERM"] {
        let out = scratch.path(signal);
        let mut run = Running::start(&scratch, &out, &["train.save_steps=30"]);
        assert!(run.steps(3), "{}", run.said);
        run.signal(signal);
        let (code, said) = run.end();
        assert_eq!(code, 130, "{said}");
        for part in ["interrupted after step ", "checkpoint-", "with --resume"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!said.contains("error:") && !out.join("adapter").exists(), "{said}");
        // A run that forgets about it is reminded.
        let (code, said) = Running::start(&scratch, &out, &["train.save_steps=30"]).end();
        assert_eq!(code, 2, "{said}");
        assert!(said.contains("is a checkpoint of an earlier run") && said.contains("--resume"), "{said}");
        let (code, said) = Running::start(&scratch, &out, &["train.save_steps=30", "--resume=latest"]).end();
        assert_eq!(code, 0, "{said}");
        assert_same(&out, &whole);
    }
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let scratch = Scratch::new();
    let out = scratch.path("twice");
    // A step that takes its time.
    let rows = fs::read_to_string(crate::golden("qwen3-tied/rows.jsonl")).unwrap();
    let rows = format!("data.train={}", scratch.write("rows.jsonl", rows.repeat(1000)));
    let slow = ["train.save_steps=1", "train.gradient_accumulation_steps=4000", &rows];
    let run = Running::start(&scratch, &out, &slow);
    let start = Instant::now();
    while !(out.join("run.toml").exists() && run.handles_interrupts()) {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    run.signal("INT");
    std::thread::sleep(Duration::from_millis(50));
    run.signal("INT");
    let asked = Instant::now();
    let (code, said) = run.end();
    assert_eq!(code, 130, "{said}");
    assert!(!said.contains("interrupted after"), "{said}");
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(!out.join("checkpoint-1").exists());
}

#[test]
fn what_diverges_ends_with_six_and_says_where() {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    let done = scratch.train(&["train.learning_rate=1e30", "train.max_steps=5", "train.save_steps=1"]);
    let checkpoint = out.join("checkpoint-1").display().to_string();
    let parts =
        ["step 2: ", "is the first that is not finite", "rows.jsonl:", "set learning_rate below 1e30", &checkpoint];
    done.fails(6, &parts);
    assert!(out.join("checkpoint-1").is_dir() && !out.join("adapter").exists());
}

#[test]
fn a_checkpoint_that_is_not_there_is_named() {
    let scratch = Scratch::new();
    scratch.train(&["--resume=no/such"]).fails(2, &["no/such", "is not a directory"]);
    scratch.train(&["--resume", "train.max_steps=1"]).fails(2, &["train.max_steps=1", "--resume at the end"]);
    let here = scratch.path("").display().to_string();
    scratch.train(&["--resume", &here]).fails(1, &["trainer_state.json: it does not exist"]);
    let done = scratch.train(&["--resume"]).ok();
    assert!(done.stderr.contains("contains no checkpoint: the run starts from the beginning"), "{}", done.stderr);
}

#[test]
fn a_stop_file_ends_a_run_with_a_checkpoint() {
    let scratch = Scratch::new();
    let out = scratch.path("asked");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("stop"), "").unwrap();
    let mut run = Running::start(&scratch, &out, &["train.save_steps=3000", "train.max_steps=5000"]);
    assert!(run.steps(3), "a file from before the start does not count: {}", run.said);
    assert!(!out.join("stop").exists());
    fs::write(out.join("stop"), "").unwrap();
    stopped(run, &out);
}

#[cfg(feature = "serve")]
#[test]
fn the_dashboard_of_a_run_stops_it() {
    use std::io::{Read, Write};

    let scratch = Scratch::new();
    let out = scratch.path("shown");
    let more = ["train.save_steps=3000", "train.max_steps=5000", "--dashboard", "127.0.0.1:0"];
    let mut run = Running::start(&scratch, &out, &more);
    assert!(run.steps(3), "{}", run.said);
    let address = run.said.lines().find_map(|line| line.strip_prefix("dashboard http://")).unwrap().to_owned();
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        let head =
            "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        write!(stream, "{request} HTTP/1.1\r\n{head}").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let runs = ask("GET /api/runs");
    assert!(runs.contains("\"name\":\"shown\",\"running\":true"), "{runs}");
    let stopping = ask("POST /api/stop?run=shown");
    assert!(stopping.contains("stopping"), "{stopping}");
    stopped(run, &out);
}

/// Waits for the end of a run that was asked to stop.
fn stopped(run: Running, out: &Path) {
    let (code, said) = run.end();
    assert_eq!(code, 130, "{said}");
    for part in ["stopping after this step", "interrupted after step ", "checkpoint-", "with --resume"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!out.join("stop").exists() && !out.join("adapter").exists());
}

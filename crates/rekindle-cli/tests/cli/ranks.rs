//! `rekindle train --ranks`, and ranks that a launcher starts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Scratch, command, done};

const JOB: [&str; 4] =
    ["train.max_steps=30", "train.gradient_accumulation_steps=2", "lora.lora_dropout=0.1", "train.save_steps=5"];

/// Returns a command that trains into `out`.
fn train(scratch: &Scratch, out: &Path, more: &[&str]) -> Command {
    let mut command = command();
    command.arg("train").arg(scratch.path("run.toml")).arg(format!("output_dir={}", out.display()));
    command.args(JOB).args(more);
    command
}

/// Returns the loss and the gradient norm of every step.
fn numbers(out: &Path) -> Vec<[f64; 2]> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| Some([line["loss"].as_f64()?, line["grad_norm"].as_f64()?])).collect()
}

fn assert_close(out: &Path, expected: &Path) {
    assert_steps_close(out, expected, 30);
}

/// Asserts that both runs have `steps` steps with nearly the same losses and gradient norms.
fn assert_steps_close(out: &Path, expected: &Path, steps: usize) {
    let [ours, expected] = [out, expected].map(numbers);
    assert_eq!((ours.len(), expected.len()), (steps, steps));
    for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
        assert!((ours - expected).abs() <= 1e-6 * expected.max(1.0), "{ours} is not {expected}");
    }
}

/// A run of several ranks whose steps can be waited for.
struct RunningRanks {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    text: String,
}

impl RunningRanks {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, text: String::new() }
    }

    /// Reads until the line of a step.
    fn wait_for_step(&mut self, step: usize) {
        let start = format!("step {step}/");
        loop {
            let mut line = String::new();
            assert!(self.stderr.read_line(&mut line).unwrap() > 0, "no step {step}: {}", self.text);
            self.text += &line;
            if line.starts_with(&start) {
                return;
            }
        }
    }

    /// Reads until the line of a step, and returns its number.
    fn wait_for_any_step(&mut self) -> usize {
        loop {
            let mut line = String::new();
            assert!(self.stderr.read_line(&mut line).unwrap() > 0, "no step: {}", self.text);
            self.text += &line;
            let step = line.strip_prefix("step ").and_then(|rest| rest.split_once('/'));
            if let Some(step) = step.and_then(|(step, _)| step.parse().ok()) {
                return step;
            }
        }
    }

    /// Returns the processes of the ranks.
    fn ranks(&self) -> Vec<String> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        children.split_whitespace().map(str::to_owned).collect()
    }

    /// Returns the exit code and standard error.
    fn end(mut self) -> (i32, String) {
        let mut line = String::new();
        while self.stderr.read_line(&mut line).unwrap() > 0 {
            self.text += &line;
            line.clear();
        }
        (self.child.wait().unwrap().code().unwrap_or(-1), self.text)
    }
}

fn signal(name: &str, process: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), process]).status().unwrap().success());
}

#[test]
fn ranks_of_this_machine_train_together() {
    let scratch = Scratch::new();
    let [one, three] = ["one", "three"].map(|name| scratch.path(name));
    done(&mut train(&scratch, &one, &[])).ok();
    let result = done(&mut train(&scratch, &three, &["--ranks", "3"])).ok();
    assert_eq!(result.stdout, format!("{}\n", three.join("adapter").display()), "rank 0 alone prints the result");
    let count = |part: &str| result.stderr.matches(part).count();
    assert_eq!([count("3 ranks\n"), count("step 30/30"), count("saved ")], [1, 1, 7], "{}", result.stderr);
    assert_close(&three, &one);
}

/// The base is divided among the ranks, and nothing else changes.
#[test]
fn a_divided_base_has_the_result_of_a_whole_one() {
    let scratch = Scratch::new();
    let run = |name: &str, more: &[&str]| {
        let out = scratch.path(name);
        let result = done(&mut train(&scratch, &out, &[&["--ranks", "2", "train.max_steps=6"], more].concat())).ok();
        (result.stderr, fs::read(out.join("adapter/adapter_model.safetensors")).unwrap())
    };
    let (_, whole) = run("whole", &[]);
    for setting in ["model.shard_base=true", "model.shard_base=false"] {
        let (_, divided) = run("divided", &[setting, "--overwrite"]);
        assert!(divided == whole, "{setting}");
    }
    let (stderr, auto) = run("auto", &["model.shard_base=auto"]);
    assert!(stderr.contains("shard_base = \"auto\" is false"), "{stderr}");
    assert!(auto == whole);
    let error = done(&mut train(&scratch, &scratch.path("full"), &["model.shard_base=sometimes"]));
    error.fails(2, &["shard_base must be true, false or \"auto\""]);
}

/// Twenty ranks are killed, each at a moment of its own between the start of the processes and the last steps. All ranks end
/// within seconds with the cause, and in the end the run has taken the steps of one that was never killed.
#[test]
fn ranks_killed_at_random_moments_resume() {
    let scratch = Scratch::new();
    let [whole, out] = ["whole", "killed"].map(|name| scratch.path(name));
    let steps = "train.max_steps=60";
    done(&mut train(&scratch, &whole, &[steps])).ok();
    // A generator of Numerical Recipes.
    let mut state = 20_u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    let mut done_steps = 0;
    for kill in 0..20 {
        let mut running = RunningRanks::start(train(&scratch, &out, &[steps, "--ranks", "3", "--resume"]));
        // Some are killed while they load the model or connect.
        let while_starting = random(5) == 0;
        if while_starting {
            while running.ranks().len() < 3 {
                std::thread::sleep(Duration::from_millis(5));
            }
        } else {
            let first = running.wait_for_any_step();
            done_steps = (first + random(6) as usize).clamp(first, first.max(40));
            if done_steps > first {
                running.wait_for_step(done_steps);
            }
        }
        std::thread::sleep(Duration::from_millis(random(30).into()));
        let victim = random(3) as usize;
        let process = running.ranks().swap_remove(victim);
        let killed = Instant::now();
        signal("KILL", &process);
        let (code, text) = running.end();
        let what = format!("kill {kill} of rank {victim} at step {done_steps}: {text}");
        assert!(killed.elapsed() < Duration::from_secs(10), "{:?}, {what}", killed.elapsed());
        assert_eq!(code, 1, "{what}");
        assert!(text.contains(&format!("error: rank {victim} was ended by a signal: 9")), "{what}");
        if !while_starting && victim > 0 {
            assert!(text.contains(&format!("error: rank {victim} on ")) && text.contains("probably killed"), "{what}");
        }
    }
    let result = done(&mut train(&scratch, &out, &[steps, "--ranks", "2", "--resume"])).ok();
    assert!(result.stderr.contains("resuming from "), "{}", result.stderr);
    assert_steps_close(&out, &whole, 60);
}

/// Whenever a rank is killed, all end within seconds, and the run resumes on another number of ranks.
#[test]
fn a_killed_rank_ends_all_and_the_run_resumes() {
    let scratch = Scratch::new();
    let [whole, out] = ["whole", "killed"].map(|name| scratch.path(name));
    done(&mut train(&scratch, &whole, &[])).ok();
    for (victim, step) in [(0, 3), (1, 9), (2, 14), (2, 16), (0, 19), (1, 22), (0, 24), (1, 27)] {
        let mut running = RunningRanks::start(train(&scratch, &out, &["--ranks", "3", "--resume"]));
        running.wait_for_step(step);
        let processes = running.ranks();
        assert_eq!(processes.len(), 3, "{}", running.text);
        let killed = Instant::now();
        signal("KILL", &processes[victim]);
        let (code, text) = running.end();
        assert!(killed.elapsed() < Duration::from_secs(10), "{:?}: {text}", killed.elapsed());
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(&format!("error: rank {victim} was ended by a signal: 9")), "{text}");
        if victim > 0 {
            let cause = format!("error: rank {victim} on ");
            assert!(text.contains(&cause) && text.contains("probably killed"), "{text}");
        }
    }
    let result = done(&mut train(&scratch, &out, &["--ranks", "2", "--resume"])).ok();
    assert!(result.stderr.contains("resuming from "), "{}", result.stderr);
    assert_close(&out, &whole);
}

#[test]
fn a_signal_ends_all_ranks_with_a_checkpoint() {
    let scratch = Scratch::new();
    let [whole, out] = ["whole", "stopped"].map(|name| scratch.path(name));
    done(&mut train(&scratch, &whole, &[])).ok();
    // Long enough that the signal comes before the end.
    let mut running = RunningRanks::start(train(&scratch, &out, &["--ranks", "2", "train.max_steps=3000"]));
    running.wait_for_step(3);
    signal("TERM", &running.child.id().to_string());
    let (code, text) = running.end();
    assert_eq!(code, 130, "{text}");
    assert!(text.contains("interrupted after step ") && !text.contains("error:"), "{text}");
    assert_eq!(text.matches("interrupted").count(), 1, "{text}");
}

/// The error of a rank is printed once, with its exit code.
#[test]
fn the_error_of_a_rank_is_that_of_the_run() {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    let diverges = ["--ranks", "2", "train.learning_rate=1e30"];
    done(&mut train(&scratch, &out, &diverges))
        .fails(6, &["is the first that is not finite", "ended with exit code 6"]);
    let unknown = done(&mut train(&scratch, &out, &["--ranks", "2", "train.no_such_key=1"]));
    unknown.fails(2, &["no_such_key"]);
    assert_eq!(unknown.stderr.matches("error:").count(), 1, "{}", unknown.stderr);
    let conflict = ["--ranks", "2", "--gpus", "2"];
    done(&mut train(&scratch, &out, &conflict)).fails(2, &["--ranks", "cannot be used with"]);
    done(&mut train(&scratch, &out, &["--ranks", "0"])).fails(2, &["\"0\" is not a whole number above 0"]);
    if !Path::new("/dev/nvidiactl").exists() {
        done(&mut train(&scratch, &out, &["--gpus", "all"])).fails(2, &["no CUDA device", "--ranks N"]);
    }
    let mut ranked = train(&scratch, &out, &["--ranks", "2"]);
    ranked.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
    done(&mut ranked).fails(2, &["has started this process as rank 1 of 2", "remove --ranks"]);
    let mut incomplete = train(&scratch, &out, &[]);
    done(incomplete.env("RANK", "1")).fails(2, &["RANK is 1, but WORLD_SIZE is not set"]);
}

/// The variables of Open MPI, of MPICH, and of Kubeflow Trainer with one pod of two ranks and with two pods.
#[test]
fn mpi_and_kubeflow_start_ranks() {
    let scratch = Scratch::new();
    let whole = scratch.path("whole");
    done(&mut train(&scratch, &whole, &[])).ok();
    let check = |launcher: &str, variables: [&[(&str, &str)]; 2]| {
        let out = scratch.path(launcher);
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let started = variables.into_iter().filter(|variables| !variables.is_empty()).map(|variables| {
            let mut command = train(&scratch, &out, &[]);
            command.envs(variables.iter().copied()).env("RAYON_NUM_THREADS", "1");
            for name in ["MASTER", "PET_MASTER"] {
                command.env(format!("{name}_ADDR"), "127.0.0.1").env(format!("{name}_PORT"), &free);
            }
            RunningRanks::start(command)
        });
        for running in started.collect::<Vec<_>>() {
            let (code, text) = running.end();
            assert_eq!(code, 0, "{launcher}: {text}");
        }
        assert_close(&out, &whole);
    };
    let open_mpi = |rank: &'static str| {
        [("RANK", rank), ("SIZE", "2"), ("LOCAL_RANK", rank), ("LOCAL_SIZE", "2")]
            .map(|(name, value)| (format!("OMPI_COMM_WORLD_{name}"), value))
    };
    let open_mpi = ["0", "1"].map(open_mpi);
    let open_mpi = open_mpi.each_ref().map(|of| of.each_ref().map(|(name, value)| (name.as_str(), *value)));
    check("open-mpi", [&open_mpi[0], &open_mpi[1]]);
    let mpich = ["0", "1"]
        .map(|rank| [("PMI_RANK", rank), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", rank), ("MPI_LOCALNRANKS", "2")]);
    check("mpich", [&mpich[0], &mpich[1]]);
    check("kubeflow", [&[("PET_NNODES", "1"), ("PET_NPROC_PER_NODE", "2"), ("PET_NODE_RANK", "0")], &[]]);
    let pods = ["0", "1"].map(|node| [("PET_NNODES", "2"), ("PET_NPROC_PER_NODE", "1"), ("PET_NODE_RANK", node)]);
    check("kubeflow-pods", [&pods[0], &pods[1]]);
}

/// The variables of a Slurm step, and of a restart by torchrun.
#[test]
fn launchers_start_and_restart_ranks() {
    let scratch = Scratch::new();
    let [whole, out] = ["whole", "out"].map(|name| scratch.path(name));
    done(&mut train(&scratch, &whole, &[])).ok();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let slurm = |rank: &str, more: &[&str]| {
        let mut command = train(&scratch, &out, more);
        command.envs([("SLURM_JOB_ID", "71"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "2")]);
        command.envs([("SLURM_STEP_NUM_NODES", "1"), ("SLURM_PROCID", rank), ("SLURM_LOCALID", rank)]);
        command.env("MASTER_PORT", &port).env("RAYON_NUM_THREADS", "1");
        command
    };
    // The first run is asked to stop; the second is the one that Slurm starts after it has requeued the job.
    let first = RunningRanks::start(slurm("1", &[]));
    let mut zero = RunningRanks::start(slurm("0", &[]));
    zero.wait_for_step(4);
    signal("TERM", &first.child.id().to_string());
    let ends = [zero.end(), first.end()];
    assert!(ends.iter().all(|(code, _)| *code == 130 || *code == 0), "{ends:?}");
    let was_stopped = ends[0].0 == 130;
    if was_stopped {
        let mut one = slurm("1", &[]);
        let one = RunningRanks::start(std::mem::replace(one.env("SLURM_RESTART_COUNT", "1"), command()));
        let mut zero = slurm("0", &[]);
        let zero = done(zero.env("SLURM_RESTART_COUNT", "1")).ok();
        assert!(zero.stderr.contains("resuming from "), "{}", zero.stderr);
        assert_eq!(one.end(), (0, String::new()), "ranks after the first print nothing");
    }
    assert_close(&out, &whole);

    // One rank alone resumes by itself too.
    let out = scratch.path("restarted");
    let mut running = RunningRanks::start(train(&scratch, &out, &[]));
    running.wait_for_step(8);
    running.child.kill().unwrap();
    running.end();
    let mut restarted = train(&scratch, &out, &[]);
    restarted.envs([("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "1")]);
    let restarted = done(&mut restarted).ok();
    assert!(restarted.stderr.contains("resuming from "), "{}", restarted.stderr);
    assert_close(&out, &whole);
}

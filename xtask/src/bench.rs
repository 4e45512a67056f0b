//! `cargo xtask bench`: benchmarks.

pub(crate) mod generate;
pub(crate) mod kernels;
pub(crate) mod quantize;
pub(crate) mod shape;
pub(crate) mod train;

use core::ops::Range;
use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle::LoraConfig;
use rekindle_hub::Checkpoint;
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_models::{Batch, CausalLm, LoadOptions, Sft};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};
use serde_json::{Value, json};

use crate::{random_checkpoint, root};

const BATCH: usize = 4;
const SEQ: usize = 256;
const VOCAB: u32 = 8192;
const WARMUP: usize = 2;

/// Runs the job of `xtask/peers/cpu_train.py` in Rekindle and, if a Python is given, also in PyTorch, one after the
/// other.
pub(crate) fn cpu(steps: usize, python: Option<&Path>, threads: usize) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    random_checkpoint::write(dir.path(), &config(), 1)?;
    let mut ours = Command::new(std::env::current_exe()?);
    ours.args(["bench", "cpu", "--worker"]).arg(dir.path()).args(["--steps", &steps.to_string()]);
    ours.env("RAYON_NUM_THREADS", threads.to_string());
    let ours = result(&mut ours)?;
    println!("{:<16}{:>12}{:>12}{:>14}", "", "tokens/s", "ms a step", "peak MiB");
    let row = |name: &str, r: &Value| {
        let number = |key: &str| r[key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{name:<16}{:>12.0}{:>12.1}{:>14.0}",
            number("tokens_per_second"),
            number("ms_per_step"),
            number("peak_rss_mib")
        );
        (number("tokens_per_second"), number("peak_rss_mib"))
    };
    let (speed, memory) = row("rekindle", &ours);
    if let Some(python) = python {
        let mut peer = Command::new(python);
        peer.arg("-B").arg(root().join("xtask/peers/cpu_train.py"));
        peer.args(["--steps", &steps.to_string(), "--warmup", &WARMUP.to_string(), "--threads", &threads.to_string()]);
        let (peer_speed, peer_memory) = row("PyTorch + PEFT", &result(&mut peer)?);
        println!("{:<16}{:>11.2}×{:>12}{:>13.2}×", "ratio", speed / peer_speed, "", memory / peer_memory);
    }
    Ok(())
}

/// Measures in this process and prints one JSON line.
pub(crate) fn cpu_worker(checkpoint: &Path, steps: usize) -> Result<(), Box<dyn Error>> {
    let options = LoadOptions::new(Device::cpu(), DType::F32, SEQ);
    let mut model = CausalLm::load(&Checkpoint::open(checkpoint)?, &options, &mut |_| ())?;
    model.add_adapter(&LoraConfig::new(16).lora_alpha(32.0))?;
    let config = SftConfig::default();
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 0)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    for step in 0..WARMUP + steps {
        let batch = random_batch(&mut rng, [BATCH, SEQ], 0..VOCAB);
        let began = Instant::now();
        let result = optimizer.step(&mut model, &Sft, &[batch], 1e-4)?;
        if step >= WARMUP {
            times.push(began.elapsed().as_secs_f64());
        }
        losses.push((result.loss * 1e4).round() / 1e4);
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let report = json!({
        "tokens_per_second": (BATCH * SEQ) as f64 / median,
        "ms_per_step": median * 1e3,
        "ms_fastest_step": times[0] * 1e3,
        "peak_rss_mib": resident_kib("VmHWM") / 1024.0,
        "losses": losses,
    });
    println!("{report}");
    Ok(())
}

/// Returns rows of random tokens, all with labels.
fn random_batch(rng: &mut ChaCha8Rng, [rows, length]: [usize; 2], ids: Range<u32>) -> Batch {
    let rows: Vec<(Vec<u32>, Vec<i32>)> = (0..rows)
        .map(|_| {
            let ids: Vec<u32> = (0..length).map(|_| rng.random_range(ids.clone())).collect();
            let labels = ids.iter().map(|&id| id as i32).collect();
            (ids, labels)
        })
        .collect();
    Batch::from_rows(rows.iter().map(|(ids, labels)| (ids.as_slice(), labels.as_slice())), 0)
}

/// Returns the command-line name of a value.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Measures kernels and whole steps on a CUDA device and writes the numbers to `out`.
pub(crate) fn gpu(weights: Option<&Path>, python: Option<&Path>, out: &Path) -> Result<(), Box<dyn Error>> {
    // In a separate process, whose device memory would otherwise be counted as that of the steps.
    let mut kernels = Command::new(std::env::current_exe()?);
    kernels.args(["bench", "kernels"]);
    if let Some(python) = python {
        kernels.arg("--python").arg(python);
    }
    let (table, kernels) = output(&mut kernels)?;
    println!("{table}");
    let train = train::table(weights, python)?;
    std::fs::write(out, format!("{:#}\n", json!({"kernels": kernels, "train": train})))?;
    println!("{}", out.display());
    Ok(())
}

/// Runs the program, shows its output, and returns the last line as JSON.
fn result(command: &mut Command) -> Result<Value, Box<dyn Error>> {
    let (_, value) = output(command)?;
    eprintln!("{value}");
    Ok(value)
}

/// Runs the program; returns its output before the last line, and the last line as JSON.
fn output(command: &mut Command) -> Result<(String, Value), Box<dyn Error>> {
    let shown = format!("{command:?}");
    let output = command.stderr(std::process::Stdio::inherit()).output().map_err(|e| format!("{shown}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{shown}: {}", output.status).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let text = text.trim_end();
    let (before, line) = text.rsplit_once('\n').unwrap_or(("", text));
    Ok((before.to_owned(), serde_json::from_str(line).map_err(|error| format!("{shown}: {error}: {line}"))?))
}

/// Returns a memory size of this process reported by the kernel: `VmHWM`, the peak resident size, or `RssAnon`, the
/// resident anonymous size. NaN if it is not available.
fn resident_kib(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(f64::NAN)
}

fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": true,
        "hidden_act": "silu"
    })
}

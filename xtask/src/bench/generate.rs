//! `cargo xtask bench generate`: measures the engine in a real model's shape.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use clap::{Args, ValueEnum};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle::LoraConfig;
use rekindle::engine::{CacheSize, Engine, EngineConfig, Event, Request};
use rekindle_hub::Checkpoint;
use rekindle_kernels::paged_attention::PAGE;
use rekindle_kernels::{DType, Device, parse_device};
use rekindle_models::{CausalLm, LoadIn, LoadOptions, SamplingParams};
use serde_json::{Value, json};

use super::shape::Shape;
use super::train::print_profile;
use super::{name, result};
use crate::random_checkpoint;

/// Bytes per second that a large copy reaches on an H200.
const BANDWIDTH: f64 = 4.25e12;

/// Token ids of prompts.
const IDS: core::ops::Range<u32> = 4..2000;

/// A benchmark job.
#[derive(Args, Clone, Debug)]
pub(crate) struct Generate {
    /// The model whose shape is used, with random weights.
    #[arg(long, value_enum, default_value_t = Shape::Qwen3_4b)]
    shape: Shape,
    /// The weights.
    #[arg(long, value_enum, default_value_t = Mode::Bf16)]
    mode: Mode,
    /// Prompts at once; several numbers, separated by commas, are measured one after another.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32, 64, 256])]
    batch: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// New tokens of each sample; none ends earlier.
    #[arg(long, default_value_t = 512)]
    new: usize,
    /// Samples of each prompt.
    #[arg(long, default_value_t = 1)]
    samples: usize,
    /// The temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the k most likely tokens only; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the smallest set of most likely tokens whose probabilities reach this sum.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Tokens of a step at most.
    #[arg(long, default_value_t = 8192)]
    batch_tokens: usize,
    /// The device to use.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// The directory that keeps the weights for the next job of that shape; by default they are deleted.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Makes kernels of a step wait for the ones before them to end.
    #[arg(long)]
    no_overlap: bool,
    /// Profiles four steps of single tokens for each batch, operation by operation, and prints the longest.
    #[arg(long)]
    profile: bool,
    /// Measures with existing weights in this process and prints one JSON line.
    #[arg(long, hide = true)]
    worker: bool,
}

/// The weights of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// bf16.
    Bf16,
    /// bf16 with an adapter of rank 16 on all linears.
    Lora,
    /// NF4.
    Nf4,
}

/// Measures each batch in a process of its own and prints a table.
pub(crate) fn run(job: &Generate) -> Result<(), Box<dyn Error>> {
    if job.worker {
        return worker(job);
    }
    let scratch = tempfile::tempdir()?;
    let at = job.weights.as_deref().unwrap_or(scratch.path()).join(name(job.shape));
    if !at.join("config.json").exists() {
        std::fs::create_dir_all(&at)?;
        random_checkpoint::write_bf16(&at, &job.shape.config(), 1)?;
    }
    let mut ours = Command::new(std::env::current_exe()?);
    ours.args(["bench", "generate", "--worker", "--device", &job.device, "--weights"]).arg(&at);
    let batches: Vec<String> = job.batch.iter().map(usize::to_string).collect();
    let options = [
        ("--shape", name(job.shape)),
        ("--mode", name(job.mode)),
        ("--batch", batches.join(",")),
        ("--prompt", job.prompt.to_string()),
        ("--new", job.new.to_string()),
        ("--samples", job.samples.to_string()),
        ("--temperature", job.temperature.to_string()),
        ("--top-k", job.top_k.to_string()),
        ("--top-p", job.top_p.to_string()),
        ("--batch-tokens", job.batch_tokens.to_string()),
    ];
    if job.profile {
        ours.arg("--profile");
    }
    if job.no_overlap {
        ours.arg("--no-overlap");
    }
    ours.args(options.iter().flat_map(|(option, value)| [*option, value.as_str()]));
    let report = result(&mut ours)?;
    println!("{} {}, prompt {}, {} new × {}", name(job.shape), name(job.mode), job.prompt, job.new, job.samples);
    println!("{:>8}{:>12}{:>14}{:>14}{:>10}", "prompts", "tokens/s", "decode only", "bytes' floor", "of it");
    for row in report["rows"].as_array().into_iter().flatten() {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:>8}{:>12.0}{:>14.0}{:>14.0}{:>9.0}%",
            number("batch"),
            number("tokens_per_second"),
            number("decode_tokens_per_second"),
            number("floor_tokens_per_second"),
            100.0 * number("decode_tokens_per_second") / number("floor_tokens_per_second")
        );
    }
    Ok(())
}

/// Measures in this process and prints one JSON line.
fn worker(job: &Generate) -> Result<(), Box<dyn Error>> {
    let at = job.weights.as_deref().ok_or("a worker is given its weights")?;
    let began = Instant::now();
    let (device, _) = rekindle_kernels::open_device(parse_device(&job.device)?)?;
    let cuda = match &device {
        Device::Cuda(cuda) => Some(cuda.clone()),
        Device::Burn(_) | Device::Meta(_) => None,
    };
    if let Some(cuda) = &cuda {
        cuda.allow_overlap(!job.no_overlap);
    }
    let dtype = if cuda.is_some() { DType::BF16 } else { DType::F32 };
    let length = job.prompt + job.new;
    let mut options = LoadOptions::new(device.clone(), dtype, length + 1);
    options.load_in = (job.mode == Mode::Nf4).then_some(LoadIn::FourBit(None));
    let mut model = CausalLm::load(&Checkpoint::open(at)?, &options, &mut |_| ())?;
    if job.mode == Mode::Lora {
        model.add_adapter(&LoraConfig::new(16).lora_alpha(32.0))?;
    }
    device.synchronize()?;
    let load_seconds = began.elapsed().as_secs_f64();
    let weights = cuda.as_ref().map_or(0, |cuda| cuda.memory().in_use);
    let rows = job.batch.iter().map(|&batch| measure(job, &model, batch, weights)).collect::<Result<Vec<_>, _>>()?;
    let card = cuda.map(|cuda| cuda.props().name.clone());
    println!("{}", json!({"rows": rows, "weights_gib": gib(weights), "load_seconds": load_seconds, "card": card}));
    Ok(())
}

/// Measures one batch, after a run that compiles, plans and records.
fn measure(job: &Generate, model: &CausalLm, batch: usize, weights: usize) -> Result<Value, Box<dyn Error>> {
    let sequences = batch * job.samples;
    let pages = sequences * (job.prompt + job.new).div_ceil(PAGE) + batch;
    let config = EngineConfig {
        max_batch_tokens: job.batch_tokens.max(sequences),
        max_sequences: sequences,
        cache: CacheSize::Pages(pages),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(model, config)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let _warm = generate(job, &mut engine, batch, job.new.min(8), &mut rng)?;
    let [first, whole] = {
        let first = generate(job, &mut engine, batch, 1, &mut rng)?;
        [first, generate(job, &mut engine, batch, job.new, &mut rng)?]
    };
    if job.profile
        && let Device::Cuda(cuda) = model.device()
    {
        submit(job, &mut engine, batch, 8, &mut rng)?;
        while engine.stats().waiting > 0 || engine.stats().running == 0 {
            engine.step();
        }
        let (_, entries) = cuda.profile(|| (0..4).for_each(|_| drop(engine.step())))?;
        eprintln!("{batch} prompts, 4 steps");
        print_profile(&entries);
        while engine.has_work() {
            engine.step();
        }
    }
    let mean_length = job.prompt as f64 + job.new as f64 / 2.0;
    let cache = (model.decoder().page_bytes() / PAGE * sequences) as f64 * mean_length;
    let step = (weights as f64 + cache) / BANDWIDTH;
    Ok(json!({
        "batch": batch,
        "samples": job.samples,
        "tokens_per_second": (sequences * job.new) as f64 / whole,
        "decode_tokens_per_second": (sequences * (job.new - 1)) as f64 / (whole - first),
        "prompt_tokens_per_second": (batch * job.prompt) as f64 / first,
        "floor_tokens_per_second": sequences as f64 / step,
        "not_recorded": engine.steps_refusal(),
    }))
}

/// Answers prompts that were not seen before; returns the seconds.
fn generate(
    job: &Generate,
    engine: &mut Engine<&CausalLm>,
    batch: usize,
    new: usize,
    rng: &mut ChaCha8Rng,
) -> Result<f64, Box<dyn Error>> {
    let began = Instant::now();
    submit(job, engine, batch, new, rng)?;
    let mut tokens = 0;
    while engine.has_work() {
        for event in engine.step() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Failed { error, .. } => return Err(error.into()),
                Event::Finished { .. } | Event::Prompt { .. } => {}
            }
        }
    }
    if tokens != batch * job.samples * new {
        return Err(format!("{tokens} new tokens of {}", batch * job.samples * new).into());
    }
    Ok(began.elapsed().as_secs_f64())
}

/// Submits prompts of random tokens.
fn submit(
    job: &Generate,
    engine: &mut Engine<&CausalLm>,
    batch: usize,
    new: usize,
    rng: &mut ChaCha8Rng,
) -> Result<(), Box<dyn Error>> {
    for index in 0..batch {
        let prompt: Vec<u32> = (0..job.prompt).map(|_| rng.random_range(IDS)).collect();
        let &Generate { temperature, top_k, top_p, .. } = job;
        let sampling = SamplingParams { temperature, top_k, top_p, seed: index as u64, ..SamplingParams::default() };
        engine.submit(Request { n: job.samples, max_tokens: new, sampling, ..Request::new(prompt) })?;
    }
    Ok(())
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

//! `cargo xtask bench train`: measures training steps in a real model's shape on a GPU, optionally with a peer.

mod losses;
pub(crate) mod plan;

use core::ops::Range;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::{Args, ValueEnum};
use rekindle::{Bias, LoraConfig};
use rekindle_hub::Checkpoint;
use rekindle_kernels::runtime::{Cuda, ProfileEntry};
use rekindle_kernels::{DType, Device, parse_device};
use rekindle_models::{CausalLm, Fp8Products, GradientCheckpointing, LoadIn, LoadOptions};
use rekindle_train::SftConfig;
use serde_json::{Value, json};

use self::losses::{Loss, LossArguments, MeasuredSteps, WARMUP};
use super::shape::Shape;
use super::{name, result};
use crate::random_checkpoint;

/// Token ids, few enough for the peers' small tokenizer.
const IDS: Range<u32> = 4..2000;

/// Embedded, because there may be no checkout on the machine.
const PEER: &str = include_str!("../../peers/gpu_train.py");

/// A benchmark job.
#[derive(Args, Clone, Debug)]
pub(crate) struct Train {
    /// The model whose shape is used, with random weights.
    #[arg(long, value_enum, default_value_t = Shape::Qwen3_4b)]
    shape: Shape,
    /// The training mode.
    #[arg(long, value_enum, default_value_t = Mode::Lora)]
    mode: Mode,
    /// The loss.
    #[arg(long, value_enum, default_value_t = Loss::Sft)]
    loss: Loss,
    #[command(flatten)]
    arguments: LossArguments,
    /// Rows per step.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens per row.
    #[arg(long, default_value_t = 2048)]
    seq: usize,
    /// The activations kept for the backward.
    #[arg(long, value_enum, default_value_t = Checkpointing::Block)]
    checkpointing: Checkpointing,
    /// Measured steps, after three warm-up steps.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// The device to use.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// The directory that keeps the weights for the next job of that shape; by default they are deleted.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Gives q, k, v and o biases, as `attention_bias` in `config.json`.
    #[arg(long)]
    attention_bias: bool,
    /// The biases trained with the adapter, as `bias` in `[lora]`.
    #[arg(long, value_enum, default_value_t = TrainedBias::None)]
    bias: TrainedBias,
    /// Trains magnitudes, as `use_dora` in `[lora]`.
    #[arg(long)]
    use_dora: bool,
    /// Keeps the linears in fp8 and multiplies with them in fp8, as `fp8 = true`.
    #[arg(long)]
    fp8: bool,
    /// The dtype of activations and frozen weights.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Bf16)]
    dtype: ComputeDtype,
    /// The optimizer, as `optim` in `[train]`.
    #[arg(long, default_value = "adamw")]
    optim: String,
    /// Updates parameters in the backward.
    #[arg(long)]
    optimizer_in_bwd: bool,
    /// Profiles one more step and prints the longest operations.
    #[arg(long)]
    profile: bool,
    /// A Python interpreter with torch and a peer, in which the same job is measured too.
    #[arg(long)]
    python: Option<PathBuf>,
    /// The peer.
    #[arg(long, value_enum, default_value_t = Peer::Unsloth)]
    peer: Peer,
    /// Measures with existing weights in this process and prints one JSON line.
    #[arg(long, hide = true)]
    worker: bool,
}

/// The training mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// LoRA of rank 16 on all linears of a bf16 base.
    Lora,
    /// The same with an NF4 base with double quantization.
    Qlora,
    /// Full fine-tuning with f32 master weights.
    Full,
    /// Full fine-tuning with bf16 weights and stochastic rounding, without f32 master weights.
    FullBf16,
    /// Full fine-tuning with the blocks' linears in 8 bits and everything else in bf16.
    FullInt8,
    /// Full fine-tuning with the blocks' linears in NF4 and everything else in bf16.
    FullNf4,
}

impl Mode {
    fn is_full(self) -> bool {
        !matches!(self, Self::Lora | Self::Qlora)
    }

    fn load_in(self) -> Option<LoadIn> {
        match self {
            Self::Qlora | Self::FullNf4 => Some(LoadIn::FourBit(None)),
            Self::FullInt8 => Some(LoadIn::EightBit),
            Self::Lora | Self::Full | Self::FullBf16 => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Checkpointing {
    /// All activations.
    Off,
    /// The input of each block.
    Block,
    /// The input of each block, in host memory.
    Host,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TrainedBias {
    /// None.
    None,
    /// Every bias of the model.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ComputeDtype {
    Bf16,
    /// With a residual stream of f32 and a scaled loss.
    F16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Peer {
    Unsloth,
    Peft,
}

/// The jobs of docs/benchmarks.md: shape, mode, rows, tokens per row, kept activations, measured steps.
const JOBS: [(Shape, Mode, usize, usize, Checkpointing, usize); 7] = [
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Block, 8),
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Host, 8),
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Off, 8),
    (Shape::Qwen3_4b, Mode::Qlora, 4, 2048, Checkpointing::Host, 8),
    (Shape::Qwen3_4b, Mode::Qlora, 1, 32_768, Checkpointing::Host, 4),
    (Shape::Qwen3_0_6b, Mode::Lora, 2, 512, Checkpointing::Off, 10),
    (Shape::Llama3_1_8b, Mode::Lora, 2, 4096, Checkpointing::Off, 6),
];

/// Runs every job of docs/benchmarks.md; returns its table as rows and as JSON.
pub(crate) fn table(weights: Option<&Path>, python: Option<&Path>) -> Result<Value, Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let weights = weights.unwrap_or(scratch.path()).to_owned();
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (shape, mode, batch, seq, checkpointing, steps) in JOBS {
        let job = Train {
            shape,
            mode,
            batch,
            seq,
            checkpointing,
            steps,
            device: "cuda".to_owned(),
            weights: Some(weights.clone()),
            attention_bias: false,
            bias: TrainedBias::None,
            use_dora: false,
            fp8: false,
            dtype: ComputeDtype::Bf16,
            optim: "adamw".to_owned(),
            optimizer_in_bwd: false,
            loss: Loss::Sft,
            arguments: LossArguments::UNUSED,
            profile: false,
            python: python.map(Path::to_owned),
            peer: Peer::Unsloth,
            worker: false,
        };
        let (ours, peer) = job.measure()?;
        lines.push(job.markdown(&ours, peer.as_ref()));
        rows.push(json!({"job": job.name(), "rekindle": ours, "unsloth": peer}));
    }
    println!("| job | rekindle, tokens/s | Unsloth | ratio | rekindle, GiB | Unsloth | ratio |");
    println!("|---|---|---|---|---|---|---|");
    lines.iter().for_each(|line| println!("{line}"));
    Ok(Value::Array(rows))
}

/// Measures Rekindle and then the peer, each in a separate process, and prints both.
pub(crate) fn run(job: &Train) -> Result<(), Box<dyn Error>> {
    if job.worker {
        return worker(job);
    }
    let (ours, peer) = job.measure()?;
    println!("{}", job.name());
    println!("{:<16}{:>12}{:>12}{:>12}", "", "tokens/s", "ms a step", "GiB taken");
    let (speed, memory) = row("rekindle", &ours);
    if let Some(peer) = peer {
        let (peer_speed, peer_memory) = row(&name(job.peer), &peer);
        println!("{:<16}{:>11.2}×{:>12}{:>11.2}×", "ratio", speed / peer_speed, "", memory / peer_memory);
    }
    Ok(())
}

/// Prints one line of the table.
fn row(name: &str, r: &Value) -> (f64, f64) {
    let number = |key: &str| r[key].as_f64().unwrap_or(f64::NAN);
    let [speed, step, memory] = ["tokens_per_second", "ms_per_step", "device_gib"].map(number);
    println!("{name:<16}{speed:>12.0}{step:>12.1}{memory:>12.2}");
    for (part, value) in r["parts_ms"].as_object().into_iter().flatten() {
        println!("  {part}: {:.3}", value.as_f64().unwrap_or(f64::NAN));
    }
    (speed, memory)
}

/// Measures in this process and prints one JSON line.
fn worker(job: &Train) -> Result<(), Box<dyn Error>> {
    let at = job.weights.as_deref().ok_or("a worker is given its weights")?;
    let began = Instant::now();
    let (device, _) = rekindle_kernels::open_device(parse_device(&job.device)?)?;
    let Device::Cuda(cuda) = &device else { return Err(format!("{} is not a CUDA device", job.device).into()) };
    let dtype = match job.dtype {
        ComputeDtype::Bf16 => DType::BF16,
        ComputeDtype::F16 => DType::F16,
    };
    let mut options = LoadOptions::new(device.clone(), dtype, job.seq);
    options.full_finetuning = job.mode.is_full();
    options.stochastic_rounding = job.mode == Mode::FullBf16;
    options.load_in = job.mode.load_in();
    if job.fp8 {
        options.fp8 = Some(Fp8Products::ForwardAndBackward);
    }
    let mut model = CausalLm::load(&Checkpoint::open(at)?, &options, &mut |_| ())?;
    if !job.mode.is_full() {
        let bias = match job.bias {
            TrainedBias::None => Bias::None,
            TrainedBias::All => Bias::All,
        };
        model.add_adapter(&LoraConfig::new(16).lora_alpha(32.0).bias(bias).use_dora(job.use_dora))?;
    }
    model.set_gradient_checkpointing(job.checkpointing.setting());
    device.synchronize()?;
    let (load_seconds, weights) = (began.elapsed().as_secs_f64(), cuda.memory().in_use);

    let optim = serde_json::from_value(Value::from(job.optim.as_str()))?;
    let config = SftConfig { optimizer_in_bwd: job.optimizer_in_bwd, optim, ..SftConfig::default() };
    let MeasuredSteps { first, times, losses, parts } = losses::measure(job, config, &mut model, Some(cuda))?;
    let memory = taken(cuda);
    let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
    let median = losses::median(times);
    let report = json!({
        "job": job.name(),
        "tokens_per_second": (job.batch * job.seq) as f64 / median,
        "ms_per_step": median * 1e3,
        "ms_fastest_step": fastest * 1e3,
        "device_gib": memory,
        "weights_gib": gib(weights),
        "high_water_gib": gib(cuda.memory().high_water),
        "extent_gib": gib(cuda.memory().extent),
        // On an otherwise idle GPU: the memory of this process outside the arena, and in total.
        "outside_gib": memory - gib(cuda.memory().mapped),
        "process_gib": memory,
        "pinned_gib": gib(cuda.pinned_bytes()),
        "load_seconds": load_seconds,
        "first_step_seconds": first,
        "losses": losses,
        "parts_ms": parts,
        "card": cuda.props().name,
    });
    println!("{report}");
    Ok(())
}

/// Returns the used device memory reported by the driver, including contexts and other processes. The peers are
/// measured in the same way; their allocators also keep freed memory.
fn taken(cuda: &Cuda) -> f64 {
    let (free, total) = cuda.device_memory();
    gib(total - free)
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Prints the time of each operation.
pub(super) fn print_profile(entries: &[ProfileEntry]) {
    let total: f64 = entries.iter().map(|entry| entry.milliseconds).sum();
    eprintln!("{:>10}{:>8}{:>8}  operation", "ms", "calls", "%");
    for ProfileEntry { name, calls, milliseconds } in entries {
        eprintln!("{milliseconds:>10.3}{calls:>8}{:>8.2}  {name}", 100.0 * milliseconds / total);
    }
    eprintln!("{total:>10.3}");
}

impl Train {
    /// Returns our numbers and, if there is a Python, the peer's.
    fn measure(&self) -> Result<(Value, Option<Value>), Box<dyn Error>> {
        let scratch = tempfile::tempdir()?;
        let directory = name(self.shape) + if self.attention_bias { "-attention-bias" } else { "" };
        let at = self.weights.as_deref().unwrap_or(scratch.path()).join(directory);
        if !at.join("config.json").exists() {
            std::fs::create_dir_all(&at)?;
            let mut config = self.shape.config();
            if self.attention_bias {
                config["attention_bias"] = Value::from(true);
            }
            random_checkpoint::write_bf16(&at, &config, 1)?;
        }
        let mut ours = Command::new(std::env::current_exe()?);
        ours.args(["bench", "train", "--worker", "--device", &self.device, "--weights"]).arg(&at);
        ours.args(["--shape", &name(self.shape), "--optim", &self.optim]).args(self.options());
        if self.optimizer_in_bwd {
            ours.arg("--optimizer-in-bwd");
        }
        ours.args(["--dtype", &name(self.dtype)]);
        if self.fp8 {
            ours.arg("--fp8");
        }
        if self.profile {
            ours.arg("--profile");
        }
        let ours = result(&mut ours)?;
        let Some(python) = &self.python else { return Ok((ours, None)) };
        let script = scratch.path().join("gpu_train.py");
        std::fs::write(&script, PEER)?;
        let mut peer = Command::new(python);
        peer.arg("-B").arg(script).arg(at).args(["--peer", &name(self.peer), "--warmup", &WARMUP.to_string()]);
        Ok((ours, Some(result(peer.args(self.options()))?)))
    }

    /// Returns the arguments common to our worker and the peer's script.
    fn options(&self) -> Vec<String> {
        let options = [
            ("--mode", name(self.mode)),
            ("--batch", self.batch.to_string()),
            ("--seq", self.seq.to_string()),
            ("--checkpointing", name(self.checkpointing)),
            ("--steps", self.steps.to_string()),
            ("--bias", name(self.bias)),
            ("--loss", name(self.loss)),
        ];
        let flag = self.use_dora.then(|| "--use-dora".to_owned());
        let of_loss = self.arguments.options().into_iter().filter(|_| self.loss != Loss::Sft);
        let options = options.into_iter().chain(of_loss);
        options.flat_map(|(option, value)| [option.to_owned(), value]).chain(flag).collect()
    }

    fn name(&self) -> String {
        let Self { shape, mode, loss, batch, seq, checkpointing, optim, optimizer_in_bwd, .. } = self;
        let (shape, mode, checkpointing) = (name(*shape), name(*mode), name(*checkpointing));
        let mode = if self.dtype == ComputeDtype::F16 { format!("{mode} in f16") } else { mode };
        let loss = if *loss == Loss::Sft { String::new() } else { format!(" {}", name(*loss)) };
        let in_bwd = if *optimizer_in_bwd { ", in the backward" } else { "" };
        let mut lora = String::new();
        if self.attention_bias {
            lora += &format!(" with attention biases, bias {}", name(self.bias));
        }
        if self.use_dora {
            lora += " DoRA";
        }
        if self.fp8 {
            lora += " with fp8 products";
        }
        format!("{shape} {mode}{lora}{loss}, {batch} × {seq}, checkpointing {checkpointing}, {optim}{in_bwd}")
    }

    /// Returns a row of the table in docs/benchmarks.md.
    fn markdown(&self, ours: &Value, peer: Option<&Value>) -> String {
        let number = |of: &Value, key: &str| of[key].as_f64().unwrap_or(f64::NAN);
        let (speed, memory) = (number(ours, "tokens_per_second"), number(ours, "device_gib"));
        let Some(peer) = peer else { return format!("| {} | {speed:.0} | | | {memory:.2} | | |", self.name()) };
        let (peer_speed, peer_memory) = (number(peer, "tokens_per_second"), number(peer, "device_gib"));
        format!(
            "| {} | {speed:.0} | {peer_speed:.0} | {:.2} | {memory:.2} | {peer_memory:.2} | {:.2} |",
            self.name(),
            speed / peer_speed,
            memory / peer_memory
        )
    }
}

impl Checkpointing {
    fn setting(self) -> GradientCheckpointing {
        match self {
            Self::Off => GradientCheckpointing::Off,
            Self::Block => GradientCheckpointing::Block,
            Self::Host => GradientCheckpointing::Host,
        }
    }
}

//! Repository tasks; `cargo xtask help` lists them.

#[cfg(feature = "models")]
mod bench;
mod build;
mod ci;
#[cfg(feature = "models")]
mod full;
mod goldens;
mod gpu_bundle;
#[cfg(feature = "models")]
mod kernels;
#[cfg(feature = "models")]
mod quickstart;
#[cfg(feature = "models")]
mod random_checkpoint;
#[cfg(feature = "models")]
mod rope;
mod tidy;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs everything that CI checks.
    Ci,
    /// Checks layering, `unsafe`, and which crates may use which words.
    Tidy,
    /// Regenerates the goldens with transformers, PEFT and TensorBoard.
    Goldens {
        /// A Python interpreter with torch, transformers and peft.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
    /// Copies the GPU tests and the command to target/gpu, for a machine without Rust.
    GpuBundle,
    #[cfg(feature = "models")]
    /// Compiles every CUDA kernel for every architecture; needs no GPU.
    Kernels {
        /// Compute capabilities to compile for, such as 75,90; by default all.
        #[arg(long, value_delimiter = ',')]
        arch: Vec<u32>,
        /// Fails if NVRTC is missing, instead of reporting "not run".
        #[arg(long)]
        require: bool,
    },
    #[cfg(feature = "models")]
    /// Writes the quickstart's text, tokenizer and instruction sets, and trains its base model.
    Quickstart {
        /// The output file of the corpus, which is not kept in the repository.
        #[arg(long, default_value = "target/quickstart")]
        scratch: PathBuf,
        /// Optimizer steps of about 1,024 tokens.
        #[arg(long, default_value_t = 5500)]
        steps: usize,
    },
    #[cfg(feature = "models")]
    /// Extends the quickstart's base model beyond its window with every method, and prints the tables of
    /// docs/context-extension.md.
    Rope {
        /// Optimizer steps of the short fine-tuning run, 2,048 tokens each.
        #[arg(long, default_value_t = 60)]
        steps: usize,
        /// Number of evaluated documents.
        #[arg(long, default_value_t = 96)]
        documents: usize,
    },
    #[cfg(feature = "models")]
    /// Fully fine-tunes the quickstart's base model in 32, 16, 8 and 4 bits, and prints the table of
    /// docs/full-finetuning.md.
    Full {
        /// Optimizer steps of 8 rows.
        #[arg(long, default_value_t = 200)]
        steps: usize,
    },
    #[cfg(feature = "models")]
    /// Runs benchmarks.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

#[cfg(feature = "models")]
#[derive(Subcommand)]
enum Bench {
    /// Measures LoRA fine-tuning on the CPU; with `--python` also PyTorch + PEFT.
    Cpu {
        /// Measured steps, after two warm-up steps.
        #[arg(long, default_value_t = 8)]
        steps: usize,
        /// A Python interpreter with torch, transformers and peft.
        #[arg(long)]
        python: Option<PathBuf>,
        /// Threads for each program.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Measures an existing checkpoint in this process and prints one JSON line.
        #[arg(long, hide = true)]
        worker: Option<PathBuf>,
    },
    /// Measures the operations of a training step on a CUDA device; with `--python` also PyTorch's.
    Kernels {
        /// The device to use.
        #[arg(long, default_value = "cuda")]
        device: String,
        /// A Python interpreter with torch, and with fla for the gated delta rule.
        #[arg(long)]
        python: Option<PathBuf>,
        /// Measure one part alone: attention, bandwidth, products, experts or delta.
        #[arg(long)]
        only: Option<String>,
    },
    /// Runs all CUDA benchmarks of docs/benchmarks.md: kernels and whole steps.
    Gpu {
        /// The directory that keeps the weights for the next run; by default they are deleted.
        #[arg(long)]
        weights: Option<PathBuf>,
        /// A Python interpreter with torch and Unsloth.
        #[arg(long)]
        python: Option<PathBuf>,
        /// The output file for the numbers as JSON.
        #[arg(long, default_value = "gpu.json")]
        out: PathBuf,
    },
    /// Measures fine-tuning in a real model's shape on a CUDA device; with `--python` also Unsloth or PEFT.
    Train(bench::train::Train),
    /// Measures generation with the engine in a real model's shape on a CUDA device.
    Generate(bench::generate::Generate),
    /// Compares the planned with the used memory of a CUDA device; nothing else should run on it.
    Plan {
        /// The directory that keeps the weights for the next run; by default they are deleted.
        #[arg(long)]
        weights: Option<PathBuf>,
    },
    /// Measures time and memory of quantizing a large model on load and to disk. Linux only.
    Quantize {
        /// The model whose shape is used, with random weights.
        #[arg(long, value_enum, default_value_t = bench::shape::Shape::Qwen3_4b)]
        shape: bench::shape::Shape,
        /// A directory with space for the weights, which are deleted afterwards.
        #[arg(long, default_value = "target")]
        dir: PathBuf,
        /// Measures an existing checkpoint in this process and prints one JSON line.
        #[arg(long, hide = true, requires = "job")]
        worker: Option<PathBuf>,
        /// The job of the worker process.
        #[arg(long, hide = true)]
        job: Option<bench::quantize::Job>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Ci => ci::run(),
        Task::Tidy => tidy::run(),
        Task::Goldens { python } => goldens::make(&python),
        Task::GpuBundle => gpu_bundle::make(),
        #[cfg(feature = "models")]
        Task::Kernels { arch, require } => kernels::check(&arch, require),
        #[cfg(feature = "models")]
        Task::Quickstart { scratch, steps } => quickstart::make(&scratch, steps),
        #[cfg(feature = "models")]
        Task::Full { steps } => full::measure(steps),
        #[cfg(feature = "models")]
        Task::Rope { steps, documents } => rope::measure(steps, documents),
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Cpu { steps, python, threads, worker } } => match worker {
            Some(checkpoint) => bench::cpu_worker(&checkpoint, steps),
            None => bench::cpu(steps, python.as_deref(), threads),
        },
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Kernels { device, python, only } } => {
            bench::kernels::run(&device, python.as_deref(), only.as_deref())
        }
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Gpu { weights, python, out } } => {
            bench::gpu(weights.as_deref(), python.as_deref(), &out)
        }
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Train(job) } => bench::train::run(&job),
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Generate(job) } => bench::generate::run(&job),
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Plan { weights } } => bench::train::plan::run(weights.as_deref()),
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Quantize { shape, dir, worker, job } } => match (worker, job) {
            (Some(checkpoint), Some(job)) => bench::quantize::worker(&checkpoint, job),
            _ => bench::quantize::run(shape, &dir),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the repository's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// Runs a program and fails if it fails.
fn run(command: &mut std::process::Command) -> Result<(), Box<dyn Error>> {
    let shown = format!("{command:?}");
    eprintln!("$ {shown}");
    let status = command.status().map_err(|error| format!("{shown}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{shown}: {status}").into()) }
}

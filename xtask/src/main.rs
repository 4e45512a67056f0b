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
    /// Everything that CI checks.
    Ci,
    /// Layering, `unsafe`, and who may know what.
    Tidy,
    /// Makes the goldens again with transformers, PEFT and TensorBoard.
    Goldens {
        /// A Python with torch, transformers and peft.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
    /// Puts the GPU tests and the command into target/gpu, for a machine without Rust.
    GpuBundle,
    #[cfg(feature = "models")]
    /// Compiles every CUDA kernel for every architecture, without a GPU.
    Kernels {
        /// Fails where NVRTC is missing, instead of saying "not run".
        #[arg(long)]
        require: bool,
    },
    #[cfg(feature = "models")]
    /// Writes the quickstart's text, tokenizer and instruction sets, and trains its base model.
    Quickstart {
        /// Where the corpus is written; it is not kept in the repository.
        #[arg(long, default_value = "target/quickstart")]
        scratch: PathBuf,
        /// Optimizer steps of about 1,024 tokens.
        #[arg(long, default_value_t = 5500)]
        steps: usize,
    },
    #[cfg(feature = "models")]
    /// Takes the quickstart's base model beyond its window with every method, and prints the tables of
    /// docs/context-extension.md.
    Rope {
        /// Optimizer steps of the short fine-tune, of 2,048 tokens each.
        #[arg(long, default_value_t = 60)]
        steps: usize,
        /// Documents that are measured.
        #[arg(long, default_value_t = 96)]
        documents: usize,
    },
    #[cfg(feature = "models")]
    /// Trains all weights of the quickstart's base model in 32, 16, 8 and 4 bits, and prints the table of
    /// docs/full-finetuning.md.
    Full {
        /// Optimizer steps of 8 rows.
        #[arg(long, default_value_t = 200)]
        steps: usize,
    },
    #[cfg(feature = "models")]
    /// Measures.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

#[cfg(feature = "models")]
#[derive(Subcommand)]
enum Bench {
    /// A LoRA fine-tune on the CPU, beside PyTorch + PEFT when `--python` has them.
    Cpu {
        /// Counted steps, after two of warm-up.
        #[arg(long, default_value_t = 8)]
        steps: usize,
        /// A Python with torch, transformers and peft.
        #[arg(long)]
        python: Option<PathBuf>,
        /// Threads of each.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Measures in this process a checkpoint that is there already, and prints one JSON line.
        #[arg(long, hide = true)]
        worker: Option<PathBuf>,
    },
    /// The operations of a training step alone on a CUDA device, beside PyTorch's when `--python` has it.
    Kernels {
        /// Where to compute.
        #[arg(long, default_value = "cuda")]
        device: String,
        /// A Python with torch.
        #[arg(long)]
        python: Option<PathBuf>,
    },
    /// Everything that docs/benchmarks.md has of a CUDA device: kernels and whole steps.
    Gpu {
        /// Where the weights are written, and found again by the next run; without it they are deleted.
        #[arg(long)]
        weights: Option<PathBuf>,
        /// A Python with torch and Unsloth.
        #[arg(long)]
        python: Option<PathBuf>,
        /// The numbers as JSON.
        #[arg(long, default_value = "gpu.json")]
        out: PathBuf,
    },
    /// A fine-tune of a real model's shape on a CUDA device, beside Unsloth or PEFT when `--python` has them.
    Train(bench::train::Train),
    /// What is planned for a CUDA device beside what the same steps take of it; nothing else should run there.
    Plan {
        /// Where the weights are written, and found again by the next run; without it they are deleted.
        #[arg(long)]
        weights: Option<PathBuf>,
    },
    /// Quantizing a large model while loading and to disk: time, and memory against its bound. Linux only.
    Quantize {
        /// The model whose shape is filled with random weights.
        #[arg(long, value_enum, default_value_t = bench::shape::Shape::Qwen3_4b)]
        shape: bench::shape::Shape,
        /// Where there is room for the weights; they are deleted afterwards.
        #[arg(long, default_value = "target")]
        dir: PathBuf,
        /// Measures in this process a checkpoint that is there already, and prints one JSON line.
        #[arg(long, hide = true, requires = "job")]
        worker: Option<PathBuf>,
        /// What the worker does.
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
        Task::Kernels { require } => kernels::check(require),
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
        Task::Bench { what: Bench::Kernels { device, python } } => bench::kernels::run(&device, python.as_deref()),
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Gpu { weights, python, out } } => {
            bench::gpu(weights.as_deref(), python.as_deref(), &out)
        }
        #[cfg(feature = "models")]
        Task::Bench { what: Bench::Train(job) } => bench::train::run(&job),
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

/// The repository's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// Runs a program and fails when it does.
fn run(command: &mut std::process::Command) -> Result<(), Box<dyn Error>> {
    let shown = format!("{command:?}");
    eprintln!("$ {shown}");
    let status = command.status().map_err(|error| format!("{shown}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{shown}: {status}").into()) }
}

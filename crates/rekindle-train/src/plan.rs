//! The memory that a run takes, before it is loaded.
//!
//! One definition throughout: the most bytes that are allocated at once, on the device that computes. On the CPU a process
//! is resident with more than that, which [`MemoryPlan::mapped`] names: pages of the checkpoint's files, which the system
//! takes back when memory is short, and the program itself.

mod advice;
mod fit;

use core::fmt;
use std::path::PathBuf;

use rekindle_kernels::Device;
use rekindle_kernels::cuda::Cuda;
use rekindle_kernels::optimizer::StateBytes;
use rekindle_lora::{GradientCheckpointing, LoraConfig};
use rekindle_models::{
    Account, Batch, Bytes, CausalLm, Coding, LoadOptions, ModelConfig, Tokens, Trained, Use, stored_quantization,
};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::{Error, Optimizer, OptimizerConfig, SftConfig};

pub use advice::Change;
pub use fit::{Fit, Verdict};

/// What a process takes of a card beside the arena: the context, the kernels' code, and what cuBLASLt keeps.
///
/// `cargo xtask bench plan` measured 0.52 to 0.54 GiB on an H200 with driver 580 (docs/benchmarks.md).
pub const OUTSIDE: usize = 512 << 20;

/// A run to plan for: what is loaded, what is trained, and with what.
#[derive(Clone, Debug)]
pub struct Job {
    /// What the model's `config.json` says.
    pub json: Value,
    /// The model's name or directory, for messages.
    pub name: PathBuf,
    /// How it is loaded. On a planned device ([`Cuda::planned`]) the plan is made of the step itself, on the CPU and on
    /// wgpu of an account of it.
    pub load: LoadOptions,
    /// The adapter; without one all weights are trained.
    pub lora: Option<LoraConfig>,
    /// What becomes of activations.
    pub checkpointing: GradientCheckpointing,
    /// The run's numbers.
    pub train: SftConfig,
}

/// Makes plans of one job for batches of any size.
pub struct Planner {
    job: Job,
    config: ModelConfig,
    engine: Engine,
}

enum Engine {
    /// A model without values on a planned device.
    Cuda(Box<Planned>),
    Account {
        coding: Option<Coding>,
        trained: Trained,
    },
}

struct Planned {
    cuda: Cuda,
    model: CausalLm,
    optimizer: Optimizer,
}

/// The rows of the largest forward and backward pass of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Tokens of each row.
    pub lengths: Vec<usize>,
}

/// The most bytes that a run allocates at once, by use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Rows of the largest pass.
    pub rows: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// What becomes of activations.
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Bytes by use at the peak.
    #[serde(serialize_with = "by_use")]
    pub bytes: Bytes,
    /// Free pieces between what is in use that are too short for what was asked.
    pub gaps: usize,
    /// On a GPU, what is taken beside the tensors ([`OUTSIDE`]).
    pub outside: usize,
    /// All of these. This is what is compared with the available memory.
    pub peak: usize,
    /// Host memory that a GPU's activations and states go to.
    pub host: usize,
    /// On the CPU, bytes of the checkpoint's files that are mapped while it loads. They count as resident, beside `peak`,
    /// until the system needs the memory for something else.
    pub mapped: usize,
}

impl Planner {
    /// Reads the shapes of a job; nothing is loaded.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that is not supported or an adapter that matches nothing, [`Error::Config`] and
    /// [`Error::NothingToTrain`] as the run itself.
    pub fn new(job: Job) -> Result<Self, Error> {
        job.train.validate()?;
        let model = |problems| rekindle_models::Error::Config { path: job.name.join("config.json"), problems };
        let mut config = ModelConfig::from_json(&job.json).map_err(model)?;
        if let Some(rows) = job.load.resize_model_vocab {
            config.vocab_size = rows;
        }
        let engine = match &job.load.device {
            Device::Cuda(cuda) if cuda.is_planned() => {
                // Of its own: nothing else is in its memory.
                let cuda = Cuda::planned(cuda.facts().clone());
                let load = LoadOptions { device: Device::Cuda(cuda.clone()), ..job.load.clone() };
                let mut model = CausalLm::outline(&job.json, &job.name, &load)?;
                if let Some(lora) = &job.lora {
                    model.outline_adapter(lora)?;
                }
                let optimizer = Optimizer::new(&model, OptimizerConfig::from(&job.train), 0)?;
                Engine::Cuda(Box::new(Planned { cuda, model, optimizer }))
            }
            _ => {
                let coding = Coding::of(&job.json, &job.name, &job.load)?;
                let mut planner = Self { config, engine: Engine::Account { coding, trained: Trained::default() }, job };
                let counted = planner.account(GradientCheckpointing::Off).trained()?;
                if let Engine::Account { trained, .. } = &mut planner.engine {
                    *trained = counted;
                }
                return Ok(planner);
            }
        };
        Ok(Self { job, config, engine })
    }

    /// What the job takes with these rows in the largest pass.
    ///
    /// # Errors
    /// [`Error::Model`] for rows that the model does not take.
    pub fn plan(&mut self, rows: &Rows) -> Result<MemoryPlan, Error> {
        self.plan_with(rows, self.job.checkpointing)
    }

    /// [`plan`](Self::plan) with another fate of activations.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_with(&mut self, rows: &Rows, checkpointing: GradientCheckpointing) -> Result<MemoryPlan, Error> {
        let full = self.job.lora.is_none();
        match &mut self.engine {
            Engine::Cuda(planned) => planned.step(rows, checkpointing, full),
            Engine::Account { trained, .. } => {
                let OptimizerConfig { rule, format, .. } = OptimizerConfig::from(&self.job.train);
                // On the CPU all memory is the host's.
                let StateBytes { device, host } = format.bytes(rule, trained.sizes.iter().copied());
                let state = device + host;
                let bytes = self.account(checkpointing).step(rows.tokens(), state)?;
                let mapped = self.mapped(&bytes);
                Ok(MemoryPlan {
                    rows: rows.lengths.len(),
                    tokens: rows.tokens().all,
                    use_gradient_checkpointing: checkpointing,
                    bytes,
                    gaps: 0,
                    outside: 0,
                    peak: bytes.total(),
                    host: 0,
                    mapped,
                })
            }
        }
    }

    /// The job.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// The longest row that the job's model takes.
    pub fn max_seq_length(&self) -> usize {
        self.job.load.max_seq_length
    }

    /// How many token ids the model has.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// The size of the checkpoint's files, from the shapes and the dtype that its configuration names.
    fn mapped(&self, bytes: &Bytes) -> usize {
        let json = &self.job.json;
        if stored_quantization(json).is_some() {
            return bytes.of(Use::Weights);
        }
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| json.get(key)?.as_str());
        let element = if matches!(dtype, Some("bfloat16" | "float16")) { 2 } else { 4 };
        element * self.config.tensors().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum::<usize>()
    }

    fn account(&self, checkpointing: GradientCheckpointing) -> Account<'_> {
        let Engine::Account { coding, .. } = &self.engine else { panic!("a planned device keeps its own account") };
        Account {
            config: &self.config,
            coding: coding.as_ref(),
            element: self.job.load.dtype.size(),
            lora: self.job.lora.as_ref(),
            checkpointing,
            max_seq_length: self.job.load.max_seq_length,
            threads: std::thread::available_parallelism().map_or(1, core::num::NonZero::get),
        }
    }
}

impl Planned {
    fn step(&mut self, rows: &Rows, checkpointing: GradientCheckpointing, full: bool) -> Result<MemoryPlan, Error> {
        let Self { cuda, model, optimizer } = self;
        model.set_gradient_checkpointing(checkpointing);
        // What an earlier plan had on the host goes back.
        cuda.trim();
        cuda.reset_high_water();
        let before = cuda.memory().in_use;
        optimizer.step(model, &[rows.batch()], 0.0)?;
        let memory = cuda.memory();
        let mut bytes = Bytes::default();
        let mut activations = 0;
        for (label, used) in &memory.at_high_water {
            let what = match *label {
                "weights and inputs"
                | "stacked weights"
                | "packed weights"
                | "scales of packed weights"
                | "mirrors" => Use::Weights,
                "parameters" if full => Use::Weights,
                "parameters" => Use::Adapters,
                "gradients" => Use::Gradients,
                "optimizer state" => Use::Optimizer,
                "logits" | "targets" => Use::LossChunks,
                "activations" => {
                    activations = *used;
                    continue;
                }
                _ => Use::Scratch,
            };
            bytes.add(what, *used);
        }
        // What waits for the backward is there when the loss begins.
        let gradients = bytes.of(Use::Gradients);
        let waiting = cuda.in_use_before("logits").map_or(0, |used| used.saturating_sub(before + gradients));
        let saved = waiting.min(activations);
        bytes.add(Use::SavedActivations, saved);
        bytes.add(Use::Scratch, activations - saved);
        let gaps = memory.extent - memory.high_water;
        Ok(MemoryPlan {
            rows: rows.lengths.len(),
            tokens: rows.tokens().all,
            use_gradient_checkpointing: checkpointing,
            bytes,
            gaps,
            outside: OUTSIDE,
            peak: memory.extent + OUTSIDE,
            host: cuda.pinned_bytes(),
            mapped: 0,
        })
    }
}

impl Rows {
    /// `count` rows of `length` tokens.
    pub fn equal(count: usize, length: usize) -> Self {
        Self { lengths: vec![length; count] }
    }

    /// The longest `count` of rows with these lengths, which no pass exceeds.
    pub fn longest(count: usize, lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut lengths: Vec<usize> = lengths.into_iter().collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.truncate(count);
        Self { lengths }
    }

    fn tokens(&self) -> Tokens {
        let all = self.lengths.iter().sum();
        // The first label of a row is that of a token before it.
        let counted = self.lengths.iter().map(|length| length.saturating_sub(1)).sum();
        Tokens { all, longest: self.lengths.iter().copied().max().unwrap_or(0), counted }
    }

    /// Documents of these lengths, all of whose tokens count.
    fn batch(&self) -> Batch {
        let zeros: Vec<_> = self.lengths.iter().map(|&length| (vec![0; length], vec![0; length])).collect();
        Batch::from_rows(zeros.iter().map(|(ids, labels)| (&ids[..], &labels[..])), 0)
    }
}

fn by_use<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(Use::ALL.map(|what| (what, bytes.of(what))))
}

impl fmt::Display for MemoryPlan {
    /// A table of bytes by use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, bytes: usize| match bytes {
            0 => Ok(()),
            _ => writeln!(f, "{name:<20} {:>12}", show(bytes)),
        };
        for what in Use::ALL {
            line(what.label(), self.bytes.of(what))?;
        }
        line("gaps", self.gaps)?;
        line("outside", self.outside)?;
        write!(f, "{:<20} {:>12}", "peak", show(self.peak))?;
        for (what, bytes) in [("on the host", self.host), ("mapped files", self.mapped)] {
            if bytes > 0 {
                write!(f, "\n{what:<20} {:>12}  beside the peak", show(bytes))?;
            }
        }
        Ok(())
    }
}

/// Bytes for people, in powers of 1,024 as memory is sold.
pub fn show(bytes: usize) -> String {
    match bytes {
        0..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

impl fmt::Debug for Planner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Planner").field("job", &self.job).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

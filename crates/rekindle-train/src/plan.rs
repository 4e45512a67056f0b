//! The memory of a run, planned before anything is loaded.
//!
//! The plan is the peak of allocated bytes on the device that computes. On the CPU, the resident size of a process is
//! larger: it also includes mapped pages of the checkpoint's files ([`MemoryPlan::mapped`]), which the system reclaims
//! when memory is short, and the program itself.

mod advice;
mod fit;
mod memory;

use core::fmt;
use std::path::PathBuf;

use rekindle_data::RowTask;
use rekindle_kernels::runtime::NCCL_BYTES;
use rekindle_kernels::{Device, MemoryUse};
use rekindle_lora::LoraConfig;
use rekindle_models::{
    Answer, Batch, CausalLm, GradientCheckpointing, LoadOptions, Objective, SampledCompletion, is_quantized,
};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::{Error, Method, Optimizer, OptimizerConfig, SftConfig};

pub use advice::MemoryChange;
pub use fit::{MemoryFit, MemoryVerdict};
pub use memory::{MemoryBytes, MemoryCategory};

/// A run to plan: model, adapter and training configuration.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    /// The model's `config.json`.
    pub json: Value,
    /// The model's name or directory, for messages.
    pub name: PathBuf,
    /// The options for loading it, with the device to plan for.
    pub load: LoadOptions,
    /// The adapter; without one all weights are trained.
    pub lora: Option<LoraConfig>,
    /// The training configuration.
    pub train: SftConfig,
    /// True if there are rows to evaluate.
    pub evaluates: bool,
    /// The number of ranks that train together; the plan is for one of them.
    pub ranks: usize,
}

/// A memory planner of one job, for batches of any size.
///
/// The model is built without values on a device that counts memory and computes nothing ([`Device::planned`]). One
/// optimizer step of the largest batch runs through the training code; the peak that the device counts is the plan.
pub struct Planner {
    job: PlannedRun,
    objective: Box<dyn Objective>,
    device: Device,
    model: CausalLm,
    optimizer: Optimizer,
}

/// The rows of the largest forward and backward pass of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassRows {
    /// Tokens of each row; of a pair, those of its longer document.
    pub lengths: Vec<usize>,
}

/// The peak of a run's allocated bytes, by category.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Rows of the largest pass.
    pub rows: usize,
    /// Tokens of these rows.
    pub tokens: usize,
    /// Gradient checkpointing.
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Bytes by category at the peak.
    #[serde(serialize_with = "by_category")]
    pub bytes: MemoryBytes,
    /// Free memory between tensors that could not be used.
    #[serde(rename = "gaps")]
    pub fragmentation: usize,
    /// On a GPU, memory besides the tensors ([`CUDA_CONTEXT_BYTES`](rekindle_kernels::runtime::CUDA_CONTEXT_BYTES)), with
    /// several ranks also that of NCCL ([`NCCL_BYTES`]).
    #[serde(rename = "outside")]
    pub context: usize,
    /// The total, which must not exceed the available memory.
    pub peak: usize,
    /// Host memory for offloaded activations and optimizer states of a GPU.
    pub host: usize,
    /// On the CPU, bytes of the checkpoint's files that are mapped while it loads. They are resident in addition to
    /// `peak` until the system needs the memory.
    pub mapped: usize,
}

impl Planner {
    /// Builds the model of a job without values; nothing is loaded.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that is not supported or an adapter that matches nothing, [`Error::Config`] and
    /// [`Error::NothingToTrain`] as the run itself.
    pub fn new(job: PlannedRun) -> Result<Self, Error> {
        job.train.validate()?;
        let objective = job.train.method.objective();
        let device = job.load.device.planned();
        let load = LoadOptions { device: device.clone(), ..job.load.clone() };
        let mut model = CausalLm::on_meta(&job.json, &job.name, &load)?;
        if let Some(lora) = &job.lora {
            model.add_adapter_on_meta(lora)?;
        }
        let optimizer = Optimizer::planned(&model, OptimizerConfig::from(&job.train), job.ranks)?;
        Ok(Self { job, objective, device, model, optimizer })
    }

    /// Plans steps of this objective instead of that of the configured method.
    #[must_use]
    pub fn objective(self, objective: Box<dyn Objective>) -> Self {
        Self { objective, ..self }
    }

    /// Includes evaluation passes in the plan ([`PlannedRun::evaluates`]).
    pub fn with_evaluation(mut self) -> Self {
        self.job.evaluates = true;
        self
    }

    /// Plans the job with these rows in the largest pass.
    ///
    /// # Errors
    /// [`Error::Model`] for rows that exceed the model's limits.
    pub fn plan(&mut self, rows: &PassRows) -> Result<MemoryPlan, Error> {
        self.plan_with(rows, self.job.train.use_gradient_checkpointing)
    }

    /// Plans like [`plan`](Self::plan), with another gradient checkpointing.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_with(&mut self, rows: &PassRows, checkpointing: GradientCheckpointing) -> Result<MemoryPlan, Error> {
        self.model.set_gradient_checkpointing(checkpointing);
        let before = self.begin();
        let batch = rows.batch(&self.job);
        self.optimizer.step(&mut self.model, &*self.objective, &[batch], 0.0)?;
        let mut step = self.counted(rows, checkpointing, before);
        if let Some(sampling) = self.sampling(rows, checkpointing)?.filter(|sampling| sampling.peak > step.peak) {
            step = MemoryPlan { host: sampling.host.max(step.host), ..sampling };
        }
        if !self.job.evaluates || self.job.train.method.has_rollouts() {
            return Ok(step);
        }
        let rows = rows.for_evaluation(self.job.train.per_device_eval_batch_size);
        let before = self.begin();
        let batch = rows.batch(&self.job);
        if self.model.has_score_head() {
            self.model.scores(&batch)?;
        } else {
            self.model.nll(&batch)?;
        }
        let evaluation = self.counted(&rows, checkpointing, before);
        let host = step.host.max(evaluation.host);
        let largest = if evaluation.peak > step.peak { evaluation } else { step };
        Ok(MemoryPlan { host, ..largest })
    }

    /// Plans the sampling of completions: the key/value cache, beside a part of the prompts.
    fn sampling(&mut self, rows: &PassRows, checkpointing: GradientCheckpointing) -> Result<Option<MemoryPlan>, Error> {
        let method = &self.job.train.method;
        let Some(settings) = method.rollouts(&self.job.train) else { return Ok(None) };
        let longest = rows.lengths.iter().copied().max().unwrap_or(1);
        let before = self.begin();
        let cache = self.model.decoder().paged_states(settings.pages(longest)).map_err(rekindle_models::Error::from)?;
        // The largest step of the engine.
        let part = rekindle_engine::EngineConfig::default().max_batch_tokens.max(settings.arguments.max_sequences);
        let part = PassRows::equal(part.div_ceil(longest), longest.min(part));
        self.model.nll(&part.batch(&self.job))?;
        let plan = self.counted(rows, checkpointing, before);
        drop(cache);
        Ok(Some(plan))
    }

    /// Returns true if each rank holds a part of the optimizer's state.
    pub fn is_sharded(&self) -> bool {
        self.optimizer.is_sharded()
    }

    /// Returns the bytes that each rank sends in a step, and receives as well: 2 · (N − 1)/N of the f32 gradients of N ranks.
    ///
    /// An all-reduce over a ring takes as many as the reduce-scatter of gradients and the all-gather of parameters that
    /// take its place if the state is divided.
    pub fn bytes_per_step(&self) -> usize {
        let ranks = self.job.ranks;
        let values = self.model.params().numel();
        8 * values / ranks * (ranks - 1)
    }

    /// Returns the bytes of frozen weights that each rank receives in a step: (N − 1)/N of those of the blocks, for the forward
    /// and again for the backward of each pass. 0 unless the ranks divide them.
    pub fn gathered_bytes_per_step(&self) -> usize {
        let Some(shards) = self.model.decoder().shards() else { return 0 };
        let ranks = self.job.ranks;
        let passes = self.job.train.rows_per_step().div_ceil(ranks * self.rows_in_pass().max(1));
        2 * passes * (shards.bytes() / ranks * (ranks - 1))
    }

    /// Returns the number of rows of the maximum length that have no fewer tokens than any pass of a rank. A step's rows are
    /// dealt by their tokens.
    pub fn rows_in_pass(&self) -> usize {
        let train = &self.job.train;
        train.per_device_train_batch_size.min(train.rows_per_step().div_ceil(self.job.ranks))
    }

    /// Returns the job.
    pub fn job(&self) -> &PlannedRun {
        &self.job
    }

    /// Returns the maximum length of a row.
    pub fn max_seq_length(&self) -> usize {
        self.job.load.max_seq_length
    }

    /// Returns the vocabulary size of the model.
    pub fn vocab_size(&self) -> usize {
        self.model.config().vocab_size()
    }

    /// Returns the model's window in tokens.
    pub(crate) fn window(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    /// Begins a measurement; returns the bytes in use.
    fn begin(&self) -> usize {
        self.device.reset_memory_stats();
        self.device.memory_stats().in_use
    }

    /// Returns the plan from the device's counts since [`begin`](Self::begin).
    fn counted(&self, rows: &PassRows, checkpointing: GradientCheckpointing, before: usize) -> MemoryPlan {
        let stats = self.device.memory_stats();
        let mut bytes = MemoryBytes::default();
        let mut activations = 0;
        for &(usage, used) in &stats.at_high_water {
            match MemoryCategory::of(usage, self.job.lora.is_some()) {
                Some(category) => bytes.add(category, used),
                None => activations += used,
            }
        }
        // What waits for the backward is there when the loss begins.
        let gradients = bytes.of(MemoryCategory::Gradients);
        let waiting = self.device.in_use_before(MemoryUse::Logits);
        let waiting = waiting.map_or(0, |used| used.saturating_sub(before + gradients));
        let saved = waiting.min(activations);
        bytes.add(MemoryCategory::SavedActivations, saved);
        bytes.add(MemoryCategory::Scratch, activations - saved);
        let nccl = if self.job.ranks > 1 && matches!(self.device, Device::Cuda(_)) { NCCL_BYTES } else { 0 };
        let context = self.device.context_bytes() + nccl;
        MemoryPlan {
            rows: rows.lengths.len(),
            tokens: rows.lengths.iter().sum::<usize>() * documents_per_row(&self.job.train.method),
            use_gradient_checkpointing: checkpointing,
            bytes,
            fragmentation: stats.extent - stats.high_water,
            context,
            peak: stats.extent + context,
            host: self.device.pinned_bytes(),
            mapped: if self.device.is_cpu() { self.mapped(&bytes) } else { 0 },
        }
    }

    /// Returns the size of the checkpoint's files, from the shapes and the dtype in its configuration.
    fn mapped(&self, bytes: &MemoryBytes) -> usize {
        let json = &self.job.json;
        if is_quantized(json) {
            return bytes.of(MemoryCategory::Weights);
        }
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| json.get(key)?.as_str());
        let element = if matches!(dtype, Some("bfloat16" | "float16")) { 2 } else { 4 };
        element * self.model.num_parameters()
    }
}

impl PassRows {
    /// Returns `count` rows of `length` tokens.
    pub fn equal(count: usize, length: usize) -> Self {
        Self { lengths: vec![length; count] }
    }

    /// Returns the longest `count` of rows with these lengths, the upper bound of a pass.
    pub fn longest(count: usize, lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut lengths: Vec<usize> = lengths.into_iter().collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.truncate(count);
        Self { lengths }
    }

    /// Returns an evaluation pass of the longest row.
    fn for_evaluation(&self, count: usize) -> Self {
        Self::equal(count, self.lengths.iter().copied().max().unwrap_or(0))
    }

    /// Returns documents of these lengths, two of a pair; the loss covers all their tokens.
    fn batch(&self, job: &PlannedRun) -> Batch {
        let method = &job.train.method;
        let per_row = documents_per_row(method);
        let lengths = self.lengths.iter().flat_map(|&length| core::iter::repeat_n(length, per_row));
        let zeros: Vec<_> = lengths.map(|length| (vec![0; length], vec![0; length])).collect();
        let mut batch = Batch::from_rows(zeros.iter().map(|(ids, labels)| (&ids[..], &labels[..])), 0);
        if method.has_rollouts() {
            let completion = SampledCompletion { mean_tokens: 1.0, ..SampledCompletion::default() };
            let tokens = |length: &usize| Some(vec![0.0; length.saturating_sub(1)]);
            // A completion for every row; the reference is computed before.
            let of_row = |length| SampledCompletion { reference_log_probs: tokens(length), ..completion.clone() };
            batch.completions = self.lengths.iter().map(of_row).collect();
            return batch;
        }
        if method.task() != RowTask::Sft {
            // Without an adapter to turn off, the reference is computed before.
            let reference = (method.reference().is_some() && job.lora.is_none()).then_some(0.0);
            batch.answers = vec![Answer { preferred: true, reference }; batch.rows.len()];
        }
        if method.needs_mismatched() {
            batch.mismatched = Some(Box::new(batch.clone()));
        }
        batch
    }
}

/// Returns the number of documents of a row.
fn documents_per_row(method: &Method) -> usize {
    method.task().examples_per_row()
}

fn by_category<S: Serializer>(bytes: &MemoryBytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(MemoryCategory::ALL.map(|category| (category, bytes.of(category))))
}

impl fmt::Display for MemoryPlan {
    /// Formats the bytes by category as a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, bytes: usize| match bytes {
            0 => Ok(()),
            _ => writeln!(f, "{name:<20} {:>12}", show(bytes)),
        };
        for category in MemoryCategory::ALL {
            line(category.label(), self.bytes.of(category))?;
        }
        line("fragmentation", self.fragmentation)?;
        line("CUDA context", self.context)?;
        write!(f, "{:<20} {:>12}", "peak", show(self.peak))?;
        for (what, bytes) in [("on the host", self.host), ("mapped files", self.mapped)] {
            if bytes > 0 {
                write!(f, "\n{what:<20} {:>12}  beside the peak", show(bytes))?;
            }
        }
        Ok(())
    }
}

/// Formats bytes in powers of 1,024.
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

//! The memory plan of a run, before anything is loaded.

use std::path::Path;
use std::sync::Arc;

use rekindle_data::{Dataset, Tokenizer};
use rekindle_hub::read_config;
use rekindle_kernels::runtime::{self, CUDA_CONTEXT_BYTES, Cuda, DeviceProps};
use rekindle_kernels::{Device, DeviceKind, ShardExchange, open_device};
use rekindle_lora::LoraConfig;
use rekindle_lora::peft::AdapterConfig;
use rekindle_models::{GradientCheckpointing, LoadOptions, ModelConfig};
use rekindle_train::{MemoryFit, MemoryPlan, MemoryVerdict, PassRows, PlannedRun, Planner, SftConfig, ShardRanks};

use crate::time_estimate::{Work, token_time};
use crate::{DataSource, Error, Loader, Model, TokenTime};

/// A memory planner of one run, for batches of any size.
///
/// ```no_run
/// use rekindle::{DeviceKind, FastLanguageModel, LoraConfig, SftConfig};
///
/// # fn main() -> Result<(), rekindle::Error> {
/// let model = FastLanguageModel::from_pretrained("Qwen/Qwen3-4B").device(DeviceKind::Cuda(0)).load_in_4bit(true);
/// let mut run = model.planner(Some(LoraConfig::new(16)), SftConfig::default(), Some(24 << 30))?;
/// let fit = run.fit(&run.rows())?;
/// println!("{fit}");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RunPlanner {
    planner: Planner,
    device: DeviceKind,
    card: Option<String>,
    available: Option<usize>,
}

/// The parts of a model that each of several ranks holds a share of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankShares {
    /// The optimizer's state; `None` is the setting of the run.
    pub optimizer: Option<bool>,
    /// The frozen weights of the blocks.
    pub base: bool,
}

impl Loader<'_> {
    /// Plans a run from the configuration of the model, and of an adapter to continue; no weights are loaded or
    /// downloaded.
    ///
    /// `lora` is the adapter to train; without one, and without an adapter to continue, all weights are trained.
    /// `memory` replaces the free memory of the device, which then need not exist.
    ///
    /// # Errors
    /// Those of [`load`](Self::load) that need no weights.
    pub fn planner(
        &self,
        lora: Option<LoraConfig>,
        train: SftConfig,
        memory: Option<usize>,
    ) -> Result<RunPlanner, Error> {
        let (model, adapter) = self.find_config()?;
        let json = read_config(&model)?;
        let config = ModelConfig::from_json(&json)
            .map_err(|problems| rekindle_models::Error::Config { path: model.join("config.json"), problems })?;
        let PlannedDevice { device, kind, card, available } = PlannedDevice::of(self.device, memory)?;
        let load = self.options(&config, adapter.as_deref(), device, kind)?;
        let lora = match adapter.as_deref().or(self.adapter.as_deref()) {
            Some(adapter) if lora.is_some() => Some(saved_lora_config(adapter)?),
            _ => lora,
        };
        let name = self.args.name_or_path.clone();
        let job = PlannedRun { json, name, load, lora, train, evaluates: false, ranks: 1 };
        Ok(RunPlanner { planner: Planner::new(job)?, device: kind, card, available })
    }
}

/// Returns the configuration of the adapter in a directory.
///
/// # Errors
/// [`Error::Model`] if there is none, or it is invalid.
pub(crate) fn saved_lora_config(adapter: &Path) -> Result<LoraConfig, Error> {
    Ok(AdapterConfig::open(adapter).map_err(rekindle_models::Error::from)?.lora().clone())
}

impl RunPlanner {
    /// Plans the training of a loaded model. Its memory counts as available, because the plan includes it.
    pub(crate) fn of_model(model: &Model, train: SftConfig, evaluates: bool) -> Result<Self, Error> {
        let PlannedDevice { device, kind, card, available } = PlannedDevice::of(model.device(), None)?;
        let (json, options) = model.loaded_as();
        let load = LoadOptions { device, ..options.clone() };
        let lora = model.causal_lm().lora().cloned();
        let (json, name) = (json.clone(), model.path().to_owned());
        let job = PlannedRun { json, name, load, lora, train, evaluates, ranks: 1 };
        let available = available.map(|free| free.saturating_add(model.reusable_bytes()));
        Ok(Self { planner: Planner::new(job)?, device: kind, card, available })
    }

    /// Returns the longest rows of encoded rows that can be in one pass.
    pub(crate) fn rows_in(&self, rows: &Dataset) -> PassRows {
        if self.planner.job().train.packing {
            return self.rows();
        }
        let lengths: Vec<usize> = rows.examples().map(|example| example.input_ids.len()).collect();
        let per_row = rows.task().examples_per_row();
        let job = self.planner.job();
        let completion = job.train.method.max_completion_length().unwrap_or(0);
        let longest = |row: &[usize]| row.iter().copied().max().unwrap_or(0) + completion;
        let lengths = lengths.chunks(per_row).map(|row| longest(row).min(job.load.max_seq_length));
        let longest = PassRows::longest(job.train.per_device_train_batch_size, lengths);
        // A rank gets at most as many tokens as this many copies of the longest row have.
        let dealt = PassRows::equal(self.planner.rows_in_pass(), longest.lengths.first().copied().unwrap_or(0));
        let tokens = |rows: &PassRows| rows.lengths.iter().sum::<usize>();
        if tokens(&dealt) < tokens(&longest) { dealt } else { longest }
    }

    /// Includes evaluation passes: the run has rows to evaluate.
    pub fn with_evaluation(mut self) -> Self {
        self.planner = self.planner.with_evaluation();
        self
    }

    /// Plans for one of `ranks` ranks, each with a device like this one. `shares` are the parts of the model that each holds a
    /// share of.
    ///
    /// # Errors
    /// [`Error::Train`] for a run that several ranks cannot train.
    pub fn on_ranks(&self, ranks: usize, shares: RankShares) -> Result<Self, Error> {
        let mut job = PlannedRun { ranks, ..self.planner.job().clone() };
        job.train.shard_optimizer = shares.optimizer.or(job.train.shard_optimizer);
        job.load.shard_base = shares.base.then(|| Arc::new(ShardRanks::Planned(ranks)) as Arc<dyn ShardExchange>);
        let (card, available) = (self.card.clone(), self.available);
        Ok(Self { planner: Planner::new(job)?, device: self.device, card, available })
    }

    /// Returns true if each of several ranks holds a part of the optimizer's state.
    pub fn is_sharded(&self) -> bool {
        self.planner.is_sharded()
    }

    /// Returns the bytes that each rank sends in a step, and receives as well.
    pub fn bytes_per_step(&self) -> usize {
        self.planner.bytes_per_step()
    }

    /// Returns the bytes of frozen weights that each rank receives in a step, if the ranks divide them.
    pub fn gathered_bytes_per_step(&self) -> usize {
        self.planner.gathered_bytes_per_step()
    }

    /// Returns the rows of a pass, each of the maximum length.
    pub fn rows(&self) -> PassRows {
        PassRows::equal(self.planner.rows_in_pass(), self.planner.job().load.max_seq_length)
    }

    /// Returns the longest rows of `data` that can be in one pass.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn rows_of(&self, tokenizer: Option<&Tokenizer>, data: &DataSource) -> Result<PassRows, Error> {
        if self.planner.job().train.packing {
            return Ok(self.rows());
        }
        let (dataset, _) = data.encode(tokenizer, self.planner.max_seq_length(), self.planner.vocab_size())?;
        Ok(self.rows_in(&dataset))
    }

    /// Plans the run with these rows in its largest pass.
    ///
    /// # Errors
    /// [`Error::Train`] for rows that exceed the model's limits.
    pub fn plan(&mut self, rows: &PassRows) -> Result<MemoryPlan, Error> {
        Ok(self.planner.plan(rows)?)
    }

    /// Plans the run with another gradient checkpointing.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_with(&mut self, rows: &PassRows, checkpointing: GradientCheckpointing) -> Result<MemoryPlan, Error> {
        Ok(self.planner.plan_with(rows, checkpointing)?)
    }

    /// Compares the plan with the available memory, and finds settings that would fit.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); [`Error::Argument`] if the available memory is unknown.
    pub fn fit(&mut self, rows: &PassRows) -> Result<MemoryFit, Error> {
        let available = self.available.ok_or_else(|| {
            Error::Argument(format!(
                "device \"{}\" does not report its free memory; set the memory to plan for",
                self.device
            ))
        })?;
        Ok(self.planner.fit(rows, available)?)
    }

    /// Returns the plan of a run that fits, with a choice for [`GradientCheckpointing::Auto`]. If the available memory
    /// is unknown, every run fits.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`], and as [`plan`](Self::plan).
    pub fn decide(&mut self, rows: &PassRows) -> Result<MemoryPlan, Error> {
        match self.planner.decide(rows, self.available.unwrap_or(usize::MAX))? {
            MemoryVerdict::Fits(plan) => Ok(plan),
            MemoryVerdict::DoesNotFit(fit) => Err(Error::DoesNotFit(fit)),
        }
    }

    /// Estimates the training time per token; `None` for a device without figures. `checkpointing` is that of the plan
    /// ([`MemoryPlan::use_gradient_checkpointing`]).
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that is not supported.
    pub fn token_time(&self, checkpointing: GradientCheckpointing) -> Result<Option<TokenTime>, Error> {
        let job = self.planner.job();
        let config = ModelConfig::from_json(&job.json)
            .map_err(|problems| rekindle_models::Error::Config { path: job.name.join("config.json"), problems })?;
        let work = Work { config: &config, full: job.lora.is_none(), recomputes: checkpointing.recomputes() };
        Ok(token_time(&work, &job.load.device).filter(|_| !matches!(self.device, DeviceKind::Wgpu(_))))
    }

    /// Returns the device of the run, never [`DeviceKind::Auto`].
    pub fn device(&self) -> DeviceKind {
        self.device
    }

    /// Returns the available memory, if it is known.
    pub fn available_memory(&self) -> Option<usize> {
        self.available
    }

    /// Returns the name of the GPU, if the run uses one.
    pub fn card(&self) -> Option<&str> {
        self.card.as_deref()
    }

    /// Returns the available bytes, if known.
    pub fn available(&self) -> Option<usize> {
        self.available
    }
}

/// The device that a plan is for.
struct PlannedDevice {
    device: Device,
    kind: DeviceKind,
    card: Option<String>,
    available: Option<usize>,
}

impl PlannedDevice {
    fn of(asked: DeviceKind, memory: Option<usize>) -> Result<Self, Error> {
        match asked {
            DeviceKind::Cuda(index) => Self::card(index, memory),
            DeviceKind::Auto => match runtime::first().map_err(rekindle_kernels::DeviceError::from)? {
                Some(index) => Self::card(index, memory),
                None => Self::of(DeviceKind::Cpu, memory),
            },
            DeviceKind::Cpu | DeviceKind::Wgpu(_) => {
                let free = if asked == DeviceKind::Cpu { Device::cpu().free_memory() } else { None };
                Ok(Self { device: Device::cpu(), kind: asked, card: None, available: memory.or(free) })
            }
        }
    }

    /// Returns a GPU, or one like it if there is none and `memory` is given.
    fn card(index: usize, memory: Option<usize>) -> Result<Self, Error> {
        let props = match (memory, runtime::device_props(index)) {
            (Some(memory), Ok(props)) => DeviceProps { total_memory: memory, ..props },
            (Some(memory), Err(_)) => DeviceProps::hopper(memory),
            (None, Ok(props)) => props,
            (None, Err(error)) => return Err(rekindle_kernels::DeviceError::from(error).into()),
        };
        let available = match memory {
            Some(memory) => memory,
            // What is free beside our own context, which the plan counts.
            None => {
                let (device, _) = open_device(DeviceKind::Cuda(index))?;
                device.free_memory().unwrap_or(0).saturating_add(CUDA_CONTEXT_BYTES).min(props.total_memory)
            }
        };
        let card = Some(props.to_string());
        let device = Device::Cuda(Cuda::planned(props));
        Ok(Self { device, kind: DeviceKind::Cuda(index), card, available: Some(available) })
    }
}

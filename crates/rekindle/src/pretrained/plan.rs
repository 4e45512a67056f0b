//! What a run takes, before anything is loaded.

use std::path::Path;

use rekindle_data::Tokenizer;
use rekindle_hub::read_config;
use rekindle_kernels::runtime::{self, CUDA_CONTEXT_BYTES, Cuda, DeviceProps};
use rekindle_kernels::{Device, DeviceKind, open_device};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{GradientCheckpointing, LoraConfig};
use rekindle_models::ModelConfig;
use rekindle_train::{Fit, Job, MemoryPlan, Planner, Rows, SftConfig, Verdict};

use crate::time_estimate::{Work, token_time};
use crate::{DataSource, Error, Loader, TokenTime};

/// Plans of one run for batches of any size.
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

impl Loader {
    /// Reads the configuration of the model, and of the adapter where one is gone on with; nothing is loaded, and of a
    /// name on the hub nothing else is downloaded. `lora` is the adapter that is to be trained; without one, and without
    /// an adapter to go on with, all weights are. `memory` is what the device has, instead of what it says; with it there
    /// need not be such a device.
    ///
    /// # Errors
    /// Those of [`load`](Self::load) that the configuration alone shows.
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
        let Place { device, kind, card, available } = Place::of(self.device, memory)?;
        let load = self.options(&config, adapter.as_deref(), device, kind)?;
        let checkpointing = match &lora {
            Some(lora) if lora.use_gradient_checkpointing != GradientCheckpointing::Off => {
                lora.use_gradient_checkpointing
            }
            _ => self.use_gradient_checkpointing,
        };
        let lora = match adapter.as_deref().or(self.adapter.as_deref()) {
            Some(adapter) if lora.is_some() => Some(saved_lora_config(adapter)?),
            _ => lora,
        };
        let job =
            Job { json, name: self.source.name_or_path.clone(), load, lora, checkpointing, train, evaluates: false };
        Ok(RunPlanner { planner: Planner::new(job)?, device: kind, card, available })
    }
}

/// Returns the configuration of the adapter in a directory.
///
/// # Errors
/// [`Error::Model`] where there is none, or it is broken.
pub fn saved_lora_config(adapter: &Path) -> Result<LoraConfig, Error> {
    Ok(AdapterConfig::open(adapter).map_err(rekindle_models::Error::from)?.lora().clone())
}

impl RunPlanner {
    /// Plans evaluation passes too: the run has rows to evaluate.
    pub fn with_evaluation(mut self) -> Self {
        self.planner = self.planner.with_evaluation();
        self
    }

    /// As many rows as a pass has, each as long as rows can be.
    pub fn rows(&self) -> Rows {
        let job = self.planner.job();
        Rows::equal(job.train.per_device_train_batch_size, job.load.max_seq_length)
    }

    /// The longest rows of `data` that can meet in one pass.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn rows_of(&self, tokenizer: Option<&Tokenizer>, data: &DataSource) -> Result<Rows, Error> {
        if self.planner.job().train.packing {
            return Ok(self.rows());
        }
        let (dataset, _) = data.encode(tokenizer, self.planner.max_seq_length(), self.planner.vocab_size())?;
        let lengths = dataset.examples().map(|example| example.input_ids.len());
        Ok(Rows::longest(self.planner.job().train.per_device_train_batch_size, lengths))
    }

    /// What the run takes with these rows in its largest pass.
    ///
    /// # Errors
    /// [`Error::Train`] for rows that the model does not take.
    pub fn plan(&mut self, rows: &Rows) -> Result<MemoryPlan, Error> {
        Ok(self.planner.plan(rows)?)
    }

    /// What the run takes with another kind of gradient checkpointing.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_with(&mut self, rows: &Rows, checkpointing: GradientCheckpointing) -> Result<MemoryPlan, Error> {
        Ok(self.planner.plan_with(rows, checkpointing)?)
    }

    /// The plan beside the memory there is, and what would fit.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); [`Error::Argument`] where nobody tells how much memory there is.
    pub fn fit(&mut self, rows: &Rows) -> Result<Fit, Error> {
        let available = self.available.ok_or_else(|| {
            Error::Argument(format!(
                "device \"{}\" does not tell how much memory is free; say how much there is",
                self.device
            ))
        })?;
        Ok(self.planner.fit(rows, available)?)
    }

    /// The plan of a run that fits; [`GradientCheckpointing::Auto`] is decided. Where nobody tells how much memory there
    /// is, everything fits.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`], and as [`plan`](Self::plan).
    pub fn decide(&mut self, rows: &Rows) -> Result<MemoryPlan, Error> {
        match self.planner.decide(rows, self.available.unwrap_or(usize::MAX))? {
            Verdict::Fits(plan) => Ok(plan),
            Verdict::DoesNotFit(fit) => Err(Error::DoesNotFit(fit)),
        }
    }

    /// Estimates the time that a token of training takes, where there are figures for the device. `checkpointing` is what
    /// becomes of activations ([`MemoryPlan::use_gradient_checkpointing`]).
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

    /// Where the run computes, never [`DeviceKind::Auto`].
    pub fn device(&self) -> DeviceKind {
        self.device
    }

    /// The GPU that is planned for, if it is one.
    pub fn card(&self) -> Option<&str> {
        self.card.as_deref()
    }

    /// Bytes that are there for the run, where that is known.
    pub fn available(&self) -> Option<usize> {
        self.available
    }
}

/// Where a plan is for.
struct Place {
    device: Device,
    kind: DeviceKind,
    card: Option<String>,
    available: Option<usize>,
}

impl Place {
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

    /// The card, or one like it where there is none and its memory is given.
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

//! A training job and its checks.

mod arguments;
mod guard;
mod moving_reference;
mod output;
mod preflight;
mod ranks;
mod records;
mod resume;
mod resume_compatibility;
mod rows;
mod run;
mod source;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rekindle_data::Dataset;
use rekindle_dist::{Communicator, OneRank, PrecededCommunicator};
use rekindle_models::CausalLm;

use crate::{
    Companion, Error, ModelCard, RolloutTask, RunDescription, Sampler, SaveStrategy, SftConfig, TrainEvent, TrainReport,
};
pub use arguments::TrainerArguments;
use output::OutputDir;
pub use preflight::{Preflight, check_output_dir};
pub use resume::Resume;
pub(crate) use rows::StepRows;
use run::Run;

/// A run over encoded examples. [`Trainer::new`] fills in the defaults; set the other fields as needed.
pub struct Trainer<'a> {
    /// The model, whose parameters are updated.
    pub model: &'a mut CausalLm,
    /// The training configuration.
    pub config: SftConfig,
    /// The order of the rows, the output directory and the checkpoint to resume from.
    pub arguments: TrainerArguments,
    /// The rows to train on.
    pub train: Dataset,
    /// The rows to evaluate before the first step, every `eval_steps` and at the end.
    pub eval: Option<Dataset>,
    /// Files to save beside every checkpoint and result, such as the tokenizer's.
    pub companions: Vec<Companion>,
    /// Answers prompts at each evaluation and at the end.
    pub sampler: Option<Sampler<'a>>,
    /// The rewards of a method that samples completions, with the columns of its rows.
    pub rollouts: Option<RolloutTask<'a>>,
    /// The description of the run in `report.html`.
    pub description: RunDescription,
    /// The contents of the model card besides the run's metrics.
    pub card: ModelCard,
    /// Notices for the user, one sentence each; [`TrainEvent::Started`] reports them.
    pub notes: Vec<String>,
    /// The ranks that train together; each has a trainer with the same rows and configuration. Rank 0 alone writes. Default:
    /// [`OneRank`].
    pub world: Arc<dyn Communicator>,
    /// A flag that ends the run after the current step, with a checkpoint ([`TrainEnd::Interrupted`](crate::TrainEnd)).
    pub stop: Arc<AtomicBool>,
    /// Called for every step, evaluation, sample and checkpoint.
    pub on_event: Box<dyn FnMut(TrainEvent<'_>) + 'a>,
}

impl<'a> Trainer<'a> {
    /// Returns a run with default [`TrainerArguments`], which writes nothing to disk.
    pub fn new(model: &'a mut CausalLm, train: Dataset, config: SftConfig) -> Self {
        Self {
            model,
            config,
            arguments: TrainerArguments::default(),
            train,
            eval: None,
            companions: Vec::new(),
            sampler: None,
            rollouts: None,
            description: RunDescription::default(),
            card: ModelCard::default(),
            notes: Vec::new(),
            world: Arc::new(OneRank),
            stop: Arc::default(),
            on_event: Box::new(|_| ()),
        }
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::NothingToTrain`], [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Differs`]
    /// and [`Error::Checkpoint`] before the first step; [`Error::Ranks`] if another rank failed; [`Error::Diverged`] if a value is not finite; [`Error::File`]
    /// and [`Error::Io`] if results cannot be written.
    pub fn train(mut self) -> Result<TrainReport, Error> {
        let Some(shards) = self.model.decoder().shards().cloned() else { return Run::begin(self)?.go() };
        // A rank that waits for others gives them its parts of the weights that they read meanwhile.
        let world = Arc::new(PrecededCommunicator::new(self.world, move || shards.finish()));
        self.world = Arc::clone(&world) as Arc<dyn Communicator>;
        let report = Run::begin(self)?.go()?;
        world.barrier()?;
        Ok(report)
    }

    /// Refuses settings that need rows to evaluate or an output directory that is missing.
    fn check_needs(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        for (_, what) in self.config.needs_eval().iter().filter(|(wanted, _)| *wanted && self.eval.is_none()) {
            problems.push(format!("{what} needs evaluation rows"));
        }
        let keeps = [
            (self.config.save_steps.is_some(), "save_steps"),
            (matches!(self.config.save_strategy, Some(SaveStrategy::Epoch | SaveStrategy::Best)), "save_strategy"),
            (self.config.load_best_model_at_end, "load_best_model_at_end"),
            (self.arguments.resume == Some(Resume::Latest), "resuming from the latest checkpoint"),
        ];
        for (_, what) in keeps.iter().filter(|(wanted, _)| *wanted && self.arguments.output_dir.is_none()) {
            problems.push(format!("{what} needs an output_dir"));
        }
        if self.config.method.has_rollouts() {
            problems.extend(self.rollout_problems());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    /// Returns a sentence for everything that a run with sampled completions lacks.
    fn rollout_problems(&self) -> Vec<String> {
        let (name, mut problems) = (self.config.method.name(), Vec::new());
        if self.rollouts.as_ref().is_none_or(|task| task.rewards.is_empty()) {
            problems.push(format!(
                "method \"{name}\" needs a reward: add a section [[rewards]] with a type, such as type = \"exact\""
            ));
        }
        let device = self.model.device();
        if !device.is_cpu() && !matches!(device, rekindle_kernels::Device::Cuda(_)) {
            problems.push(format!(
                "method \"{name}\" runs on the CPU and on CUDA, not on device \"{}\"; set device = \"cpu\" or \"cuda\"",
                device.name()
            ));
        }
        let beta = self.config.method.rollouts(&self.config).map_or(0.0, |settings| settings.beta);
        let is_base = self.model.lora().is_some() && self.model.adapter_changes_nothing();
        if beta != 0.0 && !is_base {
            problems.push(format!(
                "beta = {beta} needs a reference model, the model before training, which is a new adapter turned off; here all \
                 weights are trained, or the adapter was trained before; set beta = 0, or merge the adapter into its base first"
            ));
        }
        problems
    }

    fn output(&self) -> OutputDir<'_> {
        OutputDir { arguments: &self.arguments, full: self.model.lora().is_none() }
    }
}

fn result_name(full: bool) -> &'static str {
    if full { "model" } else { "adapter" }
}

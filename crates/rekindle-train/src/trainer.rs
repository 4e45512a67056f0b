//! A training job and its checks.

mod agreement;
mod guard;
mod output;
mod preflight;
mod resume;
mod rows;
mod run;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rekindle_data::Dataset;
use rekindle_models::CausalLm;

use crate::{Companion, Error, ModelCard, RunDescription, Sampler, SaveStrategy, SftConfig, TrainEvent, TrainReport};
use output::OutputDir;
pub use preflight::{Preflight, check_output_dir};
pub use resume::Resume;
use run::Run;

/// A run over encoded examples.
pub struct Trainer<'a> {
    model: &'a mut CausalLm,
    config: SftConfig,
    train: Dataset,
    eval: Option<Dataset>,
    shuffle: bool,
    seed: u64,
    output_dir: Option<PathBuf>,
    companions: Vec<Companion>,
    sampler: Option<Sampler<'a>>,
    description: RunDescription,
    card: ModelCard,
    notes: Vec<String>,
    resume: Option<Resume>,
    overwrite: bool,
    stop: Arc<AtomicBool>,
    on_event: Box<dyn FnMut(TrainEvent<'_>) + 'a>,
}

impl<'a> Trainer<'a> {
    /// Returns a run that writes nothing to disk and shuffles rows with seed 3407.
    pub fn new(model: &'a mut CausalLm, train: Dataset, config: SftConfig) -> Self {
        Self {
            model,
            config,
            train,
            eval: None,
            shuffle: true,
            seed: 3407,
            output_dir: None,
            companions: Vec::new(),
            sampler: None,
            description: RunDescription::default(),
            card: ModelCard::default(),
            notes: Vec::new(),
            resume: None,
            overwrite: false,
            stop: Arc::default(),
            on_event: Box::new(|_| ()),
        }
    }

    /// Evaluates this dataset before the first step, every `eval_steps` and at the end.
    #[must_use]
    pub fn eval_dataset(mut self, eval: Dataset) -> Self {
        self.eval = Some(eval);
        self
    }

    /// If true, each epoch has its own order. Default true.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// Sets the seed of the order and of dropout. Default 3407.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the directory for `checkpoint-N/`, `adapter/` (or `model/`) and the files of a
    /// [`Recorder`](crate::Recorder).
    #[must_use]
    pub fn output_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.output_dir = Some(dir.into());
        self
    }

    /// Sets files to save beside every checkpoint and result, such as the tokenizer's.
    #[must_use]
    pub fn companions(mut self, companions: Vec<Companion>) -> Self {
        self.companions = companions;
        self
    }

    /// Answers prompts at each evaluation and at the end.
    #[must_use]
    pub fn sampler(mut self, sampler: Sampler<'a>) -> Self {
        self.sampler = Some(sampler);
        self
    }

    /// Sets the description of the run in `report.html`.
    #[must_use]
    pub fn describe(mut self, description: RunDescription) -> Self {
        self.description = description;
        self
    }

    /// Sets notices for the user, one sentence each; [`TrainEvent::Started`] reports them.
    #[must_use]
    pub fn notes(mut self, notes: Vec<String>) -> Self {
        self.notes = notes;
        self
    }

    /// Sets the contents of the model card besides the run's metrics.
    #[must_use]
    pub fn model_card(mut self, card: ModelCard) -> Self {
        self.card = card;
        self
    }

    /// Resumes from a checkpoint, with the model that the earlier run started with. On the CPU the result is
    /// bit-identical to that of an uninterrupted run.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = Some(resume);
        self
    }

    /// If true, checkpoints and the result of an earlier run in the output directory are replaced. Default false: such
    /// a directory is refused.
    #[must_use]
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Sets a flag that ends the run after the current step, with a checkpoint ([`TrainEnd::Interrupted`](crate::TrainEnd)).
    #[must_use]
    pub fn stop_flag(mut self, flag: Arc<AtomicBool>) -> Self {
        self.stop = flag;
        self
    }

    /// Sets a callback for every step, evaluation, sample and checkpoint.
    #[must_use]
    pub fn on_event(mut self, on_event: impl FnMut(TrainEvent<'_>) + 'a) -> Self {
        self.on_event = Box::new(on_event);
        self
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::NothingToTrain`], [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Differs`]
    /// and [`Error::Checkpoint`] before the first step; [`Error::Diverged`] if a value is not finite; [`Error::File`]
    /// and [`Error::Io`] if results cannot be written.
    pub fn train(self) -> Result<TrainReport, Error> {
        Run::begin(self)?.go()
    }

    /// Refuses settings that need rows to evaluate or an output directory that is missing.
    fn check_needs(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        for (_, what) in self.config.needs_eval().iter().filter(|(wanted, _)| *wanted && self.eval.is_none()) {
            problems.push(format!("{what} needs rows to evaluate"));
        }
        let keeps = [
            (self.config.save_steps.is_some(), "save_steps"),
            (matches!(self.config.save_strategy, Some(SaveStrategy::Epoch | SaveStrategy::Best)), "save_strategy"),
            (self.config.load_best_model_at_end, "load_best_model_at_end"),
            (self.resume == Some(Resume::Latest), "resuming from the latest checkpoint"),
        ];
        for (_, what) in keeps.iter().filter(|(wanted, _)| *wanted && self.output_dir.is_none()) {
            problems.push(format!("{what} needs an output_dir"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    fn output(&self) -> OutputDir<'_> {
        OutputDir {
            dir: self.output_dir.as_deref(),
            full: self.model.lora().is_none(),
            resume: self.resume.as_ref(),
            overwrite: self.overwrite,
        }
    }
}

fn result_name(full: bool) -> &'static str {
    if full { "model" } else { "adapter" }
}

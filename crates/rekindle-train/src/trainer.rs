//! A training job: what it is made of, and what is checked before it runs.

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

use crate::{Companion, Error, Event, ModelCard, Report, RunDescription, Sampler, SaveStrategy, SftConfig};
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
    on_event: Box<dyn FnMut(Event<'_>) + 'a>,
}

impl<'a> Trainer<'a> {
    /// A run with nothing written to disk and rows shuffled by seed 3407, until told otherwise.
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

    /// Returns true if each epoch has its own order.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// Seed of the order and of dropout.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Writes `checkpoint-N/`, `adapter/` (or `model/`) and what a [`Recorder`](crate::Recorder) does there.
    #[must_use]
    pub fn output_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.output_dir = Some(dir.into());
        self
    }

    /// Files to lie beside everything that is saved, such as the tokenizer's.
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

    /// What `report.html` says of the run beside its numbers.
    #[must_use]
    pub fn describe(mut self, description: RunDescription) -> Self {
        self.description = description;
        self
    }

    /// What the user should know of the run, one sentence each; [`Event::Started`] reports it.
    #[must_use]
    pub fn notes(mut self, notes: Vec<String>) -> Self {
        self.notes = notes;
        self
    }

    /// What the `README.md` beside everything that is saved says of the run beside its numbers.
    #[must_use]
    pub fn model_card(mut self, card: ModelCard) -> Self {
        self.card = card;
        self
    }

    /// Resumes from a checkpoint, with a model as the earlier run started with. On the CPU the result is bit-identical to
    /// that of an uninterrupted run.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = Some(resume);
        self
    }

    /// Whether the run may replace the checkpoints and the result of an earlier run in the output directory. Default
    /// false: such a directory is refused.
    #[must_use]
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Ends the run after the step at which `flag` is found true, with a checkpoint ([`End::Interrupted`](crate::End)).
    #[must_use]
    pub fn stop_flag(mut self, flag: Arc<AtomicBool>) -> Self {
        self.stop = flag;
        self
    }

    /// Is told about every step, evaluation, sample and save.
    #[must_use]
    pub fn on_event(mut self, on_event: impl FnMut(Event<'_>) + 'a) -> Self {
        self.on_event = Box::new(on_event);
        self
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::NothingToTrain`], [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Differs`] and
    /// [`Error::Checkpoint`] before anything happens; [`Error::Diverged`] when a number is not finite; [`Error::File`] and [`Error::Io`] when
    /// results cannot be written.
    pub fn train(self) -> Result<Report, Error> {
        Run::begin(self)?.go()
    }

    /// Refuses what asks for something that is not there.
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

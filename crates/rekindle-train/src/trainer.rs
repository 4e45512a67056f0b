//! A training job: what it is made of, and what is checked before it runs.

mod agreement;
mod guard;
mod resume;
mod rows;
mod run;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rekindle_data::Dataset;
use rekindle_models::CausalLm;

use crate::checkpoint::Checkpoint;
use crate::save::{check_checkpoint, check_replaceable};
use crate::{Error, Event, Report, RunDescription, Sampler, SftConfig};
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
    companions: Vec<PathBuf>,
    sampler: Option<Sampler<'a>>,
    description: RunDescription,
    resume: Option<Resume>,
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
            resume: None,
            stop: Arc::default(),
            on_event: Box::new(|_| ()),
        }
    }

    /// Evaluates this dataset every `eval_steps` and at the end.
    #[must_use]
    pub fn eval_dataset(mut self, eval: Dataset) -> Self {
        self.eval = Some(eval);
        self
    }

    /// Whether each epoch has its own order.
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
    pub fn companions(mut self, files: Vec<PathBuf>) -> Self {
        self.companions = files;
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

    /// Goes on from a checkpoint, with a model as the earlier run began with. On the CPU the run ends in the same bits
    /// as one that never stopped.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = Some(resume);
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
    /// [`Error::Config`], [`Error::NothingToTrain`], [`Error::EarlierRun`], [`Error::Differs`] and [`Error::Checkpoint`]
    /// before anything happens; [`Error::Diverged`] when a number is not finite; [`Error::File`] and [`Error::Io`] when
    /// results cannot be written.
    pub fn train(self) -> Result<Report, Error> {
        Run::begin(self)?.go()
    }

    /// Refuses what asks for something that is not there.
    fn check_needs(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        if self.config.eval_steps.is_some() && self.eval.is_none() {
            problems.push("eval_steps needs rows to evaluate".to_owned());
        }
        let keeps = [
            (self.config.save_steps.is_some(), "save_steps"),
            (self.config.load_best_model_at_end, "load_best_model_at_end"),
            (self.resume == Some(Resume::Latest), "resuming from the latest checkpoint"),
        ];
        for (_, what) in keeps.iter().filter(|(wanted, _)| *wanted && self.output_dir.is_none()) {
            problems.push(format!("{what} needs an output_dir"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    /// Refuses, before any work is done, what would be found out when results are written.
    fn check_output(&self, full: bool, total: usize) -> Result<(), Error> {
        let Some(dir) = &self.output_dir else { return Ok(()) };
        check_replaceable(&dir.join(result_name(full)), !full)?;
        let mut saves = self.config.save_steps.into_iter().flat_map(|every| (every..=total).step_by(every));
        saves.try_for_each(|step| check_checkpoint(&Checkpoint::path(dir, step), !full))
    }
}

fn result_name(full: bool) -> &'static str {
    if full { "model" } else { "adapter" }
}

//! `SftTrainer`: supervised fine-tuning on a file of rows.

use std::path::PathBuf;

use rekindle_data::{LoadReport, Overlong, Thinking, Tokenizer, TrainOn, Untrained};
use rekindle_train::{Event, Report, SftConfig, Trainer};

use crate::describe::{Rows, describe};
use crate::prompts::sampler;
use crate::{Error, Model};

/// A JSONL file of rows, what of them is trained, and what happens to rows that are too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// The file.
    pub path: PathBuf,
    /// Default: an error that names the row.
    pub overlong: Overlong,
    /// Which turns of a conversation are trained. Default: all of the assistant's.
    pub train_on: TrainOn,
    /// What happens to reasoning. Default: it is trained as the template shows it.
    pub thinking: Thinking,
    /// What happens to rows with nothing to train. Default: an error that names the row.
    pub untrained: Untrained,
}

impl DataFile {
    /// A file in which no row may be longer than the model's `max_seq_length`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            overlong: Overlong::Error,
            train_on: TrainOn::Assistant,
            thinking: Thinking::Keep,
            untrained: Untrained::Error,
        }
    }

    /// What happens to longer rows.
    #[must_use]
    pub fn overlong(mut self, overlong: Overlong) -> Self {
        self.overlong = overlong;
        self
    }

    /// Which turns of a conversation are trained.
    #[must_use]
    pub fn train_on(mut self, train_on: TrainOn) -> Self {
        self.train_on = train_on;
        self
    }

    /// What happens to the reasoning of a conversation.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.thinking = thinking;
        self
    }

    /// What happens to rows with nothing to train.
    #[must_use]
    pub fn untrained(mut self, untrained: Untrained) -> Self {
        self.untrained = untrained;
        self
    }
}

/// Trains what is trainable in a model on the rows of a file.
pub struct SftTrainer<'a> {
    model: &'a mut Model,
    tokenizer: Option<&'a Tokenizer>,
    train: DataFile,
    eval: Option<DataFile>,
    config: SftConfig,
    shuffle: bool,
    seed: u64,
    output_dir: Option<PathBuf>,
    run_file: Option<String>,
    on_event: Box<dyn FnMut(Event<'_>) + 'a>,
    on_data: OnData<'a>,
}

type OnData<'a> = Box<dyn FnMut(&DataFile, &LoadReport) + 'a>;

impl<'a> SftTrainer<'a> {
    /// A run over `train`. `tokenizer` may be `None` for pretokenized rows.
    pub fn new(
        model: &'a mut Model,
        tokenizer: impl Into<Option<&'a Tokenizer>>,
        train: DataFile,
        config: SftConfig,
    ) -> Self {
        Self {
            model,
            tokenizer: tokenizer.into(),
            train,
            eval: None,
            config,
            shuffle: true,
            seed: 3407,
            output_dir: None,
            run_file: None,
            on_event: Box::new(|_| ()),
            on_data: Box::new(|_, _| ()),
        }
    }

    /// Evaluates these rows every `eval_steps` and at the end.
    #[must_use]
    pub fn eval_dataset(mut self, eval: DataFile) -> Self {
        self.eval = Some(eval);
        self
    }

    /// Whether each epoch has its own order. Default true.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// Seed of the order and of dropout. Default 3407.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Where `adapter/` (or `model/`), `metrics.jsonl`, `report.html`, `loss.svg` and `tensorboard/` are written; without
    /// it, nothing is.
    #[must_use]
    pub fn output_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.output_dir = Some(dir.into());
        self
    }

    /// The configuration that `report.html` shows. Default: the [`SftConfig`].
    #[must_use]
    pub fn run_file(mut self, text: impl Into<String>) -> Self {
        self.run_file = Some(text.into());
        self
    }

    /// Is told about every step, evaluation, sample and save.
    #[must_use]
    pub fn on_event(mut self, on_event: impl FnMut(Event<'_>) + 'a) -> Self {
        self.on_event = Box::new(on_event);
        self
    }

    /// Is told what was found in each file of rows.
    #[must_use]
    pub fn on_data(mut self, on_data: impl FnMut(&DataFile, &LoadReport) + 'a) -> Self {
        self.on_data = Box::new(on_data);
        self
    }

    /// Encodes the rows and runs to the end.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be used, [`Error::Argument`] for samples that cannot be made, and
    /// [`Error::Train`] for everything after that.
    pub fn train(mut self) -> Result<Report, Error> {
        let train = self.encode(&self.train.clone())?;
        let eval = self.eval.clone().map(|file| self.encode(&file)).transpose()?;
        let companions = self.model.companions();
        let sampler = sampler(self.model, self.tokenizer, &self.config, eval.as_ref().map(|rows| &rows.dataset))?;
        let configuration = self.run_file.unwrap_or_else(|| format!("{:#?}", self.config));
        let description =
            describe(self.model, &train, eval.as_ref(), self.seed, self.output_dir.as_deref(), configuration);
        let mut trainer = Trainer::new(self.model.causal_lm_mut(), train.dataset, self.config)
            .shuffle(self.shuffle)
            .seed(self.seed)
            .companions(companions)
            .describe(description)
            .on_event(self.on_event);
        if let Some(eval) = eval {
            trainer = trainer.eval_dataset(eval.dataset);
        }
        if let Some(sampler) = sampler {
            trainer = trainer.sampler(sampler);
        }
        if let Some(dir) = self.output_dir {
            trainer = trainer.output_dir(dir);
        }
        Ok(trainer.train()?)
    }

    fn encode(&mut self, file: &DataFile) -> Result<Rows, Error> {
        let (dataset, report) = self.model.encode(self.tokenizer, file)?;
        (self.on_data)(file, &report);
        Ok(Rows { what: format!("{}: {report}", file.path.display()), dataset })
    }
}

impl core::fmt::Debug for SftTrainer<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SftTrainer").field("train", &self.train).field("config", &self.config).finish_non_exhaustive()
    }
}

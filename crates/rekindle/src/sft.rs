//! `SftTrainer`: supervised fine-tuning.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rekindle_data::{LoadReport, Tokenizer};
use rekindle_dist::{Communicator, OneRank};
use rekindle_rewards::RewardSet;
use rekindle_train::{
    PromptColumns, PromptRow, RolloutTask, SftConfig, TrainEvent, TrainReport, Trainer, TrainerArguments,
};
use serde_json::Value;

use crate::describe::{describe, model_card};
use crate::prompts::sampler;
use crate::{DataSource, EncodedRows, Error, Model, RunPlanner};

/// The rows of an [`SftTrainer`]: a source, or rows encoded by a [`RowEncoder`](crate::RowEncoder).
#[derive(Clone, Debug)]
pub enum TrainingRows {
    /// A source, which is encoded when training starts.
    Source(Box<DataSource>),
    /// Rows encoded for the same model.
    Encoded(Box<EncodedRows>),
}

impl From<DataSource> for TrainingRows {
    fn from(source: DataSource) -> Self {
        Self::Source(Box::new(source))
    }
}

impl From<EncodedRows> for TrainingRows {
    fn from(rows: EncodedRows) -> Self {
        Self::Encoded(Box::new(rows))
    }
}

/// A trainer of a model's adapter, or of all its weights, on rows.
///
/// [`SftConfig::method`] chooses the loss. For GRPO and RLOO, the rows are prompts, and [`rewards`](Self::rewards) score the
/// completions that the model samples:
///
/// ```no_run
/// use rekindle::rewards::{Reward, RewardError, RewardSet, Sample};
/// use rekindle::{DataSource, FastLanguageModel, Grpo, LoraConfig, SftConfig, SftTrainer};
///
/// struct Short;
///
/// impl Reward for Short {
///     fn name(&self) -> &str {
///         "short"
///     }
///
///     fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
///         Ok(samples.iter().map(|sample| Some(-(sample.completion.len() as f64))).collect())
///     }
/// }
///
/// # fn main() -> Result<(), rekindle::Error> {
/// let (model, tokenizer) = FastLanguageModel::from_pretrained("examples/quickstart/base").load()?;
/// let mut model = model.get_peft_model(LoraConfig::new(8))?;
/// let mut rewards = RewardSet::new();
/// rewards.push(Box::new(Short), 1.0)?;
/// let method = Grpo { max_completion_length: 32, ..Grpo::default() }.into();
/// let config = SftConfig { method, max_steps: Some(10), ..SftConfig::default() };
/// let prompts = DataSource::new("prompts.jsonl");
/// let report = SftTrainer::new(&mut model, &tokenizer, prompts, config).rewards(rewards).train()?;
/// println!("{:?}", report.steps[9].metrics.get("reward"));
/// # Ok(())
/// # }
/// ```
pub struct SftTrainer<'a> {
    model: &'a mut Model,
    tokenizer: Option<&'a Tokenizer>,
    train: TrainingRows,
    eval: Option<TrainingRows>,
    config: SftConfig,
    arguments: TrainerArguments,
    run_file: Option<String>,
    check_memory: bool,
    world: Arc<dyn Communicator>,
    rewards: Option<RewardSet>,
    stop: Arc<AtomicBool>,
    on_event: Box<dyn FnMut(TrainEvent<'_>) + 'a>,
    on_data: OnData<'a>,
}

type OnData<'a> = Box<dyn FnMut(&DataSource, &LoadReport) + 'a>;

impl<'a> SftTrainer<'a> {
    /// Returns a trainer on `train`. `tokenizer` may be `None` for pretokenized rows.
    pub fn new(
        model: &'a mut Model,
        tokenizer: impl Into<Option<&'a Tokenizer>>,
        train: impl Into<TrainingRows>,
        config: SftConfig,
    ) -> Self {
        Self {
            model,
            tokenizer: tokenizer.into(),
            train: train.into(),
            eval: None,
            config,
            arguments: TrainerArguments::default(),
            run_file: None,
            check_memory: true,
            world: Arc::new(OneRank),
            rewards: None,
            stop: Arc::default(),
            on_event: Box::new(|_| ()),
            on_data: Box::new(|_, _| ()),
        }
    }

    /// Evaluates these rows before the first step, every `eval_steps` and at the end.
    #[must_use]
    pub fn eval_dataset(mut self, eval: impl Into<TrainingRows>) -> Self {
        self.eval = Some(eval.into());
        self
    }

    /// Sets the order of the rows, the output directory and the checkpoint to resume from. By default, nothing is
    /// written.
    #[must_use]
    pub fn arguments(mut self, arguments: TrainerArguments) -> Self {
        self.arguments = arguments;
        self
    }

    /// Sets the configuration that `report.html` shows. Default: the [`SftConfig`].
    #[must_use]
    pub fn run_file(mut self, text: impl Into<String>) -> Self {
        self.run_file = Some(text.into());
        self
    }

    /// If true, a run that does not fit into memory is refused before the first step ([`Error::DoesNotFit`], which
    /// lists changes that would fit), and [`GradientCheckpointing::Auto`](crate::GradientCheckpointing::Auto) becomes the
    /// fastest setting that fits. Default true. Without the check, `Auto` is as `true`.
    #[must_use]
    pub fn check_memory(mut self, check_memory: bool) -> Self {
        self.check_memory = check_memory;
        self
    }

    /// Sets the ranks that train together. Each has a trainer with the same rows and configuration; rank 0 alone writes.
    /// Default: this process alone.
    #[must_use]
    pub fn world(mut self, world: Arc<dyn Communicator>) -> Self {
        self.world = world;
        self
    }

    /// Sets the rewards of completions, for methods that sample them (GRPO, RLOO).
    #[must_use]
    pub fn rewards(mut self, rewards: RewardSet) -> Self {
        self.rewards = Some(rewards);
        self
    }

    /// Sets a flag that ends the run after the current step, with a checkpoint to resume from
    /// ([`TrainEnd::Interrupted`](crate::TrainEnd)).
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

    /// Sets a callback for the report about each source of rows that the trainer reads.
    #[must_use]
    pub fn on_data(mut self, on_data: impl FnMut(&DataSource, &LoadReport) + 'a) -> Self {
        self.on_data = Box::new(on_data);
        self
    }

    /// Encodes the rows and trains to the end.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] for a run that exceeds the memory, [`Error::Data`] for rows that cannot be used,
    /// [`Error::Argument`] for invalid prompts, and [`Error::Train`] for everything else.
    pub fn train(mut self) -> Result<TrainReport, Error> {
        let train = self.encode(self.train.clone())?;
        let eval = self.eval.take().map(|rows| self.encode(rows)).transpose()?;
        if self.check_memory {
            let mut planner = RunPlanner::of_model(self.model, self.config.clone(), eval.is_some())?;
            let plan = planner.decide(&planner.rows_in(&train.dataset))?;
            self.config.use_gradient_checkpointing = plan.use_gradient_checkpointing;
        }
        let companions = self.model.companions(self.tokenizer)?;
        let rollouts = self.rollouts(&train, eval.as_ref())?;
        let sampler = sampler(self.model, self.tokenizer, &self.config, eval.as_ref().map(|rows| &rows.dataset))?;
        // Prompts have no end tokens to compare with.
        let texts = self.tokenizer.filter(|_| !self.config.method.has_rollouts());
        let notice = texts.map(|tokenizer| self.model.end_token_notice(tokenizer, &train.dataset));
        let notice = notice.transpose()?.flatten();
        let configuration = self.run_file.unwrap_or_else(|| format!("{:#?}", self.config));
        let run_name = self.config.run_name.clone();
        let seed = self.arguments.seed;
        let description = describe(
            self.model,
            &train,
            eval.as_ref(),
            seed,
            self.arguments.output_dir.as_deref(),
            run_name.as_deref(),
            configuration,
        );
        let card = model_card(run_name.as_deref(), &train, eval.as_ref(), seed);
        let trainer = Trainer {
            arguments: self.arguments,
            eval: eval.map(|eval| eval.dataset),
            companions,
            sampler,
            rollouts,
            description,
            card,
            notes: notice.into_iter().collect(),
            world: self.world,
            stop: self.stop,
            on_event: self.on_event,
            ..Trainer::new(self.model.causal_lm_mut(), train.dataset, self.config)
        };
        Ok(trainer.train()?)
    }

    /// Returns the rewards with the columns of the rows, for a method that samples completions.
    fn rollouts(&mut self, train: &EncodedRows, eval: Option<&EncodedRows>) -> Result<Option<RolloutTask<'a>>, Error> {
        let Some(rewards) = self.rewards.take() else { return Ok(None) };
        if !self.config.method.has_rollouts() {
            return Err(Error::Argument(format!(
                "rewards have no effect with method = \"{}\"; remove them, or use GRPO or RLOO",
                self.config.method.name()
            )));
        }
        let mut columns = PromptColumns::new();
        for rows in core::iter::once(train).chain(eval) {
            columns.extend(rows.source.raw_rows(None)?.into_iter().map(|row| {
                let mut fields = row.fields;
                let prompt = fields.shift_remove("prompt").filter(Value::is_array);
                let messages = prompt.or_else(|| fields.shift_remove("messages"));
                fields.shift_remove("prompt_ids");
                ((row.path, row.row), PromptRow { columns: fields, messages })
            }));
        }
        let stop_ids = self.model.end_tokens(self.tokenizer)?;
        Ok(Some(RolloutTask { rewards, columns, stop_ids, tokenizer: self.tokenizer }))
    }

    fn encode(&mut self, rows: TrainingRows) -> Result<EncodedRows, Error> {
        let model = self.model.causal_lm();
        let (max_seq_length, vocab_size) = (model.max_seq_length(), model.config().vocab_size());
        let source = match rows {
            TrainingRows::Encoded(rows)
                if (rows.max_seq_length, rows.vocab_size) == (max_seq_length, vocab_size)
                    && rows.dataset.task() == self.config.method.task() =>
            {
                return Ok(*rows);
            }
            TrainingRows::Encoded(rows) => rows.source,
            TrainingRows::Source(source) => *source,
        };
        let source = source.task(self.config.method.task());
        let (dataset, report) = self.model.encode(self.tokenizer, &source)?;
        (self.on_data)(&source, &report);
        Ok(EncodedRows { source, dataset, report, max_seq_length, vocab_size })
    }
}

impl core::fmt::Debug for SftTrainer<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SftTrainer").field("train", &self.train).field("config", &self.config).finish_non_exhaustive()
    }
}

//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rekindle_data::{Dataset, Order};
use rekindle_hub::{Dtype, write_atomic};
use rekindle_models::{Batch, CausalLm};

use crate::evaluate::batch;
use crate::save::check_replaceable;
use crate::{
    AdamW, Error, EvalMetrics, Evaluation, MetricsFile, Optimizer, Series, SftConfig, StepMetrics, evaluate, loss_svg,
    lr_factor, save_result,
};

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// An optimizer step is done.
    Step {
        /// Its numbers.
        metrics: &'a StepMetrics,
        /// Steps of the whole run.
        total: usize,
    },
    /// The evaluation set was looked at.
    Eval(&'a EvalMetrics),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// What a finished run has to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Every step.
    pub steps: Vec<StepMetrics>,
    /// Every evaluation, the last one after the last step.
    pub evals: Vec<EvalMetrics>,
    /// Where the adapter or model was written, if anywhere.
    pub saved: Option<PathBuf>,
}

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

    /// Writes `metrics.jsonl`, `loss.svg`, `checkpoint-N/` and `adapter/` (or `model/`) there.
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

    /// Is told about every step, evaluation and save.
    #[must_use]
    pub fn on_event(mut self, on_event: impl FnMut(Event<'_>) + 'a) -> Self {
        self.on_event = Box::new(on_event);
        self
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::NothingToTrain`] before anything happens; [`Error::NonFinite`] when the run
    /// diverges; [`Error::File`] and [`Error::Io`] when results cannot be written.
    pub fn train(mut self) -> Result<Report, Error> {
        self.config.validate()?;
        let full = self.model.lora().is_none();
        let total = self.config.total_steps(self.train.len());
        let warmup = self.config.resolved_warmup(total);
        let peak = self.config.resolved_learning_rate(full);
        self.check_output(full, total)?;
        let mut optimizer = Optimizer::new(self.model, AdamW::from(&self.config), self.seed)?;
        let mut metrics_file = match &self.output_dir {
            Some(dir) => {
                std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.clone(), source })?;
                Some(MetricsFile::create(&dir.join("metrics.jsonl"))?)
            }
            None => None,
        };
        let mut rows = self.rows();
        let mut report = Report { steps: Vec::new(), evals: Vec::new(), saved: None };
        let start = Instant::now();
        let mut seen = 0;
        for step in 0..total {
            let began = Instant::now();
            let chosen: Vec<usize> = rows.by_ref().take(self.config.rows_per_step()).collect();
            let batches = self.batches(&chosen);
            let lr = peak * lr_factor(self.config.lr_scheduler_type, step, warmup, total);
            let result = optimizer.step(self.model, &batches, lr)?;
            for (what, value) in [("loss", result.loss), ("grad_norm", result.grad_norm)] {
                if !value.is_finite() {
                    let lines = chosen.iter().map(|&i| self.train.example(i).line).collect();
                    return Err(Error::NonFinite { step: step + 1, what, value, lines });
                }
            }
            seen += chosen.len();
            let metrics = StepMetrics {
                step: step + 1,
                epoch: seen as f64 / self.train.len() as f64,
                loss: result.loss,
                grad_norm: result.grad_norm,
                learning_rate: lr,
                tokens: result.tokens,
                trained_tokens: result.counted,
                tokens_per_second: result.tokens as f64 / began.elapsed().as_secs_f64(),
                seconds: start.elapsed().as_secs_f64(),
            };
            if let Some(file) = &mut metrics_file {
                file.write(&metrics)?;
            }
            (self.on_event)(Event::Step { metrics: &metrics, total });
            report.steps.push(metrics);
            let done = step + 1;
            let due = |every: Option<usize>| every.is_some_and(|n| done % n == 0);
            if due(self.config.eval_steps) || done == total {
                self.evaluate(done, &mut metrics_file, &mut report)?;
            }
            if due(self.config.save_steps) && done < total {
                self.save(&checkpoint_name(done))?;
            }
        }
        report.saved = self.save(result_name(full))?;
        if let Some(dir) = &self.output_dir {
            write_atomic(&dir.join("loss.svg"), plot(&report).as_bytes())?;
        }
        Ok(report)
    }

    /// Refuses, before any work is done, what would be found out when results are written or asked for.
    fn check_output(&self, full: bool, total: usize) -> Result<(), Error> {
        let mut problems = Vec::new();
        if self.config.eval_steps.is_some() && self.eval.is_none() {
            problems.push("eval_steps needs rows to evaluate".to_owned());
        }
        if self.config.save_steps.is_some() && self.output_dir.is_none() {
            problems.push("save_steps needs an output_dir".to_owned());
        }
        if !problems.is_empty() {
            return Err(Error::Config(problems));
        }
        let Some(dir) = &self.output_dir else { return Ok(()) };
        check_replaceable(&dir.join(result_name(full)), !full)?;
        let mut saves = self.config.save_steps.into_iter().flat_map(|every| (every..total).step_by(every));
        saves.try_for_each(|step| check_replaceable(&dir.join(checkpoint_name(step)), !full))
    }

    /// Row numbers from the first to the last of the run; `num_train_epochs` may end in the middle of a step.
    fn rows(&self) -> impl Iterator<Item = usize> + use<> {
        let count = self.train.len();
        let limit = match self.config.max_steps {
            Some(steps) => steps.saturating_mul(self.config.rows_per_step()),
            None => (self.config.num_train_epochs * count as f64).ceil() as usize,
        };
        Order::new(count, self.shuffle, self.seed).from_cursor(0).take(limit)
    }

    fn batches(&self, rows: &[usize]) -> Vec<Batch> {
        let size = self.config.per_device_train_batch_size;
        let parts = rows.chunks(size).enumerate();
        parts.map(|(i, part)| batch(part.iter().map(|&row| self.train.example(row)), i * size)).collect()
    }

    fn evaluate(&mut self, step: usize, file: &mut Option<MetricsFile>, report: &mut Report) -> Result<(), Error> {
        let Some(eval) = &self.eval else { return Ok(()) };
        let Evaluation { loss, perplexity, tokens, .. } =
            evaluate(self.model, eval, self.config.per_device_eval_batch_size, &mut |_| ())?;
        let metrics = EvalMetrics { step, eval_loss: loss, eval_perplexity: perplexity, eval_tokens: tokens };
        if let Some(file) = file {
            file.write(&metrics)?;
        }
        (self.on_event)(Event::Eval(&metrics));
        report.evals.push(metrics);
        Ok(())
    }

    fn save(&mut self, name: &str) -> Result<Option<PathBuf>, Error> {
        let Some(dir) = &self.output_dir else { return Ok(None) };
        let path = dir.join(name);
        save_result(self.model, &path, &self.companions, Dtype::F32)?;
        (self.on_event)(Event::Saved(&path));
        Ok(Some(path))
    }
}

fn result_name(full: bool) -> &'static str {
    if full { "model" } else { "adapter" }
}

fn checkpoint_name(step: usize) -> String {
    format!("checkpoint-{step}")
}

fn plot(report: &Report) -> String {
    let train = report.steps.iter().map(|m| (m.step as f64, m.loss)).collect();
    let mut series = vec![Series { name: "training loss".to_owned(), color: "#2b6cb0", points: train }];
    if !report.evals.is_empty() {
        let points = report.evals.iter().map(|m| (m.step as f64, m.eval_loss)).collect();
        series.push(Series { name: "evaluation loss".to_owned(), color: "#c05621", points });
    }
    loss_svg("loss", &series)
}

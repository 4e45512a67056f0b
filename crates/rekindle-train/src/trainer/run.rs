//! The loop: one step after another, with what falls due between them.

use std::path::PathBuf;
use std::time::Instant;

use rekindle_hub::Dtype;
use rekindle_kernels::optimizer::Rates;

use super::rows::Rows;
use super::{Trainer, checkpoint_name, result_name};
use crate::{
    Error, EvalMetrics, Evaluation, Event, Optimizer, OptimizerConfig, Recorder, Report, Schedule, StepMetrics,
    evaluate, save_result,
};

/// A run that goes on.
pub(super) struct Run<'a> {
    job: Trainer<'a>,
    /// Whether all weights are trained.
    full: bool,
    total: usize,
    schedule: Schedule,
    peaks: Rates,
    optimizer: Optimizer,
    rows: Rows,
    recorder: Option<Recorder>,
    report: Report,
    start: Instant,
}

impl<'a> Run<'a> {
    /// Opens what the run writes to.
    pub(super) fn begin(mut job: Trainer<'a>) -> Result<Self, Error> {
        job.config.validate()?;
        let full = job.model.lora().is_none();
        let total = job.config.total_steps(job.train.len());
        let peak = job.config.resolved_learning_rate(full);
        let schedule = job.config.schedule(peak, total)?;
        job.config.check_embedding_rate(job.model.params())?;
        job.check_output(full, total)?;
        let optimizer = Optimizer::new(job.model, OptimizerConfig::from(&job.config), job.seed)?;
        let description = std::mem::take(&mut job.description);
        let recorder = match &job.output_dir {
            Some(dir) => Some(Recorder::open(dir, job.config.report_to, total, None, description)?),
            None => None,
        };
        Ok(Self {
            full,
            total,
            schedule,
            peaks: Rates { default: peak, embedding: job.config.embedding_learning_rate.unwrap_or(peak) },
            optimizer,
            rows: Rows::new(&job.config, job.train.len(), job.shuffle, job.seed, 0),
            recorder,
            report: Report { steps: Vec::new(), evals: Vec::new(), saved: None },
            start: Instant::now(),
            job,
        })
    }

    /// Takes all steps and writes the result.
    pub(super) fn go(mut self) -> Result<Report, Error> {
        for step in 0..self.total {
            self.step(step)?;
            let done = step + 1;
            let due = |every: Option<usize>| every.is_some_and(|n| done % n == 0);
            let (eval_due, save_due) = (due(self.job.config.eval_steps), due(self.job.config.save_steps));
            if eval_due || done == self.total {
                self.evaluate(done)?;
            }
            if save_due && done < self.total {
                self.save(&checkpoint_name(done))?;
            }
        }
        self.report.saved = self.save(result_name(self.full))?;
        Ok(self.report)
    }

    /// Takes step `step`, counted from 0.
    fn step(&mut self, step: usize) -> Result<(), Error> {
        let began = Instant::now();
        let rows = self.rows.next_step(&self.job.train);
        let factor = self.schedule.factor(step);
        let rates = Rates { default: self.peaks.default * factor, embedding: self.peaks.embedding * factor };
        let result = self.optimizer.step(self.job.model, &rows.batches, rates)?;
        for (what, value) in [("loss", result.loss), ("grad_norm", result.grad_norm)] {
            if !value.is_finite() {
                let lines = rows.examples.iter().map(|&i| self.job.train.example(i).row.get()).collect();
                return Err(Error::NonFinite { step: step + 1, what, value, lines });
            }
        }
        let memory = self.job.model.device().memory();
        let metrics = StepMetrics {
            step: step + 1,
            epoch: self.rows.seen() as f64 / self.job.train.len() as f64,
            loss: result.loss,
            grad_norm: result.grad_norm,
            learning_rate: rates.default,
            tokens: result.tokens,
            trained_tokens: result.counted,
            tokens_per_second: result.tokens as f64 / began.elapsed().as_secs_f64(),
            seconds: self.start.elapsed().as_secs_f64(),
            memory: memory.map(|memory| memory.in_use),
            peak_memory: memory.map(|memory| memory.peak),
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.step(&metrics)?;
        }
        (self.job.on_event)(Event::Step { metrics: &metrics, total: self.total });
        self.report.steps.push(metrics);
        Ok(())
    }

    /// The loss of the evaluation set, and answers to the prompts.
    fn evaluate(&mut self, step: usize) -> Result<(), Error> {
        if let Some(eval) = &self.job.eval {
            let Evaluation { loss, perplexity, tokens, .. } =
                evaluate(self.job.model, eval, self.job.config.per_device_eval_batch_size, &mut |_| ())?;
            let metrics = EvalMetrics { step, eval_loss: loss, eval_perplexity: perplexity, eval_tokens: tokens };
            if let Some(recorder) = &mut self.recorder {
                recorder.eval(&metrics)?;
            }
            (self.job.on_event)(Event::Eval(&metrics));
            self.report.evals.push(metrics);
        }
        if let Some(sampler) = &self.job.sampler {
            for sample in sampler.sample(self.job.model, step)? {
                if let Some(recorder) = &mut self.recorder {
                    recorder.sample(&sample)?;
                }
                (self.job.on_event)(Event::Sample(&sample));
            }
        }
        self.publish()
    }

    fn publish(&self) -> Result<(), Error> {
        self.recorder.as_ref().map_or(Ok(()), Recorder::publish)
    }

    fn save(&mut self, name: &str) -> Result<Option<PathBuf>, Error> {
        let Some(dir) = &self.job.output_dir else { return Ok(None) };
        let path = dir.join(name);
        save_result(self.job.model, &path, &self.job.companions, Dtype::F32)?;
        (self.job.on_event)(Event::Saved(&path));
        self.publish()?;
        Ok(Some(path))
    }
}

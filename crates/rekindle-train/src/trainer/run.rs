//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rekindle_hub::{DirectoryLock, remove_atomic};
use rekindle_kernels::optimizer::LearningRates;
use rekindle_models::{Batch, Objective, StepKey};

use super::guard::{self, Pass};
use super::moving_reference::MovingReference;
use super::ranks::share_start;
use super::records::open_recorder;
use super::resume::{Start, best_path};
use super::resume_compatibility::RecordedSettings;
use super::rows::StepRows;
use super::source::{StepSource, small_epochs};
use super::{Trainer, result_name};
use crate::batches::Batches;
use crate::checkpoint::{Checkpoint, TrainerState, configuration_sha256};
use crate::evaluate::{evaluate_objective_while, evaluate_while};
use crate::model_card::CardRun;
use crate::reference::{ReferenceLogProbs, is_precomputed};
use crate::save::write_model_with;
use crate::stopping::Stopping;
use crate::world::{share, share_parameters};
use crate::{
    Error, EvalMetrics, Evaluation, Method, MetricValues, Optimizer, OptimizerConfig, Recorder, RunHistory,
    SaveStrategy, Schedule, StepBatches, StepMetrics, TensorWorld, Timetable, TrainEnd, TrainEvent, TrainReport,
    write_result,
};
use rekindle_data::Dataset;

/// The log-probabilities of the reference model, if they are computed before training.
#[derive(Default)]
struct References {
    train: Option<ReferenceLogProbs>,
    eval: Option<ReferenceLogProbs>,
}

impl References {
    /// Computes the log-probabilities where the run needs them. The model is that before training.
    fn of(job: &mut Trainer<'_>) -> Result<Self, Error> {
        if !is_precomputed(&job.config.method, job.model)? {
            return Ok(Self::default());
        }
        let file =
            |name: &str| job.arguments.output_dir.as_ref().map(|dir| dir.join(format!("reference-{name}.safetensors")));
        let of = |rows, name| ReferenceLogProbs::of(job.model, rows, &job.config, file(name).as_deref(), &*job.world);
        let train = of(&job.train, "train")?;
        let eval = job.eval.as_ref().map(|eval| of(eval, "eval")).transpose()?;
        job.notes.push("the log-probabilities of the reference model were computed before the first step".to_owned());
        Ok(Self { train: Some(train), eval })
    }
}

/// A run in progress.
pub(super) struct Run<'a> {
    job: Trainer<'a>,
    settings: RecordedSettings,
    notes: Vec<String>,
    /// True if all weights are trained.
    full: bool,
    /// Steps done.
    done: usize,
    times: Timetable,
    schedule: Schedule,
    peaks: LearningRates,
    optimizer: Optimizer,
    objective: Box<dyn Objective>,
    reference: References,
    moving_reference: Option<MovingReference>,
    rows: StepSource<'a>,
    stopping: Stopping,
    recorder: Option<Recorder>,
    report: TrainReport,
    /// True if rank 0 writes checkpoints.
    saves: bool,
    /// The steps of the last evaluation and of the last checkpoint.
    evaluated: Option<usize>,
    saved: Option<usize>,
    /// The checkpoint with the lowest evaluation loss.
    best: Option<PathBuf>,
    start: Instant,
    /// Seconds of the run before it was resumed.
    before: f64,
    /// The lock that keeps other runs out of the output directory.
    _locked: Option<DirectoryLock>,
}

impl<'a> Run<'a> {
    /// Prepares the start of the run, or resumes it.
    pub(super) fn begin(mut job: Trainer<'a>) -> Result<Self, Error> {
        job.config.validate()?;
        job.config.method.check_rows(&job.train)?;
        job.config.method.check_model(job.model)?;
        let full = job.model.lora().is_none();
        let packs = job.config.rows(&job.train, job.model.max_seq_length());
        let times = job.config.timetable(packs.len());
        let total = times.total;
        let peak = job.config.resolved_learning_rate(full);
        let schedule = job.config.schedule(peak, total)?;
        job.config.check_embedding_rate(job.model.params())?;
        job.model.set_gradient_checkpointing(job.config.use_gradient_checkpointing);
        job.check_needs()?;
        job.check_ranks(total)?;
        let world = Arc::clone(&job.world);
        let tensors = TensorWorld::connect(Arc::clone(&world), job.model.device())?;
        let config = OptimizerConfig::from(&job.config);
        let mut optimizer = Optimizer::on_ranks(job.model, config, job.arguments.seed, tensors)?;
        let saves = share(&*world, job.arguments.output_dir.is_some())?;
        if !world.is_first() {
            // Rank 0 alone writes and reads checkpoints, so the ranks need no shared file system.
            job.arguments.output_dir = None;
            job.arguments.resume = None;
            job.sampler = None;
        }
        let lock = |dir: &PathBuf| DirectoryLock::acquire(dir);
        let mut locked = job.arguments.output_dir.as_ref().filter(|dir| dir.is_dir()).map(lock).transpose()?;
        let Start { checkpoint, settings, mut notes } = Start::find(&job, total)?;
        job.output().check_writable(&times)?;
        notes.extend(small_epochs(&job.config, packs.len()));
        if let (Some(dir), None) = (&job.arguments.output_dir, &locked) {
            std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.clone(), source })?;
            locked = Some(lock(dir)?);
        }
        job.output().clear()?;
        let reference = References::of(&mut job)?;
        notes.extend(job.config.method.balance_advice(&job.train));
        notes.append(&mut job.notes);
        let (mut best, mut saved) = (None, Vec::new());
        if let Some(checkpoint) = &checkpoint {
            saved = checkpoint.restore_optimizer(&mut optimizer)?;
            checkpoint.restore_model(job.model)?;
            let wanted = checkpoint.state.best.filter(|_| job.config.load_best_model_at_end);
            let place = wanted.zip(job.arguments.output_dir.as_ref());
            best = place.map(|(best, dir)| best_path(&checkpoint.path, dir, best.step)).transpose()?;
        }
        let recorder = open_recorder(&mut job, total, checkpoint.as_ref())?;
        let RunHistory { steps, evals, .. } = recorder.as_ref().map(|r| r.history().clone()).unwrap_or_default();
        let (path, state) = checkpoint.map(|Checkpoint { path, state }| (path, state)).unzip();
        let state = share_start(job.model, &mut optimizer, state, saved)?;
        let (done, examples_seen, before) =
            state.as_ref().map_or((0, 0, 0.0), |state| (state.global_step, state.examples_seen, state.seconds));
        if recorder.is_some() && steps.len() != done {
            let had = steps.len();
            notes.push(format!("metrics.jsonl has only {had} of the {done} earlier steps"));
        }
        let moving_reference = MovingReference::begin(&job.config, job.model, world.size(), path.as_deref())?;
        let rows = StepSource::begin(&mut job, packs, (examples_seen, total), path.as_deref())?;
        let stopping = match &state {
            Some(state) => Stopping::new(&job.config, state.best, state.early_stopping_patience_counter),
            None => Stopping::new(&job.config, None, 0),
        };
        Ok(Self {
            settings,
            notes,
            full,
            done,
            times,
            schedule,
            peaks: LearningRates { default: peak, embedding: job.config.embedding_learning_rate.unwrap_or(peak) },
            optimizer,
            objective: job.config.method.objective(),
            reference,
            moving_reference,
            rows,
            stopping,
            recorder,
            evaluated: state.as_ref().and_then(|state| state.last_evaluation),
            saves,
            saved: state.as_ref().map(|_| done),
            best,
            report: TrainReport { steps, evals, end: TrainEnd::Finished, best: None, checkpoint: path, saved: None },
            start: Instant::now(),
            before,
            _locked: locked,
            job,
        })
    }

    /// Runs the remaining steps, and writes the result.
    pub(super) fn go(mut self) -> Result<TrainReport, Error> {
        (self.job.on_event)(TrainEvent::Started {
            done: self.done,
            times: &self.times,
            checkpoint: self.report.checkpoint.as_deref(),
            notes: &self.notes,
        });
        loop {
            let is_best = if self.evaluation_is_due() { self.evaluate()? } else { Some(false) };
            let Some(is_best) = is_best else { return self.interrupted() };
            if self.save_is_due(is_best) {
                self.save_checkpoint(is_best)?;
            }
            if self.stopping.is_over() {
                self.report.end = TrainEnd::EarlyStopping;
                return self.finish();
            }
            if self.done == self.times.total {
                return self.finish();
            }
            if self.all_stop()? || !self.step()? {
                return self.interrupted();
            }
        }
    }

    fn evaluation_is_due(&self) -> bool {
        let due = match self.done {
            0 => self.job.eval.is_some() && self.job.config.evaluates_on_start(),
            done => self.times.evaluates_after(done),
        };
        due && (self.job.eval.is_some() || self.job.sampler.is_some()) && self.evaluated != Some(self.done)
    }

    fn save_is_due(&self, is_best: bool) -> bool {
        let due = self.times.saves_after(self.done) || (self.times.saves() && self.stopping.is_over());
        let config = &self.job.config;
        let keeps_best = config.load_best_model_at_end || config.save_strategy == Some(SaveStrategy::Best);
        (due && self.saved != Some(self.done)) || (is_best && keeps_best)
    }

    fn is_asked_to_stop(&self) -> bool {
        self.job.stop.load(Ordering::Relaxed)
    }

    /// Returns true if any rank is asked to stop.
    fn all_stop(&self) -> Result<bool, Error> {
        let asked = [u8::from(self.is_asked_to_stop())];
        Ok(self.job.world.all_gather(&asked)?.iter().any(|asked| asked[..] == [1]))
    }

    /// Returns true if this rank may end an evaluation early: only without others, which would wait for it.
    fn stops_evaluating(&self) -> bool {
        self.job.world.size() == 1 && self.is_asked_to_stop()
    }

    /// Runs the next step. Returns false if the run is asked to stop before the step has rows.
    fn step(&mut self) -> Result<bool, Error> {
        let began = Instant::now();
        let next = self.rows.next_step(&self.job, self.reference.train.as_ref(), self.done + 1)?;
        let Some((mut rows, of_rollouts)) = next else {
            return Ok(false);
        };
        if let Some(reference) = &self.moving_reference {
            reference.add_to(self.job.model, &*self.objective, &mut rows.batches)?;
        }
        let factor = self.schedule.factor(self.optimizer.steps() as usize);
        let rates = LearningRates { default: self.peaks.default * factor, embedding: self.peaks.embedding * factor };
        let key = self.optimizer.key();
        let batches = StepBatches { own: rows.own(), all: &rows.batches };
        let result = self.optimizer.step_on_ranks(self.job.model, &*self.objective, batches, rates)?;
        if let Some(broken) = guard::broken(&result, self.optimizer.loss_scaler()) {
            return Err(self.diverged(broken, rates.default, &rows, key));
        }
        self.done += 1;
        if let Some(reference) = &mut self.moving_reference {
            reference.after_step(self.done, self.job.model);
        }
        let memory = self.job.model.device().memory();
        let metrics = StepMetrics {
            step: self.done,
            epoch: self.rows.epoch(),
            loss: result.loss,
            grad_norm: result.grad_norm,
            learning_rate: rates.default,
            tokens: result.tokens,
            trained_tokens: result.counted,
            tokens_per_second: result.tokens as f64 / began.elapsed().as_secs_f64(),
            seconds: self.seconds(),
            memory: memory.map(|memory| memory.in_use),
            peak_memory: memory.map(|memory| memory.peak),
            metrics: MetricValues::prefixed(&result.metrics, "").with(of_rollouts.metrics, ""),
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.completions(of_rollouts.completions)?;
            recorder.step(&metrics)?;
        }
        (self.job.on_event)(TrainEvent::Step { metrics: &metrics, total: self.times.total });
        self.report.steps.push(metrics);
        Ok(true)
    }

    /// Evaluates the evaluation set and answers the prompts. Returns true if the loss is the lowest so far, or `None`
    /// if the run is asked to stop.
    fn evaluate(&mut self) -> Result<Option<bool>, Error> {
        let mut is_best = false;
        if self.job.eval.is_some() {
            let Some(metrics) = self.evaluation()? else { return Ok(None) };
            if let Some(recorder) = &mut self.recorder {
                recorder.eval(&metrics)?;
            }
            (self.job.on_event)(TrainEvent::Eval(&metrics));
            // As in transformers, the model before the first step is no candidate for the best.
            is_best = self.done > 0 && self.stopping.evaluated(self.done, metrics.eval_loss);
            self.report.evals.push(metrics);
        }
        if let Some(sampler) = &self.job.sampler {
            for sample in sampler.sample(self.job.model, self.done)? {
                if let Some(recorder) = &mut self.recorder {
                    recorder.sample(&sample)?;
                }
                (self.job.on_event)(TrainEvent::Sample(&sample));
            }
        }
        self.evaluated = Some(self.done);
        self.publish()?;
        Ok(Some(is_best))
    }

    /// Returns the loss of the evaluation set, or `None` if the run is asked to stop.
    fn evaluation(&mut self) -> Result<Option<EvalMetrics>, Error> {
        if let StepSource::Rollouts(_) = &self.rows {
            let found = self.rows.evaluate(&self.job, &*self.objective, self.done)?;
            let Some((metrics, completions)) = found else { return Ok(None) };
            if let Some(recorder) = &mut self.recorder {
                recorder.completions(completions)?;
            }
            return Ok(Some(metrics));
        }
        let Some(eval) = &self.job.eval else { return Ok(None) };
        if self.job.config.method != Method::Sft {
            let eval = eval.clone();
            return self.preference_evaluation(&eval);
        }
        let size = self.job.config.per_device_eval_batch_size;
        let world = &*self.job.world;
        let result = evaluate_while(self.job.model, eval, size, world, &mut |_| !self.stops_evaluating())?;
        let Some(evaluation) = result else { return Ok(None) };
        if !evaluation.loss.is_finite() {
            let (batches, examples) = guard::broken_rows(eval, &evaluation, size);
            return Err(self.broken_evaluation(eval, evaluation.loss, &batches, &examples));
        }
        let Evaluation { loss, perplexity, tokens, .. } = evaluation;
        Ok(Some(EvalMetrics {
            step: self.done,
            eval_loss: loss,
            eval_perplexity: Some(perplexity),
            eval_tokens: tokens,
            metrics: MetricValues::default(),
        }))
    }

    /// Returns the loss of the evaluation set by the method's objective, or `None` if the run is asked to stop.
    fn preference_evaluation(&mut self, eval: &Dataset) -> Result<Option<EvalMetrics>, Error> {
        let Trainer { model, config, .. } = &self.job;
        let from = Batches::new(eval, config, model.max_seq_length()).reference(self.reference.eval.as_ref());
        let per_row = eval.task().examples_per_row();
        let examples: Vec<usize> = (0..eval.len()).collect();
        let size = per_row * config.per_device_eval_batch_size;
        let parts = examples.chunks(size).enumerate();
        let mut batches: Vec<Batch> = parts.map(|(index, part)| from.batch(part, index * size)).collect();
        if let Some(reference) = &self.moving_reference {
            reference.add_to(self.job.model, &*self.objective, &mut batches)?;
        }
        let go_on = &mut || !self.stops_evaluating();
        let (model, world) = (&*self.job.model, &*self.job.world);
        let found = evaluate_objective_while(model, &*self.objective, &batches, world, go_on)?;
        let Some(found) = found else { return Ok(None) };
        if !found.loss.is_finite() {
            return Err(self.broken_evaluation(eval, found.loss, &batches, &examples));
        }
        Ok(Some(EvalMetrics {
            step: self.done,
            eval_loss: found.loss,
            eval_perplexity: None,
            eval_tokens: found.tokens,
            metrics: MetricValues::prefixed(&found.metrics, "eval_"),
        }))
    }

    /// Returns the error for an evaluation whose loss is not finite.
    fn broken_evaluation(&self, eval: &Dataset, loss: f64, batches: &[Batch], examples: &[usize]) -> Error {
        let pass = Pass {
            step: self.done,
            what: "eval_loss",
            value: loss,
            dataset: eval,
            batches,
            examples,
            key: None,
            loss_scale: 1.0,
            learning_rate: self.peaks.default,
            checkpoint: self.report.checkpoint.clone(),
        };
        pass.explain(self.job.model, &self.job.config)
    }

    fn publish(&self) -> Result<(), Error> {
        self.recorder.as_ref().map_or(Ok(()), Recorder::publish)
    }

    /// Returns the error for a step with a value that is not finite.
    fn diverged(&self, broken: guard::Broken, lr: f64, rows: &StepRows, key: StepKey) -> Error {
        let pass = Pass {
            step: self.done + 1,
            what: broken.what,
            value: broken.value,
            dataset: &self.job.train,
            batches: &rows.batches,
            examples: &rows.examples,
            key: Some(key),
            loss_scale: broken.loss_scale,
            learning_rate: lr,
            checkpoint: self.report.checkpoint.clone(),
        };
        pass.explain(self.job.model, &self.job.config)
    }

    /// Writes a checkpoint of this step, and removes those beyond `save_total_limit`.
    fn save_checkpoint(&mut self, is_best: bool) -> Result<(), Error> {
        // All ranks save at the same steps.
        self.saved = Some(self.done);
        let optimizer = if self.saves { self.optimizer.gather_state()? } else { None };
        let Some(optimizer) = optimizer else { return Ok(()) };
        let Some(dir) = &self.job.arguments.output_dir else { return Ok(()) };
        let path = Checkpoint::path(dir, self.done);
        let RecordedSettings { configuration, changeable } = self.settings.clone();
        let state = TrainerState {
            format_version: TrainerState::FORMAT,
            global_step: self.done,
            optimizer_steps: self.optimizer.steps(),
            loss_scaler: self.optimizer.loss_scaler().copied(),
            examples_seen: self.rows.seen(),
            seconds: self.seconds(),
            last_evaluation: self.evaluated,
            best: self.stopping.best,
            early_stopping_patience_counter: self.stopping.counter,
            configuration_sha256: configuration_sha256(&configuration),
            configuration,
            changeable,
        };
        let write = |target: &Path| {
            let model = &*self.job.model;
            write_model_with(model, target, model.trained_dtype(), &self.job.card, Some(self.card_run()))?;
            self.rows.save(target)?;
            self.moving_reference.as_ref().map_or(Ok(()), |reference| reference.save(target))
        };
        Checkpoint::write(&path, self.job.model, &optimizer, &state, &self.job.companions, write)?;
        if is_best && self.job.config.load_best_model_at_end {
            self.best = Some(path.clone());
        }
        if let Some(limit) = self.job.config.save_total_limit {
            let mut there = Checkpoint::list(dir);
            let surplus = there.len().saturating_sub(limit);
            there.retain(|(_, there)| *there != path && self.best.as_ref() != Some(there));
            for (_, old) in there.into_iter().take(surplus) {
                remove_atomic(&old)?;
            }
        }
        (self.job.on_event)(TrainEvent::Saved(&path));
        self.report.checkpoint = Some(path);
        self.publish()
    }

    /// Ends the run before its last step, with a checkpoint to resume from.
    fn interrupted(mut self) -> Result<TrainReport, Error> {
        if self.done > 0 && self.saved != Some(self.done) {
            self.save_checkpoint(false)?;
        }
        self.report.end = TrainEnd::Interrupted;
        self.report.best = self.stopping.best;
        Ok(self.report)
    }

    /// Writes the result.
    fn finish(mut self) -> Result<TrainReport, Error> {
        let best = self.stopping.best.zip(self.best.as_deref());
        if let Some((_, path)) = best.filter(|(best, _)| best.step != self.done) {
            Checkpoint::open(path)?.restore_model(self.job.model)?;
        }
        if self.job.config.load_best_model_at_end {
            share_parameters(self.optimizer.world(), self.job.model)?;
        }
        if let Some(dir) = &self.job.arguments.output_dir {
            let path = dir.join(result_name(self.full));
            write_result(&path, !self.full, &self.job.companions, |target| {
                let model = &*self.job.model;
                write_model_with(model, target, model.trained_dtype(), &self.job.card, Some(self.card_run()))
            })?;
            (self.job.on_event)(TrainEvent::Saved(&path));
            self.report.saved = Some(path);
        }
        self.publish()?;
        self.report.best = self.stopping.best;
        Ok(self.report)
    }

    /// Returns the run so far, for the model card.
    fn card_run(&self) -> CardRun<'_> {
        CardRun { config: &self.job.config, steps: &self.report.steps, evals: &self.report.evals }
    }

    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64()
    }
}

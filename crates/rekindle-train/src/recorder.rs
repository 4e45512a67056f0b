//! The records of a run: metrics, events, report and plot.

use std::path::{Path, PathBuf};

use rekindle_hub::write_atomic;

use crate::{
    Error, EvalMetrics, EventFile, MetricsFile, PromptSample, RecordedUntil, ReportTo, RewardedCompletion,
    RunDescription, RunHistory, StepMetrics, loss_svg, report_html,
};

/// A recorder of a run's metrics. It writes `metrics.jsonl` and TensorBoard's event files immediately, and
/// `report.html` and `loss.svg` when they are [published](Self::publish).
#[derive(Debug)]
pub struct Recorder {
    dir: PathBuf,
    metrics: MetricsFile,
    events: Option<EventFile>,
    history: RunHistory,
    total: usize,
    description: RunDescription,
}

impl Recorder {
    /// Begins the records of a run of `total` steps in `dir`, or continues those of a run that has reached `resumed`.
    /// Removes the records of an earlier run, and of steps after `resumed`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] if a file cannot be written, or `metrics.jsonl` is invalid.
    pub fn open(
        dir: &Path,
        report_to: ReportTo,
        total: usize,
        resumed: Option<RecordedUntil>,
        description: RunDescription,
    ) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
        let path = dir.join("metrics.jsonl");
        let (metrics, history) = match resumed {
            Some(until) => MetricsFile::resume(&path, until)?,
            None => (MetricsFile::create(&path)?, RunHistory::default()),
        };
        let logs = dir.join("tensorboard");
        let events = match (report_to, resumed) {
            (ReportTo::None, _) => None,
            (ReportTo::Tensorboard, None) => Some(EventFile::create(&logs)?),
            (ReportTo::Tensorboard, Some(until)) => Some(EventFile::resume(&logs, until.steps)?),
        };
        let recorder = Self { dir: dir.to_owned(), metrics, events, history, total, description };
        // Until the first evaluation an earlier run's page would stand there.
        recorder.publish()?;
        Ok(recorder)
    }

    /// Returns the records so far, including those before resuming.
    pub fn history(&self) -> &RunHistory {
        &self.history
    }

    /// Records a step.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, step: &StepMetrics) -> Result<(), Error> {
        self.metrics.write(step)?;
        if let Some(events) = &mut self.events {
            let scalars = step_scalars(step);
            let scalars: Vec<_> = scalars.iter().map(|(name, value)| (&**name, *value)).collect();
            events.scalars(step.step, &scalars)?;
        }
        self.history.steps.push(step.clone());
        Ok(())
    }

    /// Records an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<(), Error> {
        self.metrics.write(eval)?;
        if let Some(events) = &mut self.events {
            let scalars = eval_scalars(eval);
            let scalars: Vec<_> = scalars.iter().map(|(name, value)| (&**name, *value)).collect();
            events.scalars(eval.step, &scalars)?;
        }
        self.history.evals.push(eval.clone());
        Ok(())
    }

    /// Records the answer to a prompt.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sample(&mut self, sample: &PromptSample) -> Result<(), Error> {
        self.metrics.write(sample)?;
        if let Some(events) = &mut self.events {
            let PromptSample { prompt, output, .. } = sample;
            // Markdown renders indented text verbatim.
            let text = format!("{prompt}{output}").replace('\n', "\n    ");
            events.text(sample.step, &format!("samples/{}", sample.sample), &format!("    {text}"))?;
        }
        self.history.samples.push(sample.clone());
        Ok(())
    }

    /// Records sampled completions with their rewards.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn completions(&mut self, completions: Vec<RewardedCompletion>) -> Result<(), Error> {
        completions.iter().try_for_each(|completion| self.metrics.write(completion))?;
        self.history.completions.extend(completions);
        Ok(())
    }

    /// Writes `report.html` and `loss.svg` atomically from the records so far.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn publish(&self) -> Result<(), Error> {
        write_atomic(&self.dir.join("loss.svg"), loss_svg(&self.history).as_bytes())?;
        let page = report_html(&self.history, self.total, &self.description);
        Ok(write_atomic(&self.dir.join("report.html"), page.as_bytes())?)
    }
}

/// Returns the metrics of a step under the names of transformers' trainer.
pub fn step_scalars(step: &StepMetrics) -> Vec<(String, f64)> {
    let mut scalars = vec![
        ("train/loss".to_owned(), step.loss),
        ("train/grad_norm".to_owned(), step.grad_norm),
        ("train/learning_rate".to_owned(), step.learning_rate),
        ("train/epoch".to_owned(), step.epoch),
        ("train/tokens_per_second".to_owned(), step.tokens_per_second),
    ];
    scalars.extend(step.memory.map(|bytes| ("train/memory".to_owned(), bytes as f64)));
    scalars.extend(step.peak_memory.map(|bytes| ("train/peak_memory".to_owned(), bytes as f64)));
    scalars.extend(step.metrics.0.iter().map(|(name, value)| (format!("train/{name}"), *value)));
    scalars
}

/// Returns the metrics of an evaluation under the names of transformers' trainer.
pub fn eval_scalars(eval: &EvalMetrics) -> Vec<(String, f64)> {
    let mut scalars = vec![("eval/loss".to_owned(), eval.eval_loss)];
    scalars.extend(eval.eval_perplexity.map(|perplexity| ("eval/perplexity".to_owned(), perplexity)));
    scalars.extend(eval.metrics.0.iter().map(|(name, value)| (name.replacen("eval_", "eval/", 1), *value)));
    scalars
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{eval, sample, step};

    #[test]
    fn a_resumed_run_has_one_whole_report() {
        let dir = tempfile::tempdir().unwrap();
        let record = |resumed, steps: std::ops::RangeInclusive<usize>| {
            let description = RunDescription { title: "run".into(), ..RunDescription::default() };
            let mut recorder = Recorder::open(dir.path(), ReportTo::Tensorboard, 6, resumed, description).unwrap();
            for n in steps {
                recorder.step(&step(n)).unwrap();
                if n % 2 == 0 {
                    recorder.eval(&eval(n)).unwrap();
                    recorder.sample(&sample(n)).unwrap();
                    recorder.publish().unwrap();
                }
            }
        };
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        record(None, 1..=6);
        let whole = ["metrics.jsonl", "report.html", "loss.svg"].map(read);
        assert!(whole[1].contains("All 6 steps"), "{}", whole[1]);

        record(None, 1..=5);
        assert!(read("report.html").contains("Step 4 of 6"));
        record(Some(RecordedUntil { steps: 3, evaluated: 2 }), 4..=6);
        assert_eq!(["metrics.jsonl", "report.html", "loss.svg"].map(read), whole);
        record(None, 1..=1);
        assert!(read("report.html").contains("Step 0 of 6"), "the earlier run's page is gone");
        record(Some(RecordedUntil { steps: 0, evaluated: 0 }), 1..=6);
        let files = || std::fs::read_dir(dir.path().join("tensorboard")).unwrap().count();
        assert_eq!(files(), 2, "of the last run's two parts");
        record(None, 1..=1);
        assert_eq!(files(), 1);
    }
}

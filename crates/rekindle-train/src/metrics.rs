//! `metrics.jsonl`: one JSON object per line for every step, every evaluation and every sample.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::Error;

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// The share of the data seen; 1 is one pass.
    pub epoch: f64,
    /// The loss of the step: the mean over counted tokens, or that of the training method.
    pub loss: f64,
    /// Global gradient norm before clipping; infinite for a step that was skipped ([`LossScaler`](crate::LossScaler)), and
    /// then `null` in the file.
    #[serde(deserialize_with = "infinite_if_null")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Tokens of this step.
    pub tokens: usize,
    /// Tokens that the loss covers.
    pub trained_tokens: usize,
    /// `tokens` ÷ the step's wall-clock time.
    pub tokens_per_second: f64,
    /// Wall-clock time since the run began.
    pub seconds: f64,
    /// Bytes in use after the step, on the device; on the CPU, of the process
    /// ([`Device::memory`](rekindle_kernels::Device::memory)).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// The peak of bytes in use so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The loss's own metrics, such as `rewards/margins`.
    #[serde(flatten)]
    pub metrics: MetricValues,
}

/// Reads a number that JSON cannot hold unless it is finite.
fn infinite_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// Numbers by name. Values of a line that are not numbers are ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MetricValues(pub BTreeMap<String, f64>);

impl MetricValues {
    /// Returns a value.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// Adds values, `prefix` before each name.
    #[must_use]
    pub(crate) fn with(mut self, values: Vec<(String, f64)>, prefix: &str) -> Self {
        self.0.extend(values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)));
        self
    }

    /// Returns these values, `prefix` before each name.
    pub(crate) fn prefixed(values: &[(&'static str, f64)], prefix: &str) -> Self {
        Self(values.iter().map(|(name, value)| (format!("{prefix}{name}"), *value)).collect())
    }
}

impl<'de> Deserialize<'de> for MetricValues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = BTreeMap::<String, serde_json::Value>::deserialize(deserializer)?;
        Ok(Self(values.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect()))
    }
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Steps done before it.
    pub step: usize,
    /// The loss, as that of a step.
    pub eval_loss: f64,
    /// e^`eval_loss`, if the loss is a negative log-likelihood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_perplexity: Option<f64>,
    /// Counted tokens.
    pub eval_tokens: usize,
    /// The loss's own metrics, such as `eval_rewards/margins`.
    #[serde(flatten)]
    pub metrics: MetricValues,
}

/// The model's answer to a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptSample {
    /// Steps done before it.
    pub step: usize,
    /// The number of the prompt, from 1.
    pub sample: usize,
    /// The prompt, decoded from its tokens.
    pub prompt: String,
    /// The answer in the row, if the prompt is from a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// The most likely continuation.
    pub output: String,
    /// Its tokens.
    pub new_tokens: usize,
    /// True if it ended with an end token, and not at the length limit.
    pub ended: bool,
}

/// A completion that the model has sampled in a run with rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewardedCompletion {
    /// The step that trains on it; of an evaluation, the steps done before it.
    pub step: usize,
    /// True for a prompt of the evaluation set.
    pub evaluation: bool,
    /// The prompt, decoded from its tokens.
    pub prompt: String,
    /// The completion, without special tokens.
    pub completion: String,
    /// The weighted sum of its rewards; `None` if all are null.
    pub reward: Option<f64>,
    /// Each reward, not weighted.
    pub rewards: BTreeMap<String, Option<f64>>,
    /// Its tokens.
    pub new_tokens: usize,
    /// True if it ended with an end token, and not at the length limit.
    pub ended: bool,
}

/// The position up to which a run's metrics are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedUntil {
    /// Steps done.
    pub steps: usize,
    /// The step of the last evaluation; 0 without one.
    pub evaluated: usize,
}

/// A run's metrics so far, including those before resuming.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunHistory {
    /// Every step.
    pub steps: Vec<StepMetrics>,
    /// Every evaluation.
    pub evals: Vec<EvalMetrics>,
    /// Every sample.
    pub samples: Vec<PromptSample>,
    /// Sampled completions with their rewards.
    pub completions: Vec<RewardedCompletion>,
}

/// A line of the file. Unknown keys and lines of other kinds are ignored.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Step(StepMetrics),
    Eval(EvalMetrics),
    Sample(PromptSample),
    Completion(RewardedCompletion),
    Other { step: Option<usize> },
}

impl Line {
    fn is_after(&self, until: RecordedUntil) -> bool {
        match self {
            Self::Step(line) => line.step > until.steps,
            Self::Eval(line) => line.step > until.evaluated,
            Self::Sample(line) => line.step > until.evaluated,
            Self::Completion(line) => line.step > if line.evaluation { until.evaluated } else { until.steps },
            Self::Other { step } => step.is_some_and(|step| step > until.steps),
        }
    }
}

impl RunHistory {
    /// Reads a `metrics.jsonl`. An incomplete last line is ignored.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or another line is invalid.
    pub fn read(path: &Path) -> Result<Self, Error> {
        Ok(Self::parse(path, RecordedUntil { steps: usize::MAX, evaluated: usize::MAX })?.0)
    }

    /// Reads the metrics in `path` up to `until`, and their lines.
    fn parse(path: &Path, until: RecordedUntil) -> Result<(Self, String), Error> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let (mut history, mut kept) = (Self::default(), String::new());
        for (index, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
            let parsed: Line = serde_json::from_str(line).map_err(|error| {
                let message = format!("line {}: {error}", index + 1);
                failed(std::io::Error::new(std::io::ErrorKind::InvalidData, message))
            })?;
            if parsed.is_after(until) {
                continue;
            }
            kept += line;
            match parsed {
                Line::Step(step) => history.steps.push(step),
                Line::Eval(eval) => history.evals.push(eval),
                Line::Sample(sample) => history.samples.push(sample),
                Line::Completion(completion) => history.completions.push(completion),
                Line::Other { .. } => {}
            }
        }
        Ok((history, kept))
    }
}

/// A writer of `metrics.jsonl`. Every line reaches the file before the next step begins.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl MetricsFile {
    /// Creates the file, replacing one from an earlier run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self, Error> {
        let file = File::create(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), out: BufWriter::new(file) })
    }

    /// Continues the file of a run that has reached `until`, without its later lines, and returns the metrics before.
    /// Creates the file if it is missing.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::File`] if the shortened file cannot be written.
    pub fn resume(path: &Path, until: RecordedUntil) -> Result<(Self, RunHistory), Error> {
        if !path.exists() {
            return Ok((Self::create(path)?, RunHistory::default()));
        }
        let (history, kept) = RunHistory::parse(path, until)?;
        rekindle_hub::write_atomic(path, kept.as_bytes())?;
        let file = File::options().append(true).open(path);
        let file = file.map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok((Self { path: path.to_owned(), out: BufWriter::new(file) }, history))
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, line: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string(line).expect("numbers and texts serialize");
        writeln!(self.out, "{text}")
            .and_then(|()| self.out.flush())
            .map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn step(step: usize) -> StepMetrics {
        StepMetrics {
            step,
            epoch: step as f64 / 8.0,
            loss: 2.0 + 1.0 / step as f64,
            grad_norm: 0.5,
            learning_rate: 2e-4,
            tokens: 100,
            trained_tokens: 50,
            tokens_per_second: 900.0,
            seconds: step as f64,
            memory: Some(3 << 20),
            peak_memory: None,
            metrics: MetricValues::default(),
        }
    }

    pub(crate) fn eval(step: usize) -> EvalMetrics {
        let metrics = MetricValues::default();
        EvalMetrics { step, eval_loss: 2.25, eval_perplexity: Some(2.25f64.exp()), eval_tokens: 70, metrics }
    }

    pub(crate) fn sample(step: usize) -> PromptSample {
        let output = format!("after {step}");
        PromptSample { step, sample: 1, prompt: "<q>".into(), expected: None, output, new_tokens: 2, ended: true }
    }

    fn completion(step: usize, evaluation: bool) -> RewardedCompletion {
        RewardedCompletion {
            step,
            evaluation,
            prompt: "q".into(),
            completion: "a".into(),
            reward: None,
            rewards: [("exact".to_owned(), Some(0.5)), ("judge".to_owned(), None)].into(),
            new_tokens: 2,
            ended: true,
        }
    }

    #[test]
    fn a_resumed_file_goes_on_after_its_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let (mut file, nothing) = MetricsFile::resume(&path, RecordedUntil { steps: 5, evaluated: 5 }).unwrap();
        assert_eq!(nothing, RunHistory::default());
        for n in 1..=4 {
            file.write(&step(n)).unwrap();
        }
        file.write(&eval(2)).unwrap();
        file.write(&sample(2)).unwrap();
        file.write(&completion(2, false)).unwrap();
        file.write(&completion(3, false)).unwrap();
        file.write(&completion(3, true)).unwrap();
        file.write(&serde_json::json!({ "step": 4, "another": "kind" })).unwrap();
        drop(file);
        // As a kill leaves it.
        let mut text = std::fs::read_to_string(&path).unwrap();
        text += "{\"step\": 5, \"lo";
        std::fs::write(&path, &text).unwrap();
        assert_eq!(RunHistory::read(&path).unwrap().steps.len(), 4);

        let (mut file, history) = MetricsFile::resume(&path, RecordedUntil { steps: 2, evaluated: 2 }).unwrap();
        let mut expected = RunHistory {
            steps: vec![step(1), step(2)],
            evals: vec![eval(2)],
            samples: vec![sample(2)],
            completions: vec![completion(2, false)],
        };
        assert_eq!(history, expected);
        file.write(&step(3)).unwrap();
        expected.steps.push(step(3));
        assert_eq!(RunHistory::read(&path).unwrap(), expected);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 6);
        drop(file);

        // Stopped before its evaluation.
        let (_, history) = MetricsFile::resume(&path, RecordedUntil { steps: 2, evaluated: 0 }).unwrap();
        let completions = vec![completion(2, false)];
        assert_eq!(history, RunHistory { steps: vec![step(1), step(2)], completions, ..RunHistory::default() });
    }

    #[test]
    fn a_skipped_step_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let skipped = StepMetrics { grad_norm: f64::INFINITY, ..step(1) };
        MetricsFile::create(&path).unwrap().write(&skipped).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"grad_norm\":null"));
        assert_eq!(RunHistory::read(&path).unwrap().steps, [skipped]);
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\": 1}\n{\"step\": 2, \n").unwrap();
        let error = RunHistory::read(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl: line 2: EOF"), "{error}");
    }
}

//! `metrics.jsonl`: one JSON object a line, for every step and every evaluation.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::Error;

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// From 1 on.
    pub step: usize,
    /// Share of the data seen, 1 for all of it once.
    pub epoch: f64,
    /// Mean loss of the step's counted tokens.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Used by this step.
    pub learning_rate: f64,
    /// Tokens that went through the model in this step.
    pub tokens: usize,
    /// Tokens that counted in the loss.
    pub trained_tokens: usize,
    /// `tokens` ÷ the step's wall-clock time.
    pub tokens_per_second: f64,
    /// Wall-clock time since the run began.
    pub seconds: f64,
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalMetrics {
    /// Steps done before it.
    pub step: usize,
    /// Mean loss of the counted tokens.
    pub eval_loss: f64,
    /// e^`eval_loss`.
    pub eval_perplexity: f64,
    /// Counted tokens.
    pub eval_tokens: usize,
}

/// Writes `metrics.jsonl`; every line reaches the file before the next step begins.
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

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, line: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string(line).expect("numbers serialize");
        writeln!(self.out, "{text}")
            .and_then(|()| self.out.flush())
            .map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

//! `[data]`: the rows of a run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::{Columns, DataSource, NotShown, Overlong, RowSample, Thinking, TrainOn, Untrained};
use serde::{Deserialize, Serialize};

use super::ModelArguments;

/// `[data]`: the rows of a run and how they are encoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataArguments {
    /// Rows to train on: files, directories, patterns or datasets on the hub.
    pub train: DataPaths,
    /// Rows to evaluate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<DataPaths>,
    /// Rows of `train` to hold out and evaluate, if there is no `eval`: a fraction, or their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_fraction: Option<f64>,
    /// The maximum number of rows of `train` to use. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<usize>,
    /// Seed of `eval_fraction` and `max_rows`. It is separate from the run's seed, so that runs with other seeds hold
    /// out the same rows. Default 3407.
    #[serde(skip_serializing_if = "is_default_seed")]
    pub sample_seed: u64,
    /// If true, each epoch has its own random order. Default true.
    pub shuffle: bool,
    /// Treatment of rows longer than `max_seq_length`. Default: an error.
    pub overlong: Overlong,
    /// The turns of a conversation that the loss covers. Default: the assistant's.
    pub train_on: TrainOn,
    /// Treatment of reasoning in conversations. Default: it is trained.
    pub thinking: Thinking,
    /// Treatment of rows without a token to train. Default: an error.
    pub untrained: Untrained,
    /// Treatment of rows of which the chat template omits a part. Default: an error.
    pub not_shown: NotShown,
    /// The name of one of the tokenizer's chat templates. Default: `tool_use` for rows with tools, else `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// If true, plain text ends with the end token, which the loss covers. Default true.
    #[serde(skip_serializing_if = "is_true")]
    pub text_end_token: bool,
    /// Branch, tag or commit of datasets on the hub. Default `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Configuration of datasets on the hub: the folder of one of several sets of rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// Split of `train`. Default `train`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Split of `eval`. Default `test`, or `validation` for a directory without `test`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_split: Option<String>,
    /// The file's column for each key of a row, such as `prompt = "question"`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: BTreeMap<String, String>,
    /// If true, encoded rows are cached on disk. Default true.
    #[serde(skip_serializing_if = "is_true")]
    pub cache: bool,
}

/// The default of [`DataArguments::sample_seed`].
pub const SAMPLE_SEED: u64 = 3407;

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_default_seed(value: &u64) -> bool {
    *value == SAMPLE_SEED
}

/// One path, pattern or dataset name, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a file, a directory or a pattern, or a list of them")]
pub enum DataPaths {
    /// A single one.
    One(PathBuf),
    /// A list, read in this order.
    Several(Vec<PathBuf>),
}

impl Default for DataArguments {
    fn default() -> Self {
        Self {
            train: DataPaths::Several(Vec::new()),
            eval: None,
            eval_fraction: None,
            max_rows: None,
            sample_seed: SAMPLE_SEED,
            shuffle: true,
            overlong: Overlong::default(),
            train_on: TrainOn::default(),
            thinking: Thinking::default(),
            untrained: Untrained::default(),
            not_shown: NotShown::default(),
            chat_template: None,
            text_end_token: true,
            revision: None,
            subset: None,
            split: None,
            eval_split: None,
            columns: BTreeMap::new(),
            cache: true,
        }
    }
}

impl DataArguments {
    /// Returns the arguments for training on `train`, with the defaults.
    pub fn new(train: impl Into<PathBuf>) -> Self {
        Self { train: DataPaths::One(train.into()), ..Self::default() }
    }

    /// Returns the rows to train on, found with the hub access of `model`.
    pub fn train_source(&self, model: &ModelArguments) -> DataSource {
        self.source(&self.train, model).split(self.split.clone())
    }

    /// Returns the rows to evaluate: those of `eval`, or those that `eval_fraction` holds out.
    pub fn eval_source(&self, model: &ModelArguments) -> Option<DataSource> {
        match &self.eval {
            Some(eval) => {
                let all = RowSample { max_rows: None, held_out: None, seed: self.sample_seed };
                Some(self.source(eval, model).sample(all).held_out().split(self.eval_split.clone()))
            }
            None => self.eval_fraction.map(|_| self.train_source(model).held_out_rows()),
        }
    }

    /// Returns true if there are rows to evaluate.
    pub fn has_eval(&self) -> bool {
        self.eval.is_some() || self.eval_fraction.is_some()
    }

    pub(crate) fn sample(&self) -> RowSample {
        RowSample { max_rows: self.max_rows, held_out: self.eval_fraction, seed: self.sample_seed }
    }

    pub(super) fn list_problems(&self, problems: &mut Vec<String>) {
        if self.train.is_empty() {
            problems.push(
                "[data] train is missing; set it to a file of rows, such as JSON lines, CSV or \
                     Parquet"
                    .to_owned(),
            );
        }
        if let Err(error) = Columns::new(self.columns.clone()) {
            problems.push(format!("[data] {error}"));
        }
        if let Err(error) = self.sample().check() {
            problems.push(format!("[data] {error}"));
        }
        if self.eval.is_some() && self.eval_fraction.is_some() {
            problems.push(
                "[data] eval and eval_fraction exclude each other; eval names rows to evaluate, eval_fraction holds \
                 rows of train out"
                    .to_owned(),
            );
        }
    }

    fn source(&self, paths: &DataPaths, model: &ModelArguments) -> DataSource {
        let source = DataSource::with_arguments(paths.as_slice().to_vec(), self.clone()).hub(model.access());
        let on_hub = |paths: &DataPaths| DataSource::of(paths.as_slice()).is_on_hub();
        // If one of the two sources is on disk, these keys apply to the other.
        if !source.is_on_hub() && (on_hub(&self.train) || self.eval.as_ref().is_some_and(on_hub)) {
            return source.revision(None).subset(None);
        }
        source
    }
}

impl DataPaths {
    fn as_slice(&self) -> &[PathBuf] {
        match self {
            DataPaths::One(path) => std::slice::from_ref(path),
            DataPaths::Several(paths) => paths,
        }
    }

    /// Returns true if nothing is named.
    fn is_empty(&self) -> bool {
        self.as_slice().iter().all(|path| path.as_os_str().is_empty())
    }
}

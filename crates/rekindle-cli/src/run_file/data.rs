//! `[data]`: the rows of a run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rekindle::{Columns, DataSource, NotShown, Overlong, RowSample, Thinking, TrainOn, Untrained};
use serde::{Deserialize, Serialize};

use super::ModelSection;

/// Where the rows come from, and how they are read.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct DataSection {
    pub(crate) train: Paths,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval: Option<Paths>,
    /// Rows of `train` that are held out where there is no `eval`: a fraction, or their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval_fraction: Option<f64>,
    /// The most rows of `train` that are used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_rows: Option<usize>,
    /// The seed of `eval_fraction` and `max_rows`, apart from the run's: runs with other seeds stay comparable.
    #[serde(skip_serializing_if = "is_default_seed")]
    pub(crate) sample_seed: u64,
    pub(crate) shuffle: bool,
    pub(crate) overlong: Overlong,
    pub(crate) train_on: TrainOn,
    pub(crate) thinking: Thinking,
    pub(crate) untrained: Untrained,
    pub(crate) not_shown: NotShown,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) chat_template: Option<String>,
    #[serde(skip_serializing_if = "is_true")]
    pub(crate) text_end_token: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) subset: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) split: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval_split: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) columns: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_true")]
    pub(crate) cache: bool,
}

/// The default of `sample_seed`.
pub(crate) const SAMPLE_SEED: u64 = 3407;

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_default_seed(value: &u64) -> bool {
    *value == SAMPLE_SEED
}

/// One, or a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a file, a directory or a pattern, or a list of them")]
pub(crate) enum Paths {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: Paths::Several(Vec::new()),
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

impl DataSection {
    /// The rows to train on; `model` has the settings of the hub.
    pub(crate) fn train_source(&self, model: &ModelSection) -> DataSource {
        self.source(&self.train, model).split(self.split.clone()).sample(self.sample())
    }

    /// The rows to evaluate: those of `eval`, or those that `eval_fraction` holds out.
    pub(crate) fn eval_source(&self, model: &ModelSection) -> Option<DataSource> {
        match &self.eval {
            Some(eval) => Some(self.source(eval, model).held_out().split(self.eval_split.clone())),
            None => self.eval_fraction.map(|_| self.train_source(model).held_out_rows()),
        }
    }

    /// Returns whether there are rows to evaluate.
    pub(crate) fn has_eval(&self) -> bool {
        self.eval.is_some() || self.eval_fraction.is_some()
    }

    fn sample(&self) -> RowSample {
        RowSample { max_rows: self.max_rows, held_out: self.eval_fraction, seed: self.sample_seed }
    }

    pub(super) fn check(&self, problems: &mut Vec<String>) {
        if self.train.is_empty() {
            problems
                .push("[data] train is missing; give a file of rows, such as JSON lines, CSV or Parquet".to_owned());
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

    fn source(&self, paths: &Paths, model: &ModelSection) -> DataSource {
        let source = DataSource::of(paths.as_slice())
            .overlong(self.overlong)
            .train_on(self.train_on)
            .thinking(self.thinking)
            .untrained(self.untrained)
            .not_shown(self.not_shown)
            .chat_template(self.chat_template.clone())
            .text_end_token(self.text_end_token)
            .columns(self.columns.clone())
            .cache(self.cache)
            .hub(model.token.clone(), model.cache_dir.clone(), model.local_files_only);
        let on_hub = |paths: &Paths| DataSource::of(paths.as_slice()).is_on_hub();
        // If one of the two sources is on disk, these keys apply to the other.
        if !source.is_on_hub() && (on_hub(&self.train) || self.eval.as_ref().is_some_and(on_hub)) {
            return source;
        }
        source.revision(self.revision.clone()).subset(self.subset.clone())
    }
}

impl Paths {
    fn as_slice(&self) -> &[PathBuf] {
        match self {
            Paths::One(path) => std::slice::from_ref(path),
            Paths::Several(paths) => paths,
        }
    }

    /// Returns whether nothing is named.
    fn is_empty(&self) -> bool {
        self.as_slice().iter().all(|path| path.as_os_str().is_empty())
    }
}

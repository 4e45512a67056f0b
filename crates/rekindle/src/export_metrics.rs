//! Export of a run's metrics for other programs.

mod csv;
mod mlflow;
mod wandb;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rekindle_train::{RunHistory, eval_scalars, step_scalars};
use sha2::{Digest as _, Sha256};

use crate::Error;

/// A format of exported metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsFormat {
    /// One table, with a row for each step.
    Csv,
    /// The directory `mlruns` that MLflow's file store reads.
    Mlflow,
    /// The directory `wandb` of an offline run, which `wandb sync` uploads when a user runs it.
    WandbOffline,
}

impl MetricsFormat {
    /// The names of all formats.
    pub const NAMES: [&str; 3] = ["csv", "mlflow", "wandb-offline"];
}

impl FromStr for MetricsFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "csv" => Ok(Self::Csv),
            "mlflow" => Ok(Self::Mlflow),
            "wandb-offline" => Ok(Self::WandbOffline),
            _ => {
                let names = Self::NAMES.join(", ");
                Err(Error::Argument(format!("{name:?} is no format of metrics; choose one of {names}")))
            }
        }
    }
}

/// The files of the resolved configuration: the first one, if the second one is the user's run file.
const CONFIGURATIONS: [&str; 2] = ["run.resolved.toml", "run.toml"];

/// The metrics of a run as exporters need them.
#[derive(Debug)]
struct ExportedRun {
    dir: PathBuf,
    name: String,
    /// The time at which the run began.
    start: Duration,
    rows: Vec<MetricRow>,
    /// The keys of the run file and their values, such as `train.learning_rate`.
    parameters: Vec<(String, toml::Value)>,
}

/// The metrics of a step: those of training, then those of evaluation.
#[derive(Debug)]
struct MetricRow {
    step: usize,
    /// Seconds since the start of the run.
    seconds: f64,
    values: Vec<(String, f64)>,
}

/// Writes the metrics of the run in the directory `run` to `out`, and returns the path of the result. No program is
/// started, and nothing is sent.
///
/// The default of `out` is `metrics.csv` in the run's directory for CSV, and `mlruns` or `wandb` in the current directory
/// for the others, to which a run is added. An earlier export of the same run is replaced. Metrics have the names of
/// transformers' trainer (`train/loss`, `eval/loss`). Values that are not finite are left out.
///
/// # Errors
/// [`Error::Train`] if `metrics.jsonl` cannot be read, [`Error::File`] if the result cannot be written.
pub fn export_metrics(run: &Path, format: MetricsFormat, out: Option<&Path>) -> Result<PathBuf, Error> {
    let run = ExportedRun::read(run)?;
    match format {
        MetricsFormat::Csv => csv::write(&run, out),
        MetricsFormat::Mlflow => mlflow::write(&run, out.unwrap_or(Path::new("mlruns"))),
        MetricsFormat::WandbOffline => wandb::write(&run, out.unwrap_or(Path::new("wandb"))),
    }
}

impl ExportedRun {
    fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("metrics.jsonl");
        let history = RunHistory::read(&path)?;
        let modified =
            fs::metadata(&path).and_then(|metadata| metadata.modified()).unwrap_or_else(|_| SystemTime::now());
        let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = history.steps.last().map_or(0.0, |step| step.seconds);
        let length = Duration::try_from_secs_f64(length).unwrap_or_default();
        let absolute = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let name = absolute.file_name().map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned());
        let text = CONFIGURATIONS.iter().find_map(|name| fs::read_to_string(dir.join(name)).ok()).unwrap_or_default();
        let mut parameters = Vec::new();
        flatten("", &toml::Value::Table(text.parse().unwrap_or_default()), &mut parameters);
        // A token of the hub is not written to run.toml; the key is left out in any case.
        parameters.retain(|(key, _)| key != "model.token");
        let start = modified.saturating_sub(length);
        Ok(Self { dir: absolute, name, start, rows: rows(&history), parameters })
    }

    /// Returns `digits` hexadecimal digits that identify the run: its directory and its first step.
    fn id(&self, digits: usize) -> String {
        let first = self.rows.first().map_or_else(String::new, |row| format!("{row:?}"));
        let hash = Sha256::new_with_prefix(self.dir.as_os_str().as_encoded_bytes()).chain_update(first).finalize();
        let mut id = String::new();
        for byte in &hash[..digits.div_ceil(2)] {
            write!(id, "{byte:02x}").expect("writing to a string");
        }
        id.truncate(digits);
        id
    }
}

/// Joins the metrics of training and evaluation by their steps.
fn rows(history: &RunHistory) -> Vec<MetricRow> {
    let mut rows: BTreeMap<usize, MetricRow> = BTreeMap::new();
    let row = |step| MetricRow { step, seconds: 0.0, values: Vec::new() };
    for step in &history.steps {
        let row = rows.entry(step.step).or_insert_with(|| row(step.step));
        row.seconds = step.seconds;
        row.values.extend(step_scalars(step));
    }
    for eval in &history.evals {
        let values = eval_scalars(eval);
        rows.entry(eval.step).or_insert_with(|| row(eval.step)).values.extend(values);
    }
    let mut rows: Vec<MetricRow> = rows.into_values().collect();
    rows.iter_mut().for_each(|row| row.values.retain(|(_, value)| value.is_finite()));
    rows
}

/// Lists the values of a table with their keys joined by dots.
fn flatten(prefix: &str, value: &toml::Value, out: &mut Vec<(String, toml::Value)>) {
    let toml::Value::Table(table) = value else {
        out.push((prefix.to_owned(), value.clone()));
        return;
    };
    for (key, value) in table {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        flatten(&key, value, out);
    }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| rekindle_hub::Error::Io { path: path.to_owned(), source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of two steps with an evaluation after the second.
    pub(super) fn run(dir: &Path) -> ExportedRun {
        let step = |step: usize, loss: f64| {
            format!(
                "{{\"step\":{step},\"epoch\":0.5,\"loss\":{loss},\"grad_norm\":1.0,\"learning_rate\":0.001,\"tokens\":8,\
                 \"trained_tokens\":4,\"tokens_per_second\":16.0,\"seconds\":{step}.5,\"memory\":1024}}\n"
            )
        };
        let eval = "{\"step\":2,\"eval_loss\":0.75,\"eval_tokens\":4}\n";
        fs::write(dir.join("metrics.jsonl"), step(1, 2.0) + &step(2, 1.0) + eval).unwrap();
        fs::write(dir.join("run.toml"), "seed = 7\n[train]\nlearning_rate = 1e-3\noptim = \"adamw\"\n").unwrap();
        let run = ExportedRun::read(dir).unwrap();
        ExportedRun { start: Duration::from_millis(1_700_000_000_250), ..run }
    }

    #[test]
    fn training_and_evaluation_share_a_row() {
        let scratch = tempfile::tempdir().unwrap();
        let run = run(scratch.path());
        assert_eq!(run.rows.len(), 2);
        let value = |row: usize, name: &str| run.rows[row].values.iter().find(|(key, _)| key == name).map(|(_, v)| *v);
        assert_eq!((value(0, "train/loss"), value(0, "eval/loss")), (Some(2.0), None));
        assert_eq!((value(1, "train/loss"), value(1, "eval/loss")), (Some(1.0), Some(0.75)));
        assert_eq!(run.rows[1].seconds, 2.5);
        let names: Vec<&str> = run.parameters.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(names, ["seed", "train.learning_rate", "train.optim"]);
        assert_eq!((run.id(8).len(), run.id(32).len()), (8, 32));
    }

    #[test]
    fn formats_have_names() {
        for name in MetricsFormat::NAMES {
            name.parse::<MetricsFormat>().unwrap();
        }
        let error = "tensorboard".parse::<MetricsFormat>().unwrap_err().to_string();
        assert!(error.contains("csv, mlflow, wandb-offline"), "{error}");
    }
}

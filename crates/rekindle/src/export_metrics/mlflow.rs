//! Metrics in the layout of MLflow's file store.
//!
//! ```text
//! mlruns/EXPERIMENT/meta.yaml
//! mlruns/EXPERIMENT/RUN/meta.yaml
//! mlruns/EXPERIMENT/RUN/metrics/train/loss     a line for each value: milliseconds since 1970, value, step
//! mlruns/EXPERIMENT/RUN/params/train.optim     the value
//! mlruns/EXPERIMENT/RUN/tags/mlflow.runName    the value
//! mlruns/EXPERIMENT/RUN/artifacts/report.html
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_hub::{AtomicDir, write_atomic};
use serde_json::Value;

use super::{ExportedRun, io_error};
use crate::Error;

/// The experiment of all exported runs, and its number, which MLflow would choose at random.
const EXPERIMENT: (&str, &str) = ("rekindle", "526569");

/// Files of a run that become its artifacts.
const ARTIFACTS: [&str; 4] = ["report.html", "loss.svg", "run.resolved.toml", "run.toml"];

/// The status of a finished run, and the type of a local source.
const FINISHED: u32 = 3;
const LOCAL: u32 = 4;

/// Adds the run to the directory `out`, and returns the run's directory there.
pub(super) fn write(run: &ExportedRun, out: &Path) -> Result<PathBuf, Error> {
    let (name, number) = EXPERIMENT;
    let experiment = out.join(number);
    fs::create_dir_all(&experiment).map_err(io_error(&experiment))?;
    let absolute = fs::canonicalize(&experiment).map_err(io_error(&experiment))?;
    let start = run.start.as_millis();
    if !experiment.join("meta.yaml").exists() {
        let meta = format!(
            "artifact_location: {}\ncreation_time: {start}\nexperiment_id: '{number}'\nlast_update_time: {start}\n\
             lifecycle_stage: active\nname: {name}\n",
            file_url(&absolute)
        );
        write_atomic(&experiment.join("meta.yaml"), meta.as_bytes())?;
    }
    let id = run.id(32);
    let dir = experiment.join(&id);
    let target = AtomicDir::replace(&dir)?;
    let put = |name: &str, text: &str| {
        let path = target.path().join(name);
        let parent = path.parent().unwrap_or(target.path());
        fs::create_dir_all(parent).map_err(io_error(parent))?;
        fs::write(&path, text).map_err(io_error(&path))
    };
    let at = |seconds: f64| (run.start + Duration::try_from_secs_f64(seconds).unwrap_or_default()).as_millis();
    let end = at(run.rows.iter().map(|row| row.seconds).fold(0.0, f64::max));
    let meta = format!(
        "artifact_uri: {}\nend_time: {end}\nentry_point_name: ''\nexperiment_id: '{number}'\nlifecycle_stage: active\n\
         run_id: {id}\nrun_name: {}\nrun_uuid: {id}\nsource_name: ''\nsource_type: {LOCAL}\nsource_version: ''\n\
         start_time: {start}\nstatus: {FINISHED}\ntags: []\nuser_id: ''\n",
        file_url(&absolute.join(&id).join("artifacts")),
        // JSON's quotes are YAML's too.
        Value::from(run.name.as_str())
    );
    put("meta.yaml", &meta)?;
    put("tags/mlflow.runName", &run.name)?;
    put("tags/mlflow.source.name", "rekindle")?;
    put("tags/mlflow.source.type", "LOCAL")?;
    let mut metrics: BTreeMap<&str, String> = BTreeMap::new();
    for row in &run.rows {
        for (name, value) in &row.values {
            writeln!(metrics.entry(name).or_default(), "{} {value} {}", at(row.seconds), row.step)
                .expect("writing to a string");
        }
    }
    for (name, lines) in &metrics {
        put(&format!("metrics/{name}"), lines)?;
    }
    for (key, value) in &run.parameters {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        put(&format!("params/{key}"), &text)?;
    }
    let artifacts = target.path().join("artifacts");
    fs::create_dir_all(&artifacts).map_err(io_error(&artifacts))?;
    for name in ARTIFACTS.iter().filter(|name| run.dir.join(name).is_file()) {
        fs::copy(run.dir.join(name), artifacts.join(name)).map_err(io_error(&artifacts))?;
    }
    target.commit()?;
    Ok(dir)
}

/// Returns the URL of an absolute path.
fn file_url(path: &Path) -> String {
    let mut url = "file://".to_owned();
    for byte in path.to_string_lossy().bytes() {
        match byte {
            b'/' | b'-' | b'_' | b'.' | b'~' | b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => url.push(char::from(byte)),
            _ => write!(url, "%{byte:02X}").expect("writing to a string"),
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_the_layout_of_the_file_store() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("loss.svg"), "<svg/>").unwrap();
        let run = super::super::tests::run(scratch.path());
        let out = scratch.path().join("ml runs");
        let dir = write(&run, &out).unwrap();
        assert_eq!(write(&run, &out).unwrap(), dir, "an earlier export is replaced");
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!(read("metrics/train/loss"), "1700000001750 2 1\n1700000002750 1 2\n");
        assert_eq!(read("metrics/eval/loss"), "1700000002750 0.75 2\n");
        assert_eq!((read("params/train.optim"), read("params/train.learning_rate")), ("adamw".into(), "0.001".into()));
        assert_eq!(read("artifacts/loss.svg"), "<svg/>");
        let meta = read("meta.yaml");
        assert!(meta.contains("start_time: 1700000000250\n") && meta.contains("end_time: 1700000002750\n"), "{meta}");
        assert!(meta.contains("/ml%20runs/526569/"), "{meta}");
        let experiment = fs::read_to_string(out.join("526569/meta.yaml")).unwrap();
        assert!(experiment.contains("name: rekindle\n"), "{experiment}");
    }
}

//! Metrics as a table.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rekindle_hub::write_atomic;

use super::ExportedRun;
use crate::Error;

/// Writes a header and a row for each step. A metric that a step does not have is an empty field.
pub(super) fn write(run: &ExportedRun, out: Option<&Path>) -> Result<PathBuf, Error> {
    let path = out.map_or_else(|| run.dir.join("metrics.csv"), Path::to_owned);
    write_atomic(&path, table(run).as_bytes())?;
    Ok(path)
}

fn table(run: &ExportedRun) -> String {
    let mut names = Vec::new();
    let mut known = BTreeSet::new();
    for (name, _) in run.rows.iter().flat_map(|row| &row.values) {
        if known.insert(name) {
            names.push(name);
        }
    }
    let quoted = |name: &str| match name.contains([',', '"', '\n']) {
        true => format!("\"{}\"", name.replace('"', "\"\"")),
        false => name.to_owned(),
    };
    let mut text = "step,seconds".to_owned();
    names.iter().for_each(|name| text += &format!(",{}", quoted(name)));
    text.push('\n');
    for row in &run.rows {
        text += &format!("{},{}", row.step, row.seconds);
        for name in &names {
            let value = row.values.iter().find(|(key, _)| key == *name);
            text += &value.map_or_else(|| ",".to_owned(), |(_, value)| format!(",{value}"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_for_each_step() {
        let scratch = tempfile::tempdir().unwrap();
        let run = super::super::tests::run(scratch.path());
        let path = write(&run, None).unwrap();
        assert_eq!(path.file_name().unwrap(), "metrics.csv");
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "step,seconds,train/loss,train/grad_norm,train/learning_rate,train/epoch,train/tokens_per_second,\
             train/memory,eval/loss"
        );
        assert_eq!(lines[1..], ["1,1.5,2,1,0.001,0.5,16,1024,", "2,2.5,1,1,0.001,0.5,16,1024,0.75"]);
    }
}

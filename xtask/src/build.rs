//! Builds all programs of the workspace with one command, so that they share their dependencies.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::root;

/// Runs `cargo build --workspace` with these arguments; returns root sources and programs.
pub(crate) fn programs(arguments: &[&str]) -> Result<Vec<(PathBuf, PathBuf)>, Box<dyn Error>> {
    let mut command = Command::new("cargo");
    command.args(["build", "--workspace", "--locked"]).args(arguments);
    command.args(["--message-format", "json-render-diagnostics"]).current_dir(root());
    eprintln!("$ {command:?}");
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("cargo build: {}", output.status).into());
    }
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        if let (Some(source), Some(program)) = (message["target"]["src_path"].as_str(), message["executable"].as_str())
        {
            programs.push((PathBuf::from(source), PathBuf::from(program)));
        }
    }
    Ok(programs)
}

/// Returns the program whose root source has this path in the repository; program names may not be unique.
pub(crate) fn of<'a>(programs: &'a [(PathBuf, PathBuf)], source: &str) -> Result<&'a PathBuf, Box<dyn Error>> {
    let found = programs.iter().find(|(root, _)| root.ends_with(source));
    found.map(|(_, program)| program).ok_or_else(|| format!("cargo built nothing from {source}").into())
}

//! Building programs of the workspace, all in one go, so that they share their dependencies.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::root;

/// What `cargo build --workspace` made with these arguments: names and files.
pub(crate) fn programs(arguments: &[&str]) -> Result<Vec<(String, PathBuf)>, Box<dyn Error>> {
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
        if let (Some(name), Some(file)) = (message["target"]["name"].as_str(), message["executable"].as_str()) {
            programs.push((name.to_owned(), PathBuf::from(file)));
        }
    }
    Ok(programs)
}

/// One of them.
pub(crate) fn named<'a>(programs: &'a [(String, PathBuf)], name: &str) -> Result<&'a PathBuf, Box<dyn Error>> {
    let found = programs.iter().find(|(program, _)| program == name);
    found.map(|(_, file)| file).ok_or_else(|| format!("cargo built no {name}").into())
}

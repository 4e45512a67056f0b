//! Test of the commands in the example notebooks.

use std::fs;
use std::path::Path;

use clap::Parser as _;
use serde_json::Value;

use super::Args;

/// Splits a command line at spaces outside of double quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            other => words.last_mut().unwrap().push(other),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn the_notebooks_are_valid_and_their_commands_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/notebooks");
    let mut commands = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let notebook: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((&notebook["nbformat"], &notebook["nbformat_minor"]), (&4.into(), &5.into()), "{path:?}");
        let mut ids = Vec::new();
        for cell in notebook["cells"].as_array().unwrap() {
            let kind = cell["cell_type"].as_str().unwrap();
            assert!(["code", "markdown"].contains(&kind) && cell["metadata"].is_object(), "{cell}");
            let id = cell["id"].as_str().unwrap();
            assert!(!ids.contains(&id) && id.len() <= 64, "{id}");
            ids.push(id);
            if kind == "code" {
                assert!(
                    cell["outputs"] == Value::Array(Vec::new()) && cell["execution_count"].is_null(),
                    "{id} was run"
                );
            }
            for line in cell["source"].as_array().unwrap() {
                let Some(line) = line.as_str().unwrap().trim_end().strip_prefix("!rekindle ") else { continue };
                let parsed = Args::try_parse_from([vec!["rekindle".to_owned()], words(line)].concat());
                parsed.unwrap_or_else(|error| panic!("{line}: {error}"));
                commands += 1;
            }
        }
    }
    assert!(commands >= 7, "{commands} commands");
}

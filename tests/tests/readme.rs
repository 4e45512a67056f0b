//! Runs the README's library example, and checks that the README contains it verbatim.

#![allow(clippy::unwrap_used)]

use std::path::Path;

include!("../../crates/rekindle/examples/finetune.rs");

const EXAMPLE: &str = include_str!("../../crates/rekindle/examples/finetune.rs");
const README: &str = include_str!("../../README.md");

#[test]
fn the_example_of_the_readme_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::env::set_current_dir(root).unwrap();
    main().unwrap();
    let adapter = root.join("target/finetuned");
    assert!(adapter.join("adapter_model.safetensors").exists());
    assert!(adapter.join("tokenizer.json").exists(), "the tokenizer is saved too");
}

#[test]
fn the_readme_contains_the_example_verbatim() {
    assert!(README.contains(EXAMPLE), "README.md and crates/rekindle/examples/finetune.rs differ");
}

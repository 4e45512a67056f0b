//! `cargo xtask tidy`: checks the invariants of ARCHITECTURE.md.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::root;

/// The workspace crates that each crate may depend on, excluding dev-dependencies.
const LAYERS: [(&str, &[&str]); 18] = [
    ("rekindle-dist", &[]),
    ("rekindle-hub", &[]),
    ("rekindle-rewards", &[]),
    ("rekindle-rope", &[]),
    ("rekindle-data", &["rekindle-hub"]),
    ("rekindle-gguf", &["rekindle-hub"]),
    ("rekindle-kernels", &[]),
    ("rekindle-quant", &["rekindle-kernels", "rekindle-hub"]),
    ("rekindle-lora", &["rekindle-kernels", "rekindle-hub", "rekindle-quant"]),
    (
        "rekindle-models",
        &["rekindle-kernels", "rekindle-gguf", "rekindle-hub", "rekindle-quant", "rekindle-rope", "rekindle-lora"],
    ),
    ("rekindle-burn", &["rekindle-kernels", "rekindle-lora", "rekindle-quant", "rekindle-rope"]),
    ("rekindle-engine", &["rekindle-kernels", "rekindle-models"]),
    (
        "rekindle-train",
        &[
            "rekindle-kernels",
            "rekindle-hub",
            "rekindle-data",
            "rekindle-dist",
            "rekindle-lora",
            "rekindle-models",
            "rekindle-engine",
            "rekindle-rewards",
        ],
    ),
    (
        "rekindle",
        &[
            "rekindle-kernels",
            "rekindle-hub",
            "rekindle-data",
            "rekindle-dist",
            "rekindle-gguf",
            "rekindle-lora",
            "rekindle-models",
            "rekindle-quant",
            "rekindle-engine",
            "rekindle-rewards",
            "rekindle-train",
        ],
    ),
    ("rekindle-serve", &[]),
    ("rekindle-cli", &["rekindle", "rekindle-serve"]),
    ("rekindle-tests", &["*"]),
    ("xtask", &["*"]),
];

/// External crates that only some workspace crates may depend on.
const OWNERS: [(&str, &[&str]); 14] = [
    ("cudarc", &["rekindle-kernels"]),
    ("burn", &["rekindle-burn", "rekindle-kernels", "rekindle-quant", "rekindle-tests"]),
    ("burn-cubecl", &["rekindle-burn", "rekindle-kernels"]),
    ("burn-flex", &["rekindle-kernels"]),
    ("cubecl", &["rekindle-burn", "rekindle-kernels"]),
    ("cubecl-common", &["rekindle-burn"]),
    ("gemm", &["rekindle-kernels"]),
    ("hf-hub", &["rekindle-hub"]),
    ("ureq", &["rekindle-hub", "rekindle-rewards"]),
    ("memmap2", &["rekindle-hub"]),
    ("minijinja", &["rekindle-data", "xtask"]),
    ("axum", &["rekindle-serve"]),
    ("llguidance", &["rekindle-serve"]),
    ("tokio", &["rekindle-serve"]),
];

/// Words that may occur only below certain paths: the word and the allowed path prefixes.
const WORDS: [(&str, &[&str]); 9] = [
    ("cudarc", &["kernels/src/runtime/"]),
    ("cublasLt", &["kernels/src/runtime/", "kernels/cu/"]),
    (
        "allow(unsafe_code)",
        &["kernels/src/", "crates/rekindle-hub/", "kernels/tests/meta.rs", "tests/tests/memory_plan.rs"],
    ),
    ("quant_state", &["crates/rekindle-quant/"]),
    ("adapter_config.json", &["crates/rekindle-lora/", "crates/rekindle-cli/", "tests/", "crates/rekindle-hub/"]),
    ("self_attn.", &["crates/rekindle-models/", "crates/rekindle-lora/", "tests/", "crates/rekindle/"]),
    (
        "rope_parameters",
        &[
            "crates/rekindle-rope/",
            "crates/rekindle-models/src/families/",
            "tests/",
            "crates/rekindle-cli/tests/",
            "crates/rekindle-hub/",
        ],
    ),
    ("lora_A", &["crates/rekindle-lora/", "kernels/src/params/", "tests/", "crates/rekindle-hub/"]),
    ("todo!(", &[]),
];

/// Keys of a `config.json` that describe an architecture. Production code names them only in [`FAMILIES`].
const ARCHITECTURE_KEYS: [&str; 18] = [
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "attention_bias",
    "rms_norm_eps",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
];

/// The folder of the model families.
const FAMILIES: &str = "crates/rekindle-models/src/families/";

/// Files outside of [`FAMILIES`] that write architecture keys: the output of `inspect`, a merge that unties the head, and
/// the keys of GGUF, some of which have the same names.
const KEY_WRITERS: [&str; 4] = [
    "crates/rekindle/src/inspect.rs",
    "crates/rekindle-models/src/checkpoint/merge.rs",
    "crates/rekindle-gguf/src/architecture/describe.rs",
    "crates/rekindle-gguf/src/architecture/read.rs",
];

/// First words of a doc comment that make it a noun clause instead of a verb or a noun phrase.
const CLAUSES: [&str; 6] = ["What", "Whether", "How", "Of", "Where", "Which"];

/// Folders of `kernels/src`, from the lowest up: a folder names none above it.
const ROOMS: [&str; 6] = ["runtime", "host", "tensor", "params", "ops", "optimizer"];

/// A file longer than this needs a reason.
const LONG_FILE: usize = 500;

pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    let mut problems = dependencies()?;
    for file in sources(&root())? {
        let text = std::fs::read_to_string(&file)?;
        let name = file.strip_prefix(root())?.display().to_string();
        if name == "xtask/src/tidy.rs" {
            continue;
        }
        for (word, places) in WORDS {
            if text.contains(word) && !places.iter().any(|place| name.starts_with(place)) {
                problems.push(format!("{name}: \"{word}\" belongs to {}", places.join(", ")));
            }
        }
        if let Some(problem) = room_above(&name, &text) {
            problems.push(problem);
        }
        problems.extend(architecture_keys(&name, &text));
        problems.extend(noun_clauses(&name, &text));
        let lines = text.lines().count();
        if lines > LONG_FILE {
            problems.push(format!("{name} has {lines} lines; split files longer than {LONG_FILE} lines"));
        }
    }
    if problems.is_empty() {
        eprintln!("tidy: ok");
        return Ok(());
    }
    Err(problems.join("\n       ").into())
}

/// Returns the architecture keys that a file of production code names outside of the families.
fn architecture_keys(name: &str, text: &str) -> Vec<String> {
    let is_production = name.contains("/src/") && !name.starts_with("xtask/") && !name.ends_with("tests.rs");
    if !is_production || name.starts_with(FAMILIES) || KEY_WRITERS.contains(&name) {
        return Vec::new();
    }
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let named = ARCHITECTURE_KEYS.iter().filter(|key| code.contains(&format!("\"{key}\"")));
    named.map(|key| format!("{name}: the architecture key \"{key}\" belongs to {FAMILIES}")).collect()
}

/// Returns the text of a line of a doc comment.
fn doc(line: &str) -> Option<&str> {
    let line = line.trim_start();
    line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))
}

/// Returns the doc comments of a file that begin with a noun clause.
fn noun_clauses(name: &str, text: &str) -> Vec<String> {
    let mut previous_is_doc = false;
    let mut problems = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let begins = doc(line).filter(|_| !previous_is_doc).and_then(|doc| doc.split_whitespace().next());
        if let Some(word) = begins.filter(|word| CLAUSES.contains(word)) {
            let line = index + 1;
            problems.push(format!("{name}:{line}: begin the doc comment with a verb or a noun, not with \"{word}\""));
        }
        previous_is_doc = doc(line).is_some();
    }
    problems
}

/// Returns a problem if a file of `kernels/src` names a folder above its own.
fn room_above(name: &str, text: &str) -> Option<String> {
    let room = name.strip_prefix("kernels/src/")?.split_once('/')?.0;
    let floor = ROOMS.iter().position(|&known| known == room)?;
    let above = ROOMS[floor + 1..].iter().find(|above| text.contains(&format!("crate::{above}")))?;
    Some(format!("{name} names crate::{above}, which lies above {room}"))
}

/// Dependencies that point the wrong way.
fn dependencies() -> Result<Vec<String>, Box<dyn Error>> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .current_dir(root())
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let layers = BTreeMap::from(LAYERS);
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = layers.get(name) else {
            problems.push(format!("{name} is missing from LAYERS in xtask/src/tidy.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let ships = dependency["kind"].is_null();
            if ships && layers.contains_key(on) && !allowed.contains(&"*") && !allowed.contains(&on) {
                problems.push(format!("{name} depends on {on}, which LAYERS does not allow"));
            }
            for (owned, owners) in OWNERS {
                if ships && on == owned && !owners.contains(&name) {
                    problems.push(format!("{name} depends on {on}, which only {} may", owners.join(", ")));
                }
            }
        }
    }
    Ok(problems)
}

/// Returns every Rust and CUDA file of the workspace's crates.
fn sources(dir: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                found.extend(sources(&path)?);
            }
        } else if [".rs", ".cu", ".cuh"].iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architecture_keys_belong_to_families() {
        let code = "let heads = json[\"num_attention_heads\"];";
        assert_eq!(architecture_keys("crates/rekindle-models/src/loss.rs", code).len(), 1);
        assert!(architecture_keys("crates/rekindle-models/src/families/llama.rs", code).is_empty());
        let test = format!("#[cfg(test)]\nmod tests {{ {code} }}");
        assert!(architecture_keys("crates/rekindle-models/src/loss.rs", &test).is_empty());
    }

    #[test]
    fn doc_comments_begin_with_a_verb_or_a_noun() {
        let found = |text: &str| noun_clauses("crates/rekindle/src/lib.rs", text).len();
        assert_eq!(found("    /// What it is.\n    /// How it works.\n"), 1, "only the first line counts");
        assert_eq!(found("//! Whether it works.\n"), 1);
        assert_eq!(found("/// Returns the loss.\n/// What follows is a note.\n// What a comment may say.\n"), 0);
    }
}

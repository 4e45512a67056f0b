//! Uploads of results to a hub on loopback.

use std::fs;

use serde_json::{Value, json};

use crate::hub::server::Server;
use crate::{Done, Scratch, command, done, golden};

/// A finished run and a hub that takes its result.
struct Publisher {
    hub: Server,
    scratch: Scratch,
}

impl Publisher {
    fn new() -> Self {
        let hub = Server::start(&[]);
        hub.hub().token = Some("hf_write".to_owned());
        let scratch = Scratch::new();
        scratch.train(&[]).ok();
        Self { hub, scratch }
    }

    fn push(&self, more: &str) -> Done {
        let line = format!("push {} --to ada/tuned {more}", self.scratch.path("out").display());
        let mut command = command();
        command.env("HF_ENDPOINT", &self.hub.endpoint).env("HF_HOME", self.scratch.path("home"));
        done(command.env("HF_TOKEN", "hf_write").args(line.split_whitespace()))
    }

    /// Returns a file of the repository.
    fn file(&self, name: &str) -> Vec<u8> {
        self.hub.hub().file_of("ada/tuned", name).unwrap_or_else(|| panic!("{name}"))
    }

    fn card(&self) -> String {
        String::from_utf8(self.file("README.md")).unwrap()
    }
}

#[test]
fn an_adapter_is_pushed_with_its_card() {
    let publisher = Publisher::new();
    publisher.push("").fails(2, &["trained on a directory of this machine", "--base-model organization/name"]);
    let dry = publisher.push("--base-model org/base --dry-run").ok();
    for part in ["README.md  ", "adapter_config.json  ", "adapter_model.safetensors  ", "loss.svg  "] {
        assert!(dry.stdout.contains(part), "{part}: {}", dry.stdout);
    }
    assert!(dry.stderr.contains("nothing was sent"), "{}", dry.stderr);
    assert!(publisher.hub.requests().is_empty(), "a dry run asks nothing");

    let pushed = publisher.push("--base-model org/base --private --message first").ok();
    assert_eq!(pushed.stdout, format!("{}/ada/tuned\n", publisher.hub.endpoint));
    assert!(pushed.stderr.contains("created ada/tuned"), "{}", pushed.stderr);
    let config: Value = serde_json::from_slice(&publisher.file("adapter_config.json")).unwrap();
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!("org/base"), &Value::Null));
    let weights = fs::read(publisher.scratch.path("out/adapter/adapter_model.safetensors")).unwrap();
    assert!(publisher.file("adapter_model.safetensors") == weights);
    let card = publisher.card();
    for part in ["base_model: org/base", "from_pretrained(\"ada/tuned\")", "## Data", "## Hyperparameters", "loss.svg"]
    {
        assert!(card.contains(part), "{part}: {card}");
    }
    assert!(card.contains("Training data: rows.jsonl, ") && card.contains("adapter for `org/base`"), "{card}");
    assert!(!card.contains(&golden("qwen3-tied").display().to_string()), "a path of this machine: {card}");
    {
        let hub = publisher.hub.hub();
        assert!(hub.uploads.private.contains("ada/tuned"));
        assert_eq!(hub.uploads.commits[0][0]["value"]["summary"], "first");
    }
    let again = publisher.push("--base-model org/base --private").ok();
    assert!(again.stderr.contains("the repository has all files already"), "{}", again.stderr);
}

#[test]
fn a_merged_model_and_gguf_files_are_pushed() {
    let publisher = Publisher::new();
    let merged = publisher.push("--merge").ok();
    assert!(merged.stderr.contains("names no base model"), "{}", merged.stderr);
    assert!(publisher.file("config.json").starts_with(b"{") && !publisher.file("model.safetensors").is_empty());
    assert!(publisher.card().contains("library_name: transformers"));
    publisher.push("--gguf f16,q8_0 --base-model org/base").ok();
    assert!(publisher.file("tuned-F16.gguf").starts_with(b"GGUF") && !publisher.file("tuned-Q8_0.gguf").is_empty());
    let card = publisher.card();
    assert!(card.contains("- `tuned-F16.gguf`") && card.contains("base_model:finetune:org/base"), "{card}");
    // What was generated is gone.
    let mut left = fs::read_dir(publisher.scratch.path("out")).unwrap().flatten();
    assert!(left.all(|entry| !entry.file_name().to_string_lossy().contains("push")));
}

#[test]
fn a_push_without_permission_or_result_says_so() {
    let publisher = Publisher::new();
    publisher.hub.hub().token = Some("hf_other".to_owned());
    publisher.push("--base-model org/base").fails(5, &["ada/tuned: ", "does not accept the token", "write permission"]);
    let line = format!("push {} --to ada/tuned --base-model org/base", publisher.scratch.path("out").display());
    crate::run(&line).fails(5, &["ada/tuned: an upload needs a token", "HF_TOKEN"]);
    // Known before the merge.
    crate::run(&format!("{line} --merge")).fails(5, &["an upload needs a token"]);
    let empty = tempfile::tempdir().unwrap();
    let line = format!("push {} --to ada/tuned --dry-run", empty.path().display());
    crate::run(&line).fails(2, &["holds no adapter and no model", "finished run"]);
}

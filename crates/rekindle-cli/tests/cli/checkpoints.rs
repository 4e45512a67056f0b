//! Tests of the files beside the weights of checkpoints and adapters, and of how they are found.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::{Done, Scratch, command, done, golden, run};

/// A copy of the quickstart's model, which has a tokenizer.
fn base(scratch: &Scratch) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base");
    let base = scratch.path("base");
    fs::create_dir(&base).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, base.join(path.file_name().unwrap())).unwrap();
    }
    base
}

const CHAT: &str =
    "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":\"ok\"}]}\n";

/// One step on `rows` with the copied base and more arguments.
fn train(scratch: &Scratch, rows: &str, more: &[&str]) -> Done {
    let rows = scratch.write("rows.jsonl", rows);
    let base = scratch.path("base").display().to_string();
    let (model, data) = (format!("model.name_or_path={base}"), format!("data.train={rows}"));
    scratch.train(&[&[&*model, &data, "train.max_steps=1"], more].concat())
}

#[test]
fn every_file_of_the_tokenizer_comes_along() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let files = ["tokenizer.model", "added_tokens.json", "preprocessor_config.json"];
    files.iter().for_each(|name| fs::write(base.join(name), "{}").unwrap());
    fs::create_dir(base.join("additional_chat_templates")).unwrap();
    fs::write(base.join("additional_chat_templates/tool_use.jinja"), "{{ messages[0].content }}").unwrap();
    fs::write(base.join("tokenization_custom.py"), "raise SystemExit").unwrap();
    let check = |dir: &Path| {
        let own = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
        for name in files.iter().chain(&own).chain(&["additional_chat_templates/tool_use.jinja"]) {
            let bytes = |dir: &Path| fs::read(dir.join(name)).map_err(|error| format!("{}: {error}", dir.display()));
            assert_eq!(bytes(dir).unwrap(), bytes(&base).unwrap(), "{name}");
        }
        assert!(dir.join("generation_config.json").is_file());
        assert!(!dir.join("tokenization_custom.py").exists(), "code is not copied");
    };
    train(&scratch, CHAT, &["train.save_steps=1"]).ok();
    check(&scratch.path("out/adapter"));
    check(&scratch.path("out/checkpoint-1"));
    let out = |name: &str| scratch.path(name).display().to_string();
    run(&format!("merge {} --out {}", out("out"), out("merged"))).ok();
    check(&scratch.path("merged"));
    for _ in 0..2 {
        // The second replaces the first, templates and all.
        run(&format!("quantize --model {} --to nf4 --out {}", base.display(), out("nf4"))).ok();
        check(&scratch.path("nf4"));
    }
    let full = format!(
        "output_dir = {:?}\ndevice = \"cpu\"\n[model]\nname_or_path = {base:?}\nfull_finetuning = true\n[data]\n\
         train = {:?}\n[train]\nmax_steps = 1\n",
        out("full"),
        out("rows.jsonl"),
    );
    run(&format!("train {}", scratch.write("full.toml", full))).ok();
    check(&scratch.path("full/model"));

    // An adapter that PEFT saved brings no tokenizer.
    for name in files.iter().chain(&["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]) {
        fs::remove_file(scratch.path("out/adapter").join(name)).unwrap();
    }
    fs::remove_dir_all(scratch.path("out/adapter/additional_chat_templates")).unwrap();
    run(&format!("merge {} --out {}", out("out"), out("merged-again"))).ok();
    check(&scratch.path("merged-again"));
}

#[test]
fn pickled_adapters_are_refused_as_pickled_models_are() {
    let scratch = Scratch::new();
    let (adapter, base) = (scratch.path("adapter"), golden("qwen3-tied"));
    fs::create_dir(&adapter).unwrap();
    let config = json!({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base});
    fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let (adapter, base) = (adapter.display(), base.display());
    let commands = |base: &str| {
        [
            format!("generate --device cpu --prompt-ids 1 --model {adapter}"),
            format!("generate --device cpu --prompt-ids 1 --model {base} --adapter {adapter}"),
            format!("merge {adapter} --out {}", scratch.path("merged").display()),
            format!("inspect {adapter}"),
            format!("train {} lora.init_from={adapter}", scratch.path("run.toml").display()),
        ]
    };
    for line in commands(&base.to_string()) {
        run(&line).fails(1, &["lacks adapter_model.safetensors"]);
    }
    fs::write(scratch.path("adapter/adapter_model.bin"), "PK").unwrap();
    for line in commands(&base.to_string()) {
        run(&line).fails(
            1,
            &[
                "adapter_model.bin\" is not supported: pickled weights can run code when they are read",
                "convert the adapter to safetensors",
            ],
        );
    }
}

/// Runs a command line in another directory.
fn run_in(dir: &Path, line: &str) -> Done {
    done(Command::current_dir(&mut command(), dir).args(line.split_whitespace()))
}

#[test]
fn a_relative_base_is_found_from_elsewhere() {
    let scratch = Scratch::new();
    let (project, elsewhere) = (scratch.path("project"), tempfile::tempdir().unwrap());
    let base = project.join("models/base");
    fs::create_dir_all(&base).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden("qwen3-tied").join(file), base.join(file)).unwrap();
    }
    let file = scratch.path("run.toml");
    run_in(&project, &format!("train {} model.name_or_path=models/base output_dir=out", file.display())).ok();
    let adapter = project.join("out/adapter");
    let config: Value = serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], "models/base");

    let generate = format!("generate --device cpu --json --prompt-ids 1,2 --model {}", adapter.display());
    let here = run_in(&project, &generate).ok();
    assert!(!here.stderr.contains("is loaded from"), "{}", here.stderr);
    let there = run_in(elsewhere.path(), &generate).ok();
    let said =
        format!("the adapter's base model \"models/base\" is loaded from {}", base.canonicalize().unwrap().display());
    assert!(there.stderr.contains(&said), "{}", there.stderr);
    assert_eq!(there.answer(), here.answer());
    let merged = run_in(elsewhere.path(), &format!("merge {} --out merged", adapter.display())).ok();
    assert!(
        merged.stderr.contains(&said) && elsewhere.path().join("merged/config.json").is_file(),
        "{}",
        merged.stderr
    );

    fs::rename(&base, project.join("models/renamed")).unwrap();
    let code = if cfg!(feature = "network") { 5 } else { 1 };
    run_in(elsewhere.path(), &generate).fails(
        code,
        &[
            "the base model of the adapter",
            "models/base: there is no such directory",
            "pass it as the model and the adapter separately",
        ],
    );
}

/// A token that the tokenizer has and the table lacks.
#[test]
fn rows_of_a_resized_vocabulary_come_along() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let file = base.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let token = json!({"id": 1049, "content": "<|new|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    fs::write(&file, tokenizer.to_string()).unwrap();
    let rows = CHAT.replace("ok", "ok <|new|>");
    let hint = "the tokenizer has 1050: load the model with resize_model_vocab = 1050";
    train(&scratch, &rows, &[]).fails(3, &["is outside the model's vocabulary of 1049", hint]);

    // An adapter that was trained without the row merges, with a notice.
    let out = |name: &str| scratch.path(name).display().to_string();
    let vocab = |dir: &str| {
        let config: Value = serde_json::from_slice(&fs::read(scratch.path(dir).join("config.json")).unwrap()).unwrap();
        config["vocab_size"].as_u64().unwrap()
    };
    train(&scratch, CHAT, &[&format!("output_dir={}", out("small"))]).ok();
    let merged = run(&format!("merge {} --out {}", out("small"), out("merged-small"))).ok();
    assert!(merged.stderr.contains("has 1049 token ids, but its tokenizer, "), "{}", merged.stderr);
    assert!(merged.stderr.contains("has 1050; train the adapter with resize_model_vocab = 1050"), "{}", merged.stderr);
    assert_eq!(vocab("merged-small"), 1049);

    let trained = train(&scratch, &rows, &["model.resize_model_vocab=1050"]).ok();
    let said = "resize_model_vocab: embed_tokens with 1050 rows stays frozen and is saved with the adapter";
    assert!(trained.stderr.contains(said), "{}", trained.stderr);
    assert!(trained.stderr.contains("modules_to_save = [\"embed_tokens\", \"lm_head\"]"), "{}", trained.stderr);
    let rows = out("rows.jsonl");
    let eval = |model: &str| run(&format!("eval --device cpu --json --data {rows} --model {model}")).json();
    let adapted = eval(&out("out/adapter"));
    let merged = run(&format!("merge {} --out {} --verify", out("out"), out("merged"))).ok();
    assert!(!merged.stderr.contains("token ids"), "{}", merged.stderr);
    assert_eq!(vocab("merged"), 1050);
    let (adapted, merged) = (adapted["loss"].as_f64().unwrap(), eval(&out("merged"))["loss"].as_f64().unwrap());
    // Weights are rounded once to the base's dtype.
    assert!((adapted - merged).abs() <= 2e-2 * adapted, "{adapted} and {merged}");

    // Training continues from it, including its tables.
    let again = format!("output_dir={}", out("again"));
    let from = format!("lora.init_from={}", out("out/adapter"));
    train(&scratch, &fs::read_to_string(&rows).unwrap(), &[&from, &again]).ok();
    eval(&out("again/adapter"));
}

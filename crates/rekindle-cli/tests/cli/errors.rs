//! The errors that a new user meets, with their exit codes.

use std::fs;

use crate::{Scratch, golden, run};

#[test]
fn usage_is_2() {
    assert_eq!(run("").code, 2);
    for line in
        ["trian x", "generate --model m", "eval --model m", "eval --model m --data d --dtype f8", "train r.toml seed"]
    {
        run(line).fails(2, &[]);
    }
    run("eval --model m --data d --device gpu").fails(2, &["device \"gpu\" is unknown"]);
}

#[test]
fn a_bad_configuration_is_2() {
    run("train no-such-run.toml").fails(2, &["no-such-run.toml"]);
    let scratch = Scratch::new();
    scratch
        .train(&["train.learning_rat=1"])
        .fails(2, &["run.toml", "[train]", "\"learning_rat\"", "\"learning_rate\""]);
    scratch.train(&["train.max_steps=ten"]).fails(2, &["max_steps", "\"ten\"", "whole number"]);
    scratch.train(&["model.full_finetuning=true"]).fails(2, &["[lora]", "full_finetuning"]);
    scratch.train(&["lora.target_modules=[\"q_porj\"]"]).fails(2, &["q_porj", "q_proj"]);
    scratch.train(&["model.max_seq_length=100000"]).fails(2, &["100000", "256"]);
    assert!(!scratch.path("out").exists());
}

#[test]
fn generation_checks_its_numbers() {
    let line = format!("generate --device cpu --model {}", golden("qwen3-tied").display());
    run(&format!("{line} --prompt-ids 1 --temperature -1")).fails(2, &["temperature"]);
    run(&format!("{line} --prompt-ids 1 --top-p 0")).fails(2, &["top_p"]);
    run(&format!("{line} --prompt-ids 130,131")).fails(3, &["131", "vocabulary"]);
    run(&format!("{line} --prompt hello")).fails(1, &["tokenizer.json"]);
}

#[test]
fn a_missing_or_broken_model_is_1() {
    let rows = golden("qwen3-tied/rows.jsonl");
    let eval =
        |model: &str, more: &str| run(&format!("eval --device cpu --model {model} --data {} {more}", rows.display()));
    eval("/no/such/model", "").fails(1, &["/no/such/model"]);
    let model = golden("qwen3-tied").display().to_string();
    eval(&model, "--adapter ./no/such/adapter").fails(1, &["no/such/adapter"]);

    let scratch = Scratch::new();
    let dir = scratch.path("broken");
    fs::create_dir(&dir).unwrap();
    let copy = |name: &str| fs::copy(golden("qwen3-tied").join(name), dir.join(name)).unwrap();
    copy("config.json");
    let broken = dir.display().to_string();
    eval(&broken, "").fails(1, &["model.safetensors"]);
    copy("model.safetensors");
    let whole = fs::read(dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("model.safetensors"), &whole[..whole.len() - 100]).unwrap();
    eval(&broken, "").fails(1, &["model.safetensors"]);
    fs::write(dir.join("model.safetensors"), &whole).unwrap();
    eval(&broken, "").ok();
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    fs::write(dir.join("config.json"), config.replace("\"intermediate_size\": 52", "\"intermediate_size\": 54"))
        .unwrap();
    eval(&broken, "").fails(
        1,
        &["9 tensors do not fit config.json", "model.layers.0.mlp.gate_proj.weight", "52", "54", " and 6 more"],
    );
}

#[test]
fn bad_rows_are_3_and_named_by_line() {
    let scratch = Scratch::new();
    let good = "{\"input_ids\": [1, 2, 3]}\n";
    for (name, text, parts) in [
        ("json", format!("{good}{{\"input_ids\": [1, 2\n"), vec![":2:"]),
        ("keys", format!("{good}{good}{{\"inputs\": []}}\n"), vec![":3:", "inputs"]),
        ("empty", String::new(), vec!["empty.jsonl"]),
        ("ignored", "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n".to_owned(), vec!["labels are ignored"]),
        ("vocabulary", format!("{good}{{\"input_ids\": [1, 131]}}\n"), vec![":2:", "131", "vocabulary"]),
    ] {
        let file = scratch.write(&format!("{name}.jsonl"), text);
        let line = format!("eval --device cpu --model {} --data {file} --json", golden("qwen3-tied").display());
        run(&line).fails(3, &parts);
        scratch.train(&[&format!("data.train={file}")]).fails(3, &parts);
    }
    let missing = format!("data.train={}", scratch.path("missing.jsonl").display());
    scratch.train(&[&missing]).fails(3, &["missing.jsonl"]);
    // The model lacks what the rows need, which is not the rows' fault.
    let text = scratch.write("text.jsonl", "{\"text\": \"hello\"}\n");
    scratch.train(&[&format!("data.train={text}")]).fails(1, &["tokenizer.json", "input_ids"]);
}

#[test]
fn a_row_that_is_too_long_is_3_unless_the_run_file_says_what_to_do() {
    let scratch = Scratch::new();
    scratch.train(&["model.max_seq_length=16"]).fails(3, &[":1:", "19 tokens", "max_seq_length = 16", "data.overlong"]);
    let done = scratch.train(&["model.max_seq_length=16", "data.overlong=truncate"]).ok();
    assert!(done.stderr.contains("truncated"), "{}", done.stderr);
}

#[test]
fn what_cannot_be_written_is_1() {
    let scratch = Scratch::new();
    let file = scratch.write("file", "");
    scratch.train(&[&format!("output_dir={file}/below")]).fails(1, &["file/below"]);
}

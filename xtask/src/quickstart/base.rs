//! The base model, trained from random weights on the corpus.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use rekindle::{
    DataSource, Dtype, FastLanguageModel, LrSchedulerType, SftConfig, SftTrainer, StepCount, Tokenizer, TrainEvent,
};
use rekindle_data::{Message, RenderOptions};
use rekindle_train::{Companion, save_result};
use serde_json::{Value, json};

use crate::{random_checkpoint, root};

/// The maximum row length; the longest row of the corpus has 125 tokens.
const MAX_SEQ_LENGTH: usize = 256;

/// Writes the files of `examples/quickstart` except its README: instruction sets and base model.
///
/// # Errors
/// If a file cannot be written or training diverges.
pub(crate) fn make(scratch: &Path, steps: usize) -> Result<(), Box<dyn Error>> {
    let out = root().join("examples/quickstart");
    super::write_instructions(&out)?;
    fs::create_dir_all(scratch)?;
    let corpus = scratch.join("corpus.jsonl");
    super::write_corpus(&corpus)?;
    let start = scratch.join("start");
    fs::create_dir_all(&start)?;
    super::train_tokenizer(&corpus, &start)?;
    let tokenizer = Tokenizer::from_dir(&start)?;
    for old in ["model.safetensors", "model.safetensors.index.json"] {
        let old = start.join(old);
        if old.exists() {
            fs::remove_file(old)?;
        }
    }
    random_checkpoint::write(&start, &config(tokenizer.vocab_size()), 1)?;
    let ids = scratch.join("ids.jsonl");
    let rows = encode(&corpus, &tokenizer, &ids)?;
    eprintln!("{rows} rows");

    let (mut model, _) = FastLanguageModel::from_pretrained(&start)
        .max_seq_length(MAX_SEQ_LENGTH)
        .dtype(Dtype::F32)
        .full_finetuning(true)
        .load()?;
    let train = SftConfig {
        // About 1,024 tokens per step.
        per_device_train_batch_size: 27,
        max_steps: Some(steps),
        learning_rate: Some(2e-3),
        lr_scheduler_type: LrSchedulerType::Cosine,
        warmup_steps: StepCount::Steps(100),
        adam_beta2: 0.98,
        ..SftConfig::default()
    };
    SftTrainer::new(&mut model, None, DataSource::new(&ids), train)
        .on_event(|event| {
            if let TrainEvent::Step { metrics, total } = event
                && (metrics.step % 100 == 0 || metrics.step == total)
            {
                eprintln!(
                    "step {}/{total}  loss {:.4}  {:.0} tok/s  {:.0} s",
                    metrics.step, metrics.loss, metrics.tokens_per_second, metrics.seconds
                );
            }
        })
        .train()?;
    let companions: Vec<_> = tokenizer.files().into_iter().map(Companion::from).collect();
    save_result(model.causal_lm(), &out.join("base"), &companions, rekindle_hub::Dtype::BF16)?;
    Ok(())
}

fn config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
        "attention_bias": false,
        "bos_token_id": null,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32"
    })
}

/// Returns rows of token ids with a label for every token: a base model learns questions as well as answers.
fn encode(corpus: &Path, tokenizer: &Tokenizer, out: &Path) -> Result<usize, Box<dyn Error>> {
    let mut file = BufWriter::new(File::create(out)?);
    let mut rows = 0;
    for line in BufReader::new(File::open(corpus)?).lines() {
        let row: Value = serde_json::from_str(&line?)?;
        writeln!(file, "{}", json!({ "input_ids": ids(&row, tokenizer)? }))?;
        rows += 1;
    }
    file.flush()?;
    Ok(rows)
}

/// Returns a row of the corpus as text, including an end token.
pub(super) fn ids(row: &Value, tokenizer: &Tokenizer) -> Result<Vec<u32>, Box<dyn Error>> {
    if let Some(text) = row["text"].as_str() {
        let mut ids = tokenizer.encode(text, false)?;
        ids.push(tokenizer.eos_id().ok_or("the tokenizer has no end token")?);
        return Ok(ids);
    }
    let messages: Vec<Message> = row["messages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|m| Message::new(m["role"].as_str().unwrap_or_default(), m["content"].as_str().unwrap_or_default()))
        .collect();
    Ok(tokenizer.encode(&tokenizer.chat_template()?.render(&messages, &RenderOptions::default())?, false)?)
}

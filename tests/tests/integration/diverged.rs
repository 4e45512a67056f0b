//! Tests that a non-finite value is traced to its origin.

use std::path::Path;

use rekindle::{
    DataSource, DeviceKind, Diverged, Error, ErrorKind, FastLanguageModel, LoraConfig, NonFinite, SftConfig,
    SftTrainer, StepCount, Tokenizer, TrainerArguments,
};
use rekindle_models::Sft;
use rekindle_tests::{Golden, poisoned};

const NO_TOKENIZER: Option<&Tokenizer> = None;

fn run(golden: &Golden, change: impl FnOnce(&mut SftConfig), out: Option<&Path>) -> Diverged {
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).max_seq_length(128);
    let model = loader.load_model().expect("a golden loads");
    let mut model = model.get_peft_model(LoraConfig::new(4)).expect("a valid configuration");
    let mut config = SftConfig {
        per_device_train_batch_size: 3,
        gradient_accumulation_steps: 3,
        max_steps: Some(4),
        ..SftConfig::default()
    };
    change(&mut config);
    let before = model.causal_lm().params().all_values();
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    let arguments =
        TrainerArguments { shuffle: false, output_dir: out.map(Path::to_owned), ..TrainerArguments::default() };
    let trainer = SftTrainer::new(&mut model, NO_TOKENIZER, rows, config).arguments(arguments);
    let error = trainer.train().expect_err("it diverges");
    assert_eq!(error.kind(), ErrorKind::Diverged);
    let Error::Train(rekindle_train::Error::Diverged(diverged)) = error else { panic!("{error}") };
    if out.is_none() {
        assert_eq!(model.causal_lm().params().all_values(), before, "the failed step changed no parameter");
    }
    *diverged
}

#[test]
fn a_weight_of_the_checkpoint_is_found() {
    let tensor = "model.layers.1.mlp.down_proj.weight";
    let (_dir, golden) = poisoned("qwen3-tied", tensor, 7);
    let diverged = run(&golden, |_| (), None);
    let Some(NonFinite::Weight { name, trained: false, .. }) = &diverged.found else { panic!("{diverged}") };
    assert_eq!(name, tensor);
    assert_eq!((diverged.step, diverged.all_rows, &diverged.checkpoint), (1, true, &None));
    let text = diverged.to_string();
    for part in ["step 1: ", tensor, "rows.jsonl:1", "damaged"] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// Only rows with the token are affected.
#[test]
fn the_embedding_of_one_token_is_found() {
    let rows = Golden::open("qwen3-untied-sharded").rows;
    let with = |id: u32| -> Vec<usize> {
        let found = rows.iter().enumerate().filter(|(_, row)| row.input_ids.contains(&id));
        found.map(|(index, _)| index + 1).collect()
    };
    let id = rows.iter().flat_map(|row| &row.input_ids).find(|id| with(**id).len() == 1).expect("some token is rare");
    let hidden = rekindle_tests::read_json(&Golden::open("qwen3-untied-sharded").dir.join("config.json"))["hidden_size"]
        .as_u64()
        .expect("a number") as usize;
    let tensor = "model.embed_tokens.weight";
    let (_dir, golden) = poisoned("qwen3-untied-sharded", tensor, *id as usize * hidden + 3);
    let diverged = run(&golden, |_| (), None);
    let Some(NonFinite::Weight { name, .. }) = &diverged.found else { panic!("{diverged}") };
    assert_eq!(name, tensor);
    let mut lines: Vec<usize> = diverged.rows.iter().map(|(_, line)| *line).collect();
    // The nine rows of a step cycle through the seven.
    lines.dedup();
    assert_eq!((lines, diverged.all_rows), (with(*id), false), "{diverged}");
}

#[test]
fn an_excessive_learning_rate_is_diagnosed() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let change = |config: &mut SftConfig| {
        (config.learning_rate, config.save_steps) = (Some(1e30), Some(StepCount::Steps(1)));
    };
    let diverged = run(&Golden::open("llama3"), change, Some(out.path()));
    assert_eq!(diverged.step, 2, "the first step changes the parameters");
    let Some(NonFinite::Output { module, largest_input, .. }) = &diverged.found else { panic!("{diverged}") };
    assert!(module.starts_with("model.layers.") && largest_input.is_finite(), "{diverged}");
    assert_eq!(diverged.checkpoint, Some(out.path().join("checkpoint-1")));
    let text = diverged.to_string();
    for part in ["try: set learning_rate below 1e30, or add a warm-up", "the last good checkpoint is "] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// With A = 0 the outputs are those of the base for any B.
#[test]
fn an_overflowing_gradient_is_found() {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    let mut values = vec![0.0; model.params().numel()];
    let spoiled = |name: &str| name.contains("layers.1.") && name.contains("up_proj") && name.contains("lora_B");
    let infos = model.params().infos().to_vec();
    let info = infos.iter().find(|info| spoiled(&info.name)).expect("every linear has the adapter");
    values[info.at.range()].fill(3e38);
    model.params_mut().set_all_values(values);
    let batches = [golden.batch(&[0, 1]), golden.batch(&[2])];
    let found = model.first_non_finite(&Sft, &batches, 1e3, None).expect("golden rows fit");
    let Some(NonFinite::Gradient { parameter, rows }) = &found else { panic!("{found:?}") };
    assert_eq!(*parameter, info.name.replace("lora_B", "lora_A"));
    assert!(!rows.is_empty());
}

#[test]
fn finite_values_are_not_reported() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load_adapted("all-linear");
    assert_eq!(model.first_non_finite(&Sft, &[golden.packed()], 1.0, None).expect("golden rows fit"), None);
}

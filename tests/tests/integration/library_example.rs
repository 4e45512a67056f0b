//! The workflow of the README's library example: load, add an adapter, train, save, load again.

use std::path::Path;

use rekindle::{
    DataSource, DeviceKind, Dtype, FastLanguageModel, LoraConfig, Model, SftConfig, SftTrainer, StepCount, Tokenizer,
    TrainerArguments,
};
use rekindle_tests::{Golden, read_json};
use serde_json::Value;

const NO_TOKENIZER: Option<&Tokenizer> = None;

fn load(golden: &Golden) -> Model {
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).dtype(Dtype::F32);
    loader.max_seq_length(128).load_model().expect("a golden checkpoint loads")
}

#[test]
fn a_trained_and_saved_model_loads_again() {
    let golden = Golden::open("qwen3-tied");
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    let out = tempfile::tempdir().expect("a temporary directory");
    let run = out.path().join("run");
    let mut model = load(&golden).get_peft_model(LoraConfig::new(4).lora_alpha(8.0)).expect("a valid configuration");
    let before = model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit");
    let config = SftConfig {
        per_device_train_batch_size: 3,
        gradient_accumulation_steps: 2,
        max_steps: Some(8),
        learning_rate: Some(0.01),
        warmup_steps: StepCount::Steps(2),
        eval_steps: Some(StepCount::Steps(4)),
        save_steps: Some(StepCount::Steps(5)),
        ..SftConfig::default()
    };
    let mut told = 0;
    let report = SftTrainer::new(&mut model, NO_TOKENIZER, rows.clone(), config)
        .eval_dataset(rows.clone())
        .arguments(into_dir(&run))
        .on_event(|_| told += 1)
        .train()
        .expect("golden rows can be trained on");
    assert_eq!(told, 1 + 8 + 3 + 3, "the start, steps, evaluations and saves");
    assert_eq!(report.saved, Some(run.join("adapter")));
    let after = model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit");
    let losses = [report.evals.first(), report.evals.last()].map(|eval| eval.map(|eval| (eval.step, eval.eval_loss)));
    assert_eq!(losses, [Some((0, before.loss)), Some((8, after.loss))], "before the first step and after the last");
    // Eight steps at this rate on seven rows; a run without effect stays where it was.
    assert!(after.loss < before.loss - 0.3, "{} -> {}", before.loss, after.loss);

    check_metrics(&std::fs::read_to_string(run.join("metrics.jsonl")).expect("it was written"), &report);
    check_plot(&std::fs::read_to_string(run.join("loss.svg")).expect("it was written"));
    assert!(run.join("checkpoint-5/adapter_model.safetensors").is_file());

    let again = load(&golden).load_adapter(run.join("adapter")).expect("it was just written");
    assert_eq!(again.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit"), after);
    model.save_pretrained(out.path().join("saved")).expect("the disk has space");
    let tensors = |dir: &str| rekindle_tests::tensors(&out.path().join(dir).join("adapter_model.safetensors"));
    assert_eq!(tensors("saved"), tensors("run/adapter"));
}

#[test]
fn full_finetuning_writes_a_model() {
    let golden = Golden::open("qwen2");
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    let out = tempfile::tempdir().expect("a temporary directory");
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).full_finetuning(true);
    let mut model = loader.load_model().expect("a golden checkpoint loads");
    let config = SftConfig { max_steps: Some(2), learning_rate: Some(1e-3), ..SftConfig::default() };
    SftTrainer::new(&mut model, NO_TOKENIZER, rows.clone(), config)
        .arguments(into_dir(out.path()))
        .train()
        .expect("golden rows can be trained on");
    let saved = Golden { dir: out.path().join("model"), ..Golden::open("qwen2") };
    let losses = |model: &Model| model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit");
    assert_eq!(losses(&load(&saved)), losses(&model));
    assert_ne!(losses(&load(&golden)), losses(&model), "the run changes the model");
    let config = |golden: &Golden| read_json(&golden.dir.join("config.json"));
    assert_eq!(config(&saved), config(&golden), "config.json is preserved");
}

#[test]
fn repeated_runs_write_the_same_losses() {
    let golden = Golden::open("llama-bias");
    let run = |seed| {
        let mut model = load(&golden).get_peft_model(LoraConfig::new(2).lora_dropout(0.1)).expect("valid");
        let config = SftConfig { per_device_train_batch_size: 2, max_steps: Some(5), ..SftConfig::default() };
        let rows = DataSource::new(golden.dir.join("rows.jsonl"));
        let arguments = TrainerArguments { seed, ..TrainerArguments::default() };
        let trainer = SftTrainer::new(&mut model, NO_TOKENIZER, rows, config).arguments(arguments);
        let report = trainer.train().expect("it runs");
        report.steps.iter().map(|step| (step.loss, step.grad_norm)).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2), "the seed determines the order and dropout");
}

fn into_dir(dir: &Path) -> TrainerArguments {
    TrainerArguments { output_dir: Some(dir.to_owned()), ..TrainerArguments::default() }
}

fn check_metrics(text: &str, report: &rekindle::TrainReport) {
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect();
    let (steps, evals): (Vec<&Value>, Vec<&Value>) = lines.iter().partition(|line| line.get("loss").is_some());
    assert_eq!((steps.len(), evals.len()), (8, 3));
    for (line, step) in steps.iter().zip(&report.steps) {
        assert_eq!(line["step"], step.step);
        assert_eq!(line["loss"], step.loss);
        assert_eq!(line["grad_norm"], step.grad_norm);
        assert_eq!(line["learning_rate"], step.learning_rate);
        assert_eq!(line["tokens"], step.tokens);
        assert!(step.trained_tokens > 0 && step.trained_tokens < step.tokens);
    }
    let rates: Vec<f64> = report.steps.iter().map(|step| step.learning_rate).collect();
    assert_eq!(&rates[..3], &[0.0, 0.005, 0.01], "two steps of warm-up, then the peak");
    for (line, eval) in evals.iter().zip(&report.evals) {
        assert_eq!((&line["step"], &line["eval_loss"]), (&Value::from(eval.step), &Value::from(eval.eval_loss)));
    }
}

/// Checks that the tags are balanced and two lines are drawn.
fn check_plot(svg: &str) {
    let mut open: Vec<&str> = Vec::new();
    for tag in svg.split('<').skip(1).map(|part| part.split_once('>').expect("every tag ends").0) {
        let name = tag.split([' ', '/']).find(|word| !word.is_empty()).expect("a tag has a name");
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name)),
            (false, true) => {}
            (false, false) => open.push(name),
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
    }
    assert!(open.is_empty() && svg.starts_with("<svg "));
    assert!(svg.contains("training loss") && svg.contains("evaluation loss"));
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}

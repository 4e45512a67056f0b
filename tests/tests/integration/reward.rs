//! Reward models against transformers, PEFT and TRL: scores, losses, gradient norms, trajectories, files and runs.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::{DeviceKind, FastLanguageModel};
use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::{DType, Device};
use rekindle_lora::LoraConfig;
use rekindle_models::objective::RewardModel;
use rekindle_models::{CausalLm, GradientCheckpointing, LoadOptions};
use rekindle_tests::{goldens, read_json};
use rekindle_train::{
    Batches, Method, Optimizer, OptimizerConfig, Resume, SftConfig, StepCount, TrainEvent, TrainReport, Trainer,
    TrainerArguments,
};
use serde_json::Value;

/// The tolerance of scores, losses, metrics and gradient norms, relative to 1 or to the value if it is larger: TRL computes in
/// float32.
const TOLERANCE: f64 = 1e-5;

/// The tolerance over twelve steps, likewise.
const TRAJECTORY_TOLERANCE: f64 = 1e-4;

const MAX_SEQ_LENGTH: usize = 128;

fn golden() -> Value {
    read_json(&goldens().join("reward/expect.json"))
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) -> f64 {
    let error = (got - want).abs() / want.abs().max(1.0);
    assert!(error <= tolerance, "{what} is {got}, not {want}: off by {error:.1e}");
    error
}

fn rows(margins: bool) -> Dataset {
    let path = goldens().join(if margins { "reward/pairs.jsonl" } else { "preferences/pairs.jsonl" });
    let options =
        EncodeOptions { max_seq_length: MAX_SEQ_LENGTH, task: RowTask::ScoredPairs, ..EncodeOptions::default() };
    Dataset::load(&path, None, &options).expect("the golden's rows load").0
}

fn load(dir: &Path, change: impl FnOnce(&mut LoadOptions)) -> CausalLm {
    let mut options = LoadOptions::new(Device::cpu(), DType::F32, MAX_SEQ_LENGTH);
    change(&mut options);
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint");
    CausalLm::load(&checkpoint, &options, &mut |_| ()).expect("it loads")
}

/// Loads the golden reward model with all weights trained, or frozen with PEFT's adapter.
fn model(kind: &str) -> CausalLm {
    let dir = goldens().join("reward/model");
    if kind == "full" {
        return load(&dir, |options| options.full_finetuning = true);
    }
    let mut model = load(&dir, |_| ());
    model.load_adapter(&goldens().join("reward/adapter")).expect("PEFT's adapter loads");
    model
}

fn scores(model: &CausalLm, margins: bool) -> Vec<f64> {
    let dataset = rows(margins);
    let method: Method = RewardModel::default().into();
    let config = SftConfig { method, ..SftConfig::default() };
    let batch = Batches::new(&dataset, &config, MAX_SEQ_LENGTH).batch(&(0..dataset.len()).collect::<Vec<_>>(), 0);
    model.scores(&batch).expect("golden rows fit")
}

fn config(arguments: &Value) -> SftConfig {
    let mut loss = arguments.clone();
    loss.as_object_mut().expect("a map").remove("margins");
    let loss: RewardModel = serde_json::from_value(loss).expect("arguments of the loss");
    SftConfig { method: loss.into(), ..SftConfig::default() }
}

#[test]
fn scores_are_those_of_transformers() {
    let golden = golden();
    for kind in ["full", "adapter"] {
        let got = scores(&model(kind), false);
        let want = list(&golden["scores"][kind]);
        assert_eq!(got.len(), want.len());
        let worst = got.iter().zip(want).map(|(got, want)| assert_close(kind, *got, number(want), TOLERANCE));
        println!("{kind}: off by {:.1e}", worst.fold(0.0, f64::max));
    }
}

/// Every loss, with its metrics and gradient norm, in one micro-batch, in one for each pair, and with checkpointing.
#[test]
fn reward_losses_are_those_of_trl() {
    for case in list(&golden()["losses"]) {
        let (kind, arguments) = (case["kind"].as_str().expect("a name"), &case["arguments"]);
        let name = format!("{kind} {arguments}");
        let dataset = rows(arguments["margins"] == true);
        let config = config(arguments);
        let from = Batches::new(&dataset, &config, MAX_SEQ_LENGTH);
        let all: Vec<usize> = (0..dataset.len()).collect();
        let mut worst = 0.0_f64;
        for (parts, checkpointing) in [
            (vec![&all[..]], GradientCheckpointing::Off),
            (all.chunks(2).collect(), GradientCheckpointing::Off),
            (vec![&all[..4], &all[4..]], GradientCheckpointing::Block),
        ] {
            let mut model = model(kind);
            model.set_gradient_checkpointing(checkpointing);
            let batches: Vec<_> = parts.iter().map(|part| from.batch(part, part[0])).collect();
            let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 1).expect("weights are trained");
            let objective = config.method.objective();
            let got = optimizer.step(&mut model, &*objective, &batches, 0.0).expect("golden rows fit");
            worst = worst.max(assert_close(&format!("{name}: loss"), got.loss, number(&case["loss"]), TOLERANCE));
            let norm = number(&case["grad_norm"]);
            worst = worst.max(assert_close(&format!("{name}: grad_norm"), got.grad_norm, norm, TOLERANCE));
            for (metric, want) in case["metrics"].as_object().expect("a map") {
                let (_, got) = got.metrics.iter().find(|(known, _)| known == metric).expect("it is reported");
                worst = worst.max(assert_close(&format!("{name}: {metric}"), *got, number(want), TOLERANCE));
            }
        }
        println!("{name}: off by {worst:.1e}");
    }
}

#[test]
fn reward_trajectories_are_those_of_trl() {
    for (kind, case) in golden()["trajectories"].as_object().expect("a map") {
        let run = &case["run"];
        let dataset = rows(case["arguments"]["margins"] == true);
        let config = SftConfig {
            per_device_train_batch_size: number(&case["batch_size"]) as usize,
            max_steps: Some(list(&case["steps"]).len()),
            learning_rate: Some(number(&run["learning_rate"])),
            weight_decay: number(&run["weight_decay"]),
            max_grad_norm: number(&run["max_grad_norm"]),
            ..config(&case["arguments"])
        };
        let mut model = model(kind);
        let arguments = TrainerArguments { shuffle: false, ..TrainerArguments::default() };
        let trainer = Trainer { arguments, ..Trainer::new(&mut model, dataset, config) };
        let steps = trainer.train().expect("the run finishes").steps;
        let mut worst = 0.0_f64;
        for (got, want) in steps.iter().zip(list(&case["steps"])) {
            let what = |what: &str| format!("{kind}, step {}: {what}", got.step);
            let tolerance = TRAJECTORY_TOLERANCE;
            worst = worst.max(assert_close(&what("loss"), got.loss, number(&want["loss"]), tolerance));
            worst = worst.max(assert_close(&what("grad_norm"), got.grad_norm, number(&want["grad_norm"]), tolerance));
            for (metric, want) in want["metrics"].as_object().expect("a map") {
                let got = got.metrics.get(metric).expect("it is reported");
                worst = worst.max(assert_close(&what(metric), got, number(want), tolerance));
            }
        }
        assert_eq!(steps.len(), 12);
        println!("{kind}: off by {worst:.1e}");
    }
}

/// A new reward model on a decoder: with an adapter or all weights.
fn fresh(full: bool) -> CausalLm {
    let mut model = load(&goldens().join("qwen3-tied"), |options| {
        options.score_head = Some(7);
        options.full_finetuning = full;
    });
    if !full {
        model.add_adapter(&LoraConfig::new(4).lora_dropout(0.1)).expect("a valid configuration");
    }
    model
}

fn run(model: &mut CausalLm, dir: &Path, resume: bool, stop_at: usize) -> TrainReport {
    let dataset = rows(true);
    let config = SftConfig {
        method: RewardModel::default().into(),
        gradient_accumulation_steps: 2,
        per_device_train_batch_size: 1,
        max_steps: Some(6),
        learning_rate: Some(1e-3),
        eval_steps: Some(StepCount::Steps(2)),
        ..SftConfig::default()
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let resume = resume.then_some(Resume::Latest);
    let trainer = Trainer {
        arguments: TrainerArguments { output_dir: Some(dir.to_owned()), resume, ..TrainerArguments::default() },
        eval: Some(dataset.clone()),
        stop,
        on_event: Box::new(move |event| {
            if let TrainEvent::Step { metrics, .. } = event {
                flag.store(metrics.step == stop_at, Ordering::Relaxed);
            }
        }),
        ..Trainer::new(model, dataset, config)
    };
    trainer.train().expect("the run finishes")
}

/// A stopped and resumed run has the bits of an uninterrupted one, and its margin on the rows grows.
#[test]
fn reward_runs_resume() {
    for full in [false, true] {
        let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let mut model = fresh(full);
        let expected = run(&mut model, whole.path(), false, 0);
        let values = model.params().all_values();
        run(&mut fresh(full), stopped.path(), false, 3);
        let mut model = fresh(full);
        let report = run(&mut model, stopped.path(), true, 0);
        assert!(model.params().all_values() == values, "full {full}: other bits");
        let evals = |report: &TrainReport| -> Vec<_> {
            report.evals.iter().map(|eval| (eval.eval_loss, eval.metrics.clone())).collect()
        };
        assert_eq!(evals(&report), evals(&expected));
        let margin = |index: usize| expected.evals[index].metrics.get("eval_margin").expect("it is reported");
        let last = expected.evals.len() - 1;
        assert!(margin(last) > margin(0), "full {full}: the margin went from {} to {}", margin(0), margin(last));
        assert_eq!(expected.evals[last].eval_perplexity, None);
    }
}

/// Packed rows hold whole pairs, and a step over them has the loss of the same pairs in rows of their own.
#[test]
fn packed_pairs_have_the_same_loss() {
    let step = |packing| {
        let config =
            SftConfig { packing, per_device_train_batch_size: 8, max_steps: Some(1), ..config(&serde_json::json!({})) };
        let report = Trainer::new(&mut model("adapter"), rows(true), config).train().expect("the run finishes");
        (report.steps[0].loss, report.steps[0].grad_norm)
    };
    let (single, packed) = (step(false), step(true));
    assert_close("the loss", packed.0, single.0, 1e-6);
    assert_close("grad_norm", packed.1, single.1, 1e-5);
}

/// A saved reward model has the class, the labels and the tensor that transformers reads, and its own scores again.
#[test]
fn saved_reward_models_are_sequence_classifiers() {
    let dir = tempfile::tempdir().expect("a directory");
    let full = fresh(true);
    full.save(dir.path(), Dtype::F32).expect("it is written");
    let json = read_json(&dir.path().join("config.json"));
    assert_eq!(json["architectures"], serde_json::json!(["Qwen3ForSequenceClassification"]));
    assert_eq!(json["id2label"], serde_json::json!({"0": "LABEL_0"}));
    let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
    assert_eq!(checkpoint.get("score.weight").map(|view| view.shape.to_vec()), Some(vec![1, 40]));
    assert!(checkpoint.get("lm_head.weight").is_none());
    assert_eq!(scores(&load(dir.path(), |_| ()), false), scores(&full, false));

    // Scores of an adapter, loaded again and merged.
    let mut model = fresh(false);
    let run_dir = tempfile::tempdir().expect("a directory");
    run(&mut model, run_dir.path(), false, 0);
    let saved = run_dir.path().join("adapter");
    let config = read_json(&saved.join("adapter_config.json"));
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&"SEQ_CLS".into(), &serde_json::json!(["score"])));
    let mut again = load(&goldens().join("qwen3-tied"), |options| options.score_head = Some(1));
    again.load_adapter(&saved).expect("it loads");
    assert_eq!(scores(&again, false), scores(&model, false));

    // The adapter alone says that its base is a reward model.
    let loader = FastLanguageModel::from_pretrained(goldens().join("qwen3-tied")).device(DeviceKind::Cpu);
    let loaded = loader.for_adapter(&saved).load_model().expect("it loads").load_adapter(&saved).expect("it loads");
    assert_eq!(scores(loaded.causal_lm(), false), scores(&model, false));
}

#[test]
fn reward_models_and_decoders_are_not_confused() {
    let error = |model: &mut CausalLm, dataset: Dataset, method: Method| {
        let config = SftConfig { method, max_steps: Some(1), ..SftConfig::default() };
        Trainer::new(model, dataset, config).train().expect_err("refused").to_string()
    };
    let mut decoder = load(&goldens().join("qwen3-tied"), |options| options.full_finetuning = true);
    let text = error(&mut decoder, rows(false), RewardModel::default().into());
    assert!(text.contains("needs a model with a score head"), "{text}");
    let options = EncodeOptions { task: RowTask::Pairs, ..EncodeOptions::default() };
    let pairs = Dataset::load(&goldens().join("preferences/pairs.jsonl"), None, &options).expect("they load").0;
    let text = error(&mut model("full"), pairs, rekindle_models::objective::Dpo::default().into());
    assert!(text.contains("the model is a reward model"), "{text}");
    let text = model("full").check_prompt(&[1, 2]).expect_err("no text").to_string();
    assert!(text.contains("its head is a score"), "{text}");
    let text = decoder.scores(&Default::default()).expect_err("no score").to_string();
    assert!(text.contains("has no score head"), "{text}");
}

//! Preference losses against TRL: loss, metrics and gradient norm of every loss, trajectories, and splits of a step.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::run::{ConfigOverride, RunConfig, TrainOptions};
use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_lora::LoraConfig;
use rekindle_models::CausalLm;
use rekindle_models::objective::{Cpo, Dpo, Kto, Orpo};
use rekindle_tests::{Golden, goldens, read_json};
use rekindle_train::{
    Batches, Method, Optimizer, OptimizerConfig, ReferenceArguments, Resume, SftConfig, StepCount, StepResult,
    TrainEvent, TrainReport, Trainer, TrainerArguments, WithReference,
};
use serde_json::Value;

/// The tolerance for losses, metrics and gradient norms, relative to 1 or to the value if it is larger. TRL computes in
/// float32; its log-probabilities of about −80 have rounding errors of 1e-5.
const TOLERANCE: f64 = 1e-5;

/// The tolerance over twelve steps, likewise.
const TRAJECTORY_TOLERANCE: f64 = 1e-4;

const MAX_SEQ_LENGTH: usize = 128;

fn golden() -> Value {
    read_json(&goldens().join("preferences/expect.json"))
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// Returns the method of the golden's arguments, whose names are those of a run file.
fn method(arguments: &Value) -> Method {
    let mut loss = arguments.clone();
    let all = loss.as_object_mut().expect("a map");
    all.remove("method");
    let names = ["sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"];
    let reference = names.iter().filter_map(|name| all.remove_entry(*name)).collect();
    let reference: ReferenceArguments = serde_json::from_value(Value::Object(reference)).expect("arguments");
    let valid = "arguments of the loss";
    match arguments["method"].as_str().expect("a name") {
        "dpo" => Method::Dpo(WithReference { loss: serde_json::from_value::<Dpo>(loss).expect(valid), reference }),
        "kto" => Method::Kto(WithReference { loss: serde_json::from_value::<Kto>(loss).expect(valid), reference }),
        "orpo" => serde_json::from_value::<Orpo>(loss).expect(valid).into(),
        "cpo" => serde_json::from_value::<Cpo>(loss).expect(valid).into(),
        other => panic!("{other}"),
    }
}

fn rows(method: &Method) -> Dataset {
    let name = if method.task() == RowTask::Labelled { "labelled" } else { "pairs" };
    let path: PathBuf = goldens().join(format!("preferences/{name}.jsonl"));
    let options = EncodeOptions { max_seq_length: MAX_SEQ_LENGTH, task: method.task(), ..EncodeOptions::default() };
    Dataset::load(&path, None, &options).expect("the golden's rows load").0
}

fn policy() -> CausalLm {
    Golden::open("qwen3-tied").load_adapted("all-linear")
}

/// Takes a step over `batches` of `size` examples each, with the base model as reference.
fn step(
    optimizer: &mut Optimizer,
    model: &mut CausalLm,
    from: &Batches<'_>,
    parts: &[&[usize]],
    rate: f64,
) -> StepResult {
    let batches: Vec<_> = parts
        .iter()
        .scan(0, |first, part| {
            let batch = from.batch(part, *first);
            *first += part.len();
            Some(batch)
        })
        .collect();
    optimizer.step(model, &*objective(from), &batches, rate).expect("golden rows fit")
}

fn objective(from: &Batches<'_>) -> Box<dyn rekindle_models::Objective> {
    from.method().objective()
}

fn optimizer(model: &CausalLm, config: &SftConfig) -> Optimizer {
    Optimizer::new(model, OptimizerConfig::from(config), 1).expect("an adapter is trained")
}

/// Asserts that two numbers agree; returns their difference.
fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) -> f64 {
    let error = (got - want).abs() / want.abs().max(1.0);
    assert!(error <= tolerance, "{what} is {got}, not {want}: off by {error:.1e}");
    error
}

fn assert_metrics(name: &str, metrics: &[(&str, f64)], want: &Value, tolerance: f64) -> f64 {
    let want = want.as_object().expect("a map").iter();
    // Without an NLL term, CPO reports one of 0 in TRL.
    let want = want.filter(|(key, value)| !(*key == "nll_loss" && number(value) == 0.0));
    let errors = want.map(|(key, want)| {
        let (_, got) = metrics.iter().find(|(known, _)| known == key).unwrap_or_else(|| panic!("{name}: no {key}"));
        assert_close(&format!("{name}: {key}"), *got, number(want), tolerance)
    });
    errors.fold(0.0, f64::max)
}

/// Every loss, with its metrics and gradient norm, for one micro-batch, for one per row, and for two of unequal size.
#[test]
fn losses_are_those_of_trl() {
    let golden = golden();
    for case in list(&golden["losses"]) {
        let name = case["arguments"].to_string();
        let method = method(&case["arguments"]);
        let dataset = rows(&method);
        let config = SftConfig { method, per_device_train_batch_size: dataset.len(), ..SftConfig::default() };
        let per_row = if dataset.task() == RowTask::Pairs { 2 } else { 1 };
        let config = SftConfig { per_device_train_batch_size: dataset.len() / per_row, ..config };
        let from = Batches::new(&dataset, &config, MAX_SEQ_LENGTH);
        let all: Vec<usize> = (0..dataset.len()).collect();
        let (first, rest) = all.split_at(2 * per_row);
        let single: Vec<&[usize]> = all.chunks(per_row).collect();
        let mut worst = 0.0f64;
        for parts in [&[&all[..]][..], &single[..], &[first, rest][..]] {
            let mut model = policy();
            let mut optimizer = optimizer(&model, &config);
            let result = step(&mut optimizer, &mut model, &from, parts, 0.0);
            worst =
                worst.max(assert_close(&format!("{name}: the loss"), result.loss, number(&case["loss"]), TOLERANCE));
            let norm = number(&case["grad_norm"]);
            worst = worst.max(assert_close(&format!("{name}: grad_norm"), result.grad_norm, norm, TOLERANCE));
            worst = worst.max(assert_metrics(&name, &result.metrics, &case["metrics"], TOLERANCE));
        }
        println!("{name}: off by {worst:.1e}");
    }
}

/// Twelve steps with the base model as reference, or with the adapter at its start, which the trainer keeps as
/// log-probabilities.
#[test]
fn trajectories_are_those_of_trl() {
    let golden = golden();
    for (name, case) in golden["trajectories"].as_object().expect("a map") {
        let method = method(&case["arguments"]);
        let dataset = rows(&method);
        let run = &case["run"];
        let config = SftConfig {
            method,
            per_device_train_batch_size: number(&case["batch_size"]) as usize,
            max_steps: Some(list(&case["steps"]).len()),
            learning_rate: Some(number(&run["learning_rate"])),
            weight_decay: number(&run["weight_decay"]),
            max_grad_norm: number(&run["max_grad_norm"]),
            ..SftConfig::default()
        };
        let moves = case["reference"] == "moving";
        let mut model = if moves { Golden::open("qwen3-tied").load_full() } else { policy() };
        let steps: Vec<StepResult> = if case["reference"] == "base" {
            let from = Batches::new(&dataset, &config, MAX_SEQ_LENGTH);
            let schedule = config.schedule(number(&run["learning_rate"]), 12).expect("a valid schedule");
            let packs = config.rows(&dataset, MAX_SEQ_LENGTH);
            let indices: Vec<usize> = packs.iter().flatten().copied().collect();
            let parts: Vec<&[usize]> = indices.chunks(indices.len() / 2).collect();
            let mut optimizer = optimizer(&model, &config);
            let rate = |index| number(&run["learning_rate"]) * schedule.factor(index);
            (0..12).map(|index| step(&mut optimizer, &mut model, &from, &[parts[index % 2]], rate(index))).collect()
        } else {
            let arguments = TrainerArguments { shuffle: false, ..TrainerArguments::default() };
            let trainer = Trainer { arguments, ..Trainer::new(&mut model, dataset, config) };
            let steps = trainer.train().expect("the run finishes").steps;
            let names: &[&'static str] =
                &["rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "kl", "nll_loss"];
            let metrics = |step: &rekindle_train::StepMetrics| {
                names.iter().filter_map(|name| Some((*name, step.metrics.get(name)?))).collect()
            };
            let result = |step: &rekindle_train::StepMetrics| StepResult {
                loss: step.loss,
                grad_norm: step.grad_norm,
                counted: step.trained_tokens,
                tokens: step.tokens,
                metrics: metrics(step),
            };
            steps.iter().map(result).collect()
        };
        let mut worst = 0.0f64;
        for (index, (got, want)) in steps.iter().zip(list(&case["steps"])).enumerate() {
            let what = |what: &str| format!("{name}, step {}: {what}", index + 1);
            let tolerance = TRAJECTORY_TOLERANCE;
            worst = worst.max(assert_close(&what("the loss"), got.loss, number(&want["loss"]), tolerance));
            worst = worst.max(assert_close(&what("grad_norm"), got.grad_norm, number(&want["grad_norm"]), tolerance));
            let metrics = want["metrics"].as_object().expect("a map").clone();
            let known =
                metrics.into_iter().filter(|(key, _)| got.metrics.iter().any(|(name, _)| name == key)).collect();
            worst = worst.max(assert_metrics(&what("metrics"), &got.metrics, &Value::Object(known), tolerance));
        }
        assert_eq!(steps.len(), 12);
        println!("{name}: off by {worst:.1e}");
    }
}

fn fresh() -> CausalLm {
    let mut model = Golden::open("qwen3-tied").load();
    model.add_adapter(&LoraConfig::new(4).lora_dropout(0.1)).expect("a valid configuration");
    model
}

/// Runs six steps over shuffled rows with evaluations, until the end or until `stop_at` steps are done.
fn run(model: &mut CausalLm, method: &Method, dir: &Path, resume: bool, stop_at: usize) -> TrainReport {
    let dataset = rows(method);
    let config = SftConfig {
        method: method.clone(),
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 2,
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

/// A stopped and resumed run has the bits of an uninterrupted one, whichever way it has its reference.
#[test]
fn preference_runs_resume() {
    type MakeModel = fn() -> CausalLm;
    let full = || Golden::open("qwen3-tied").load_full();
    let moving =
        ReferenceArguments { sync_ref_model: true, ref_model_sync_steps: Some(2), ..ReferenceArguments::default() };
    let moving = Method::Dpo(WithReference { loss: Dpo::default(), reference: moving });
    let cases: [(&str, MakeModel, Method, bool); 6] = [
        ("dpo, new adapter", fresh, Dpo::default().into(), false),
        ("dpo, all weights", full, Dpo::default().into(), true),
        ("kto, continued adapter", policy, Kto::default().into(), true),
        ("orpo, new adapter", fresh, Orpo::default().into(), false),
        ("dpo, new adapter, moving reference", fresh, moving.clone(), false),
        ("dpo, all weights, moving reference", full, moving, false),
    ];
    for (what, make, method, is_precomputed) in cases {
        let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let mut model = make();
        let expected = run(&mut model, &method, whole.path(), false, 0);
        let values = model.params().all_values();
        run(&mut make(), &method, stopped.path(), false, 3);
        let mut model = make();
        let report = run(&mut model, &method, stopped.path(), true, 0);
        assert!(model.params().all_values() == values, "{what}: other bits");
        let numbers = |report: &TrainReport| -> Vec<_> {
            let steps = report.steps.iter().map(|step| (step.loss, step.grad_norm, step.metrics.clone()));
            steps.chain(report.evals.iter().map(|eval| (eval.eval_loss, 0.0, eval.metrics.clone()))).collect()
        };
        assert_eq!(numbers(&report), numbers(&expected), "{what}");
        assert_eq!(whole.path().join("reference-train.safetensors").is_file(), is_precomputed, "{what}");
        let last = expected.evals.last().expect("an evaluation");
        let margin = last.metrics.get("eval_rewards/margins").expect("it is reported");
        let first = expected.evals[0].metrics.get("eval_rewards/margins").expect("it is reported");
        // The margin to a reference that follows the model is small.
        let least = if what.ends_with("moving reference") { 0.0 } else { first };
        assert!(margin > least, "{what}: the margin went from {first} to {margin}");
        assert_eq!(last.eval_perplexity, None);
        let page = std::fs::read_to_string(whole.path().join("report.html")).expect("a report");
        assert!(page.contains("<b>Reward margin</b>") && page.contains("held-out reward margin"), "{what}");
    }
}

/// Packed rows hold whole pairs, and a step over them has the loss of the same pairs in rows of their own.
#[test]
fn packing_does_not_change_a_step() {
    for method in [Dpo::default().into(), Kto::default().into(), Orpo::default().into(), Cpo::simpo().into()] {
        let loss = |packing| {
            let dataset = rows(&method);
            let config = SftConfig {
                method: method.clone(),
                packing,
                per_device_train_batch_size: 8,
                max_steps: Some(1),
                ..SftConfig::default()
            };
            let packs = config.rows(&dataset, MAX_SEQ_LENGTH).len();
            let report = Trainer::new(&mut policy(), dataset, config).train().expect("the run finishes");
            (packs, report.steps[0].loss, report.steps[0].grad_norm)
        };
        let (single, packed) = (loss(false), loss(true));
        assert!(packed.0 < single.0, "{} packs of {} rows", packed.0, single.0);
        assert_close("the loss", packed.1, single.1, 1e-6);
        assert_close("grad_norm", packed.2, single.2, 1e-5);
    }
}

#[test]
fn runs_without_a_comparison_are_refused() {
    let error = |model: &mut CausalLm, dataset: Dataset, method: Method| {
        let config = SftConfig { method, max_steps: Some(1), ..SftConfig::default() };
        Trainer::new(model, dataset, config).train().expect_err("refused").to_string()
    };
    let dpo: Method = Dpo::default().into();
    let reference = ReferenceArguments { precompute_ref_log_probs: Some(false), ..ReferenceArguments::default() };
    let never = Method::Dpo(WithReference { loss: Dpo::default(), reference });
    for mut model in [policy(), Golden::open("qwen3-tied").load_full()] {
        let text = error(&mut model, rows(&dpo), never.clone());
        assert!(text.contains("precompute_ref_log_probs = false computes the reference with the adapter turned off"));
    }
    let text = error(&mut fresh(), rows(&dpo), Method::Sft);
    assert!(text.contains("encoded for another method than \"sft\""), "{text}");

    let path = goldens().join("preferences/labelled.jsonl");
    let text = std::fs::read_to_string(&path).expect("the golden's rows").replace("false", "true");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, text).expect("writable");
    let options = EncodeOptions { task: RowTask::Labelled, ..EncodeOptions::default() };
    let dataset = Dataset::load(&path, None, &options).expect("they load").0;
    let text = error(&mut fresh(), dataset, Kto::default().into());
    assert_eq!(text, "all 8 answers are desirable; method \"kto\" needs desirable and undesirable ones");
}

/// The example of docs/preferences.md, with fewer steps.
#[test]
fn the_example_trains_from_its_run_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let scratch = tempfile::tempdir().expect("a directory");
    let paths = [
        ("output_dir", scratch.path().to_owned()),
        ("model.name_or_path", root.join("examples/quickstart/base")),
        ("data.train", root.join("examples/preferences/train.jsonl")),
        ("data.eval", root.join("examples/preferences/heldout.jsonl")),
    ];
    let paths = paths.map(|(key, path)| format!("{key}={:?}", path.display().to_string()));
    let others =
        ["device=\"cpu\"", "data.cache=false", "train.max_steps=6", "train.eval_steps=6", "train.eval_samples=0"];
    let overrides: Vec<ConfigOverride> =
        paths.iter().map(String::as_str).chain(others).map(|text| text.parse().expect("a key and a value")).collect();
    let config = RunConfig::load(root.join("examples/preferences/run.toml"), &overrides).expect("a valid run file");
    let report = config.train(TrainOptions::default(), &()).expect("the run finishes");
    let margin = |index: usize| report.evals[index].metrics.get("eval_rewards/margins").expect("it is reported");
    assert_eq!((report.steps.len(), report.evals.len(), margin(0)), (6, 2, 0.0));
    assert!(margin(1) > 0.1, "the margin on held-out pairs is {}", margin(1));
    let read = |name: &str| std::fs::read_to_string(scratch.path().join(name)).expect("it was written");
    assert!(read("run.toml").contains("method = \"dpo\"\n") && read("metrics.jsonl").contains("\"rewards/chosen\":"));
    assert!(read("adapter/README.md").contains("\n- dpo\n") && read("adapter/README.md").contains("- beta: 0.1\n"));
}

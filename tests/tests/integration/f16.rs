//! Tests of training in f16: the gradient scale, and optimizer steps within the error of PyTorch's own f16 runs.

use rekindle::{
    DataSource, DeviceKind, Dtype, FastLanguageModel, LoraConfig, Resume, SftConfig, SftTrainer, StepCount, Tokenizer,
    TrainReport, TrainerArguments,
};
use rekindle_kernels::DType;
use rekindle_models::{CausalLm, Sft};
use rekindle_tests::{Golden, Trajectory};
use rekindle_train::{LossScaler, Optimizer, OptimizerConfig, StepResult};
use std::path::Path;

fn load(golden: &Golden, adapter: Option<&str>) -> CausalLm {
    let mut model = golden.load_with(|options| {
        options.dtype = DType::F16;
        options.full_finetuning = adapter.is_none();
    });
    if let Some(adapter) = adapter {
        model.load_adapter(&golden.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
    }
    model
}

/// Trains as specified by `train/NAME/trajectory.json`; the difference from the f32 run must be at most twice that of
/// PyTorch's own f16 run. Returns false if there is no such run.
fn check(golden: &Golden, name: &str) -> bool {
    let dir = golden.dir.join("train").join(name);
    let Some(spread) = dir.is_dir().then(|| Trajectory::open(&dir)).and_then(|run| run.f16_spread()) else {
        return false;
    };
    let trajectory = Trajectory::open(&dir);
    let mut model = load(golden, trajectory.adapter());
    let file = if trajectory.adapter().is_some() { "adapter_model.safetensors" } else { "model.safetensors" };
    trajectory.check_within(spread.times(2.0), &format!("{}/{name} in f16", golden.name), golden, &mut model, file);
    true
}

#[test]
fn an_adapter_of_qwen3_follows_the_golden_trajectory() {
    assert!(check(&Golden::open("qwen3-tied"), "lora"));
}

#[test]
fn an_adapter_over_nf4_weights_follows_the_golden_trajectory() {
    assert!(check(&Golden::open("quantized/qwen3-tied-nf4-double"), "lora"));
}

#[test]
fn a_new_adapter_of_llama3_follows_the_golden_trajectory() {
    assert!(check(&Golden::open("llama3"), "lora-fresh"));
}

#[test]
fn full_finetuning_of_qwen2_follows_the_golden_trajectory() {
    assert!(check(&Golden::open("qwen2"), "full"));
}

#[test]
fn adapters_of_every_family_follow_the_golden_trajectories() {
    let checked = Golden::families().iter().filter(|golden| check(golden, "lora")).count();
    assert!(checked >= 22, "{checked} families");
    let checked = Golden::families().iter().filter(|golden| check(golden, "experts")).count();
    assert!(checked >= 4, "{checked} mixtures");
}

#[test]
fn full_finetuning_of_every_family_follows_the_golden_trajectories() {
    let checked = Golden::families().iter().filter(|golden| check(golden, "full")).count();
    assert!(checked >= 18, "{checked} families");
}

/// Runs steps over all rows as one batch, the first with this scale of the loss.
fn steps(model: &mut CausalLm, golden: &Golden, count: usize, scale: f64) -> (Vec<StepResult>, Optimizer) {
    let mut optimizer = Optimizer::new(model, OptimizerConfig::from(&SftConfig::default()), 3407).expect("trainable");
    optimizer.set_loss_scaler(LossScaler::new(scale));
    let batch = golden.packed();
    let step = |_| optimizer.step(model, &Sft, core::slice::from_ref(&batch), 1e-3).expect("golden rows fit");
    ((0..count).map(step).collect(), optimizer)
}

fn metric(step: &StepResult, name: &str) -> f64 {
    step.metrics.iter().find(|(known, _)| *known == name).expect("a metric of f16").1
}

/// Steps at a scale that overflows change nothing but the scale, and the steps after them are those of a run that began with
/// the smaller one.
#[test]
fn steps_that_overflow_are_skipped() {
    for (name, adapter) in [("qwen3-tied", Some("all-linear")), ("qwen2", None)] {
        let golden = Golden::open(name);
        let mut model = load(&golden, adapter);
        let before = model.params().all_values();
        let (skipped, optimizer) = steps(&mut model, &golden, 3, f64::powi(2.0, 60));
        assert!(skipped.iter().all(|step| step.loss.is_finite() && !step.grad_norm.is_finite()), "{name}: {skipped:?}");
        assert!(model.params().all_values() == before, "{name}: a skipped step changes no parameter");
        assert_eq!(skipped.iter().map(|step| metric(step, "skipped_steps")).collect::<Vec<_>>(), [1.0, 2.0, 3.0]);
        assert_eq!(metric(&skipped[2], "loss_scale"), f64::powi(2.0, 58));
        let scaler = *optimizer.loss_scaler().expect("a model in f16");
        assert_eq!((scaler.scale(), scaler.skipped(), optimizer.steps()), (f64::powi(2.0, 57), 3, 0), "{name}");

        let (all, optimizer) = steps(&mut model, &golden, 60, f64::powi(2.0, 60));
        let first = all.iter().position(|step| step.grad_norm.is_finite()).expect("the scale becomes small enough");
        assert!(all[first..].iter().all(|step| step.grad_norm.is_finite()), "{name}");
        assert_eq!(optimizer.steps(), 60 - first as u64);
        let mut other = load(&golden, adapter);
        let (calm, _) = steps(&mut other, &golden, 60 - first, metric(&all[first], "loss_scale"));
        let losses = |steps: &[StepResult]| steps.iter().map(|s| (s.loss, s.grad_norm)).collect::<Vec<_>>();
        assert_eq!(losses(&all[first..]), losses(&calm), "{name}");
        assert!(model.params().all_values() == other.params().all_values(), "{name}");
    }
}

/// Two scales that both fit give almost the same gradient, and a gradient without a scale loses its small parts.
#[test]
fn the_scale_does_not_change_the_gradient() {
    let golden = Golden::open("qwen3-tied");
    let norm = |scale| steps(&mut load(&golden, Some("all-linear")), &golden, 1, scale).0[0].grad_norm;
    let truth = {
        let mut model = golden.load_adapted("all-linear");
        let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&SftConfig::default()), 0).expect("trainable");
        optimizer.step(&mut model, &Sft, &[golden.packed()], 1e-3).expect("golden rows fit").grad_norm
    };
    for scale in [1024.0, 65536.0] {
        let error = (norm(scale) / truth - 1.0).abs();
        assert!(error < 1e-3, "scale {scale}: the norm is off by {error:e}");
    }
    let underflowed = (norm(f64::powi(2.0, -18)) / truth - 1.0).abs();
    assert!(
        underflowed > 1e-2,
        "2⁻¹⁸ is too small a scale for these gradients, yet the norm is off by {underflowed:e}"
    );
}

/// Runs six steps with a checkpoint after every second.
fn train(golden: &Golden, dir: &Path, resume: Option<Resume>, max_steps: usize) -> (TrainReport, Vec<f32>) {
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).max_seq_length(128);
    let model = loader.dtype(Dtype::F16).load_model().expect("a golden loads");
    let mut model = model.get_peft_model(LoraConfig::new(4)).expect("a valid configuration");
    let config = SftConfig {
        per_device_train_batch_size: 2,
        max_steps: Some(max_steps),
        learning_rate: Some(0.01),
        warmup_steps: StepCount::Steps(2),
        save_steps: Some(StepCount::Steps(2)),
        ..SftConfig::default()
    };
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    let report = SftTrainer::new(&mut model, None::<&Tokenizer>, rows, config)
        .arguments(TrainerArguments { output_dir: Some(dir.to_owned()), resume, ..TrainerArguments::default() })
        .train()
        .expect("the run ends");
    (report, model.causal_lm().params().all_values())
}

fn state(dir: &Path, step: usize) -> serde_json::Value {
    rekindle_tests::read_json(&dir.join(format!("checkpoint-{step}/trainer_state.json")))
}

/// A resumed run continues with the scale of the checkpoint, and skipped steps count as steps of the run, but not for the
/// learning rate.
#[test]
fn a_resumed_run_keeps_the_scale() {
    let golden = Golden::open("qwen3-tied");
    let (start, whole, parts) = (scratch(), scratch(), scratch());
    train(&golden, start.path(), None, 6);
    let scaler = state(start.path(), 2)["loss_scaler"].clone();
    assert_eq!(scaler, serde_json::json!({ "scale": 65536.0, "growth_tracker": 2, "skipped": 0 }));

    // From a scale that overflows in the steps after the checkpoint.
    let checkpoint = |to: &Path| {
        let (from, to) = (start.path().join("checkpoint-2"), to.join("checkpoint-2"));
        std::fs::create_dir_all(&to).expect("the disk has space");
        for entry in std::fs::read_dir(from).expect("it was written").map(|entry| entry.expect("it can be read")) {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("the disk has space");
        }
        let path = to.join("trainer_state.json");
        let mut state = rekindle_tests::read_json(&path);
        state["loss_scaler"]["scale"] = f64::powi(2.0, 60).into();
        std::fs::write(path, state.to_string()).expect("the disk has space");
    };
    checkpoint(whole.path());
    let (report, values) = train(&golden, whole.path(), Some(Resume::Latest), 6);
    let of = |name: &str| report.steps.iter().map(|step| step.metrics.get(name)).collect::<Vec<_>>();
    assert_eq!(of("skipped_steps").split_off(of("skipped_steps").len() - 4), [1.0, 2.0, 3.0, 4.0].map(Some));
    let rates: Vec<f64> = report.steps.iter().rev().take(4).map(|step| step.learning_rate).collect();
    assert_eq!(rates, [rates[0]; 4], "a skipped step does not advance the schedule");
    let expected = serde_json::json!({ "scale": f64::powi(2.0, 56), "growth_tracker": 0, "skipped": 4 });
    assert_eq!(
        (&state(whole.path(), 6)["loss_scaler"], &state(whole.path(), 6)["optimizer_steps"]),
        (&expected, &2.into())
    );

    checkpoint(parts.path());
    std::fs::remove_dir_all(whole.path().join("checkpoint-6")).expect("it was written");
    std::fs::rename(whole.path().join("checkpoint-4"), parts.path().join("checkpoint-4")).expect("it was written");
    let (_, resumed) = train(&golden, parts.path(), Some(Resume::Latest), 6);
    assert_eq!(state(parts.path(), 6)["loss_scaler"], expected);
    assert!(resumed == values, "the parameters differ");
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn what_cannot_be_trained_in_f16_is_refused_by_name() {
    let refused = |golden: &str, config: SftConfig| {
        let golden = Golden::open(golden);
        let model = load(&golden, config.optimizer_in_bwd.eq(&false).then_some("all-linear"));
        Optimizer::new(&model, OptimizerConfig::from(&config), 0).expect_err("it is refused").to_string()
    };
    for (family, part) in [
        ("families/gemma3", "Gemma3ForCausalLM cannot be trained in f16: the results of its layers exceed 65,504"),
        ("families/gpt-oss", "GptOssForCausalLM cannot be trained in f16: gradients within its experts"),
        ("families/qwen3_5", "cannot be trained in f16: its gated delta layers"),
    ] {
        let error = refused(family, SftConfig::default());
        assert!(error.contains(part) && error.contains("use dtype \"bf16\" or \"f32\""), "{error}");
    }
    let error = refused("qwen2", SftConfig { optimizer_in_bwd: true, ..SftConfig::default() });
    assert!(error.contains("optimizer_in_bwd = true applies gradients before"), "{error}");
}

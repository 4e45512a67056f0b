//! Runs that sample completions of a tiny model.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rekindle::run::{ConfigOverride, RunConfig, TrainOptions};
use rekindle_data::{Dataset, EncodeOptions, RowTask};
use rekindle_lora::LoraConfig;
use rekindle_models::objective::{Grpo, GrpoLoss, Rloo};
use rekindle_models::{CausalLm, GradientCheckpointing};
use rekindle_rewards::{Reward, RewardError, RewardSet, Sample};
use rekindle_tests::Golden;
use rekindle_train::{
    GrpoAdvantages, Method, MetricValues, Resume, RlooAdvantages, RolloutArguments, RolloutTask, SftConfig, StepCount,
    TrainEnd, TrainEvent, TrainReport, Trainer, TrainerArguments, WithRollouts,
};

/// The share of even token ids; null for a completion that begins with id 0.
pub(super) struct Even {
    /// Groups scored so far.
    calls: Arc<AtomicUsize>,
    /// The group after which the run is asked to stop.
    stop_after: usize,
    stop: Arc<AtomicBool>,
    /// If true, the reward fails there instead.
    fails: bool,
}

impl Reward for Even {
    fn name(&self) -> &str {
        "even"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        if self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.stop_after {
            if self.fails {
                return Err(RewardError::failed("even", "it fails"));
            }
            self.stop.store(true, Ordering::Relaxed);
        }
        let score = |sample: &Sample| {
            assert_eq!(
                sample.completion.split_whitespace().count(),
                sample.completion_ids.len() - usize::from(!sample.truncated)
            );
            let even = sample.completion_ids.iter().filter(|id| **id % 2 == 0).count();
            (sample.completion_ids[0] != 0).then(|| even as f64 / sample.completion_ids.len() as f64)
        };
        Ok(samples.iter().map(score).collect())
    }
}

pub(super) fn task<'a>(reward: impl Reward + 'static) -> RolloutTask<'a> {
    let mut rewards = RewardSet::new();
    rewards.push(Box::new(reward), 1.0).expect("a new name");
    RolloutTask { rewards, columns: Default::default(), stop_ids: vec![130], tokenizer: None }
}

pub(super) fn even() -> Even {
    Even { calls: Arc::default(), stop_after: 0, stop: Arc::default(), fails: false }
}

pub(super) fn prompts() -> Dataset {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("prompts.jsonl");
    let row = |index: usize| {
        let ids: Vec<usize> = (0..3 + index % 4).map(|place| (17 * index + 29 * place) % 128).collect();
        format!("{{\"prompt_ids\": {ids:?}, \"answer\": {index}}}\n")
    };
    std::fs::write(&path, (0..7).map(row).collect::<String>()).expect("writable");
    let options = EncodeOptions { max_seq_length: 64, task: RowTask::Prompts, ..EncodeOptions::default() };
    Dataset::load(&path, None, &options).expect("they load").0
}

pub(super) fn fresh() -> CausalLm {
    let mut model = Golden::open("qwen3-tied").load();
    model.add_adapter(&LoraConfig::new(4).lora_dropout(0.1)).expect("a valid configuration");
    model
}

fn without_dropout() -> CausalLm {
    let mut model = Golden::open("qwen3-tied").load();
    model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
    model
}

/// Four completions of at most 6 tokens for each of four prompts, which two passes of two steps use.
pub(super) fn grpo() -> Method {
    let loss = Grpo { beta: 0.04, max_completion_length: 6, ..Grpo::default() };
    let advantages = GrpoAdvantages { num_generations: 4, ..GrpoAdvantages::default() };
    let rollouts =
        RolloutArguments { generation_batch_size: Some(16), num_iterations: 2, ..RolloutArguments::default() };
    Method::Grpo(Box::new(WithRollouts { loss, advantages, rollouts }))
}

pub(super) fn rloo() -> Method {
    let loss = Rloo { max_completion_length: 6, temperature: 0.8, ..Rloo::default() };
    let rollouts = RolloutArguments { mask_truncated_completions: true, ..RolloutArguments::default() };
    Method::Rloo(Box::new(WithRollouts { loss, advantages: RlooAdvantages::default(), rollouts }))
}

pub(super) fn config(method: Method) -> SftConfig {
    SftConfig {
        method,
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 2,
        max_steps: Some(6),
        learning_rate: Some(2e-3),
        ..SftConfig::default()
    }
}

/// Runs with evaluations, until the end, until `stop_at` steps are done, or until `reward` asks to stop.
fn run(model: &mut CausalLm, config: SftConfig, dir: &Path, resume: bool, stop_at: usize, reward: Even) -> TrainReport {
    let config = SftConfig { eval_steps: Some(StepCount::Steps(3)), ..config };
    let stop = Arc::clone(&reward.stop);
    let flag = Arc::clone(&stop);
    let resume = resume.then_some(Resume::Latest);
    let trainer = Trainer {
        arguments: TrainerArguments { output_dir: Some(dir.to_owned()), resume, ..TrainerArguments::default() },
        eval: Some(prompts()),
        rollouts: Some(task(reward)),
        stop,
        on_event: Box::new(move |event| {
            if let TrainEvent::Step { metrics, .. } = event
                && metrics.step == stop_at
            {
                flag.store(true, Ordering::Relaxed);
            }
        }),
        ..Trainer::new(model, prompts(), config)
    };
    trainer.train().expect("the run finishes")
}

/// Returns the numbers of a report but for times.
pub(super) fn numbers(report: &TrainReport) -> Vec<(f64, f64, MetricValues)> {
    let untimed = |metrics: &MetricValues| {
        MetricValues(
            metrics.0.iter().filter(|(name, _)| !name.starts_with("time/")).map(|(n, v)| (n.clone(), *v)).collect(),
        )
    };
    let steps = report.steps.iter().map(|step| (step.loss, step.grad_norm, untimed(&step.metrics)));
    steps.chain(report.evals.iter().map(|eval| (eval.eval_loss, 0.0, untimed(&eval.metrics)))).collect()
}

/// A run has the bits of an uninterrupted one if it is stopped between steps that share completions, and if it is stopped
/// while it samples.
#[test]
fn runs_resume() {
    for (what, method) in [("grpo", grpo()), ("rloo", rloo())] {
        let whole = tempfile::tempdir().expect("a directory");
        let mut model = fresh();
        let expected = run(&mut model, config(method.clone()), whole.path(), false, 0, even());
        assert_eq!((expected.steps.len(), expected.end), (6, TrainEnd::Finished));
        let values = model.params().all_values();
        // 7 groups of the evaluation before the first step, and groups of a first generation, come before the one that stops.
        let while_sampling = if what == "grpo" { 7 + 4 + 7 + 2 } else { 7 + 4 + 2 };
        for (stop_at, stop_after) in [(3, 0), (0, while_sampling)] {
            let stopped = tempfile::tempdir().expect("a directory");
            let stopping = Even { stop_after, ..even() };
            let report = run(&mut fresh(), config(method.clone()), stopped.path(), false, stop_at, stopping);
            assert_eq!(report.end, TrainEnd::Interrupted, "{what}");
            let checkpoint = report.checkpoint.expect("a checkpoint");
            let uses_earlier = what == "grpo" && stop_at == 3;
            assert_eq!(checkpoint.join("rollouts.json").is_file(), uses_earlier, "{what}, {stop_at}");
            let mut model = fresh();
            let report = run(&mut model, config(method.clone()), stopped.path(), true, 0, even());
            assert_eq!(numbers(&report), numbers(&expected), "{what}, stopped at {stop_at} or {stop_after}");
            assert!(model.params().all_values() == values, "{what}, stopped at {stop_at} or {stop_after}: other bits");
        }
        let names =
            ["reward", "reward_std", "frac_reward_zero_std", "rewards/even/mean", "completions/mean_length", "kl"];
        for name in names {
            assert!(expected.steps[0].metrics.get(name).is_some(), "{what}: {name}");
        }
        assert!(expected.evals[0].metrics.get("eval_reward").is_some());
        let page = std::fs::read_to_string(whole.path().join("report.html")).expect("a report");
        assert!(page.contains("<b>Reward</b>") && page.contains("Completion length"), "{what}");
    }
}

/// Returns the first steps of a run that writes nothing, and the trained values.
fn steps(model: &mut CausalLm, config: SftConfig) -> (Vec<(f64, f64, MetricValues)>, Vec<f32>) {
    let trainer = Trainer { rollouts: Some(task(even())), ..Trainer::new(model, prompts(), config) };
    let report = trainer.train().expect("the run finishes");
    (numbers(&report), model.params().all_values())
}

/// A run that ends without a checkpoint of its own, as a killed one does, has the bits of an uninterrupted one when it resumes
/// from the last checkpoint, be that within a generation or before one.
#[test]
fn runs_that_die_while_they_sample_resume() {
    for (method, dies_after, within) in [(grpo(), 4 + 1, false), (rloo(), 4 + 4 + 3, false), (grpo(), 4 + 1, true)] {
        // Four steps use a generation.
        let saves = if within { 3 } else { 1 };
        let config = SftConfig { save_steps: Some(StepCount::Steps(saves)), ..config(method) };
        let train = |model: &mut CausalLm, dir: &Path, resume: bool, reward: Even| {
            let resume = resume.then_some(Resume::Latest);
            let trainer = Trainer {
                arguments: TrainerArguments { output_dir: Some(dir.to_owned()), resume, ..TrainerArguments::default() },
                rollouts: Some(task(reward)),
                ..Trainer::new(model, prompts(), config.clone())
            };
            trainer.train()
        };
        let [whole, killed] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let mut model = fresh();
        let expected = train(&mut model, whole.path(), false, even()).expect("the run finishes");
        let values = model.params().all_values();
        let dying = Even { stop_after: dies_after, fails: true, ..even() };
        let error = train(&mut fresh(), killed.path(), false, dying).expect_err("the reward fails").to_string();
        assert!(error.contains("it fails"), "{error}");
        let checkpoint = |done: &usize| killed.path().join(format!("checkpoint-{done}"));
        let done = (0..6).rfind(|done| checkpoint(done).is_dir()).expect("a checkpoint");
        assert_eq!(checkpoint(&done).join("rollouts.json").is_file(), within, "after {done} steps");
        let mut model = fresh();
        let report = train(&mut model, killed.path(), true, even()).expect("the run finishes");
        assert_eq!(numbers(&report), numbers(&expected), "resumed after {done} steps");
        assert!(model.params().all_values() == values, "resumed after {done} steps: other bits");
    }
}

/// Loss and gradient do not depend on how a step is split into passes, and not on what is sampled at once, with and without
/// completions that have no loss.
#[test]
fn a_step_does_not_depend_on_its_split() {
    let with = |mut method: Method, masks: bool, max_sequences: usize| {
        let rollouts = match &mut method {
            Method::Grpo(arguments) => &mut arguments.rollouts,
            Method::Rloo(arguments) => &mut arguments.rollouts,
            _ => panic!("policy gradients"),
        };
        (rollouts.max_sequences, rollouts.mask_truncated_completions) = (max_sequences, masks);
        method
    };
    let reported = |step: &MetricValues, name: &str| step.get(name).expect("it is reported");
    let (mut differences, mut losses) = (Vec::new(), Vec::new());
    for (method, masks) in [(grpo(), false), (grpo(), true), (rloo(), false), (rloo(), true)] {
        let of = |per_device, passes, max_sequences| {
            let config = SftConfig {
                per_device_train_batch_size: per_device,
                gradient_accumulation_steps: passes,
                max_steps: Some(1),
                ..config(with(method.clone(), masks, max_sequences))
            };
            // A fifth of the tokens end a completion, so that some are truncated.
            let stop_ids = (0..131).step_by(5).collect();
            let rollouts = Some(RolloutTask { stop_ids, ..task(even()) });
            let mut model = without_dropout();
            let report = Trainer { rollouts, ..Trainer::new(&mut model, prompts(), config) }.train();
            numbers(&report.expect("the run finishes"))
        };
        let what = format!("{}, masked: {masks}", method.name());
        let whole = of(8, 1, 64);
        let truncated = reported(&whole[0].2, "completions/clipped_ratio");
        assert!(truncated > 0.0 && truncated < 1.0 && whole[0].1 > 0.0, "{what}: {truncated}");
        for other in [of(4, 2, 64), of(1, 8, 3)] {
            super::assert_close(&format!("{what}: the loss"), other[0].0, whole[0].0, 1e-6);
            super::assert_close(&format!("{what}: grad_norm"), other[0].1, whole[0].1, 1e-6);
            for name in ["reward", "entropy", "completions/max_length"] {
                super::assert_close(name, reported(&other[0].2, name), reported(&whole[0].2, name), 1e-6);
            }
        }
        losses.push((whole[0].0, whole[0].1));
        differences.extend(whole[0].2.get("sampling/sampling_logp_difference/max"));
    }
    assert!(losses[0] != losses[1] && losses[2] != losses[3], "masks have an effect: {losses:?}");
    // The engine and the training pass compute the same distribution.
    assert!(differences.len() >= 2 && differences.iter().all(|difference| *difference < 1e-5), "{differences:?}");
}

#[test]
fn checkpointing_keeps_every_bit() {
    let of = |use_gradient_checkpointing| {
        steps(&mut fresh(), SftConfig { use_gradient_checkpointing, max_steps: Some(3), ..config(grpo()) })
    };
    assert!(of(GradientCheckpointing::Off) == of(GradientCheckpointing::Block));
}

/// Ratios are 1 in the first step of a generation, and differ in later ones.
#[test]
fn only_later_steps_are_off_policy() {
    let mut method = grpo();
    let Method::Grpo(arguments) = &mut method else { panic!("GRPO") };
    // Any other ratio is clipped.
    (arguments.loss.epsilon, arguments.loss.beta) = (0.0, 0.0);
    let (steps, _) = steps(&mut without_dropout(), SftConfig { max_steps: Some(5), ..config(method) });
    let clipped: Vec<f64> = steps.iter().map(|step| step.2.get("clip_ratio/region_mean").expect("reported")).collect();
    assert_eq!((clipped[0], clipped[4]), (0.0, 0.0), "{clipped:?}");
    assert!(clipped[1] > 0.0 && clipped[2] > 0.0 && clipped[3] > 0.0, "{clipped:?}");
}

/// The reward rises for GRPO with all of its losses and for RLOO.
#[test]
fn rewards_rise() {
    let losses =
        [(GrpoLoss::Dapo, None), (GrpoLoss::DrGrpo, None), (GrpoLoss::Cispo, Some(5.0)), (GrpoLoss::Sapo, None)];
    let of_grpo = losses.map(|(loss_type, epsilon_high)| {
        let loss = Grpo { loss_type, epsilon_high, max_completion_length: 6, ..Grpo::default() };
        let advantages = GrpoAdvantages { num_generations: 8, ..GrpoAdvantages::default() };
        let rollouts = RolloutArguments { dynamic_sampling: true, ..RolloutArguments::default() };
        Method::Grpo(Box::new(WithRollouts { loss, advantages, rollouts }))
    });
    let loss = Rloo { beta: 0.0, max_completion_length: 6, ..Rloo::default() };
    let advantages = RlooAdvantages { num_generations: 8, ..RlooAdvantages::default() };
    let of_rloo = Method::Rloo(Box::new(WithRollouts { loss, advantages, rollouts: RolloutArguments::default() }));
    for method in of_grpo.into_iter().chain([of_rloo]) {
        let name = format!("{method:?}");
        let config = SftConfig {
            per_device_train_batch_size: 32,
            gradient_accumulation_steps: 1,
            max_steps: Some(12),
            learning_rate: Some(2e-2),
            ..config(method)
        };
        let (steps, _) = steps(&mut without_dropout(), config);
        let reward = |index: usize| steps[index].2.get("reward").expect("it is reported");
        println!("{:.3} -> {:.3} {name}", reward(0), reward(11));
        assert!(reward(11) > reward(0) + 0.15, "{name}: {} -> {}", reward(0), reward(11));
    }
}

/// A reward without any difference is replaced by further prompts, at most `max_num_gen_batches` times.
#[test]
fn dynamic_sampling_ends() {
    struct Constant;

    impl Reward for Constant {
        fn name(&self) -> &str {
            "constant"
        }

        fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
            Ok(vec![Some(1.0); samples.len()])
        }
    }

    let mut method = grpo();
    let Method::Grpo(arguments) = &mut method else { panic!("GRPO") };
    (arguments.rollouts.dynamic_sampling, arguments.rollouts.max_num_gen_batches) = (true, 3);
    arguments.loss.beta = 0.0;
    let config = SftConfig { max_steps: Some(1), ..config(method) };
    let mut model = without_dropout();
    let trainer = Trainer { rollouts: Some(task(Constant)), ..Trainer::new(&mut model, prompts(), config) };
    let step = trainer.train().expect("the run finishes").steps.remove(0);
    let of = |name: &str| step.metrics.get(name).expect("it is reported");
    assert_eq!((of("dynamic_sampling/prompts"), of("frac_reward_zero_std"), step.grad_norm), (12.0, 1.0, 0.0));
}

#[test]
fn runs_that_cannot_learn_are_refused() {
    let error = |model: &mut CausalLm, method: Method, rollouts: Option<RolloutTask<'_>>| {
        let trainer = Trainer { rollouts, ..Trainer::new(model, prompts(), config(method)) };
        trainer.train().expect_err("refused").to_string()
    };
    let text = error(&mut without_dropout(), grpo(), None);
    assert!(text.contains("method \"grpo\" needs a reward: add a section [[rewards]]"), "{text}");
    let text = error(&mut Golden::open("qwen3-tied").load_full(), grpo(), Some(task(even())));
    assert!(text.contains("beta = 0.04 needs a reference model"), "{text}");
    let text = error(&mut super::policy(), rloo(), Some(task(even())));
    assert!(text.contains("beta = 0.05 needs a reference model"), "{text}");
    let mut single = grpo();
    let Method::Grpo(arguments) = &mut single else { panic!("GRPO") };
    arguments.advantages.num_generations = 1;
    let text = error(&mut without_dropout(), single, Some(task(even())));
    assert!(text.contains("num_generations is 1; it must be at least 2"), "{text}");

    struct Failing;

    impl Reward for Failing {
        fn name(&self) -> &str {
            "failing"
        }

        fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
            Ok(vec![Some(1.0); samples.len() - 1])
        }
    }

    let text = error(&mut without_dropout(), grpo(), Some(task(Failing)));
    assert!(text.contains("failing") && text.contains('3') && text.contains('4'), "{text}");
}

/// The example of docs/grpo.md, with fewer steps.
#[test]
fn the_example_trains_from_its_run_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let scratch = tempfile::tempdir().expect("a directory");
    let paths = [
        ("output_dir", scratch.path().to_owned()),
        ("model.name_or_path", root.join("examples/quickstart/base")),
        ("data.train", root.join("examples/grpo/train.jsonl")),
        ("data.eval", root.join("examples/grpo/heldout.jsonl")),
    ];
    let paths = paths.map(|(key, path)| format!("{key}={:?}", path.display().to_string()));
    let others = [
        "device=\"cpu\"",
        "data.cache=false",
        "train.max_steps=6",
        "train.eval_steps=6",
        "train.eval_samples=1",
        "train.num_generations_eval=2",
    ];
    let overrides: Vec<ConfigOverride> =
        paths.iter().map(String::as_str).chain(others).map(|text| text.parse().expect("a key and a value")).collect();
    let path = root.join("examples/grpo/run.toml");
    let config = RunConfig::load(&path, &overrides).expect("a valid run file");
    let report = config.clone().train(TrainOptions::default(), &()).expect("the run finishes");
    let reward = |index: usize| report.evals[index].metrics.get("eval_rewards/exact/mean").expect("it is reported");
    assert_eq!((report.steps.len(), report.evals.len()), (6, 2));
    let of_steps: Vec<_> = report.steps.iter().filter_map(|step| step.metrics.get("reward")).collect();
    println!("{of_steps:?}, {} -> {}", reward(0), reward(1));
    assert!((0.0..0.5).contains(&of_steps[0]) && of_steps.len() == 6, "{of_steps:?}");
    let read = |name: &str| std::fs::read_to_string(scratch.path().join(name)).expect("it was written");
    assert!(read("run.toml").contains("method = \"grpo\"\n") && read("run.toml").contains("[[rewards]]"));
    assert!(read("metrics.jsonl").contains("\"completions/clipped_ratio\":"));
    assert!(read("adapter/README.md").contains("\n- grpo\n"), "{}", read("adapter/README.md"));

    let without = RunConfig { rewards: Vec::new(), ..config.clone() };
    let error = without.train(TrainOptions::default(), &()).expect_err("refused").to_string();
    assert!(error.contains("method = \"grpo\" needs a reward"), "{error}");
    let sft = RunConfig { train: SftConfig::default(), ..config };
    let error = sft.train(TrainOptions::default(), &()).expect_err("refused").to_string();
    assert!(error.contains("[[rewards]] has no effect with method = \"sft\""), "{error}");
}

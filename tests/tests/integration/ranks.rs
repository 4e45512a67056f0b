//! Runs of several ranks, connected over TCP, against the same run of one rank.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle_data::{Dataset, EncodeOptions};
use rekindle_dist::{Communicator, OneRank};
use rekindle_kernels::{DType, Device};
use rekindle_lora::LoraConfig;
use rekindle_models::objective::{Dpo, DpoLoss, Kto, RewardModel};
use rekindle_models::{CausalLm, LoadIn, LoadOptions, open_checkpoint};
use rekindle_tests::{Golden, goldens, on_ranks, relative_distance};
use rekindle_train::{
    Error, Method, Optim, Optimizer, OptimizerConfig, ReferenceArguments, Resume, SftConfig, StepCount, TensorWorld,
    TrainEvent, TrainReport, Trainer, TrainerArguments, WithReference,
};

/// The documented tolerance for losses and gradient norms. Rows have the same bits on any rank; the order of sums over them
/// differs, and so does each step that follows from it.
const TOLERANCE: f64 = 1e-6;

/// The tolerance for other metrics. Some are differences of log-probabilities of about −80, whose f32 values are 7.6e-6 apart.
const METRIC_TOLERANCE: f64 = 1e-5;

const MAX_SEQ_LENGTH: usize = 128;

/// A job that can be run on any number of ranks.
struct RankJob {
    make: fn() -> CausalLm,
    config: SftConfig,
}

/// The result of a rank.
#[derive(Debug)]
struct RankOutcome {
    report: TrainReport,
    values: Vec<f32>,
    notes: Vec<String>,
}

impl RankJob {
    /// Six steps of four rows; of the seven rows of an epoch, its last step has three.
    fn new(make: fn() -> CausalLm) -> Self {
        let config = SftConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            max_steps: Some(6),
            learning_rate: Some(1e-3),
            eval_steps: Some(StepCount::Steps(3)),
            per_device_eval_batch_size: 2,
            ..SftConfig::default()
        };
        Self { make, config }
    }

    fn config(mut self, change: impl FnOnce(&mut SftConfig)) -> Self {
        change(&mut self.config);
        self
    }

    fn rows(&self) -> Dataset {
        let name = match &self.config.method {
            Method::Sft => "qwen3-tied/rows.jsonl",
            Method::Kto(_) => "preferences/labelled.jsonl",
            _ => "preferences/pairs.jsonl",
        };
        let task = self.config.method.task();
        let options = EncodeOptions { max_seq_length: MAX_SEQ_LENGTH, task, ..EncodeOptions::default() };
        Dataset::load(&goldens().join(name), None, &options).expect("golden rows load").0
    }

    /// Trains as a rank of `world`; stops after `stop_at` steps.
    fn train(
        &self,
        world: Arc<dyn Communicator>,
        dir: Option<&Path>,
        resume: bool,
        stop_at: usize,
    ) -> Result<RankOutcome, Error> {
        let mut model = (self.make)();
        let rows = self.rows();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        // A single rank is asked, and all stop.
        let is_asked = world.rank() + 1 == world.size();
        let mut notes = Vec::new();
        let trainer = Trainer {
            arguments: TrainerArguments {
                output_dir: dir.map(Path::to_owned),
                resume: resume.then_some(Resume::Latest),
                ..TrainerArguments::default()
            },
            eval: self.config.eval_steps.is_some().then(|| rows.clone()),
            world,
            stop,
            on_event: Box::new(|event| match event {
                TrainEvent::Step { metrics, .. } if is_asked && metrics.step == stop_at => {
                    flag.store(true, Ordering::Relaxed);
                }
                TrainEvent::Started { notes: of_run, .. } => notes = of_run.to_vec(),
                _ => {}
            }),
            ..Trainer::new(&mut model, rows, self.config.clone())
        };
        let report = trainer.train()?;
        Ok(RankOutcome { report, values: model.params().all_values(), notes })
    }

    fn alone(&self) -> RankOutcome {
        self.train(Arc::new(OneRank), None, false, 0).expect("the run finishes")
    }

    fn on_ranks(&self, ranks: usize) -> Vec<RankOutcome> {
        let outcomes = on_ranks(ranks, |world| self.train(world, None, false, 0));
        outcomes.into_iter().map(|outcome| outcome.expect("the run finishes")).collect()
    }

    /// Trains on one rank and on two to eight, and compares every step and evaluation.
    fn check(&self, what: &str) {
        let expected = self.alone();
        let moved = relative_distance(&expected.values, &(self.make)().params().all_values());
        assert!(moved > 1e-6, "{what}: the run changes the parameters");
        let mut worst = 0.0f64;
        for ranks in [2, 3, 4, 8] {
            let outcomes = self.on_ranks(ranks);
            for outcome in &outcomes {
                let what = format!("{what}, {ranks} ranks");
                worst = worst.max(assert_same_run(&what, &outcome.report, &expected.report));
                assert!(outcome.values == outcomes[0].values, "{what}: the ranks have the same parameters");
            }
        }
        println!("{what}: off by {worst:.1e}");
    }
}

/// Compares losses, gradient norms, token counts and evaluations; returns the largest relative difference.
fn assert_same_run(what: &str, report: &TrainReport, expected: &TrainReport) -> f64 {
    assert_eq!(report.steps.len(), expected.steps.len(), "{what}");
    let mut worst = 0.0f64;
    let off = |what: &str, value: f64, expected: f64, tolerance: f64| {
        let error = (value - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "{what}: {value} is not {expected}: off by {error:e}");
        error
    };
    let mut close = |what: String, value: f64, expected: f64| {
        worst = worst.max(off(&what, value, expected, TOLERANCE));
    };
    for (step, other) in report.steps.iter().zip(&expected.steps) {
        let what = |name: &str| format!("{what}, step {}: {name}", step.step);
        close(what("loss"), step.loss, other.loss);
        close(what("grad_norm"), step.grad_norm, other.grad_norm);
        let counts = |step: &rekindle_train::StepMetrics| {
            (step.step, step.tokens, step.trained_tokens, step.epoch, step.learning_rate)
        };
        assert_eq!(counts(step), counts(other), "{}", what("counts"));
        assert_eq!(step.metrics.0.len(), other.metrics.0.len());
        for (name, value) in &step.metrics.0 {
            off(&what(name), *value, other.metrics.0[name], METRIC_TOLERANCE);
        }
    }
    assert_eq!(report.evals.len(), expected.evals.len(), "{what}");
    for (eval, other) in report.evals.iter().zip(&expected.evals) {
        assert_eq!((eval.step, eval.eval_tokens), (other.step, other.eval_tokens));
        close(format!("{what}, evaluation after step {}", eval.step), eval.eval_loss, other.eval_loss);
        if eval.step == 0 {
            // Before training, models are the same, and so are the sums.
            assert_eq!(eval.eval_loss.to_bits(), other.eval_loss.to_bits(), "{what}");
        }
    }
    worst
}

fn golden() -> Golden {
    Golden::open("qwen3-tied")
}

fn lora() -> CausalLm {
    golden().load_adapted("all-linear")
}

fn lora_with_dropout() -> CausalLm {
    let mut model = golden().load();
    model.add_adapter(&LoraConfig::new(4).lora_dropout(0.1)).expect("a valid configuration");
    model
}

fn qlora() -> CausalLm {
    let mut model = golden().load_with(|options| options.load_in = Some(LoadIn::FourBit(None)));
    model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
    model
}

/// A reward model with an adapter, whose head is trained too.
fn reward() -> CausalLm {
    let checkpoint = open_checkpoint(&goldens().join("reward/model")).expect("a golden");
    let options = LoadOptions::new(Device::cpu(), DType::F32, MAX_SEQ_LENGTH);
    let mut model = CausalLm::load(&checkpoint, &options, &mut |_| ()).expect("it loads");
    model.load_adapter(&goldens().join("reward/adapter")).expect("PEFT's adapter loads");
    model
}

fn full() -> CausalLm {
    golden().load_full()
}

#[test]
fn adapters_take_the_steps_of_one_rank() {
    RankJob::new(lora).check("lora");
    RankJob::new(lora_with_dropout).config(|config| config.neftune_noise_alpha = Some(5.0)).check("dropout and noise");
}

#[test]
fn quantized_bases_take_the_steps_of_one_rank() {
    RankJob::new(qlora).check("qlora");
}

/// The optimizer's state is divided among the ranks, unless it is turned off.
#[test]
fn all_weights_take_the_steps_of_one_rank() {
    let with = |shard_optimizer: Option<bool>| {
        RankJob::new(full).config(|config| {
            config.learning_rate = Some(1e-5);
            config.shard_optimizer = shard_optimizer;
        })
    };
    with(None).check("full, divided state");
    with(Some(false)).check("full, whole state");
}

/// The same number of ranks takes the same steps to the bit with a divided and with a whole state.
#[test]
fn a_divided_state_takes_the_steps_of_a_whole_one() {
    for (what, make) in [("full", full as fn() -> CausalLm), ("lora", lora_with_dropout)] {
        for (optim, ranks) in [(Optim::Adamw, 3), (Optim::Adamw8bit, 2), (Optim::Adamw8bit, 8), (Optim::Lion, 4)] {
            let run = |shard_optimizer: bool| {
                let job = RankJob::new(make).config(|config| {
                    config.optim = optim;
                    config.learning_rate = Some(1e-4);
                    config.shard_optimizer = Some(shard_optimizer);
                });
                job.on_ranks(ranks).swap_remove(ranks - 1)
            };
            let (divided, whole) = (run(true), run(false));
            assert!(divided.values == whole.values, "{what}, {optim:?}, {ranks} ranks");
        }
    }
}

/// Each rank holds 1/N of the state, and the parts are the whole.
#[test]
fn a_divided_state_takes_a_share_of_the_memory() {
    for (format, optim) in [("f32", Optim::Adamw), ("8 bits", Optim::Adamw8bit)] {
        let config = OptimizerConfig::from(&SftConfig { optim, ..SftConfig::default() });
        let whole = Optimizer::new(&full(), config, 0).expect("all is trained").state().bytes().device;
        for ranks in [2, 3, 8] {
            let bytes = on_ranks(ranks, |world| {
                let model = full();
                let world = TensorWorld::connect(world, model.device())?;
                let optimizer = Optimizer::on_ranks(&model, config, 0, world)?;
                assert!(optimizer.is_sharded());
                Ok(optimizer.state().bytes().device)
            });
            let bytes: Vec<usize> = bytes.into_iter().map(|bytes| bytes.expect("the ranks connect")).collect();
            assert_eq!(bytes.iter().sum::<usize>(), whole, "{format}, {ranks} ranks");
            // A cut is moved by less than a block of 8-bit state, and small parameters have f32 state.
            let (most, least) = (bytes.iter().max(), bytes.iter().min());
            let spread = most.zip(least).map_or(0, |(most, least)| most - least);
            assert!(spread <= whole / 10, "{format}, {ranks} ranks: {bytes:?}");
        }
    }
}

#[test]
fn a_divided_state_of_weights_in_place_is_refused() {
    let in_place = || {
        golden().load_with(|options| {
            options.full_finetuning = true;
            options.stochastic_rounding = true;
        })
    };
    let job = RankJob::new(in_place).config(|config| config.shard_optimizer = Some(true));
    for result in on_ranks(2, |world| job.train(world, None, false, 0)) {
        let error = result.expect_err("it is refused").to_string();
        assert!(error.contains("shard_optimizer = true needs weights in f32") || error.contains("failed"), "{error}");
    }
}

/// A pack is a row, and steps have fewer rows than ranks.
#[test]
fn packs_take_the_steps_of_one_rank() {
    let packed = |config: &mut SftConfig| {
        config.packing = true;
        config.per_device_train_batch_size = 1;
    };
    RankJob::new(lora_with_dropout).config(packed).check("packed");
}

#[test]
fn preferences_take_the_steps_of_one_rank() {
    let with = |method: Method| {
        RankJob::new(lora_with_dropout).config(|config| {
            config.method = method;
            config.per_device_train_batch_size = 1;
            config.gradient_accumulation_steps = 3;
        })
    };
    with(Dpo::default().into()).check("dpo");
    // A loss with sums over the step, and reference log-probabilities that the ranks compute together.
    let sorted = Dpo { loss_type: DpoLoss::AotUnpaired.into(), ..Dpo::default() };
    let reference = ReferenceArguments { precompute_ref_log_probs: Some(true), ..ReferenceArguments::default() };
    with(Method::Dpo(WithReference { loss: sorted, reference: reference.clone() })).check("aot_unpaired");
    with(Method::Kto(WithReference { loss: Kto::default(), reference })).check("kto");
}

/// The loss of a pair, and the square of the sum of its scores.
#[test]
fn reward_models_take_the_steps_of_one_rank() {
    let job = RankJob::new(reward).config(|config| {
        config.method = RewardModel { center_rewards_coefficient: Some(0.01) }.into();
        config.per_device_train_batch_size = 1;
        config.gradient_accumulation_steps = 3;
    });
    job.check("reward");
}

#[test]
fn the_same_number_of_ranks_has_the_same_bits() {
    let job = RankJob::new(lora_with_dropout);
    let [first, second] = [(); 2].map(|()| job.on_ranks(3));
    for (first, second) in first.iter().zip(&second) {
        assert!(first.values == second.values);
        let numbers = |outcome: &RankOutcome| -> Vec<[u64; 2]> {
            outcome.report.steps.iter().map(|step| [step.loss.to_bits(), step.grad_norm.to_bits()]).collect()
        };
        assert_eq!(numbers(first), numbers(second));
    }
}

/// Only rank 0 has a directory: checkpoints need no shared file system.
#[test]
fn a_checkpoint_of_four_ranks_resumes_on_three() {
    for (what, make) in [("lora", lora_with_dropout as fn() -> CausalLm), ("full", full)] {
        let job = RankJob::new(make).config(|config| {
            config.load_best_model_at_end = true;
            config.save_steps = Some(StepCount::Steps(3));
            config.learning_rate = Some(1e-4);
        });
        let expected = {
            let dir = tempfile::tempdir().expect("a directory");
            job.train(Arc::new(OneRank), Some(dir.path()), false, 0).expect("the run finishes")
        };
        let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().expect("a directory")).collect();
        let run = |ranks: usize, resume: bool, stop_at: usize| -> Vec<RankOutcome> {
            let outcomes = on_ranks(ranks, |world| {
                job.train(Arc::clone(&world), Some(dirs[world.rank()].path()), resume, stop_at)
            });
            outcomes.into_iter().map(|outcome| outcome.expect("the run finishes")).collect()
        };
        let stopped = run(4, false, 4);
        assert!(stopped.iter().all(|outcome| outcome.report.steps.len() == 4), "{what}: one rank was asked to stop");
        assert!(dirs[0].path().join("checkpoint-4").is_dir());
        let resumed = run(3, true, 0);
        assert_same_run(what, &resumed[0].report, &expected.report);
        assert_eq!(resumed[0].report.best.map(|best| best.step), expected.report.best.map(|best| best.step));
        for outcome in &resumed {
            assert!(outcome.values == resumed[0].values, "{what}: the ranks have the same parameters");
            assert!(relative_distance(&outcome.values, &expected.values) < 1e-4, "{what}");
        }
        assert!(resumed[0].notes.iter().all(|note| !note.contains("from the beginning")), "{:?}", resumed[0].notes);
        for dir in &dirs[1..] {
            let files = std::fs::read_dir(dir.path()).expect("it exists").count();
            assert_eq!(files, 0, "{what}: rank 0 alone writes");
        }
    }
}

#[test]
fn ranks_with_other_settings_are_refused() {
    let errors = on_ranks(2, |world| {
        let rate = [1e-3, 2e-3][world.rank()];
        RankJob::new(lora).config(|config| config.learning_rate = Some(rate)).train(world, None, false, 0).map(|_| ())
    });
    let texts: Vec<String> = errors.into_iter().map(|result| result.expect_err("it is refused").to_string()).collect();
    let difference = "rank 1 differs from rank 0: [train] learning_rate is 0.002 on it and 0.001 on rank 0";
    assert!(texts.iter().all(|text| text.contains(difference)), "{texts:?}");
    assert!(texts[0].starts_with("rank 1 on "), "{}", texts[0]);
}

#[test]
fn updates_in_the_backward_pass_are_refused() {
    let job = RankJob::new(full).config(|config| {
        config.optimizer_in_bwd = true;
        config.per_device_train_batch_size = 4;
        config.gradient_accumulation_steps = 1;
    });
    for result in on_ranks(2, |world| job.train(world, None, false, 0)) {
        let error = result.expect_err("it is refused").to_string();
        assert!(error.contains("optimizer_in_bwd") || error.contains("failed"), "{error}");
    }
}

/// All ranks find the rows of a loss that is not finite.
#[test]
fn a_run_that_diverges_names_its_rows_on_every_rank() {
    let job = RankJob::new(lora).config(|config| {
        config.learning_rate = Some(1e30);
        config.eval_steps = None;
    });
    let errors = on_ranks(2, |world| job.train(world, None, false, 0));
    for (rank, result) in errors.into_iter().enumerate() {
        let error = result.expect_err("it diverges").to_string();
        assert!(error.contains("rows.jsonl:") && error.contains("not finite"), "rank {rank}: {error}");
    }
}

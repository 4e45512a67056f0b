//! Tests that a stopped and resumed run is bit-identical to an uninterrupted one in every training mode.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle::{
    Bias, DataSource, DeviceKind, FastLanguageModel, InitLoraWeights, LoraConfig, LrSchedulerType, Model, Optim,
    Resume, SftConfig, SftTrainer, StepCount, Tokenizer, TrainEnd, TrainEvent, TrainReport, TrainerArguments,
};
use rekindle_tests::Golden;

const NO_TOKENIZER: Option<&Tokenizer> = None;

/// A training job that can be run repeatedly.
struct TrainingJob {
    golden: Golden,
    lora: Option<LoraConfig>,
    load_in_4bit: bool,
    config: SftConfig,
}

impl TrainingJob {
    fn new(golden: &str, lora: Option<LoraConfig>) -> Self {
        let config = SftConfig {
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            max_steps: Some(6),
            learning_rate: Some(0.01),
            warmup_steps: StepCount::Steps(2),
            save_steps: Some(StepCount::Steps(2)),
            ..SftConfig::default()
        };
        Self { golden: Golden::open(golden), lora, load_in_4bit: false, config }
    }

    fn config(mut self, change: impl FnOnce(&mut SftConfig)) -> Self {
        change(&mut self.config);
        self
    }

    fn model(&self) -> Model {
        let loader = FastLanguageModel::from_pretrained(&self.golden.dir).device(DeviceKind::Cpu).max_seq_length(128);
        let full = self.lora.is_none();
        let model = loader.full_finetuning(full).load_in_4bit(self.load_in_4bit).load_model().expect("a golden loads");
        match &self.lora {
            Some(lora) => model.get_peft_model(lora.clone()).expect("a valid configuration"),
            None => model,
        }
    }

    /// Runs until the end, or until `stop_at` steps are done.
    fn run(&self, dir: &Path, resume: Option<Resume>, stop_at: Option<usize>) -> Result<Outcome, rekindle::Error> {
        let mut model = self.model();
        let rows = DataSource::new(self.golden.dir.join("rows.jsonl"));
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let mut notes = Vec::new();
        let mut trainer = SftTrainer::new(&mut model, NO_TOKENIZER, rows.clone(), self.config.clone())
            .arguments(TrainerArguments { output_dir: Some(dir.to_owned()), resume, ..TrainerArguments::default() })
            .stop_flag(stop)
            .on_event(|event| match event {
                TrainEvent::Step { metrics, .. } if Some(metrics.step) == stop_at => {
                    flag.store(true, Ordering::Relaxed)
                }
                TrainEvent::Started { notes: told, .. } => notes = told.to_vec(),
                _ => {}
            });
        if self.config.eval_steps.is_some() {
            trainer = trainer.eval_dataset(rows);
        }
        let report = trainer.train()?;
        Ok(Outcome { values: model.causal_lm().params().all_values(), files: files(&report), report, notes })
    }
}

struct Outcome {
    report: TrainReport,
    values: Vec<f32>,
    /// The name and bytes of every file in the result.
    files: Vec<(String, Vec<u8>)>,
    notes: Vec<String>,
}

impl Outcome {
    /// Returns the numbers that must be equal: all but times.
    fn numbers(&self) -> Vec<(usize, f64, f64, f64, f64, usize)> {
        let step = |m: &rekindle::StepMetrics| (m.step, m.epoch, m.loss, m.grad_norm, m.learning_rate, m.tokens);
        self.report.steps.iter().map(step).collect()
    }

    fn assert_is(&self, other: &Self, what: &str) {
        assert_eq!(self.numbers(), other.numbers(), "{what}");
        assert_eq!(self.report.evals, other.report.evals, "{what}");
        assert_eq!(self.report.best, other.report.best, "{what}");
        assert!(self.values == other.values, "{what}: the parameters differ");
        assert!(!self.files.is_empty() && self.files == other.files, "{what}: the files differ");
    }
}

fn files(report: &TrainReport) -> Vec<(String, Vec<u8>)> {
    let Some(dir) = &report.saved else { return Vec::new() };
    let entries = std::fs::read_dir(dir).expect("it was just written").map(|entry| entry.expect("it can be read"));
    let mut files: Vec<_> = entries
        .map(|entry| {
            let bytes = std::fs::read(entry.path()).expect("it can be read");
            (entry.file_name().to_string_lossy().into_owned(), bytes)
        })
        .collect();
    files.sort();
    files
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Stops after each of `stops`, resumes, and compares with an uninterrupted run.
fn check(what: &str, job: &TrainingJob, stops: &[usize]) {
    let (whole, parts) = (scratch(), scratch());
    let expected = job.run(whole.path(), None, None).expect("it runs");
    assert_eq!(expected.report.end, TrainEnd::Finished);
    let mut resume = None;
    for &stop in stops {
        let part = job.run(parts.path(), resume, Some(stop)).expect("it runs");
        assert_eq!((part.report.end, part.report.steps.len()), (TrainEnd::Interrupted, stop), "{what}");
        assert_eq!(part.report.checkpoint, Some(parts.path().join(format!("checkpoint-{stop}"))), "{what}");
        assert!(part.values != expected.values, "{what}: the run is not finished yet");
        resume = Some(Resume::Latest);
    }
    let last = job.run(parts.path(), resume, None).expect("it runs");
    assert_eq!(last.notes, Vec::<String>::new(), "{what}");
    last.assert_is(&expected, what);
}

fn lora() -> LoraConfig {
    LoraConfig::new(4).lora_alpha(8.0)
}

#[test]
fn runs_with_adapters_of_every_kind_resume() {
    let dropout = lora().lora_dropout(0.2);
    let saved = || LoraConfig { modules_to_save: vec!["embed_tokens".to_owned()], ..lora() };
    for (what, golden, lora) in [
        ("dropout", "qwen3-tied", dropout.clone()),
        ("all biases", "qwen2", LoraConfig { bias: Bias::All, ..dropout.clone() }),
        ("biases of adapted linears", "llama-bias", LoraConfig { bias: Bias::LoraOnly, ..lora() }),
        ("DoRA", "qwen3-tied", LoraConfig { use_dora: true, ..dropout }),
        ("a trained table", "qwen3-tied", saved()),
        ("a trained table beside a head", "qwen3-untied-sharded", saved()),
        ("PiSSA", "qwen2", LoraConfig { init_lora_weights: InitLoraWeights::Pissa, ..lora() }),
    ] {
        check(what, &TrainingJob::new(golden, Some(lora)), &[1, 3]);
    }
}

#[test]
fn a_run_that_recomputes_blocks_resumes() {
    let job = TrainingJob::new("llama3", Some(lora().lora_dropout(0.2)));
    check("recomputed blocks", &job.config(|config| config.use_gradient_checkpointing = true.into()), &[1, 3]);
}

#[test]
fn a_run_with_an_adapter_over_quantized_weights_resumes() {
    check("NF4", &TrainingJob { load_in_4bit: true, ..TrainingJob::new("llama3", Some(lora())) }, &[2]);
}

#[test]
fn runs_with_noise_and_8_bit_optimizers_resume() {
    for (what, optim, noise) in
        [("NEFTune", Optim::Adamw, Some(5.0)), ("8 bits", Optim::Adamw8bit, None), ("Lion", Optim::Lion8bit, None)]
    {
        let job = TrainingJob::new(
            "qwen3-tied",
            Some(LoraConfig { modules_to_save: vec!["embed_tokens".to_owned()], ..lora() }),
        );
        let job = job.config(|config| {
            config.learning_rate = Some(1e-3);
            config.optim = optim;
            config.neftune_noise_alpha = noise;
            config.lr_scheduler_type = LrSchedulerType::CosineWithRestarts;
        });
        check(what, &job, &[3]);
    }
}

#[test]
fn a_full_finetuning_run_resumes() {
    for golden in ["qwen2", "qwen3-untied-sharded"] {
        check(golden, &TrainingJob::new(golden, None).config(|config| config.learning_rate = Some(1e-3)), &[3]);
    }
}

#[test]
fn an_epoch_ends_a_step() {
    let job = TrainingJob::new("llama3", Some(lora())).config(|config| {
        config.max_steps = None;
        config.num_train_epochs = Some(2.5);
        config.eval_steps = Some(StepCount::Steps(2));
        // An evaluation of several batches, which can be cut short too.
        config.per_device_eval_batch_size = 2;
    });
    check("epochs", &job, &[1, 2, 3]);
    let run = job.run(scratch().path(), None, None).expect("it runs");
    // Seven rows in fours: two steps an epoch, the second of three rows, and half of the last epoch is one step.
    let epochs: Vec<f64> = run.report.steps.iter().map(|step| step.epoch).collect();
    assert_eq!(epochs, [4.0 / 7.0, 1.0, 11.0 / 7.0, 2.0, 18.0 / 7.0]);
    let tokens: Vec<usize> = run.report.steps.iter().map(|step| step.tokens).collect();
    assert_eq!(tokens[0] + tokens[1], tokens[2] + tokens[3], "each epoch has every row once");
}

#[test]
fn fewer_rows_than_a_step_has_make_a_step_an_epoch() {
    let job = TrainingJob::new("llama3", Some(lora())).config(|config| {
        (config.max_steps, config.num_train_epochs) = (None, Some(4.0));
        config.gradient_accumulation_steps = 16;
    });
    let run = job.run(scratch().path(), None, None).expect("it runs");
    assert_eq!(run.report.steps.iter().map(|step| step.epoch).collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0]);
    assert!(
        run.notes.concat().contains("an epoch has only 7 rows, fewer than the 32 rows of a step"),
        "{:?}",
        run.notes
    );
}

#[test]
fn the_best_is_kept_and_found_again() {
    // At this rate the loss falls in the first step and rises from there.
    let job = TrainingJob::new("qwen3-tied", Some(lora())).config(|config| {
        config.learning_rate = Some(0.2);
        config.lr_scheduler_type = LrSchedulerType::Constant;
        config.max_steps = Some(4);
        config.warmup_steps = StepCount::Steps(0);
        config.eval_steps = Some(StepCount::Steps(1));
        config.save_steps = Some(StepCount::Steps(2));
        config.save_total_limit = Some(1);
        config.load_best_model_at_end = true;
    });
    let dir = scratch();
    let whole = job.run(dir.path(), None, None).expect("it runs");
    let best = whole.report.best.expect("there were evaluations");
    let lowest = whole.report.evals.iter().map(|eval| eval.eval_loss).fold(f64::INFINITY, f64::min);
    assert_eq!(best.eval_loss, lowest);
    assert!(best.step < 4, "the last checkpoint is not the best: {:?}", whole.report.evals);
    let mut model = job.model().load_adapter(dir.path().join("adapter")).expect("it was just written");
    let rows = DataSource::new(job.golden.dir.join("rows.jsonl"));
    assert_eq!(model.evaluate(None, &rows, &mut |_| ()).expect("rows fit").loss, best.eval_loss);
    assert_eq!(model.causal_lm_mut().params().all_values(), whole.values);
    assert_eq!(checkpoints(dir.path()), sorted([best.step, 4]), "the best and the last checkpoint");
    check("best", &job, &[2, 3]);
}

#[test]
fn early_stopping_ends_the_run() {
    let job = TrainingJob::new("qwen3-tied", Some(lora())).config(|config| {
        config.learning_rate = Some(0.0);
        config.max_steps = Some(40);
        config.warmup_steps = StepCount::Steps(0);
        config.eval_steps = Some(StepCount::Steps(2));
        config.early_stopping_patience = Some(2);
    });
    let dir = scratch();
    let whole = job.run(dir.path(), None, None).expect("it runs");
    assert_eq!((whole.report.end, whole.report.steps.len()), (TrainEnd::EarlyStopping, 6));
    assert!(whole.report.saved.is_some());
    // The patience used so far is restored.
    let parts = scratch();
    job.run(parts.path(), None, Some(5)).expect("it runs");
    let rest = job.run(parts.path(), Some(Resume::Latest), None).expect("it runs");
    assert_eq!((rest.report.end, rest.report.steps.len()), (TrainEnd::EarlyStopping, 6));
    rest.assert_is(&whole, "early stopping");
    let again = job.run(parts.path(), Some(Resume::Latest), None).expect("it runs");
    again.assert_is(&whole, "a finished run");
}

#[test]
fn only_so_many_checkpoints_stay() {
    let job = TrainingJob::new("llama3", Some(lora())).config(|config| {
        config.save_steps = Some(StepCount::Steps(1));
        config.save_total_limit = Some(2);
    });
    let dir = scratch();
    job.run(dir.path(), None, None).expect("it runs");
    assert_eq!(checkpoints(dir.path()), [5, 6]);
}

#[test]
fn resuming_a_different_run_is_refused_with_the_differences() {
    let job = TrainingJob::new("qwen3-tied", Some(lora()));
    let dir = scratch();
    job.run(dir.path(), None, Some(3)).expect("it runs");
    let fails = |job: &TrainingJob, resume: Option<Resume>, parts: &[&str]| {
        let error = job.run(dir.path(), resume, None).err().expect("it is refused").to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    };
    fails(
        &job,
        None,
        &["checkpoint-3 is a checkpoint of an earlier run", "--resume", "--overwrite", "another output_dir"],
    );
    let from = || Some(Resume::Latest);
    let other = TrainingJob::new("qwen3-tied", Some(LoraConfig { r: 8, ..lora() })).config(|config| {
        config.learning_rate = Some(0.02);
        config.weight_decay = 0.5;
    });
    let parts = [
        "[lora] r was 4 and is now 8",
        "[train] learning_rate was 0.01 and is now 0.02",
        "weight_decay was 0.01 and is now 0.5",
    ];
    fails(&other, from(), &parts);
    let rows = TrainingJob::new("qwen3-tied", Some(lora())).config(|config| config.per_device_train_batch_size = 1);
    fails(&rows, from(), &["rows of a step was 4 and is now 2"]);
    fails(
        &TrainingJob::new("qwen2", Some(lora())),
        from(),
        &["the base weights have changed", "the training rows have changed"],
    );
    fails(&TrainingJob::new("qwen3-tied", None), from(), &["full_finetuning was false and is now true"]);
    let short = TrainingJob::new("qwen3-tied", Some(lora())).config(|config| config.max_steps = Some(2));
    fails(&short, from(), &["is at step 3, but the run has only 2", "raise max_steps"]);
    fails(
        &job,
        Some(Resume::From(dir.path().join("checkpoint-2"))),
        &["checkpoint-3 at step 3", "remove the later one"],
    );
    fails(&job, Some(Resume::From(dir.path().join("adapter"))), &["trainer_state.json: it does not exist"]);
}

#[test]
fn allowed_changes_are_reported() {
    let job = TrainingJob::new("qwen3-tied", Some(lora()));
    let dir = scratch();
    job.run(dir.path(), None, Some(4)).expect("it runs");
    let longer = TrainingJob::new("qwen3-tied", Some(lora())).config(|config| {
        config.max_steps = Some(8);
        config.logging_steps = StepCount::Steps(5);
        config.save_steps = Some(StepCount::Steps(3));
        (config.per_device_train_batch_size, config.gradient_accumulation_steps) = (4, 1);
    });
    let done = longer.run(dir.path(), Some(Resume::Latest), None).expect("it runs");
    assert_eq!(done.report.steps.len(), 8);
    let notes = done.notes.join("\n");
    for part in [
        "max_steps was 6 and is now 8; from here on, learning rates",
        "per_device_train_batch_size was 2 and is now 4",
        "not bit-identical",
    ] {
        assert!(notes.contains(part), "{part:?} is not in: {notes}");
    }
    assert!(!notes.contains("warmup"), "the warm-up is already over: {notes}");
    // A copied checkpoint resumes in another directory with the history of the original.
    let elsewhere = scratch();
    let from = Some(Resume::From(dir.path().join("checkpoint-6")));
    let copy = longer.run(elsewhere.path(), from, None).expect("it runs");
    copy.assert_is(&done, "elsewhere");
}

#[test]
fn resuming_without_a_checkpoint_starts_a_new_run() {
    let job = TrainingJob::new("llama3", Some(lora())).config(|config| config.save_steps = None);
    let (dir, plain) = (scratch(), scratch());
    let run = job.run(dir.path(), Some(Resume::Latest), None).expect("it runs");
    assert!(run.notes[0].contains("contains no checkpoint: the run starts from the beginning"), "{:?}", run.notes);
    assert!(checkpoints(dir.path()).is_empty());
    run.assert_is(&job.run(plain.path(), None, None).expect("it runs"), "anew");
    assert!(job.run(plain.path(), Some(Resume::From(PathBuf::from("no/such"))), None).is_err());
}

#[test]
fn an_output_directory_is_locked_by_its_run() {
    let job = TrainingJob::new("llama3", Some(lora()));
    let dir = scratch();
    let lock = rekindle_hub::DirectoryLock::acquire(dir.path()).expect("nobody has it");
    let error = job.run(dir.path(), None, None).err().expect("it is refused").to_string();
    assert!(error.contains("another process is writing there"), "{error}");
    drop(lock);
    job.run(dir.path(), None, None).expect("it runs");
}

fn checkpoints(dir: &Path) -> Vec<usize> {
    let names = std::fs::read_dir(dir).expect("it exists").map(|entry| entry.expect("it can be read").file_name());
    sorted(names.filter_map(|name| name.to_str()?.strip_prefix("checkpoint-")?.parse().ok()))
}

fn sorted(steps: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut steps: Vec<usize> = steps.into_iter().collect();
    steps.sort_unstable();
    steps.dedup();
    steps
}

//! Tests of training runs from their configuration, as a program without the command makes them.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};

use rekindle::run::{DataArguments, LoraArguments, ModelArguments, RunConfig, RunObserver, TrainOptions, TrainingRun};
use rekindle::{
    DataSource, DeviceKind, EncodedRows, Error, ErrorKind, FastLanguageModel, GradientCheckpointing, LoraConfig,
    MemoryPlan, Model, SftConfig, SftTrainer, Tokenizer, TrainEnd, TrainEvent,
};
use rekindle_tests::Golden;

const NO_TOKENIZER: Option<&Tokenizer> = None;

/// Returns a run of two steps on a golden model.
fn config(golden: &Golden, output_dir: &Path) -> RunConfig {
    RunConfig {
        output_dir: output_dir.to_owned(),
        device: "cpu".to_owned(),
        model: ModelArguments { max_seq_length: Some(128), ..ModelArguments::new(&golden.dir) },
        lora: Some(LoraConfig::new(4).into()),
        data: DataArguments { cache: false, ..DataArguments::new(golden.dir.join("rows.jsonl")) },
        train: SftConfig { max_steps: Some(2), learning_rate: Some(1e-2), ..SftConfig::default() },
        ..RunConfig::default()
    }
}

/// Counts the calls of an observer.
#[derive(Default)]
struct Counts {
    planned: Cell<usize>,
    encoded: Cell<usize>,
    loaded: Cell<usize>,
    steps: Cell<usize>,
    written: RefCell<PathBuf>,
}

fn count(cell: &Cell<usize>) {
    cell.set(cell.get() + 1);
}

impl RunObserver for Counts {
    fn planned(&self, plan: &MemoryPlan, _: Option<usize>) {
        assert!(plan.peak > 0);
        count(&self.planned);
    }

    fn encoded(&self, _: &EncodedRows) {
        count(&self.encoded);
    }

    fn loaded(&self, _: &Model) {
        count(&self.loaded);
    }

    fn started(&self, config: &RunConfig, written: &Path) {
        assert_eq!(config.device, "cpu");
        *self.written.borrow_mut() = written.to_owned();
    }

    fn event(&self, event: &TrainEvent<'_>) {
        if let TrainEvent::Step { .. } = event {
            count(&self.steps);
        }
    }
}

#[test]
fn a_configuration_runs_without_the_command() {
    let golden = Golden::open("qwen3-tied");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let out = scratch.path().join("out");
    let counts = Counts::default();
    let report = config(&golden, &out).train(TrainOptions::default(), &counts).expect("golden rows can be trained on");
    assert_eq!((report.end, report.steps.len()), (TrainEnd::Finished, 2));
    assert!(out.join("adapter/adapter_model.safetensors").is_file());
    let counted = [&counts.planned, &counts.encoded, &counts.loaded, &counts.steps].map(Cell::get);
    assert_eq!(counted, [1, 1, 1, 2]);

    let written = counts.written.borrow().clone();
    assert_eq!(written, out.join("run.toml"));
    let again = RunConfig::load(&written, &[]).expect("a resolved run file is valid");
    assert_eq!(again.train.num_train_epochs, None, "max_steps overrides it");
    let error = again.clone().train(TrainOptions::default(), &()).expect_err("there is a result");
    assert_eq!(error.kind(), ErrorKind::Configuration);
    let overwrites = TrainOptions { overwrite: true, ..TrainOptions::default() };
    let repeated = again.train(overwrites, &()).expect("the result may be replaced");
    assert_eq!(repeated.steps[1].loss, report.steps[1].loss, "the resolved configuration is the same run");
    assert!(out.join("run.resolved.toml").is_file(), "the run file is not overwritten");
}

#[test]
fn training_continues_an_adapter_and_can_be_stopped() {
    let golden = Golden::open("qwen3-tied");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let [first, second] = ["first", "second"].map(|name| scratch.path().join(name));
    config(&golden, &first).train(TrainOptions::default(), &()).expect("golden rows can be trained on");

    let lora = LoraArguments { init_from: Some(first.join("adapter")), ..LoraArguments::default() };
    let continued = RunConfig { lora: Some(lora), ..config(&golden, &second) };
    let options = TrainOptions::default();
    let mut run = TrainingRun::open(continued, options.clone(), &()).expect("the adapter is of this model");
    assert_eq!(run.config.lora.as_ref().map(|lora| lora.config.r), Some(4), "the configuration is the adapter's");
    assert_eq!(run.train_rows.dataset().len(), golden.rows.len());
    options.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let report = run.train(&()).expect("it stops before the first step");
    assert_eq!((report.end, report.steps.len()), (TrainEnd::Interrupted, 0));
}

#[test]
fn a_trainer_refuses_what_does_not_fit() {
    let golden = Golden::open("qwen3-tied");
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).max_seq_length(128);
    let model = loader.load_model().expect("a golden checkpoint loads");
    let mut model = model.get_peft_model(LoraConfig::new(4)).expect("a valid configuration");
    let rows = || DataSource::new(golden.dir.join("rows.jsonl"));
    // Packs are planned with the maximum length: about 12.8 million tokens in a pass. The number is prime, so that only
    // single rows divide it.
    let config = SftConfig {
        packing: true,
        per_device_train_batch_size: 99_991,
        max_steps: Some(1),
        use_gradient_checkpointing: GradientCheckpointing::Auto,
        ..SftConfig::default()
    };
    let trainer = SftTrainer::new(&mut model, NO_TOKENIZER, rows(), config.clone());
    let error = trainer.train().expect_err("no machine has so much memory");
    assert_eq!(error.kind(), ErrorKind::Memory);
    assert!(matches!(error, Error::DoesNotFit(_)), "{error}");
    let trainer = SftTrainer::new(&mut model, NO_TOKENIZER, rows(), config).check_memory(false);
    assert_eq!(trainer.train().expect("there are few rows").steps.len(), 1);

    let small = SftConfig {
        max_steps: Some(1),
        use_gradient_checkpointing: GradientCheckpointing::Auto,
        ..SftConfig::default()
    };
    SftTrainer::new(&mut model, NO_TOKENIZER, rows(), small).train().expect("it fits");
    assert_eq!(model.causal_lm().gradient_checkpointing(), GradientCheckpointing::Off, "the fastest that fits");
}

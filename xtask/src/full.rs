//! `cargo xtask full`: compares full fine-tuning in 32, 16, 8 and 4 bits.

use std::error::Error;
use std::fs;

use rekindle::{
    DataSource, DeviceKind, Dtype, FastLanguageModel, Loader, LrSchedulerType, QuantConfig, SftConfig, SftTrainer,
    StepCount, Tokenizer, TrainReport,
};
use rekindle_train::{PlotSeries, lines_svg};

use crate::root;

const LEARNING_RATE: f64 = 1e-3;
const BATCH: usize = 8;
/// The number of steps between evaluations; training losses are averaged over the same interval.
const EVERY: usize = 20;
const PICTURE: &str = "docs/full-finetuning.svg";

/// A storage format of trained weights.
struct StorageFormat {
    name: &'static str,
    color: &'static str,
    load: fn(Loader<'static>) -> Loader<'static>,
    /// The changes to the run's settings.
    config: fn(SftConfig) -> SftConfig,
}

const FORMATS: [StorageFormat; 6] = [
    StorageFormat { name: "f32", color: "#2b6cb0", load: |l| l, config: |c| c },
    StorageFormat { name: "bf16", color: "#2f855a", load: |l| l.stochastic_rounding(true), config: |c| c },
    StorageFormat {
        name: "bf16, optimizer_in_bwd",
        color: "#718096",
        load: |l| l.stochastic_rounding(true),
        config: in_backward,
    },
    StorageFormat { name: "int8", color: "#b7791f", load: |l| l.load_in_8bit(true), config: |c| c },
    StorageFormat { name: "nf4, blocks of 64", color: "#c53030", load: |l| l.load_in_4bit(true), config: |c| c },
    StorageFormat { name: "nf4, blocks of 32", color: "#6b46c1", load: small_blocks, config: |c| c },
];

fn in_backward(config: SftConfig) -> SftConfig {
    SftConfig { optimizer_in_bwd: true, ..config }
}

fn small_blocks(loader: Loader<'_>) -> Loader<'_> {
    let blocksize = rekindle::Blocksize::new(32).expect("a block size of the format");
    loader.load_in_4bit(true).quant_config(QuantConfig { blocksize, double_quant: false, ..QuantConfig::default() })
}

/// Prints the table of docs/full-finetuning.md and draws its figure.
///
/// # Errors
/// If the base model cannot be read or a run diverges.
pub(crate) fn measure(steps: usize) -> Result<(), Box<dyn Error>> {
    let example = root().join("examples/quickstart");
    let tokenizer = Tokenizer::from_dir(&example.join("base"))?;
    let mut series = Vec::new();
    println!(
        "| weights | MB | | {} |",
        (1..=steps / EVERY).map(|i| format!("{}", i * EVERY)).collect::<Vec<_>>().join(" | ")
    );
    println!("|---|---|---|{}", "---|".repeat(steps / EVERY));
    for StorageFormat { name, color, load, config } in FORMATS {
        let loader = FastLanguageModel::from_pretrained(example.join("base"))
            .device(DeviceKind::Cpu)
            .dtype(Dtype::F32)
            .max_seq_length(128)
            .full_finetuning(true);
        let mut model = load(loader).load_model()?;
        let megabytes = model.memory_report().bytes() as f64 / 1e6;
        let run = config(SftConfig {
            per_device_train_batch_size: BATCH,
            max_steps: Some(steps),
            learning_rate: Some(LEARNING_RATE),
            lr_scheduler_type: LrSchedulerType::Linear,
            warmup_steps: StepCount::Steps(10),
            eval_steps: Some(StepCount::Steps(EVERY)),
            eval_on_start: Some(false),
            ..SftConfig::default()
        });
        let report = SftTrainer::new(&mut model, &tokenizer, DataSource::new(example.join("train.jsonl")), run)
            .eval_dataset(DataSource::new(example.join("heldout.jsonl")))
            .train()?;
        let (train, eval) = curves(&report);
        let cells = |losses: &[f64]| losses.iter().map(|loss| format!(" {loss:.3} |")).collect::<String>();
        println!("| {name} | {megabytes:.2} | training |{}", cells(&train));
        println!("| | | held out |{}", cells(&eval));
        let points = report.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
        series.push(PlotSeries { name, color, points });
    }
    fs::write(root().join(PICTURE), lines_svg("training loss", &series))?;
    println!("\n{PICTURE} is drawn");
    Ok(())
}

/// Returns the training losses, averaged between evaluations, and the held-out losses.
fn curves(report: &TrainReport) -> (Vec<f64>, Vec<f64>) {
    let mean = |steps: &[rekindle::StepMetrics]| steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64;
    (report.steps.chunks_exact(EVERY).map(mean).collect(), report.evals.iter().map(|eval| eval.eval_loss).collect())
}

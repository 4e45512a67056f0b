//! `cargo xtask bench plan`: compares planned and used GPU memory.

use std::error::Error;
use std::path::{Path, PathBuf};

use rekindle::LoraConfig;
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_kernels::runtime::{self, CUDA_CONTEXT_BYTES, Cuda, DeviceProps};
use rekindle_models::{LoadIn, LoadOptions};
use rekindle_train::{MemoryPlan, PassRows, PlannedRun, Planner, SftConfig};

use super::super::name;
use super::super::shape::Shape;
use super::{Checkpointing, Loss, LossArguments, Mode, Peer, Train, gib};

/// Steps per job; memory peaks in the first.
const STEPS: usize = 2;

/// Shape, mode, rows, tokens per row, kept activations.
const JOBS: [(Shape, Mode, usize, usize, Checkpointing); 9] = [
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Block),
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Host),
    (Shape::Qwen3_4b, Mode::Lora, 4, 2048, Checkpointing::Off),
    (Shape::Qwen3_4b, Mode::Qlora, 4, 2048, Checkpointing::Host),
    (Shape::Qwen3_4b, Mode::Qlora, 1, 16_384, Checkpointing::Host),
    (Shape::Qwen3_4b, Mode::Lora, 1, 1000, Checkpointing::Off),
    (Shape::Qwen3_0_6b, Mode::Lora, 2, 512, Checkpointing::Off),
    (Shape::Qwen3_0_6b, Mode::Full, 4, 1024, Checkpointing::Off),
    (Shape::Qwen3_0_6b, Mode::Full, 8, 2048, Checkpointing::Block),
];

/// Prints a row for every job; without a GPU only the plans.
pub(crate) fn run(weights: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let weights: PathBuf = weights.unwrap_or(scratch.path()).to_owned();
    let card = runtime::device_props(0);
    match &card {
        Ok(card) => println!("on {card}; {:.2} GiB are counted as taken beside the arena", gib(CUDA_CONTEXT_BYTES)),
        Err(reason) => println!("not measured: {reason}"),
    }
    let props = card.clone().unwrap_or_else(|_| DeviceProps::hopper(80 << 30));
    println!(
        "| job | planned, GiB | its arena | measured | off | taken of the card | off | beside the arena | host | measured | s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (shape, mode, batch, seq, checkpointing) in JOBS {
        let job = Train {
            attention_bias: false,
            bias: super::TrainedBias::None,
            use_dora: false,
            fp8: false,
            dtype: super::ComputeDtype::Bf16,
            optim: "adamw".to_owned(),
            optimizer_in_bwd: false,
            loss: Loss::Sft,
            arguments: LossArguments::UNUSED,
            shape,
            mode,
            batch,
            seq,
            checkpointing,
            steps: STEPS,
            device: "cuda".to_owned(),
            weights: Some(weights.clone()),
            profile: false,
            python: None,
            peer: Peer::Unsloth,
            worker: false,
        };
        let began = std::time::Instant::now();
        let plan = job.plan(props.clone())?;
        let seconds = began.elapsed().as_secs_f64();
        let arena = gib(plan.peak - plan.context);
        let (measured, host) = match &card {
            Err(_) => ("| | | | |".to_owned(), String::new()),
            Ok(_) => {
                let (ours, _) = job.measure()?;
                let number = |key: &str| ours[key].as_f64().unwrap_or(f64::NAN);
                let (extent, taken) = (number("extent_gib"), number("process_gib"));
                let off = |planned: f64, measured: f64| 100.0 * (planned / measured - 1.0);
                let text = format!(
                    "| {extent:.3} | {:+.2} % | {taken:.2} | {:+.2} % | {:.3}",
                    off(arena, extent),
                    off(gib(plan.peak), taken),
                    number("outside_gib"),
                );
                (text, format!("{:.2}", number("pinned_gib")))
            }
        };
        println!(
            "| {} | {:.2} | {arena:.3} {measured} | {:.2} | {host} | {seconds:.2} |",
            job.name(),
            gib(plan.peak),
            gib(plan.host)
        );
    }
    Ok(())
}

impl Train {
    fn plan(&self, props: DeviceProps) -> Result<MemoryPlan, Box<dyn Error>> {
        let mut load = LoadOptions::new(Device::Cuda(Cuda::planned(props)), DType::BF16, self.seq);
        load.full_finetuning = self.mode == Mode::Full;
        load.load_in = (self.mode == Mode::Qlora).then_some(LoadIn::FourBit(None));
        let lora = (self.mode != Mode::Full).then(|| LoraConfig::new(16).lora_alpha(32.0));
        let train = SftConfig { use_gradient_checkpointing: self.checkpointing.setting(), ..SftConfig::default() };
        let job = PlannedRun {
            json: self.shape.config(),
            name: name(self.shape).into(),
            load,
            lora,
            train,
            evaluates: false,
            ranks: 1,
        };
        Ok(Planner::new(job)?.plan(&PassRows::equal(self.batch, self.seq))?)
    }
}

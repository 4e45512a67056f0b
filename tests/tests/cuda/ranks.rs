//! Ranks on several devices, connected through NCCL.

use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rekindle_data::{Dataset, EncodeOptions};
use rekindle_dist::{Communicator, OneRank};
use rekindle_kernels::{Device, DeviceKind, open_device};
use rekindle_lora::LoraConfig;
use rekindle_models::objective::Dpo;
use rekindle_models::{CausalLm, LoadIn, LoadOptions};
use rekindle_tests::{Golden, goldens, on_ranks, relative_distance};
use rekindle_train::{Error, Method, SftConfig, TensorWorld, TrainReport, Trainer};

/// The documented tolerance of losses and gradient norms of several ranks.
const TOLERANCE: f64 = 1e-5;

const DEVICES: usize = 2;

const CHECKS: [(&str, fn()); 2] =
    [("ranks: steps of one rank on two devices", steps), ("ranks: a failure ends those that wait for NCCL", failures)];

/// Runs the checks whose names contain `filter` if there are two devices; returns the number of failures.
pub(crate) fn run(filter: &str) -> usize {
    let mut failed = 0;
    for (name, check) in CHECKS.iter().filter(|(name, _)| name.contains(filter)) {
        if rekindle_kernels::runtime::count() < DEVICES {
            println!("{name}: not run: it needs {DEVICES} devices");
            continue;
        }
        let passed = catch_unwind(check).is_ok();
        println!("{name}: {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    failed
}

fn device(index: usize) -> Device {
    open_device(DeviceKind::Cuda(index)).expect("the device opens").0
}

/// A run on one device and on several.
struct Case {
    what: &'static str,
    load: fn(&mut LoadOptions),
    with_adapter: bool,
    shard_optimizer: Option<bool>,
    method: Method,
}

/// Adapters, quantized bases, all weights and pairs take the steps of one rank, with a whole and with a divided state.
fn steps() {
    let lora = || Case { what: "lora", load: |_| (), with_adapter: true, shard_optimizer: None, method: Method::Sft };
    let full = || Case { load: |options| options.full_finetuning = true, with_adapter: false, ..lora() };
    let cases = [
        lora(),
        Case { what: "lora, divided state", shard_optimizer: Some(true), ..lora() },
        Case { what: "qlora", load: |options| options.load_in = Some(LoadIn::FourBit(None)), ..lora() },
        Case { what: "dpo", method: Dpo::default().into(), ..lora() },
        Case { what: "full, divided state", ..full() },
        Case { what: "full, whole state", shard_optimizer: Some(false), ..full() },
    ];
    for Case { what, load, with_adapter, shard_optimizer, method } in cases {
        let task = method.task();
        let options = EncodeOptions { max_seq_length: 128, task, ..EncodeOptions::default() };
        let name = if method == Method::Sft { "qwen3-tied/rows.jsonl" } else { "preferences/pairs.jsonl" };
        let (rows, _) = Dataset::load(&goldens().join(name), None, &options).expect("golden rows load");
        let train = |world: Arc<dyn Communicator>| -> Result<(TrainReport, Vec<f32>), Error> {
            let mut model: CausalLm = Golden::open("qwen3-tied").load_with(|options| {
                options.device = device(world.rank());
                load(options);
            });
            if with_adapter {
                model.add_adapter(&LoraConfig::new(4).lora_dropout(0.1)).expect("a valid configuration");
            }
            let config = SftConfig {
                per_device_train_batch_size: 2,
                gradient_accumulation_steps: 2,
                max_steps: Some(6),
                learning_rate: Some(if with_adapter { 1e-3 } else { 1e-5 }),
                shard_optimizer,
                method: method.clone(),
                ..SftConfig::default()
            };
            let report = Trainer { world, ..Trainer::new(&mut model, rows.clone(), config) }.train()?;
            Ok((report, model.params().all_values()))
        };
        let (expected, values) = train(Arc::new(OneRank)).expect("one rank trains");
        let ranks: Vec<_> = on_ranks(DEVICES, train).into_iter().map(|rank| rank.expect("the ranks train")).collect();
        for (report, of_rank) in &ranks {
            for (step, other) in report.steps.iter().zip(&expected.steps) {
                let off = |value: f64, expected: f64| (value - expected).abs() / expected.abs().max(1.0);
                let worst = off(step.loss, other.loss).max(off(step.grad_norm, other.grad_norm));
                assert!(worst <= TOLERANCE, "{what}, step {}: off by {worst:e}", step.step);
                assert_eq!((step.tokens, step.trained_tokens), (other.tokens, other.trained_tokens), "{what}");
            }
            assert!(*of_rank == ranks[0].1, "{what}: the ranks have the same parameters");
            let distance = relative_distance(of_rank, &values);
            assert!(distance < 1e-3, "{what}: parameters off by {distance:e}");
        }
    }
}

/// A rank fails while the other waits for it in an all-reduce on its device.
fn failures() {
    let began = Instant::now();
    let results = on_ranks(DEVICES, |world| {
        let device = device(world.rank());
        let mut model = Golden::open("qwen3-tied").load_with(|options| options.device = device.clone());
        model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
        let tensors = TensorWorld::connect(Arc::clone(&world), &device)?;
        let mut grads = model.params().zero_grads();
        tensors.all_reduce(&mut grads)?;
        device.synchronize().expect("the first sum succeeds");
        if world.rank() == 1 {
            return Err(Error::Config(vec!["the disk is full".to_owned()]));
        }
        tensors.all_reduce(&mut grads)?;
        // Returns because the sum is aborted.
        let _ = device.synchronize();
        world.barrier()?;
        Ok(())
    });
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let texts: Vec<String> = results.into_iter().map(|result| result.expect_err("it fails").to_string()).collect();
    assert!(texts.iter().all(|text| text.contains("the disk is full")), "{texts:?}");
}

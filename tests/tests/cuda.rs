//! Compares whole models on an NVIDIA GPU in `f32` with the goldens: losses, generation, optimizer steps, memory.
//!
//! This is a separate binary that reports "not run" without a GPU instead of passing. `REKINDLE_REQUIRE_CUDA=1` makes
//! that a failure. An argument selects the checks whose names contain it.

#[path = "cuda/blocks.rs"]
mod blocks;
#[path = "cuda/engine.rs"]
mod engine;
#[path = "cuda/f16.rs"]
mod f16;
#[path = "cuda/families.rs"]
mod families;
#[path = "cuda/ranks.rs"]
mod ranks;
#[path = "cuda/training_methods.rs"]
mod training_methods;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use rekindle_kernels::runtime::Cuda;
use rekindle_kernels::{DType, Device, DeviceKind, open_device};
use rekindle_lora::{Bias, InitLoraWeights, LoraConfig};
use rekindle_models::objective::{Dpo, StepTerms};
use rekindle_models::{CausalLm, GenerationConfig, GradientCheckpointing, LoadIn, Sft};
use rekindle_tests::{Golden, Tolerances, Trajectory, assert_nll, goldens, read_json, relative_distance, tensors};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};

/// Tolerances for a different summation order than on the CPU.
const CUDA_F32: Tolerances = Tolerances { loss: 1e-4, grad_norm: 1e-3, tensors: 1e-3 };

/// The golden models whose head_dim is a multiple of 8.
const MODELS: [&str; 4] = ["qwen3-tied", "qwen3-untied-sharded", "llama3", "llama-bias"];

const ADAPTER: &str = "adapter_model.safetensors";

type Check = fn(&Device);

const CHECKS: &[(&str, Check)] = &[
    ("losses of every model", losses),
    ("losses over quantized weights", losses_over_quantized_weights),
    ("blocks of GGUF files are decoded", blocks::decoding),
    ("blocks of GGUF files: losses and gradients", blocks::models),
    ("experts in MXFP4: losses and gradients of adapters", blocks::experts_in_mxfp4),
    ("fp8: decoding, losses and optimizer steps", blocks::fp8::all),
    ("losses of every LoRA option", losses_of_options),
    ("gradients of biases and magnitudes", gradients_of_options),
    ("starts from the weights", starts),
    ("adapters by name", adapters_by_name),
    ("greedy generation", generation),
    ("engine: requests at once, in parts of prompts and recorded steps", engine::requests),
    ("packed rows have the losses of rows alone", packing),
    ("optimizer steps", steps),
    ("optimizer steps in bf16", steps_in_bf16),
    ("optimizer steps in f16", f16::steps),
    ("f16: steps that overflow are skipped", f16::overflow),
    ("gradients of all weights", all_weights),
    ("recomputed activations give the same bits", recomputation),
    ("objectives", objectives),
    ("training methods: preferences", training_methods::preferences),
    ("training methods: policy gradients", training_methods::policy_gradients),
    ("training methods: rollouts", training_methods::rollouts),
    ("families: losses and greedy tokens", family_losses),
    ("families: gradients of all weights, recomputed or not", family_gradients),
    ("families: optimizer steps", families::steps),
    ("families: the auxiliary loss of routers", families::router_losses),
    ("families: quantized weights and generation", families::quantized),
    ("families in f16: optimizer steps and recomputation", f16::family_steps),
    ("memory does not grow", memory),
];

fn main() -> ExitCode {
    let device = match open_device(DeviceKind::Cuda(0)) {
        Ok((device, _)) => device,
        Err(error) => {
            println!("not run: {error}");
            let required = std::env::var_os("REKINDLE_REQUIRE_CUDA").is_some_and(|value| value == "1");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    // Options of the test harness, such as `--nocapture`, are ignored.
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let mut failed = ranks::run(&filter);
    for (name, check) in CHECKS.iter().filter(|(name, _)| name.contains(&filter)) {
        let passed = catch_unwind(AssertUnwindSafe(|| check(&device))).is_ok();
        println!("{name}: {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn on(device: &Device, golden: &Golden) -> CausalLm {
    golden.load_with(|options| options.device = device.clone())
}

fn losses(device: &Device) {
    for name in MODELS {
        let golden = Golden::open(name);
        let (model, batch) = (on(device, &golden), golden.packed());
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(name, &batch, &nll, &golden.base_losses());
        for adapter in golden.adapters() {
            let mut model = on(device, &golden);
            model.load_adapter(&golden.dir.join("adapters").join(&adapter)).expect("a golden adapter loads");
            let nll = model.nll(&batch).expect("golden rows fit");
            assert_nll(&format!("{name}/{adapter}"), &batch, &nll, &golden.adapter_losses(&adapter));
        }
    }
}

fn losses_over_quantized_weights(device: &Device) {
    for name in ["qwen3-tied-nf4-double", "qwen3-tied-fp4", "llama3-int8", "llama3-nf4-double-skip"] {
        let golden = Golden::open(&format!("quantized/{name}"));
        let (model, batch) = (on(device, &golden), golden.packed());
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(name, &batch, &nll, &golden.base_losses());
        let out = tempfile::tempdir().expect("a temporary directory");
        model.save(out.path(), rekindle_hub::Dtype::F32).expect("the disk has space");
        let bytes = |dir: &std::path::Path| std::fs::read(dir.join("model.safetensors")).expect("one file");
        assert!(bytes(out.path()) == bytes(&golden.dir), "{name}: quantized tensors are saved unchanged");
    }
    let golden = Golden::open("llama3");
    let model = golden.load_with(|options| {
        options.device = device.clone();
        options.load_in = Some(LoadIn::FourBit(None));
    });
    let cpu = golden.load_with(|options| options.load_in = Some(LoadIn::FourBit(None)));
    let batch = golden.packed();
    let (got, want) = (model.nll(&batch).expect("rows fit"), cpu.nll(&batch).expect("rows fit"));
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)), "quantized on load");
}

fn losses_of_options(device: &Device) {
    for (base, adapters) in [
        ("qwen3-tied", &["rslora", "dora", "patterns", "save-both", "save-embed-tokens-ensure-tying"][..]),
        ("llama-bias", &["bias-all", "dora-bias-all", "everything"]),
    ] {
        let golden = Golden::open(base);
        let batch = golden.packed();
        for adapter in adapters {
            let dir = goldens().join("lora-options").join(base).join("adapters").join(adapter);
            let losses = |mut model: CausalLm| {
                model.load_adapter(&dir).expect("a golden adapter loads");
                model.nll(&batch).expect("golden rows fit")
            };
            let (got, want) = (losses(on(device, &golden)), losses(golden.load()));
            let near = got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
            assert!(near, "{base}/{adapter}");
        }
    }
}

/// Trained biases and DoRA against the CPU, over dense and quantized weights, with dropout and without.
fn gradients_of_options(device: &Device) {
    let golden = Golden::open("llama-bias");
    let batch = golden.packed();
    for load_in in [None, Some(LoadIn::FourBit(None)), Some(LoadIn::EightBit), Some(LoadIn::Fp8)] {
        for (use_dora, bias, dropout) in [
            (false, Bias::All, 0.0),
            (false, Bias::LoraOnly, 0.2),
            (true, Bias::None, 0.0),
            (true, Bias::All, 0.0),
            (true, Bias::LoraOnly, 0.2),
        ] {
            let gradients = |device: &Device| {
                let mut model = golden.load_with(|options| {
                    options.device = device.clone();
                    options.load_in = load_in;
                });
                let config = LoraConfig::new(4).lora_dropout(dropout).use_dora(use_dora).bias(bias);
                let config = config.target_modules(["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
                let config = config.rank_pattern([("q_proj", 6)]).init_lora_weights(InitLoraWeights::Random);
                model.add_adapter(&config).expect("a valid configuration");
                let mut grads = model.params().zero_grads();
                let key = rekindle_models::StepKey { seed: 7, step: 3, neftune_noise_alpha: 0.0 };
                let losses = model.forward_backward(&batch, 0.5, &mut grads, Some(key)).expect("golden rows fit");
                let infos = model.params().infos().to_vec();
                let grads: Vec<_> = infos.into_iter().map(|info| (info.name, grads.values(info.at))).collect();
                (losses.values(), grads)
            };
            let what = format!("{load_in:?}, use_dora {use_dora}, bias {bias:?}, dropout {dropout}");
            let ((got_losses, got), (want_losses, want)) = (gradients(device), gradients(&Device::cpu()));
            assert!(relative_distance(&got_losses, &want_losses) <= 1e-5, "{what}: losses");
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let error = relative_distance(got, want);
                assert!(error <= 1e-4, "{what}: the gradient of {name} is off by {error:e}");
            }
        }
    }
}

/// pissa and olora keep the model's function at the start and restore the base when removed; loftq equals the CPU's.
fn starts(device: &Device) {
    let golden = Golden::open("qwen3-tied");
    let batch = golden.packed();
    let losses = |model: &CausalLm| model.nll(&batch).expect("golden rows fit");
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
    let config = OptimizerConfig::from(&SftConfig { weight_decay: 0.0, ..SftConfig::default() });
    let trained = |model: &mut CausalLm| {
        let mut optimizer = Optimizer::new(model, config, 0).expect("something is trained");
        for _ in 0..3 {
            optimizer.step(model, &Sft, std::slice::from_ref(&batch), 1e-2).expect("golden rows fit");
        }
        losses(model)
    };
    let config = |init| LoraConfig::new(4).lora_alpha(6.0).init_lora_weights(init);
    let base = losses(&golden.load());
    for init in [InitLoraWeights::Pissa, InitLoraWeights::Olora] {
        let mut model = on(device, &golden);
        // Adding another adapter first puts the weights into fused storage.
        model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
        model.add_adapter(&config(init.clone())).expect("a valid configuration");
        assert!(near(&losses(&model), &base), "{init:?}: the start");
        let after = trained(&mut model);
        assert!(!near(&after, &base), "{init:?}: training has an effect");
        let out = tempfile::tempdir().expect("a temporary directory");
        model.adapter().expect("it is active").save(out.path()).expect("the disk has space");
        model.load_adapter(out.path()).expect("it was just written");
        assert!(near(&losses(&model), &after), "{init:?}: the saved adapter");
        model.remove_adapter();
        assert!(near(&losses(&model), &base), "{init:?}: the base");
    }
    let started = |device: &Device| {
        let mut model = golden.load_with(|options| {
            options.device = device.clone();
            options.load_in = Some(LoadIn::FourBit(None));
        });
        model.add_adapter(&config(InitLoraWeights::Loftq)).expect("a valid configuration");
        losses(&model)
    };
    assert!(near(&started(device), &started(&Device::cpu())), "loftq");
}

/// Switching adapters on dense and quantized weights restores each adapter and the base exactly.
fn adapters_by_name(device: &Device) {
    let golden = Golden::open("qwen3-tied");
    let batch = golden.packed();
    for load_in in [None, Some(LoadIn::FourBit(None))] {
        let mut model = golden.load_with(|options| {
            options.device = device.clone();
            options.load_in = load_in;
        });
        let check = |model: &CausalLm, want: &[f32], what: &str| {
            let got = model.nll(&batch).expect("golden rows fit");
            let near = got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
            assert!(near, "{what}, {load_in:?}");
        };
        let base = model.nll(&batch).expect("golden rows fit");
        let mut seen = Vec::new();
        for name in ["plain", "rslora", "dora"] {
            let dir = goldens().join("lora-options/qwen3-tied/adapters").join(name);
            model.load_adapter_as(name, &dir).expect("a golden adapter loads");
            seen.push((name, model.params().all_values(), model.nll(&batch).expect("golden rows fit")));
        }
        for (name, values, nll) in seen.iter().chain(&seen) {
            model.set_adapter(name).expect("it waits");
            assert_eq!(&model.params().all_values(), values, "{name}, {load_in:?}");
            check(&model, nll, name);
        }
        model.disable_adapter().expect("the device works");
        check(&model, &base, "the base");
    }
}

fn generation(device: &Device) {
    for name in MODELS {
        let golden = Golden::open(name);
        let config = GenerationConfig { max_new_tokens: 12, ..GenerationConfig::default() };
        let prompt = &golden.rows[0].input_ids[..3];
        let made = |model: CausalLm| model.generate(prompt, &config, |_| true).expect("a valid prompt").0;
        assert_eq!(made(on(device, &golden)), made(golden.load()), "{name}");
    }
}

fn steps(device: &Device) {
    for (name, run, file) in [
        ("qwen3-tied", "lora", ADAPTER),
        ("llama3", "lora-fresh", ADAPTER),
        ("quantized/qwen3-tied-nf4-double", "lora", ADAPTER),
    ] {
        let golden = Golden::open(name);
        let trajectory = Trajectory::open(&golden.dir.join("train").join(run));
        let mut model = on(device, &golden);
        let adapter = trajectory.adapter().expect("an adapter is trained");
        model.load_adapter(&golden.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
        trajectory.check_within(CUDA_F32, &format!("{name}/{run}"), &golden, &mut model, file);
    }
}

/// The difference from the f32 run must be at most twice that of PyTorch's own bf16 run.
fn steps_in_bf16(device: &Device) {
    for (name, run) in [("qwen3-tied", "lora"), ("llama3", "lora-fresh")] {
        let golden = Golden::open(name);
        let trajectory = Trajectory::open(&golden.dir.join("train").join(run));
        let mut model = golden.load_with(|options| {
            options.device = device.clone();
            options.dtype = DType::BF16;
        });
        let adapter = trajectory.adapter().expect("an adapter is trained");
        model.load_adapter(&golden.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
        let bound = trajectory.bf16_spread().times(2.0);
        trajectory.check_within(bound, &format!("{name}/{run} in bf16"), &golden, &mut model, ADAPTER);
    }
}

fn packing(device: &Device) {
    for name in MODELS {
        let golden = Golden::open(name);
        let model = on(device, &golden);
        let together = model.nll(&golden.packed()).expect("golden rows fit");
        let alone = |row| model.nll(&golden.batch(&[row])).expect("golden rows fit");
        let apart: Vec<f32> = (0..golden.rows.len()).flat_map(alone).collect();
        assert_eq!(together.len(), apart.len());
        for (t, (a, b)) in together.iter().zip(&apart).enumerate() {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{name}: token {t} has {a} packed and {b} alone");
        }
    }
}

/// Compares with the CPU, because the model of the golden full fine-tuning run has an unsupported head_dim.
fn all_weights(device: &Device) {
    for name in MODELS {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let gradients = |device: &Device| {
            let model = golden.load_with(|options| {
                options.device = device.clone();
                options.full_finetuning = true;
            });
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 0.01, &mut grads, None).expect("golden rows fit").sum();
            let infos = model.params().infos().to_vec();
            infos.into_iter().map(|info| (info.name, grads.values(info.at))).collect::<Vec<_>>()
        };
        for ((parameter, got), (_, want)) in gradients(device).iter().zip(&gradients(&Device::cpu())) {
            let error = relative_distance(got, want);
            assert!(error <= 1e-4, "{name}: the gradient of {parameter} differs by {error:e}");
        }
    }
}

fn recomputation(device: &Device) {
    let golden = Golden::open("qwen3-tied");
    let batch = golden.packed();
    let gradients = |dropout: f64, checkpointing: GradientCheckpointing| {
        let mut model = on(device, &golden);
        let config = LoraConfig::new(4).lora_dropout(dropout);
        // Both factors are random, so that no gradient is zero.
        let config = config.target_modules("all-linear").init_lora_weights(InitLoraWeights::Random);
        model.add_adapter(&config).expect("a valid configuration");
        model.set_gradient_checkpointing(checkpointing);
        let mut grads = model.params().zero_grads();
        let key = rekindle_models::StepKey { seed: 7, step: 3, neftune_noise_alpha: 0.0 };
        model.forward_backward(&batch, 0.5, &mut grads, Some(key)).expect("golden rows fit").sum();
        grads.all_values()
    };
    cuda(device).set_deterministic(true);
    for dropout in [0.0, 0.1] {
        let whole = gradients(dropout, GradientCheckpointing::Off);
        assert!(whole.iter().any(|&g| g != 0.0));
        for recomputed in [GradientCheckpointing::Block, GradientCheckpointing::Host] {
            assert_eq!(whole, gradients(dropout, recomputed), "{recomputed:?}, dropout {dropout}");
        }
    }
    cuda(device).set_deterministic(false);
}

/// DPO against PyTorch's autograd in f32, and both ways to a gradient in the dtypes of training, bit for bit.
fn objectives(device: &Device) {
    let golden = Golden::open("qwen3-tied");
    let expect = read_json(&goldens().join("dpo/expect.json"));
    let want = tensors(&goldens().join("dpo/gradients.safetensors"));
    let mut model = on(device, &golden);
    model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
    let rows =
        expect["pairs"].as_array().expect("a list of pairs").iter().flat_map(|pair| pair.as_array().expect("rows"));
    let rows: Vec<usize> = rows.map(|row| row.as_u64().expect("a row's number") as usize).collect();
    let dpo = Dpo { beta: expect["beta"].as_f64().expect("a number"), ..Dpo::default() };
    let scale = 2.0 / rows.len() as f64;
    let mut grads = model.params().zero_grads();
    let pending =
        model.objective_backward(&dpo, &golden.batch(&rows), &StepTerms::default(), scale as f32, &mut grads, None);
    let loss = scale * pending.expect("golden rows fit").wait().0;
    let error = (loss / expect["loss"].as_f64().expect("a number") - 1.0).abs();
    assert!(error <= 1e-5, "the loss of DPO is off by {error:e}");
    for info in model.params().infos() {
        let error = relative_distance(&grads.values(info.at), &want[&info.name].1);
        assert!(error <= 1e-4, "{}: the gradient of DPO is off by {error:e}", info.name);
    }

    cuda(device).set_deterministic(true);
    let batch = golden.packed();
    let weights: Vec<f32> = (0..batch.tokens()).map(|t| (t % 7) as f32 * 0.01 - 0.02).collect();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let model = golden.load_with(|options| {
            options.device = device.clone();
            options.dtype = dtype;
            options.full_finetuning = true;
        });
        let [mut known, mut later] = [(); 2].map(|()| model.params().zero_grads());
        let losses = model.forward_backward(&batch, &*weights, &mut known, None).expect("golden rows fit").values();
        let pass = model.forward(&batch, None).expect("golden rows fit");
        let log_probs = model.log_probs_of(&pass);
        model.backward(pass, &log_probs, &*weights, &mut later).expect("the device is fine");
        assert!(known.all_values() == later.all_values(), "{dtype:?}: gradients");
        // The logarithms of device and host may differ in the last place.
        for (nll, log_prob) in losses.iter().zip(log_probs.values().log_probs) {
            assert!((nll + log_prob).abs() <= 1e-6 * nll.abs().max(1.0), "{dtype:?}: {nll} and {log_prob}");
        }
    }
    cuda(device).set_deterministic(false);
}

/// The families whose heads CUDA takes.
fn families() -> Vec<Golden> {
    let mut families = Golden::families();
    families.retain(|golden| golden.load().config().head_dim().is_multiple_of(8));
    println!("families: {}", families.iter().map(|golden| golden.name.as_str()).collect::<Vec<_>>().join(", "));
    families
}

fn family_losses(device: &Device) {
    for golden in families() {
        let (model, batch) = (on(device, &golden), golden.packed());
        assert_nll(&golden.name, &batch, &model.nll(&batch).expect("golden rows fit"), &golden.base_losses());
        for expected in golden.expect["generate"].as_array().expect("a list of generations") {
            let ids = |key: &str| serde_json::from_value::<Vec<u32>>(expected[key].clone()).expect("a list of ids");
            let config = GenerationConfig { max_new_tokens: ids("ids").len(), ..GenerationConfig::default() };
            let (got, _) = model.generate(&ids("prompt"), &config, |_| true).expect("golden prompts fit");
            assert_eq!(got, ids("ids"), "{}", golden.name);
        }
        let mut model = on(device, &golden);
        model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(&format!("{}, adapted", golden.name), &batch, &nll, &golden.adapter_losses("all-linear"));
    }
}

/// Against transformers, and with every kind of checkpointing the same bits.
fn family_gradients(device: &Device) {
    cuda(device).set_deterministic(true);
    for golden in families() {
        let batch = golden.packed();
        let mut model = golden.load_with(|options| {
            options.device = device.clone();
            options.full_finetuning = true;
        });
        let gradients = |model: &CausalLm| {
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 1.0, &mut grads, None).expect("golden rows fit").sum();
            grads
        };
        let grads = gradients(&model);
        let expected = tensors(&golden.dir.join("gradients.safetensors"));
        for info in model.params().infos() {
            let error = relative_distance(&grads.values(info.at), &expected[&info.name].1);
            assert!(error <= 1e-4, "{}: the gradient of {} differs by {error:e}", golden.name, info.name);
        }
        let mut adapted = on(device, &golden);
        adapted.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
        for model in [&mut model, &mut adapted] {
            let whole = gradients(model).all_values();
            for recomputed in [GradientCheckpointing::Block, GradientCheckpointing::Host] {
                model.set_gradient_checkpointing(recomputed);
                assert_eq!(gradients(model).all_values(), whole, "{}, {recomputed:?}", golden.name);
            }
        }
    }
    cuda(device).set_deterministic(false);
}

fn memory(device: &Device) {
    let golden = Golden::open("llama3");
    let mut model = on(device, &golden);
    model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
    let config = OptimizerConfig::from(&SftConfig { weight_decay: 0.0, ..SftConfig::default() });
    let mut optimizer = Optimizer::new(&model, config, 0).expect("something is trained");
    let batch = golden.packed();
    let mut after = Vec::new();
    for step in 0..300 {
        optimizer.step(&mut model, &Sft, std::slice::from_ref(&batch), 1e-3).expect("golden rows fit");
        if step >= 3 {
            after.push((cuda(device).memory().in_use, cuda(device).memory().mapped));
        }
    }
    assert!(after.windows(2).all(|w| w[0] == w[1]), "memory by step: {after:?}");
}

fn cuda(device: &Device) -> &Cuda {
    match device {
        Device::Cuda(cuda) => cuda,
        Device::Burn(_) | Device::Meta(_) => unreachable!("the checks run on CUDA"),
    }
}

//! Tests of optimizers: 8-bit states against bitsandbytes, every name on a model, learning rates by group.

use rekindle_hub::SafetensorsFile;
use rekindle_kernels::optimizer::{
    self, Clip, LearningRates, OptimizerState, StateFormat, StateTensor, UpdateRule, UpdateStep, maps,
};
use rekindle_kernels::{Device, Group, ParamsBuilder, from_f32};
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, Sft};
use rekindle_quant::DynamicMap;
use rekindle_tests::{Golden, goldens, read_json, relative_distance};
use rekindle_train::{Optim, Optimizer, OptimizerConfig, SftConfig};

use rekindle_kernels::DType::F32;

#[test]
fn optimizer_states_and_weights_use_the_same_maps() {
    assert_eq!(maps(), [DynamicMap::signed().values(), DynamicMap::unsigned().values()]);
}

/// Compares with 30 steps of bitsandbytes' `AdamW8bit` on an H200.
#[test]
fn adamw_8bit_states_equal_bitsandbytes() {
    let golden = SafetensorsFile::open(&goldens().join("optimizer/adamw_8bit.safetensors")).expect("a golden file");
    let about = read_json(&goldens().join("optimizer/adamw_8bit.json"));
    let number = |key: &str| about[key].as_f64().expect("a number");
    let steps: Vec<u64> =
        about["steps"].as_array().expect("a list").iter().map(|t| t.as_u64().expect("a count")).collect();

    let mut builder = ParamsBuilder::new(&Device::cpu(), F32);
    for (index, (name, n)) in TENSORS.into_iter().enumerate() {
        let start: Vec<f32> = noise(index as u64 + 1, n).iter().map(|x| 0.05 * x).collect();
        builder.push(name, &[n], true, &start);
    }
    let mut params = builder.build();
    let rule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: number("eps") };
    let mut state = OptimizerState::new(params.infos(), &Device::cpu(), rule, StateFormat::Blockwise8);
    let mut travelled = vec![0.0f64; params.numel()];
    let mut worst = 0.0f64;
    for t in 1..=30 {
        let before = params.all_values();
        let mut grads = params.zero_grads();
        for (index, info) in params.infos().iter().enumerate() {
            grads.add(info.at, from_f32(gradient(index, t), info.at.dims(), &Device::cpu(), F32));
        }
        let step = UpdateStep { t, rates: number("lr").into(), weight_decay: number("weight_decay") };
        optimizer::apply(&mut params, &grads, &mut state, &step, &Clip::of(&grads, 1.0, 0.0));
        let moved = params.all_values().into_iter().zip(before).map(|(new, old)| f64::from((new - old).abs()));
        travelled.iter_mut().zip(moved).for_each(|(sum, moved)| *sum += moved);
        if !steps.contains(&t) {
            continue;
        }
        let ours: Vec<StateTensor> = state.tensors().map(|tensor| tensor.expect("the CPU works")).collect();
        for info in params.infos() {
            let bytes = |name: &str| ours.iter().find(|tensor| tensor.name == name).expect("it exists").bytes.clone();
            let want = |field: &str| golden.get(&format!("{t}/{}/{field}", info.name)).expect("a golden tensor");
            let mut stuck = vec![false; info.at.range().len()];
            for (moment, field) in [("exp_avg", "1"), ("exp_avg_sq", "2")] {
                let (name, theirs) = (format!("{}.{moment}", info.name), want(&format!("state{field}")).data);
                let ours = bytes(&name);
                if info.name == "small" {
                    // 1 − β is rounded from f64 here, as in PyTorch, and computed in f32 there: a difference of 1.3e-5
                    // for 0.999.
                    let (ours, theirs) = (floats(&ours), floats(theirs));
                    let error = relative_distance(&ours, &theirs);
                    assert!(error <= 1.5e-5, "step {t}: {name} is off by {error:e}");
                    continue;
                }
                assert_eq!(floats(&bytes(&format!("{name}.absmax"))), floats(want(&format!("absmax{field}")).data));
                for (i, (&ours, &theirs)) in ours.iter().zip(theirs).enumerate() {
                    // A moment that is zero in a block with nonzero values stays zero here.
                    stuck[i] |= field == "1" && (ours, theirs) == (127, 126);
                    assert!(ours == theirs || stuck[i], "step {t}: {name}[{i}] has code {ours}, not {theirs}");
                }
            }
            let (values, theirs) = (params.values(info.at), floats(want("p").data));
            for (i, (ours, theirs)) in values.into_iter().zip(theirs).enumerate().filter(|(i, _)| !stuck[*i]) {
                // Powers of β from the hardware's exponential differ by 1e-7, which is 1e-4 of 1 − 0.999, whose root is
                // a factor of every update in the first steps. With an f32 state, weight decay is applied first here,
                // as in PyTorch, and last there: lr · weight_decay, another 1e-4 of every update.
                let share = if info.name == "small" { 3e-4 } else { 1e-4 };
                let bound = share * travelled[info.at.range()][i] + 4.0 * f64::from(f32::EPSILON * ours.abs());
                let error = f64::from((ours - theirs).abs());
                assert!(error <= bound, "step {t}: {}[{i}] is {ours}, not {theirs}", info.name);
                if info.name != "small" {
                    worst = worst.max(error / travelled[info.at.range()][i].max(f64::MIN_POSITIVE));
                }
            }
        }
    }
    println!("largest difference of values with an 8-bit state: {worst:.1e} of their change");
}

const TENSORS: [(&str, usize); 3] = [("whole", 4096), ("ragged", 5100), ("small", 1000)];

/// Returns the gradients of `goldens/optimizer/make.py`.
fn gradient(index: usize, step: u64) -> Vec<f32> {
    let (name, n) = TENSORS[index];
    let scales = [1.0, 1e-3, 1e-6, 0.0, 30.0];
    let scale = |i: usize| scales[if name == "whole" { i % 5 } else { i / 256 % 5 }];
    noise(1000 * (index as u64 + 1) + step, n).iter().enumerate().map(|(i, g)| g * scale(i)).collect()
}

/// The random generator of `goldens/optimizer/make.py`.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    };
    (0..n).map(next).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Runs a few steps on the golden rows; returns the losses and the model.
fn train(golden: &Golden, config: &SftConfig, rates: LearningRates, steps: usize) -> (Vec<f64>, CausalLm) {
    let mut model = golden.load_full();
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(config), 1).expect("something is trained");
    let batches = [golden.packed()];
    let step = |_| optimizer.step(&mut model, &Sft, &batches, rates).expect("golden rows fit").loss;
    ((0..steps).map(step).collect(), model)
}

#[test]
fn every_optimizer_lowers_the_loss_and_8_bit_ones_equally() {
    let golden = Golden::open("qwen2");
    let losses = |optim, rate: f64, momentum| {
        train(&golden, &SftConfig { optim, momentum, ..SftConfig::default() }, rate.into(), 8).0
    };
    for (wide, narrow, rate) in [(Optim::Adamw, Optim::Adamw8bit, 1e-3), (Optim::Lion, Optim::Lion8bit, 2e-4)] {
        let (wide, narrow) = (losses(wide, rate, None), losses(narrow, rate, None));
        let (fall, other) = (wide[0] - wide[7], narrow[0] - narrow[7]);
        println!("{wide:?}\n{narrow:?}");
        assert!(fall > 0.02 * wide[0], "{wide:?}");
        assert!((other / fall - 1.0).abs() < 0.05, "{wide:?} and {narrow:?}");
    }
    let plain = losses(Optim::Sgd, 0.05, None);
    let momentum = losses(Optim::Sgd, 0.05, Some(0.9));
    assert!(plain[7] < plain[0] && momentum[7] < plain[7], "{plain:?} and {momentum:?}");
}

#[test]
fn embeddings_have_a_separate_learning_rate() {
    let golden = Golden::open("qwen3-untied-sharded");
    let rate = |default, embedding| LearningRates { default, embedding };
    let before = golden.load_full();
    for (rates, moves) in [(rate(1e-3, 0.0), Group::Default), (rate(0.0, 1e-3), Group::Embedding)] {
        let (_, after) = train(&golden, &SftConfig::default(), rates, 1);
        let embedding = after.params().infos().iter().filter(|info| info.group == Group::Embedding);
        assert_eq!(embedding.count(), 2, "table and head");
        for info in after.params().infos() {
            let same = after.params().values(info.at) == before.params().values(info.at);
            assert_eq!(same, info.group != moves, "{} with {rates:?}", info.name);
        }
    }
    let mut adapted = golden.load();
    adapted.add_adapter(&LoraConfig::new(4).modules_to_save(["lm_head"])).expect("a valid configuration");
    let infos = adapted.params().infos().iter();
    let names: Vec<&str> = infos.filter(|info| info.group == Group::Embedding).map(|info| &*info.name).collect();
    assert_eq!(names, ["lm_head.weight"]);
}

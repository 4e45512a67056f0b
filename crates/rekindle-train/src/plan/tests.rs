use std::time::Instant;

use rekindle_kernels::DType;
use rekindle_kernels::runtime::{Cuda, DeviceProps};
use rekindle_models::LoadIn;
use rekindle_models::objective::{Dpo, Kto};
use serde_json::json;

use super::*;
use crate::{RolloutArguments, WithRollouts};

/// Returns a job with the shape of Qwen3-4B, planned for a GPU that need not exist.
fn job(load_in: Option<LoadIn>, lora: Option<LoraConfig>, checkpointing: GradientCheckpointing) -> PlannedRun {
    let json = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": true,
        "hidden_act": "silu"
    });
    let device = Device::Cuda(Cuda::planned(DeviceProps::hopper(80 << 30)));
    let mut load = LoadOptions::new(device, DType::BF16, 2048);
    (load.load_in, load.full_finetuning) = (load_in, lora.is_none());
    let train = SftConfig { use_gradient_checkpointing: checkpointing, ..SftConfig::default() };
    PlannedRun { json, name: "4b".into(), load, lora, train, evaluates: false, ranks: 1 }
}

fn plan(job: PlannedRun) -> MemoryPlan {
    Planner::new(job).unwrap().plan(&PassRows::equal(4, 2048)).unwrap()
}

const WEIGHTS: usize = 4_022_468_096;

#[test]
fn the_cache_of_sampled_completions_is_planned() {
    let rollouts =
        RolloutArguments { generation_batch_size: Some(256), max_sequences: 128, ..RolloutArguments::default() };
    let method = Method::Grpo(Box::new(WithRollouts { rollouts, ..WithRollouts::default() }));
    let mut job = job(None, Some(LoraConfig::new(16)), GradientCheckpointing::Block);
    job.train = SftConfig { method, per_device_train_batch_size: 1, ..job.train };
    let plan = Planner::new(job).unwrap().plan(&PassRows::equal(1, 2048)).unwrap();
    // Keys and values of 36 layers with 8 heads of 128 channels in bf16, and the spare page that CUDA has.
    let cache = (128 * 2048 + 16) * 36 * 2 * 8 * 128 * 2;
    assert_eq!(plan.bytes.of(MemoryCategory::KvCache), cache);
    assert!(plan.peak > WEIGHTS * 2 + cache, "{plan}");
    assert!(plan.to_string().contains("key/value cache"), "{plan}");
}

#[test]
fn a_pair_is_two_documents() {
    let job = |method: Method| {
        let mut job = job(None, Some(LoraConfig::new(16)), GradientCheckpointing::Block);
        job.train.method = method;
        job
    };
    let pairs = Planner::new(job(Dpo::default().into())).unwrap().plan(&PassRows::equal(2, 2048)).unwrap();
    let sft = Planner::new(job(Method::Sft)).unwrap().objective(Box::new(Dpo::default()));
    let documents = { sft }.plan(&PassRows::equal(4, 2048)).unwrap();
    assert_eq!((pairs.peak, pairs.bytes, pairs.tokens), (documents.peak, documents.bytes, documents.tokens));
    // All weights: the reference is computed before, so no adapter has to be turned off.
    let mut full = job(Dpo::default().into());
    (full.lora, full.load.full_finetuning) = (None, true);
    full.load.device = Device::Cuda(Cuda::planned(DeviceProps::hopper(140 << 30)));
    assert!(Planner::new(full).unwrap().plan(&PassRows::equal(1, 2048)).unwrap().peak > pairs.peak);
    let kto = Planner::new(job(Kto::default().into())).unwrap().plan(&PassRows::equal(4, 2048)).unwrap();
    assert!(kto.peak.abs_diff(pairs.peak) <= pairs.peak / 100, "{} and {}", kto.peak, pairs.peak);
}

#[test]
fn bytes_of_a_large_model_by_hand() {
    let began = Instant::now();
    let lora = LoraConfig::new(16);
    let off = plan(job(None, Some(lora.clone()), GradientCheckpointing::Off));
    let seconds = began.elapsed().as_secs_f64();
    assert!(seconds < 10.0, "{seconds} s without optimization");
    // Seven linears a block: 16 · (in + out).
    let numel = 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728));
    let by = |plan: &MemoryPlan, what| plan.bytes.of(what);
    let near = |found: usize, expected: usize, what: &str| {
        let off = found as f64 / expected as f64 - 1.0;
        assert!(off.abs() < 0.02, "{what}: {found} and not {expected}");
    };
    near(by(&off, MemoryCategory::Gradients), 4 * numel, "gradients");
    near(by(&off, MemoryCategory::Optimizer), 8 * numel, "moments");
    near(by(&off, MemoryCategory::Adapters), 6 * numel, "values in f32 and in bf16");
    near(by(&off, MemoryCategory::Weights), 2 * (WEIGHTS + numel), "weights and stacked factors");
    let parts = MemoryCategory::ALL.iter().map(|&what| by(&off, what)).sum::<usize>() + off.fragmentation + off.context;
    assert_eq!(off.peak, parts);
    assert_eq!(off.host, 0);
}

#[test]
fn less_is_kept_from_policy_to_policy() {
    let lora = || Some(LoraConfig::new(16));
    let mut planner = Planner::new(job(None, lora(), GradientCheckpointing::Auto)).unwrap();
    let rows = PassRows::equal(4, 2048);
    let [off, host, block] = [GradientCheckpointing::Off, GradientCheckpointing::Host, GradientCheckpointing::Block]
        .map(|policy| planner.plan_with(&rows, policy).unwrap());
    assert!(host.peak < block.peak && block.peak < off.peak, "{host}\n{block}\n{off}");
    // Of every block but the last x, o and the middle of the residual stream.
    let away = 35 * 4 * 2048 * (2 * 2560 + 4096) * 2;
    assert!(host.host >= away && host.host < away + away / 50, "{} and not {away}", host.host);

    // The fastest that fits.
    let decided = |available| match Planner::new(job(None, lora(), GradientCheckpointing::Auto))
        .unwrap()
        .decide(&rows, available)
    {
        Ok(MemoryVerdict::Fits(plan)) => Some(plan.use_gradient_checkpointing),
        _ => None,
    };
    assert_eq!(decided(off.peak), Some(GradientCheckpointing::Off));
    assert_eq!(decided(off.peak - 1), Some(GradientCheckpointing::Host));
    assert_eq!(decided(host.peak - 1), None);
}

#[test]
fn what_does_not_fit_is_changed_until_it_does() {
    let rows = PassRows::equal(4, 2048);
    let mut planner = Planner::new(job(None, Some(LoraConfig::new(16)), GradientCheckpointing::Off)).unwrap();
    let fit = planner.fit(&rows, 6 << 30).unwrap();
    assert!(!fit.fits && fit.changes_suffice, "{fit:?}");
    let set: Vec<&str> = fit.changes.iter().map(|change| change.set.as_str()).collect();
    assert!(set[0].contains("unsloth") && set[1].contains("load_in_4bit"), "{set:?}");
    assert!(fit.changes.windows(2).all(|pair| pair[1].peak < pair[0].peak), "{fit:?}");
    assert_eq!((fit.longest_sequence, fit.largest_batch), (0, 0), "the weights alone are more");

    let fit = planner.fit(&rows, 40 << 30).unwrap();
    assert!(fit.largest_batch > 0 && fit.longest_sequence > 0, "{fit:?}");
    let at = |planner: &mut Planner, count, length| planner.plan(&PassRows::equal(count, length)).unwrap().peak;
    assert!(at(&mut planner, fit.largest_batch, 2048) <= 40 << 30);
    assert!(at(&mut planner, fit.largest_batch + 1, 2048) > 40 << 30);
}

#[test]
fn codes_take_the_place_of_weights() {
    let coded = plan(job(Some(LoadIn::FourBit(None)), Some(LoraConfig::new(16)), GradientCheckpointing::Host));
    let dense = plan(job(None, Some(LoraConfig::new(16)), GradientCheckpointing::Host));
    let linears = WEIGHTS - 151_936 * 2560;
    let saved = dense.bytes.of(MemoryCategory::Weights) - coded.bytes.of(MemoryCategory::Weights);
    // 2 bytes less 4.127 bits per weight.
    let expected = linears as f64 * (2.0 - 4.127 / 8.0);
    assert!((saved as f64 / expected - 1.0).abs() < 0.01, "{saved} and not {expected}");
}

/// All 48 layers of Qwen3-30B-A3B in NF4, with adapters on attention.
#[test]
fn a_mixture_of_30_billion_weights_fits_24_gb() {
    let lora = LoraConfig::new(16).target_modules(["q_proj", "k_proj", "v_proj", "o_proj"]);
    let mut job = job(Some(LoadIn::FourBit(None)), Some(lora), GradientCheckpointing::Host);
    let differs = json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": true,
        "tie_word_embeddings": false
    });
    for (key, value) in differs.as_object().expect("an object") {
        job.json[key] = value.clone();
    }
    let plan = plan(job);
    println!("{plan}");
    assert!(plan.peak <= 24_000_000_000, "{plan}");
    // 29.9 billion weights of linears in 4.127 bits, and two tables in 16.
    assert!(plan.bytes.of(MemoryCategory::Weights) > 16_000_000_000, "{plan}");
}

#[test]
fn rows_of_a_pass_are_the_longest_ones() {
    assert_eq!(PassRows::longest(2, [3, 9, 1, 7]).lengths, [9, 7]);
    assert_eq!(PassRows::longest(2, [3, 9, 1, 7]).for_evaluation(3).lengths, [9, 9, 9]);
}

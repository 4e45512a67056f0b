//! Compares the memory plan of the CPU with a counting allocator, from loading to the second step.
//!
//! This is a separate binary because nothing else may allocate while it measures.

#![allow(unsafe_code, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use rekindle_hub::{Checkpoint, Dtype, TensorSpec, write_atomic, write_safetensors};
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_kernels::linear_cross_entropy::LogProbValues;
use rekindle_lora::LoraConfig;
use rekindle_models::objective::{BatchLoss, Dpo, StepTerms};
use rekindle_models::{Batch, CausalLm, GradientCheckpointing, LoadIn, LoadOptions, ModelConfig, Objective, Sft};
use rekindle_train::{
    MemoryCategory, MemoryPlan, Optimizer, OptimizerConfig, PassRows, PlannedRun, Planner, SftConfig,
};
use serde_json::{Value, json};

/// Counts the allocated bytes and their peak.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    MOST.fetch_max(NOW.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call is forwarded to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(at, layout) };
    }

    // Counted as a copy, with both blocks allocated, even if the system grows the block in place.
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        more(size);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The largest allowed difference between the plan and the counted bytes, as a fraction of the latter.
const TOLERANCE: f64 = 0.05;

struct Case {
    name: &'static str,
    family: &'static str,
    vocab: usize,
    load_in: Option<LoadIn>,
    lora: Option<LoraConfig>,
    checkpointing: bool,
    rows: usize,
    length: usize,
    /// True if all weights are trained in bf16 without an f32 copy.
    stochastic_rounding: bool,
    optimizer_in_bwd: bool,
    /// Rows of one pass of evaluation, after the steps; 0 for none.
    evaluated: usize,
    objective: fn() -> Box<dyn Objective>,
}

/// Σ (1 − p): a loss that needs log-probabilities before its weights are known.
#[derive(Debug)]
struct ExpectedErrors;

impl Objective for ExpectedErrors {
    fn count(&self, batch: &Batch) -> usize {
        batch.counted()
    }

    fn loss(&self, _: &Batch, log_probs: &LogProbValues, _: Option<&LogProbValues>, _: &StepTerms) -> BatchLoss {
        let weights: Vec<f32> = log_probs.log_probs.iter().map(|x| x.exp()).collect();
        let sum = weights.iter().map(|&p| 1.0 - f64::from(p)).sum();
        BatchLoss { sum, weights, metrics: Vec::new() }
    }
}

fn cases() -> Vec<Case> {
    let lora = || Some(LoraConfig::new(16));
    let of = |name, family, vocab, load_in, lora, checkpointing, rows, length| Case {
        name,
        family,
        vocab,
        load_in,
        lora,
        checkpointing,
        rows,
        length,
        stochastic_rounding: false,
        optimizer_in_bwd: false,
        evaluated: 0,
        objective: || Box::new(Sft),
    };
    let nf4 = Some(LoadIn::FourBit(None));
    vec![
        of("LoRA", "qwen3", 2000, None, lora(), false, 2, 256),
        of("LoRA, recomputed", "qwen3", 2000, None, lora(), true, 2, 256),
        of("LoRA, one long row", "qwen3", 2000, None, lora(), true, 1, 1024),
        of("QLoRA", "qwen3", 2000, nf4, lora(), false, 4, 128),
        of("QLoRA, recomputed, large vocabulary", "llama", 40_000, nf4, lora(), true, 2, 256),
        of("8-bit", "llama", 2000, Some(LoadIn::EightBit), lora(), false, 2, 256),
        of("fp8", "qwen3", 2000, Some(LoadIn::Fp8), lora(), false, 2, 256),
        of("fp8 experts, recomputed", "qwen3_moe", 2000, Some(LoadIn::Fp8), lora(), true, 2, 256),
        of("large vocabulary", "llama", 40_000, None, lora(), false, 1, 300),
        of(
            "dropout and magnitudes",
            "llama",
            2000,
            None,
            lora().map(|l| l.lora_dropout(0.1).use_dora(true)),
            false,
            2,
            200,
        ),
        of("all weights", "qwen3", 4000, None, None, false, 2, 256),
        of("all weights, recomputed", "llama", 4000, None, None, true, 4, 256),
        Case {
            optimizer_in_bwd: true,
            ..of("all weights, applied in the backward", "llama", 4000, None, None, true, 2, 256)
        },
        Case {
            stochastic_rounding: true,
            ..of("all weights in bf16, in place", "qwen3", 4000, None, None, false, 2, 256)
        },
        Case {
            stochastic_rounding: true,
            optimizer_in_bwd: true,
            ..of("all weights in bf16, in place, applied in the backward", "llama", 4000, None, None, true, 2, 256)
        },
        of("all weights in 4 bits, in place", "qwen3", 4000, nf4, None, true, 2, 256),
        Case {
            optimizer_in_bwd: true,
            ..of("all weights in 8 bits, in place", "llama", 4000, Some(LoadIn::EightBit), None, true, 2, 256)
        },
        Case {
            objective: || Box::new(Dpo::default()),
            ..of("LoRA, DPO, large vocabulary", "llama", 40_000, None, lora(), false, 2, 256)
        },
        Case {
            objective: || Box::new(ExpectedErrors),
            ..of("all weights, weights from log-probabilities", "llama", 40_000, None, None, true, 2, 256)
        },
        Case { evaluated: 16, ..of("LoRA, larger batches in evaluation", "qwen3", 2000, None, lora(), true, 1, 256) },
        of("LoRA on experts", "qwen3_moe", 2000, None, lora(), false, 2, 256),
        of("QLoRA on experts, recomputed", "qwen3_moe", 2000, nf4, lora(), true, 2, 256),
        of(
            "LoRA on the attention of a mixture",
            "qwen3_moe",
            2000,
            None,
            lora().map(|l| l.target_modules(["q_proj", "v_proj"])),
            true,
            2,
            256,
        ),
        of("all weights of a mixture", "qwen3_moe", 2000, None, None, false, 2, 256),
    ]
}

#[test]
fn plans_are_within_five_percent_of_the_allocated_memory() {
    let began = Instant::now();
    let mut wrong = Vec::new();
    println!("{:<56}{:>10}{:>10}{:>8}", "", "plan", "counted", "%");
    // The pools of threads and of scratch memory are made once.
    measured(&cases()[1]);
    for case in cases() {
        let (plan, counted) = measured(&case);
        let off = plan.peak as f64 / counted as f64 - 1.0;
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        println!("{:<56}{:>10.2}{:>10.2}{:>8.2}", case.name, mib(plan.peak), mib(counted), 100.0 * off);
        println!(
            "    {:?}",
            MemoryCategory::ALL.map(|what| (what.label(), (mib(plan.bytes.of(what)) * 100.0).round() / 100.0))
        );
        if off.abs() > TOLERANCE {
            wrong.push(case.name);
        }
    }
    println!("{:.1} s", began.elapsed().as_secs_f64());
    assert!(wrong.is_empty(), "plans that differ by more than {TOLERANCE}: {wrong:?}");
}

/// Returns the plan, and the peak allocation of a run of two steps.
fn measured(case: &Case) -> (MemoryPlan, usize) {
    let dir = tempfile::tempdir().unwrap();
    let json = config(case.family, case.vocab);
    write(dir.path(), &json);
    let mut options = LoadOptions::new(Device::cpu(), DType::F32, case.length);
    options.load_in = case.load_in;
    options.full_finetuning = case.lora.is_none();
    let checkpointing = GradientCheckpointing::from(case.checkpointing);
    options.stochastic_rounding = case.stochastic_rounding;
    let train = SftConfig {
        per_device_train_batch_size: case.rows,
        per_device_eval_batch_size: case.evaluated.max(1),
        optimizer_in_bwd: case.optimizer_in_bwd,
        use_gradient_checkpointing: checkpointing,
        ..SftConfig::default()
    };
    let job = PlannedRun {
        json,
        name: dir.path().to_owned(),
        load: options.clone(),
        lora: case.lora.clone(),
        train: train.clone(),
        evaluates: case.evaluated > 0,
        ranks: 1,
    };
    let rows = PassRows::equal(case.rows, case.length);
    let plan = Planner::new(job).unwrap().objective((case.objective)()).plan(&rows).unwrap();

    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut model = CausalLm::load(&checkpoint, &options, &mut |_| ()).unwrap();
    if let Some(lora) = &case.lora {
        model.add_adapter(lora).unwrap();
    }
    model.set_gradient_checkpointing(checkpointing);
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&train), 0).unwrap();
    let row: Vec<u32> = (0..case.length).map(|i| (i * 31 % case.vocab) as u32).collect();
    let labels: Vec<i32> = row.iter().map(|&id| id.cast_signed()).collect();
    let objective = (case.objective)();
    for _ in 0..2 {
        let batch = Batch::from_rows((0..case.rows).map(|_| (&row[..], &labels[..])), 0);
        let result = optimizer.step(&mut model, &*objective, &[batch], 1e-4).unwrap();
        assert!(result.loss.is_finite());
    }
    if case.evaluated > 0 {
        let batch = Batch::from_rows((0..case.evaluated).map(|_| (&row[..], &labels[..])), 0);
        model.nll(&batch).unwrap();
    }
    (plan, MOST.load(Relaxed) - before)
}

fn config(family: &str, vocab: usize) -> Value {
    let architecture = match family {
        "qwen3" => "Qwen3ForCausalLM",
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        _ => "LlamaForCausalLM",
    };
    json!({
        "architectures": [architecture],
        "model_type": family,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": family == "qwen3",
        "hidden_act": "silu",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 384,
        "norm_topk_prob": true
    })
}

/// Writes a checkpoint of small, distinct weights.
fn write(dir: &Path, config: &Value) {
    let model = ModelConfig::from_json(config).unwrap();
    write_atomic(&dir.join("config.json"), config.to_string().as_bytes()).unwrap();
    let tensors: Vec<_> =
        model.parameters().into_iter().map(|tensor| TensorSpec::new(tensor.name, Dtype::F32, tensor.shape)).collect();
    let mut state = 1u32;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    write_safetensors(&dir.join("model.safetensors"), &metadata, &tensors, |index, out| {
        for _ in 0..tensors[index].shape.iter().product::<usize>() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = match tensors[index].shape.len() {
                1 => 1.0,
                _ => (f64::from(state) / f64::from(u32::MAX) - 0.5) as f32 * 0.08,
            };
            out.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    })
    .unwrap();
}

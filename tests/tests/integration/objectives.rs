//! Tests of losses other than SFT: log-probabilities against transformers, DPO against PyTorch's autograd, and objectives
//! with every way to compute a backward pass.

use rekindle_kernels::linear_cross_entropy::{LogProbValues, TokenWeights};
use rekindle_lora::LoraConfig;
use rekindle_models::objective::{BatchLoss, Dpo, Metric, StepTerms};
use rekindle_models::{Batch, CausalLm, GradientCheckpointing, IGNORED, Objective, Sft, StepKey};
use rekindle_tests::{Golden, goldens, read_json, relative_distance, tensors};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};
use serde_json::Value;

const CHECKPOINTING: [GradientCheckpointing; 3] =
    [GradientCheckpointing::Off, GradientCheckpointing::Block, GradientCheckpointing::Host];

/// The tolerance for losses and gradients of DPO, relative. The golden's own spread between two attention kernels and
/// float64 is 1.7e-6; the largest measured difference is 1.7e-6.
const DPO_TOLERANCE: f64 = 1e-5;

fn golden_dpo() -> Value {
    read_json(&goldens().join("dpo/expect.json"))
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The rows of the golden's pairs, chosen and rejected in turn.
fn pairs(expect: &Value) -> Vec<usize> {
    let pairs = expect["pairs"].as_array().expect("a list of pairs");
    pairs.iter().flat_map(floats).map(|row| row as usize).collect()
}

#[test]
fn log_probs_entropies_and_argmax_are_those_of_transformers() {
    let (golden, expect) = (Golden::open("qwen3-tied"), golden_dpo());
    let model = golden.load_adapted("all-linear");
    for row in expect["rows"].as_array().expect("a list of rows") {
        let number = row["row"].as_u64().expect("a row's number") as usize;
        let batch = golden.batch(&[number]);
        let counted: Vec<usize> = (0..batch.tokens()).filter(|&t| batch.targets[t] != IGNORED).collect();
        let values = model.log_probs(&batch).expect("golden rows fit").values();
        let reference = model.base_log_probs(&batch).expect("the base is available").values();
        for (what, got, want) in [
            ("log_probs", &values.log_probs, floats(&row["log_probs"])),
            ("entropy", &values.entropy, floats(&row["entropy"])),
            ("reference", &reference.log_probs, floats(&row["reference"])),
        ] {
            assert_eq!(counted.len(), want.len());
            for (&t, want) in counted.iter().zip(want) {
                let error = (f64::from(got[t]) - want).abs() / want.abs().max(1.0);
                assert!(error <= 1e-5, "row {number}, token {t}: {what} is {}, not {want}", got[t]);
            }
        }
        let argmax: Vec<bool> = counted.iter().map(|&t| values.is_argmax[t]).collect();
        let want = row["is_argmax"].as_array().expect("a list");
        assert_eq!(argmax, want.iter().map(|x| x.as_bool().expect("a flag")).collect::<Vec<_>>());
    }
}

#[test]
fn dpo_is_that_of_autograd() {
    let (golden, expect) = (Golden::open("qwen3-tied"), golden_dpo());
    let want = tensors(&goldens().join("dpo/gradients.safetensors"));
    let dpo = Dpo { beta: expect["beta"].as_f64().expect("a number"), ..Dpo::default() };
    let rows = pairs(&expect);
    let split: Vec<&[usize]> = rows.chunks(2).collect();
    for checkpointing in CHECKPOINTING {
        for micro_batches in [&[&rows[..]][..], &split[..]] {
            let mut model = golden.load_adapted("all-linear");
            model.set_gradient_checkpointing(checkpointing);
            let mut grads = model.params().zero_grads();
            let (mut loss, mut metrics) = (0.0, Vec::new());
            let scale = 1.0 / (rows.len() / 2) as f64;
            for rows in micro_batches {
                let batch = golden.batch(rows);
                let pending =
                    model.objective_backward(&dpo, &batch, &StepTerms::default(), scale as f32, &mut grads, None);
                let (sum, more) = pending.expect("golden rows fit").wait();
                loss += scale * sum;
                Metric::add(&mut metrics, more);
            }
            let means = Metric::means(&metrics);
            for (name, want) in expect["metrics"].as_object().expect("a map") {
                let want = want.as_f64().expect("a metric of the golden");
                let (_, mean) = means.iter().find(|(known, _)| known == name).expect("it is reported");
                assert!((mean - want).abs() <= DPO_TOLERANCE, "{name} is {mean}, not {want}");
            }
            let error = (loss / expect["loss"].as_f64().expect("a number") - 1.0).abs();
            assert!(error <= DPO_TOLERANCE, "the loss is off by {error:e}");
            assert_eq!(model.params().infos().len(), want.len());
            let mut worst = 0.0f64;
            for info in model.params().infos() {
                let error = relative_distance(&grads.values(info.at), &want[&info.name].1);
                worst = worst.max(error);
                assert!(error <= DPO_TOLERANCE, "{}: the gradient is off by {error:e}", info.name);
            }
            println!("{checkpointing:?}, {} micro-batches: off by {worst:.1e}", micro_batches.len());
        }
    }
}

/// Training by pairs moves the model from the reference model towards the chosen rows.
#[test]
fn dpo_steps_prefer_the_chosen_rows() {
    let (golden, expect) = (Golden::open("qwen3-tied"), golden_dpo());
    let rows = pairs(&expect);
    let batches: Vec<Batch> = rows.chunks(2).map(|pair| golden.batch(pair)).collect();
    let mut model = golden.load();
    model.add_adapter(&LoraConfig::new(4).lora_alpha(8.0)).expect("a valid configuration");
    let mut optimizer =
        Optimizer::new(&model, OptimizerConfig::from(&SftConfig::default()), 1).expect("something is trained");
    let dpo = Dpo::default();
    let mut step = || optimizer.step(&mut model, &dpo, &batches, 5e-3).expect("golden rows fit");
    let first = step();
    // B = 0: the model is its reference.
    assert!((first.loss - 2f64.ln()).abs() < 1e-9, "{}", first.loss);
    let rewards = first.metrics.iter().filter(|(name, _)| name.starts_with("rewards/"));
    assert!(rewards.clone().count() == 4 && rewards.clone().all(|&(_, value)| value == 0.0), "{:?}", first.metrics);
    let last = (0..10).map(|_| step()).last().expect("ten steps");
    assert!(last.loss < 0.5 * first.loss, "the loss went from {} to {}", first.loss, last.loss);
    assert!(last.metrics.contains(&("rewards/accuracies", 1.0)), "{:?}", last.metrics);
}

/// Weights that are known after the forward give the bits of weights that are known before it.
#[test]
fn both_ways_to_a_gradient_have_the_same_bits() {
    let key = Some(StepKey { seed: 7, step: 3, neftune_noise_alpha: 5.0 });
    for name in ["qwen3-tied", "llama3", "families/granite"] {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let weights: Vec<f32> = (0..batch.tokens()).map(|t| (t % 7) as f32 * 0.01 - 0.02).collect();
        let all = vec![0.01; batch.tokens()];
        let adapted = || {
            let mut model = golden.load();
            let lora = LoraConfig::new(4).lora_dropout(0.2);
            model.add_adapter(&lora).expect("a valid configuration");
            let moved = model.params().all_values().iter().map(|value| value + 0.01).collect();
            model.params_mut().set_all_values(moved);
            model
        };
        for mut model in [adapted(), golden.load_full()] {
            for checkpointing in CHECKPOINTING {
                model.set_gradient_checkpointing(checkpointing);
                let known = |weights: TokenWeights<'_>| {
                    let mut grads = model.params().zero_grads();
                    let losses = model.forward_backward(&batch, weights, &mut grads, key).expect("golden rows fit");
                    (losses.values(), grads.all_values())
                };
                let (losses, uniform) = known(TokenWeights::Uniform(0.01));
                assert!(known(TokenWeights::from(&*all)) == (losses.clone(), uniform), "{name}: equal weights");
                for weights in [TokenWeights::Uniform(0.01), TokenWeights::from(&*weights)] {
                    let mut grads = model.params().zero_grads();
                    let pass = model.forward(&batch, key).expect("golden rows fit");
                    assert_eq!(pass.hidden().dims(), [batch.tokens(), model.config().hidden_size()]);
                    let log_probs = model.log_probs_of(&pass);
                    model.backward(pass, &log_probs, weights, &mut grads).expect("the device is fine");
                    let later: Vec<f32> = log_probs.values().log_probs.iter().map(|x| 0.0 - x).collect();
                    assert!(known(weights) == (later, grads.all_values()), "{name}, {checkpointing:?}, {weights:?}");
                }
            }
        }
    }
}

/// Σ −(1 − p)²·ln p: a loss whose weights depend on the log-probabilities, without a reference model.
#[derive(Debug)]
struct Focal;

impl Objective for Focal {
    fn count(&self, batch: &Batch) -> usize {
        batch.counted()
    }

    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        reference: Option<&LogProbValues>,
        _: &StepTerms,
    ) -> BatchLoss {
        assert!(reference.is_none());
        let p = |log_p: f64| log_p.exp();
        let counted = batch.targets.iter().zip(&log_probs.log_probs).filter(|(target, _)| **target != IGNORED);
        let sum = counted.map(|(_, &x)| f64::from(x)).map(|x| -(1.0 - p(x)).powi(2) * x).sum();
        let weight = |x: f64| ((1.0 - p(x)).powi(2) - 2.0 * p(x) * (1.0 - p(x)) * x) as f32;
        let weights = log_probs.log_probs.iter().map(|&x| weight(f64::from(x))).collect();
        BatchLoss { sum, weights, metrics: Vec::new() }
    }
}

/// The loss of all rows at parameters moved by `step` along `direction`.
fn moved_loss(golden: &Golden, model: &mut CausalLm, direction: &[f32], step: f64) -> f64 {
    let start = model.params().all_values();
    let moved = start.iter().zip(direction).map(|(x, d)| (f64::from(*x) + step * f64::from(*d)) as f32).collect();
    model.params_mut().set_all_values(moved);
    let batch = golden.packed();
    let log_probs = model.log_probs(&batch).expect("golden rows fit").values();
    let loss = Focal.loss(&batch, &log_probs, None, &StepTerms::default()).sum / batch.counted() as f64;
    model.params_mut().set_all_values(start);
    loss
}

#[test]
fn gradients_of_an_objective_are_its_slope() {
    let golden = Golden::open("qwen3-untied-sharded");
    let mut model = golden.load_full();
    let batch = golden.packed();
    let mut grads = model.params().zero_grads();
    let scale = 1.0 / batch.counted() as f32;
    model.objective_backward(&Focal, &batch, &StepTerms::default(), scale, &mut grads, None).expect("golden rows fit");
    let gradient = grads.all_values();
    let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let direction: Vec<f32> = gradient.iter().map(|&g| (f64::from(g) / norm) as f32).collect();
    let step = 1e-2;
    let rise = moved_loss(&golden, &mut model, &direction, step) - moved_loss(&golden, &mut model, &direction, -step);
    let slope = rise / (2.0 * step);
    println!("the slope is off by {:.1e}", slope / norm - 1.0);
    assert!((slope / norm - 1.0).abs() < 1e-3, "the slope along the gradient is {slope}, its norm {norm}");
}

#[test]
fn objectives_are_applied_in_the_backward() {
    let golden = Golden::open("qwen3-untied-sharded");
    let batch = golden.packed();
    for objective in [&Focal as &dyn Objective, &Sft] {
        let step = |optimizer_in_bwd: bool| {
            let mut model = golden.load_full();
            model.set_gradient_checkpointing(GradientCheckpointing::Block);
            let config = SftConfig { optimizer_in_bwd, max_grad_norm: 0.0, ..SftConfig::default() };
            let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 1).expect("all is trained");
            let batch = core::slice::from_ref(&batch);
            let losses = [(); 3].map(|()| optimizer.step(&mut model, objective, batch, 1e-3).expect("it fits").loss);
            (losses, model.params().all_values())
        };
        let (together, layer_by_layer) = (step(false), step(true));
        assert!(together == layer_by_layer, "{objective:?}: {:?}, {:?}", together.0, layer_by_layer.0);
        assert!(together.0[2] < together.0[0]);
    }
}

#[test]
fn a_reference_model_needs_an_adapter_beside_an_unchanged_base() {
    let golden = Golden::open("qwen3-tied");
    let batch = golden.batch(&[0, 2]);
    let error = |model: &CausalLm| {
        let mut grads = model.params().zero_grads();
        let failed = model.objective_backward(&Dpo::default(), &batch, &StepTerms::default(), 1.0, &mut grads, None);
        failed.expect_err("there is no reference model").to_string()
    };
    let text = error(&golden.load_full());
    assert!(text.contains("this model has no adapter; train an adapter instead of all weights"), "{text}");
    let mut model = golden.load();
    let lora = LoraConfig::new(3).init_lora_weights(rekindle_lora::InitLoraWeights::Olora);
    model.add_adapter(&lora).expect("a valid configuration");
    let text = error(&model);
    assert!(text.contains("subtracted its initial B·A from the base"), "{text}");
}

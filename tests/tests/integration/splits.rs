//! Tests that splitting an optimizer step into micro-batches changes nothing, and that steps are reproducible.

use rekindle_data::{Dataset, EncodeOptions, Packs};
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, GradientCheckpointing, Sft, StepKey};
use rekindle_tests::{Golden, relative_distance};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig, StepMetrics, Trainer};

/// The seven rows packed, one by one, in groups, and in other orders.
const SPLITS: [&[&[usize]]; 6] = [
    &[&[0], &[1], &[2], &[3], &[4], &[5], &[6]],
    &[&[0, 1, 2], &[3, 4, 5, 6]],
    &[&[6, 5, 4, 3, 2, 1, 0]],
    &[&[3, 0], &[6], &[5, 1, 4], &[2]],
    &[&[2], &[4, 6, 1], &[0, 5, 3]],
    &[&[1, 2, 3, 4, 5], &[0, 6]],
];

/// The documented tolerance. A token's part of the gradient has the same bits in any batch (except for rows with a
/// single label, whose logits are a matrix–vector product); only the order of summing up to 200 f32 terms differs.
const TOLERANCE: f64 = 1e-6;

const KEY: StepKey = StepKey { seed: 7, step: 3, neftune_noise_alpha: 0.0 };

/// Returns the sum of nll and the gradient of the mean loss over all rows, computed in these micro-batches.
fn gradient(golden: &Golden, model: &CausalLm, split: &[&[usize]], key: Option<StepKey>) -> (f64, Vec<f32>) {
    let scale = 1.0 / golden.packed().counted() as f32;
    let mut grads = model.params().zero_grads();
    let mut total = 0.0;
    for rows in split {
        total += model.forward_backward(&golden.batch(rows), scale, &mut grads, key).expect("golden rows fit").sum();
    }
    (total, grads.all_values())
}

fn check_splits(what: &str, golden: &Golden, model: &CausalLm, key: Option<StepKey>) {
    let (loss, whole) = gradient(golden, model, &[&[0, 1, 2, 3, 4, 5, 6]], key);
    assert!(whole.iter().any(|&g| g != 0.0), "{what}: the gradient is not zero");
    for split in SPLITS {
        let (part_loss, parts) = gradient(golden, model, split, key);
        let error = relative_distance(&parts, &whole);
        println!("{what}, {split:?}: {error:.1e}");
        assert!(error <= TOLERANCE, "{what}: {split:?} changes the gradient by {error:e} of its norm");
        assert!(
            (part_loss / loss - 1.0).abs() <= TOLERANCE,
            "{what}: {split:?} changes the loss from {loss} to {part_loss}"
        );
    }
}

/// Returns a model with a new adapter on all seven linears and the factors of the golden one, whose B is not zero.
fn adapted(golden: &Golden, change: impl FnOnce(LoraConfig) -> LoraConfig) -> CausalLm {
    let source = golden.load_adapted("all-linear");
    let lora = source.lora().expect("it was just loaded");
    let mut model = golden.load();
    model.add_adapter(&change(LoraConfig::new(lora.r).lora_alpha(lora.lora_alpha))).expect("a valid configuration");
    assert_eq!(model.params().infos(), source.params().infos());
    model.params_mut().set_all_values(source.params().all_values());
    model
}

#[test]
fn the_gradient_of_an_adapter_does_not_depend_on_the_split() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        check_splits(&format!("{name}, adapter"), &golden, &golden.load_adapted("all-linear"), None);
    }
}

#[test]
fn the_gradient_of_all_weights_does_not_depend_on_the_split() {
    for name in ["qwen3-tied", "qwen3-untied-sharded", "llama-bias"] {
        let golden = Golden::open(name);
        check_splits(&format!("{name}, full"), &golden, &golden.load_full(), None);
    }
}

/// Uses packs of every capacity, in micro-batches of one to three packs.
#[test]
fn the_gradient_does_not_depend_on_packing() {
    let golden = Golden::open("qwen3-tied");
    let model = adapted(&golden, |config| config.lora_dropout(0.2));
    let lengths: Vec<usize> = golden.rows.iter().map(|row| row.input_ids.len()).collect();
    let total: usize = lengths.iter().sum();
    let (_, whole) = gradient(&golden, &model, &[&[0, 1, 2, 3, 4, 5, 6]], Some(KEY));
    let mut counts = Vec::new();
    for capacity in [75, 90, 120, total] {
        let packs = Packs::best_fit(lengths.iter().copied(), capacity);
        counts.push(packs.len());
        for size in 1..=3 {
            let packs: Vec<&[usize]> = packs.iter().collect();
            let batches: Vec<Vec<usize>> = packs.chunks(size).map(|batch| batch.concat()).collect();
            let batches: Vec<&[usize]> = batches.iter().map(Vec::as_slice).collect();
            let error = relative_distance(&gradient(&golden, &model, &batches, Some(KEY)).1, &whole);
            assert!(error <= TOLERANCE, "{batches:?} changes the gradient by {error:e} of its norm");
        }
    }
    assert_eq!(counts, [3, 3, 2, 1], "number of packs for each capacity");
}

/// Compares a trainer step over all rows one by one, accumulated, and packed.
#[test]
fn a_trainer_step_does_not_depend_on_packing() {
    let golden = Golden::open("qwen2");
    let options = EncodeOptions { max_seq_length: 128, ..EncodeOptions::default() };
    let step = |packing, per_device_train_batch_size, gradient_accumulation_steps| -> StepMetrics {
        let (dataset, _) = Dataset::load(&golden.dir.join("rows.jsonl"), None, &options).expect("golden rows load");
        let config = SftConfig {
            packing,
            per_device_train_batch_size,
            gradient_accumulation_steps,
            max_steps: Some(1),
            ..SftConfig::default()
        };
        let mut model = golden.load_adapted("all-linear");
        let report = Trainer::new(&mut model, dataset, config).train().expect("a step");
        report.steps[0].clone()
    };
    let packs = Packs::best_fit(golden.rows.iter().map(|row| row.input_ids.len()), 128).len();
    assert!(packs > 1 && packs < 7, "{packs} packs");
    let single = step(false, 7, 1);
    for other in [step(false, 1, 7), step(true, packs, 1), step(true, 1, packs)] {
        assert_eq!((other.tokens, other.trained_tokens), (single.tokens, single.trained_tokens), "the same rows");
        for (a, b) in [(other.loss, single.loss), (other.grad_norm, single.grad_norm)] {
            assert!((a / b - 1.0).abs() <= TOLERANCE, "{a} is not {b}");
        }
        assert_eq!(other.epoch, 1.0);
    }
}

/// The content of one document in a pack does not affect the others.
#[test]
fn packed_documents_do_not_attend_to_each_other() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        let model = golden.load_adapted("all-linear");
        let batch = golden.packed();
        let before = model.nll(&batch).expect("golden rows fit");
        for (changed, range) in batch.documents().enumerate() {
            let mut other = batch.clone();
            for id in &mut other.input_ids[range.clone()] {
                *id = (*id + 17) % 100;
            }
            let after = model.nll(&other).expect("golden rows fit");
            for (document, range) in batch.documents().enumerate() {
                let same = before[range.clone()].iter().zip(&after[range]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert_eq!(same, document != changed, "{name}: {changed} was changed, {document} looked at");
            }
        }
    }
}

#[test]
fn the_dropout_mask_does_not_depend_on_the_split() {
    let golden = Golden::open("qwen2");
    let model = adapted(&golden, |config| config.lora_dropout(0.3));
    check_splits("qwen2, dropout", &golden, &model, Some(KEY));
}

#[test]
fn dropout_applies_only_in_training_and_changes_with_the_step() {
    let golden = Golden::open("qwen3-tied");
    let (dry, dropping) = (adapted(&golden, |c| c), adapted(&golden, |c| c.lora_dropout(0.3)));
    let batch = golden.packed();
    let nll = |model: &CausalLm| model.nll(&batch).expect("golden rows fit");
    assert_eq!(nll(&dry), nll(&dropping), "the factors are equal and there is no dropout outside training");
    let all: &[&[usize]] = &[&[0, 1, 2, 3, 4, 5, 6]];
    let of = |model, key| gradient(&golden, model, all, key);
    assert_eq!(of(&dry, Some(KEY)), of(&dropping, None), "without a key there is no dropout");
    let base = of(&dropping, None).1;
    let keys = [KEY, StepKey { step: 4, ..KEY }, StepKey { seed: 8, ..KEY }];
    let [one, later, reseeded] = keys.map(|key| of(&dropping, Some(key)).1);
    for (a, b) in [(&one, &base), (&one, &later), (&one, &reseeded)] {
        assert!(relative_distance(a, b) > 1e-2, "different masks give different gradients");
    }
}

#[test]
fn embedding_noise_does_not_depend_on_the_split_and_changes_with_the_step() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load_adapted("all-linear");
    let noisy = StepKey { neftune_noise_alpha: 5.0, ..KEY };
    check_splits("qwen3-tied, NEFTune", &golden, &model, Some(noisy));
    let of = |key| gradient(&golden, &model, SPLITS[1], key);
    assert_eq!(of(Some(KEY)), of(None), "an alpha of 0 adds no noise");
    let keys = [KEY, noisy, StepKey { step: 4, ..noisy }, StepKey { seed: 8, ..noisy }];
    let [base, one, later, reseeded] = keys.map(|key| of(Some(key)).1);
    for (a, b) in [(&one, &base), (&one, &later), (&one, &reseeded)] {
        assert!(relative_distance(a, b) > 1e-3, "different noise gives different gradients");
    }
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        for key in [None, Some(KEY), Some(StepKey { neftune_noise_alpha: 5.0, ..KEY })] {
            let of = |recompute| {
                let mut model = adapted(&golden, |c| c.lora_dropout(0.1));
                model.set_gradient_checkpointing(GradientCheckpointing::from(recompute));
                gradient(&golden, &model, SPLITS[1], key)
            };
            assert_eq!(of(true), of(false), "{name}");
        }
    }
}

#[test]
fn recomputation_in_full_finetuning_gives_the_same_bits() {
    for name in ["qwen3-tied", "qwen2", "llama-bias"] {
        let golden = Golden::open(name);
        let of = |recompute: bool| {
            let mut model = golden.load_full();
            model.set_gradient_checkpointing(recompute.into());
            assert_eq!(model.gradient_checkpointing().recomputes(), recompute);
            gradient(&golden, &model, SPLITS[1], None)
        };
        assert_eq!(of(true), of(false), "{name}");
    }
}

#[test]
fn gradient_checkpointing_is_the_models_whichever_adapter_is_active() {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    model.set_gradient_checkpointing(GradientCheckpointing::Host);
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    assert_eq!(model.gradient_checkpointing(), GradientCheckpointing::Host);
    model.set_gradient_checkpointing(GradientCheckpointing::Block);
    assert_eq!(model.gradient_checkpointing(), GradientCheckpointing::Block);
}

#[test]
fn repeated_steps_give_the_same_bits() {
    for name in ["qwen3-tied", "llama3"] {
        let golden = Golden::open(name);
        let of = |model: CausalLm| gradient(&golden, &model, SPLITS[3], Some(KEY));
        let lora = || adapted(&golden, |c| c.lora_dropout(0.1));
        assert_eq!(of(lora()), of(lora()), "{name}");
        assert_eq!(of(golden.load_full()), of(golden.load_full()), "{name}");
    }
}

#[test]
fn repeated_runs_give_the_same_bits() {
    let golden = Golden::open("qwen2");
    let run = |mut model: CausalLm, seed| {
        let mut optimizer =
            Optimizer::new(&model, OptimizerConfig::from(&SftConfig::default()), seed).expect("it is trained");
        let before = model.params().all_values();
        let batches: Vec<_> = SPLITS[3].iter().map(|rows| golden.batch(rows)).collect();
        let steps =
            [1e-3, 2e-3, 1e-3].map(|lr| optimizer.step(&mut model, &Sft, &batches, lr).expect("golden rows fit"));
        let after = model.params().all_values();
        assert!(relative_distance(&after, &before) > 1e-3, "the run changes the parameters");
        (steps, after)
    };
    let lora = || adapted(&golden, |c| c.lora_dropout(0.1));
    assert_eq!(run(lora(), 1), run(lora(), 1));
    assert_ne!(run(lora(), 1).1, run(lora(), 2).1, "the seed determines dropout");
    assert_eq!(run(golden.load_full(), 1), run(golden.load_full(), 1));
}

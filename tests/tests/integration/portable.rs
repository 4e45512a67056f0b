//! Tests of the portable operations: equal losses in f32, and the error of bfloat16.

use rekindle_kernels::Backend;
use rekindle_models::{Batch, CausalLm};
use rekindle_tests::{Golden, MODELS, RowLosses, assert_nll, relative_distance};

#[test]
fn every_model_gives_the_losses_of_transformers() {
    for name in MODELS {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let nll = Backend::portable_only(|| golden.load().nll(&batch)).expect("golden rows fit");
        assert_nll(&format!("{name}, portable"), &batch, &nll, &golden.base_losses());
    }
}

#[test]
fn both_paths_give_the_same_gradient() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        for (kind, model) in [("adapter", golden.load_adapted("all-linear")), ("full", golden.load_full())] {
            let gradient = || gradient(&model, &golden.packed());
            let (cpu, portable) = (gradient(), Backend::portable_only(gradient));
            let error = relative_distance(&portable, &cpu);
            println!("{name}, {kind}: paths differ by {error:.1e}");
            // Each path is within 1.4e-6 of the float64 gradient, like the naive computation in f32 (see `gradients`).
            assert!(error <= 2.8e-6, "{name}, {kind}: {error:e}");
        }
    }
}

/// bfloat16 has 8 significant bits; the resulting error of a loss depends on the model. The bounds come from torch's
/// own bfloat16 result for the same rows: twice the largest error of a token, and twice that of a row's sum.
#[test]
fn bfloat16_is_as_close_as_torch_is() {
    let golden = Golden::open("qwen3-tied");
    let model = golden.load_with(|options| options.dtype = rekindle_kernels::DType::BF16);
    let (truth, torch) = (golden.base_losses(), RowLosses::list(&golden.expect["bf16"]["rows"]));
    let ours = losses(&model, &golden.packed());
    let (tokens, sums) = furthest(&torch, &truth);
    let (our_tokens, our_sums) = furthest(&ours, &truth);
    println!("bf16, tokens: torch {tokens:.3}, ours {our_tokens:.3}; sums: torch {sums:.3}, ours {our_sums:.3}");
    assert!(our_tokens <= 2.0 * tokens, "largest error of a token: {our_tokens}, torch: {tokens}");
    assert!(our_sums <= 2.0 * sums, "largest error of a row's sum: {our_sums}, torch: {sums}");
    assert!(our_tokens > 1e-4, "the error of bfloat16 is visible");
}

/// Returns the largest |Δnll| of a token, and of a row's sum.
fn furthest(got: &[RowLosses], truth: &[RowLosses]) -> (f64, f64) {
    let tokens = got.iter().zip(truth).flat_map(|(g, t)| g.nll.iter().zip(&t.nll));
    let token = tokens.map(|(g, t)| (g - t).abs()).fold(0.0, f64::max);
    (token, got.iter().zip(truth).map(|(g, t)| (g.sum - t.sum).abs()).fold(0.0, f64::max))
}

fn losses(model: &CausalLm, batch: &Batch) -> Vec<RowLosses> {
    let nll = model.nll(batch).expect("golden rows fit");
    let row = |document: core::ops::Range<usize>| {
        let counted = document.filter(|&i| batch.targets[i] != rekindle_models::IGNORED);
        let nll: Vec<f64> = counted.map(|i| f64::from(nll[i])).collect();
        RowLosses { sum: nll.iter().sum(), nll }
    };
    batch.documents().map(row).collect()
}

fn gradient(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let mut grads = model.params().zero_grads();
    model.forward_backward(batch, 1.0 / batch.counted() as f32, &mut grads, None).expect("golden rows fit");
    grads.all_values()
}

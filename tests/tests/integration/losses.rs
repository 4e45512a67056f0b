//! Compares per-token losses with transformers and PEFT for every way of batching rows.

use rekindle_models::{Batch, CausalLm};
use rekindle_tests::{Golden, MODELS, RowLosses, assert_nll, read_json, worst_nll};
use serde_json::json;

/// The tolerance for packing, which may change the summation order of a row's products. This error is of the same kind
/// as the goldens' spread between two attention implementations (at most 1.5e-6).
const PACKING: f64 = 1.5e-6;

/// Returns all rows at once, one at a time, and all in reverse order.
fn batches(golden: &Golden) -> [(&'static str, Vec<Batch>); 3] {
    let count = golden.rows.len();
    let reversed: Vec<usize> = (0..count).rev().collect();
    [
        ("packed", vec![golden.packed()]),
        ("row by row", (0..count).map(|i| golden.batch(&[i])).collect()),
        ("reversed", vec![golden.batch(&reversed)]),
    ]
}

/// Returns the losses of every row of this batch, in the order of the file.
fn rows_of(batch: &Batch, nll: &[f32]) -> Vec<(u32, Vec<f32>)> {
    batch.documents().zip(&batch.rows).map(|(document, &row)| (row, nll[document].to_vec())).collect()
}

fn check(what: &str, golden: &Golden, model: &CausalLm, expected: &[RowLosses]) {
    let mut ways: Vec<Vec<(u32, Vec<f32>)>> = Vec::new();
    for (how, batches) in batches(golden) {
        let mut rows = Vec::new();
        for batch in &batches {
            let nll = model.nll(batch).expect("golden rows fit");
            assert_nll(&format!("{what}, {how}"), batch, &nll, expected);
            println!("{what}, {how}: off by {:.1e}", worst_nll(batch, &nll, expected));
            rows.extend(rows_of(batch, &nll));
        }
        rows.sort_by_key(|(row, _)| *row);
        assert_eq!(rows.len(), golden.rows.len());
        ways.push(rows);
    }
    let (packed, others) = ways.split_first().expect("three ways");
    for ((row, packed), (_, other)) in others.iter().flat_map(|other| packed.iter().zip(other)) {
        for (i, (a, b)) in packed.iter().zip(other).enumerate() {
            let moved = f64::from((a - b).abs() / a.abs().max(1.0));
            assert!(moved <= PACKING, "{what}, row {row}, token {i}: packing moves the loss from {b} to {a}");
        }
    }
}

#[test]
fn every_model_gives_the_losses_of_transformers() {
    for name in MODELS {
        let golden = Golden::open(name);
        check(name, &golden, &golden.load(), &golden.base_losses());
    }
}

#[test]
fn every_adapter_gives_the_losses_of_peft() {
    let mut seen = 0;
    for name in MODELS {
        let golden = Golden::open(name);
        for adapter in golden.adapters() {
            check(
                &format!("{name}/{adapter}"),
                &golden,
                &golden.load_adapted(&adapter),
                &golden.adapter_losses(&adapter),
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 7, "adapters in expect.json");
}

#[test]
fn trainable_and_frozen_weights_give_the_same_losses() {
    for name in MODELS {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let (frozen, trained) = (golden.load().nll(&batch), golden.load_full().nll(&batch));
        assert_eq!(frozen.expect("golden rows fit"), trained.expect("golden rows fit"), "{name}");
    }
}

#[test]
fn forward_backward_returns_the_sum_of_nll() {
    for name in MODELS {
        let golden = Golden::open(name);
        let (model, batch) = (golden.load_full(), golden.packed());
        let listed: f64 = model.nll(&batch).expect("golden rows fit").iter().map(|&x| f64::from(x)).sum();
        let mut grads = model.params().zero_grads();
        let summed = model.forward_backward(&batch, 1.0, &mut grads, None).expect("golden rows fit").sum();
        assert_eq!(listed, summed, "{name}");
    }
}

#[test]
fn both_layouts_of_llama3_scaling_give_the_same_model() {
    let golden = Golden::open("llama3");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let copy = |from: &str, to: &str| std::fs::copy(golden.dir.join(from), dir.path().join(to)).expect("copied");
    copy("config.transformers4.json", "config.json");
    copy("model.safetensors", "model.safetensors");
    let older = Golden { dir: dir.path().to_owned(), ..Golden::open("llama3") };
    let batch = golden.packed();
    let losses = |golden: &Golden| golden.load().nll(&batch).expect("golden rows fit");
    assert_eq!(losses(&older), losses(&golden));
}

/// A reader that ignores the scaling in both layouts would pass the test above, but not this one.
#[test]
fn llama3_scaling_changes_the_losses() {
    let golden = Golden::open("llama3");
    let mut config = read_json(&golden.dir.join("config.json"));
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500.0});
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    std::fs::copy(golden.dir.join("model.safetensors"), dir.path().join("model.safetensors")).expect("copied");
    let plain = Golden { dir: dir.path().to_owned(), ..Golden::open("llama3") };
    let batch = golden.packed();
    let nll = plain.load().nll(&batch).expect("golden rows fit");
    assert!(worst_nll(&batch, &nll, &golden.base_losses()) > 1e-2);
}

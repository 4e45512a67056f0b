//! Compares the gradient of every parameter with Burn's autodiff of a plain implementation of the whole model.

mod oracle;

use oracle::Oracle;
use rekindle_kernels::DType;
use rekindle_models::CausalLm;
use rekindle_tests::Golden;

/// The project's rule for numerical errors: at most twice the error of the naive float32 computation relative to
/// float64. The error is the relative L2 norm; the floor of four units in the last place is for tensors in which the
/// naive computation happens to be more exact.
const FACTOR: f64 = 2.0;
const FLOOR: f64 = 4.0 * f32::EPSILON as f64;

fn check(golden: &Golden, adapter: Option<&str>, model: &CausalLm) {
    let what = format!("{}, {}", golden.name, adapter.unwrap_or("full"));
    let batch = golden.packed();
    let scale = 1.0 / batch.counted() as f64;
    let mut grads = model.params().zero_grads();
    let total = model.forward_backward(&batch, scale as f32, &mut grads, None).expect("golden rows fit").sum();

    let gradients = |dtype| Oracle::new(golden, adapter, dtype).gradients(&golden.rows, scale);
    let ((loss, truth), (_, naive)) = (gradients(DType::F64), gradients(DType::F32));
    // The same tolerance as for the losses against transformers.
    assert!((total * scale / loss - 1.0).abs() < 1e-6, "{what}: loss {}, expected {loss}", total * scale);

    let infos = model.params().infos();
    assert_eq!(infos.len(), truth.len(), "{what}: trained tensors");
    let norm_of_all = norm(truth.values().flatten().copied());
    let mut worst = (0.0, "");
    for info in infos {
        let (truth, naive) = (&truth[&info.name], &naive[&info.name]);
        let ours: Vec<f64> = grads.values(info.at).into_iter().map(f64::from).collect();
        assert_eq!(ours.len(), truth.len(), "{what}: {}", info.name);
        let size = norm(truth.iter().copied());
        assert!(size > 1e-6 * norm_of_all, "{what}: {} has a non-negligible gradient", info.name);
        let (error, naive_error) = (distance(&ours, truth) / size, distance(naive, truth) / size);
        if error / naive_error > worst.0 {
            worst = (error / naive_error, &info.name);
        }
        let bound = FACTOR * naive_error + FLOOR;
        // Written so that NaN fails.
        assert!(error <= bound, "{what}: {} has error {error:e}, bound {bound:e}", info.name);
    }
    println!("{what}: at worst {:.2} times the naive error, at {}", worst.0, worst.1);
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    norm(a.iter().zip(b).map(|(a, b)| a - b))
}

#[test]
fn gradients_of_adapters() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        for adapter in ["all-linear", "qv-rslora"] {
            check(&golden, Some(adapter), &golden.load_adapted(adapter));
        }
    }
}

#[test]
fn gradients_of_all_weights_with_a_tied_head() {
    for name in ["qwen3-tied", "qwen2"] {
        let golden = Golden::open(name);
        check(&golden, None, &golden.load_full());
    }
}

#[test]
fn gradients_of_all_weights_with_an_untied_head() {
    for name in ["qwen3-untied-sharded", "llama3", "llama-bias"] {
        let golden = Golden::open(name);
        check(&golden, None, &golden.load_full());
    }
}

/// Checks the oracle itself, since one with the same mistake as the model would hide it.
#[test]
fn the_oracle_gives_the_losses_of_transformers() {
    for name in rekindle_tests::MODELS {
        let golden = Golden::open(name);
        let losses = Oracle::new(&golden, None, DType::F64).losses(&golden.rows);
        for (got, want) in losses.iter().zip(golden.base_losses()) {
            // transformers computed in f32; its spread against float64 is at most 1.5e-6.
            let off = got.iter().zip(&want.nll).map(|(g, w)| (g - w).abs() / w.max(1.0)).fold(0.0, f64::max);
            assert!(got.len() == want.nll.len() && off < 2e-6, "{name}: off by {off:e}");
        }
    }
}

//! Optimizer steps of transformers and PEFT, and comparison with them.

use std::path::{Path, PathBuf};

use rekindle_hub::Dtype;
use rekindle_models::{Batch, CausalLm, Sft};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig, save_result};
use serde_json::Value;

use crate::{Golden, read_json, relative_distance, tensors};

/// The relative tolerances for a run.
#[derive(Clone, Copy, Debug)]
pub struct Tolerances {
    /// For each step's loss.
    pub loss: f64,
    /// For each step's gradient norm.
    pub grad_norm: f64,
    /// For each saved tensor.
    pub tensors: f64,
}

impl Tolerances {
    /// Those of `f32` on the CPU.
    //
    // Ten times the goldens' own spread over attention implementations, padding and float64 weights (`spread` in
    // trajectory.json: up to 1.5e-7 for losses, 3e-7 for gradient norms, 2e-6 for tensors). Measured: 6e-8, 3e-7, 3e-6.
    // goldens/README.md lists mistakes that are caught even with tolerances at least 50 times wider.
    pub const CPU: Self = Self { loss: 1.5e-6, grad_norm: 3e-6, tensors: 2e-5 };

    /// Returns tolerances multiplied by `factor`.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        let Self { loss, grad_norm, tensors } = self;
        Self { loss: factor * loss, grad_norm: factor * grad_norm, tensors: factor * tensors }
    }
}

/// A run of `trajectory.json`.
#[derive(Debug)]
pub struct Trajectory {
    dir: PathBuf,
    json: Value,
}

impl Trajectory {
    /// Reads the run in `dir`.
    pub fn open(dir: &Path) -> Self {
        Self { json: read_json(&dir.join("trajectory.json")), dir: dir.to_owned() }
    }

    /// Returns the directory name of the trained adapter.
    pub fn adapter(&self) -> Option<&str> {
        self.json["adapter"].as_str().map(|adapter| adapter.trim_start_matches("adapters/"))
    }

    /// Returns the differences of PyTorch's own bf16 run from this one.
    pub fn bf16_spread(&self) -> Tolerances {
        self.spread("bf16.json").expect("a golden with a bf16 run")
    }

    /// Returns the differences of PyTorch's own f16 run with a gradient scaler from this one, if there is such a run.
    pub fn f16_spread(&self) -> Option<Tolerances> {
        self.spread("f16.json")
    }

    fn spread(&self, file: &str) -> Option<Tolerances> {
        let path = self.dir.join(file);
        let spread = path.is_file().then(|| read_json(&path)["spread"].clone())?;
        let of = |key: &str| spread[key].as_f64().expect("a number");
        Some(Tolerances { loss: of("loss"), grad_norm: of("grad_norm"), tensors: of("final") })
    }

    /// Trains `model` as specified by the run and compares every step and the saved tensors.
    pub fn check(&self, what: &str, golden: &Golden, model: &mut CausalLm, tensors_file: &str) {
        self.check_within(Tolerances::CPU, what, golden, model, tensors_file);
    }

    /// Works like [`check`](Self::check) with tolerances other than those of `f32` on the CPU.
    pub fn check_within(
        &self,
        tolerances: Tolerances,
        what: &str,
        golden: &Golden,
        model: &mut CausalLm,
        tensors_file: &str,
    ) {
        train(tolerances, what, golden, model, &self.json);
        compare(tolerances, what, model, &self.dir, tensors_file);
    }
}

fn compare(tolerances: Tolerances, what: &str, model: &CausalLm, dir: &Path, tensors_file: &str) {
    let out = tempfile::tempdir().expect("a temporary directory");
    let saved = out.path().join("result");
    save_result(model, &saved, &[], Dtype::F32).expect("the disk has space");
    let (got, want) = (tensors(&saved.join(tensors_file)), tensors(&dir.join("final.safetensors")));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    let mut worst = 0.0f64;
    for ((key, (shape, got)), (want_shape, want)) in got.iter().zip(want.values()) {
        assert_eq!(shape, want_shape, "{key}");
        let error = relative_distance(got, want);
        worst = worst.max(error);
        assert!(error <= tolerances.tensors, "{what}: {key} is off by {error:e}");
    }
    println!("{what}: tensors off by {worst:.1e}");
}

fn train(tolerances: Tolerances, what: &str, golden: &Golden, model: &mut CausalLm, trajectory: &Value) {
    let run = &trajectory["run"];
    let float = |value: &Value| value.as_f64().expect("a number");
    let size = |value: &Value| value.as_u64().expect("a count") as usize;
    let config = SftConfig {
        adam_beta1: float(&run["adam_beta1"]),
        adam_beta2: float(&run["adam_beta2"]),
        adam_epsilon: float(&run["adam_epsilon"]),
        weight_decay: float(&run["weight_decay"]),
        max_grad_norm: float(&run["max_grad_norm"]),
        lr_scheduler_type: serde_json::from_value(run["lr_scheduler_type"].clone()).expect("a known schedule"),
        warmup_steps: size(&run["warmup_steps"]).into(),
        ..SftConfig::default()
    };
    let mut optimizer = Optimizer::new(model, OptimizerConfig::from(&config), 0).expect("something is trained");
    let steps = trajectory["steps"].as_array().expect("a list of steps");
    assert_eq!(steps.len(), size(&run["max_steps"]));
    let peak = float(&run["learning_rate"]);
    let schedule = config.schedule(peak, steps.len()).expect("a schedule without arguments");
    for (number, expected) in steps.iter().enumerate() {
        let micro_batches = expected["rows"].as_array().expect("rows by micro-batch");
        let batches: Vec<Batch> = micro_batches
            .iter()
            .map(|rows| golden.batch(&rows.as_array().expect("rows").iter().map(&size).collect::<Vec<_>>()))
            .collect();
        let lr = peak * schedule.factor(number);
        let want_lr = float(&expected["learning_rate"]);
        assert!((lr - want_lr).abs() <= 1e-12 * want_lr, "step {}: learning rate {lr}, not {want_lr}", number + 1);
        let result = optimizer.step(model, &Sft, &batches, lr).expect("golden rows fit");
        assert_eq!(result.counted, size(&expected["tokens"]));
        for (part, got, tolerance) in
            [("loss", result.loss, tolerances.loss), ("grad_norm", result.grad_norm, tolerances.grad_norm)]
        {
            let want = float(&expected[part]);
            let error = (got / want - 1.0).abs();
            println!("{what}: step {} {part} off by {error:.1e}", number + 1);
            assert!(error <= tolerance, "{what}: step {} {part} is {got}, not {want}: off by {error:e}", number + 1);
        }
    }
}

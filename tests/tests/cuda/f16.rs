//! Optimizer steps in f16.

use rekindle_kernels::{DType, Device};
use rekindle_models::{CausalLm, GradientCheckpointing, Sft};
use rekindle_tests::{Golden, Trajectory};
use rekindle_train::{LossScaler, Optimizer, OptimizerConfig, SftConfig};

use super::{ADAPTER, cuda, families};

fn load(device: &Device, golden: &Golden, adapter: Option<&str>) -> CausalLm {
    let mut model = golden.load_with(|options| {
        options.device = device.clone();
        options.dtype = DType::F16;
        options.full_finetuning = adapter.is_none();
    });
    if let Some(adapter) = adapter {
        model.load_adapter(&golden.dir.join("adapters").join(adapter)).expect("a golden adapter loads");
    }
    model
}

/// The difference from the f32 run must be at most twice that of PyTorch's own f16 run on the CPU.
pub(super) fn steps(device: &Device) {
    for (name, run) in [
        ("qwen3-tied", "lora"),
        ("llama3", "lora-fresh"),
        ("quantized/qwen3-tied-nf4-double", "lora"),
        ("families/olmo2", "full"),
    ] {
        let golden = Golden::open(name);
        let trajectory = Trajectory::open(&golden.dir.join("train").join(run));
        let mut model = load(device, &golden, trajectory.adapter());
        let file = if trajectory.adapter().is_some() { ADAPTER } else { "model.safetensors" };
        let bound = trajectory.f16_spread().expect("an f16 run").times(2.0);
        trajectory.check_within(bound, &format!("{name}/{run} in f16"), &golden, &mut model, file);
    }
}

pub(super) fn family_steps(device: &Device) {
    cuda(device).set_deterministic(true);
    let mut checked = 0;
    for golden in families() {
        let trajectory = Trajectory::open(&golden.dir.join("train/lora"));
        let Some(spread) = trajectory.f16_spread() else { continue };
        checked += 1;
        let batch = golden.packed();
        let mut model = load(device, &golden, Some("all-linear"));
        let gradients = |model: &CausalLm| {
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 64.0, &mut grads, None).expect("golden rows fit").sum();
            grads.all_values()
        };
        let whole = gradients(&model);
        for recomputed in [GradientCheckpointing::Block, GradientCheckpointing::Host] {
            model.set_gradient_checkpointing(recomputed);
            assert!(gradients(&model) == whole, "{}, {recomputed:?}", golden.name);
        }
        let what = format!("{}/lora in f16", golden.name);
        trajectory.check_within(spread.times(2.0), &what, &golden, &mut model, ADAPTER);
    }
    assert!(checked >= 10, "{checked} families have goldens of f16");
    cuda(device).set_deterministic(false);
}

/// A step at a scale that overflows changes nothing but the scale, until a step fits.
pub(super) fn overflow(device: &Device) {
    let golden = Golden::open("qwen3-tied");
    let batch = golden.packed();
    let mut model = load(device, &golden, Some("all-linear"));
    let before = model.params().all_values();
    let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&SftConfig::default()), 0).expect("trainable");
    optimizer.set_loss_scaler(LossScaler::new(f64::powi(2.0, 60)));
    let mut skipped = 0;
    loop {
        let step = optimizer.step(&mut model, &Sft, core::slice::from_ref(&batch), 1e-3).expect("golden rows fit");
        assert!(step.loss.is_finite());
        if step.grad_norm.is_finite() {
            break;
        }
        skipped += 1;
        assert!(model.params().all_values() == before, "a skipped step changes no parameter");
    }
    let scaler = optimizer.loss_scaler().expect("a model in f16");
    println!("f16: {skipped} steps skipped, then the scale is {:e}", scaler.scale());
    assert_eq!(
        (scaler.skipped(), scaler.scale(), optimizer.steps()),
        (skipped, f64::powi(2.0, 60 - skipped as i32), 1)
    );
    assert!(skipped > 0 && model.params().all_values() != before);
}

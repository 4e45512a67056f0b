//! Families on CUDA: optimizer steps, the auxiliary loss of routers, and quantized weights.

use rekindle_kernels::Device;
use rekindle_models::{CausalLm, GenerationConfig, LoadIn};
use rekindle_tests::{Golden, Trajectory, read_json, relative_distance, tensors};

use super::{ADAPTER, CUDA_F32, families, on};

/// Bound of gradients on CUDA, in L2 norm.
const GRADIENTS: f64 = 1e-4;

/// Every family over NF4 as on the CPU: losses, greedy tokens, gradients of an adapter.
pub(super) fn quantized(device: &Device) {
    for golden in families() {
        let load = |device: &Device| -> CausalLm {
            golden.load_with(|options| {
                options.device = device.clone();
                options.load_in = Some(LoadIn::FourBit(None));
            })
        };
        let batch = golden.packed();
        let [mut ours, mut cpu] = [device, &Device::cpu()].map(load);
        let [got, want] = [&ours, &cpu].map(|model| model.nll(&batch).expect("golden rows fit"));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-4 * want.abs().max(1.0), "{}: {got} is not {want}", golden.name);
        }
        let prompt: Vec<u32> = serde_json::from_value(golden.expect["generate"][0]["prompt"].clone()).expect("ids");
        let config = GenerationConfig { max_new_tokens: 8, ..GenerationConfig::default() };
        let [got, want] =
            [&ours, &cpu].map(|model| model.generate(&prompt, &config, |_| true).expect("the prompt fits").0);
        assert_eq!(got, want, "{}", golden.name);
        let gradients = [&mut ours, &mut cpu].map(|model| {
            model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 1.0, &mut grads, None).expect("golden rows fit").sum();
            grads.all_values()
        });
        let error = relative_distance(&gradients[0], &gradients[1]);
        assert!(error <= GRADIENTS, "{}: the gradients differ by {error:e}", golden.name);
    }
}

/// Against transformers: the loss alone, and its gradients.
pub(super) fn router_losses(device: &Device) {
    let mixtures: Vec<Golden> = families().into_iter().filter(|golden| golden.dir.join("router").exists()).collect();
    assert!(!mixtures.is_empty(), "there are mixtures");
    for golden in mixtures {
        let (batch, router) = (golden.packed(), golden.dir.join("router"));
        let mut model = golden.load_with(|options| {
            options.device = device.clone();
            options.full_finetuning = true;
        });
        model.set_router_aux_loss(1.0 / batch.tokens() as f32);
        let loss = model.forward(&batch, None).expect("golden rows fit").router_loss().expect("it is on");
        let want = read_json(&router.join("aux.json"))["aux_loss"].as_f64().expect("a number");
        let off = (loss.sum / loss.count as f64 / want - 1.0).abs();
        assert!(off <= 1e-5, "{}: the loss is off by {off:e}", golden.name);
        let mut grads = model.params().zero_grads();
        model.forward_backward(&batch, 0.0, &mut grads, None).expect("golden rows fit");
        for (name, (_, want)) in &tensors(&router.join("gradients.safetensors")) {
            let info = model.params().infos().iter().find(|info| info.name == *name).expect("a parameter");
            let error = relative_distance(&grads.values(info.at), want);
            assert!(error <= GRADIENTS, "{}: the gradient of {name} differs by {error:e}", golden.name);
        }
    }
}

/// Twelve optimizer steps of every family have the losses and the adapter of transformers and PEFT.
pub(super) fn steps(device: &Device) {
    for golden in families() {
        let trajectory = Trajectory::open(&golden.dir.join("train/lora"));
        let mut model = on(device, &golden);
        model.load_adapter(&golden.dir.join("adapters/all-linear")).expect("a golden adapter loads");
        trajectory.check_within(CUDA_F32, &format!("{}/lora", golden.name), &golden, &mut model, ADAPTER);
    }
}

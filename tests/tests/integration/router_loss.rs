//! The auxiliary loss of mixtures against transformers, in `goldens/families/*/router`.

use rekindle_kernels::Backend;
use rekindle_models::{Batch, CausalLm, GradientCheckpointing, Sft};
use rekindle_tests::{Golden, read_json, relative_distance, tensors};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};

/// Bound of the loss and of gradients against transformers, relative. Measured: at most 5e-7 and 3e-6.
const BOUND: f64 = 1e-5;

fn mixtures() -> Vec<Golden> {
    let all: Vec<Golden> =
        Golden::families().into_iter().filter(|golden| golden.dir.join("router/aux.json").exists()).collect();
    assert!(all.len() >= 6, "{} mixtures", all.len());
    all
}

fn aux_loss(model: &CausalLm, batch: &Batch) -> f64 {
    let metric = model.forward(batch, None).expect("golden rows fit").router_loss().expect("it is on");
    metric.sum / metric.count as f64
}

/// The gradient of `nll` times the summed loss and of the auxiliary loss that is set.
fn gradient(model: &CausalLm, batch: &Batch, nll: f32) -> rekindle_kernels::Grads {
    let mut grads = model.params().zero_grads();
    model.forward_backward(batch, nll, &mut grads, None).expect("golden rows fit");
    grads
}

#[test]
fn the_loss_and_its_gradients_are_those_of_transformers() {
    for golden in mixtures() {
        for portable in [false, true] {
            let compare = || {
                let (mut model, batch) = (golden.load_full(), golden.packed());
                assert!(model.forward(&batch, None).expect("golden rows fit").router_loss().is_none(), "off");
                model.set_router_aux_loss(1.0 / batch.tokens() as f32);
                let want = read_json(&golden.dir.join("router/aux.json"))["aux_loss"].as_f64().expect("a number");
                let off = (aux_loss(&model, &batch) / want - 1.0).abs();
                assert!(off <= BOUND, "{}: the loss is off by {off:e}", golden.name);
                let grads = gradient(&model, &batch, 0.0);
                let mut worst = 0.0f64;
                let expected = tensors(&golden.dir.join("router/gradients.safetensors"));
                for (name, (_, want)) in &expected {
                    let info = model.params().infos().iter().find(|info| info.name == *name).expect("a parameter");
                    worst = worst.max(relative_distance(&grads.values(info.at), want));
                    assert!(worst <= BOUND, "{}: the gradient of {name} is off by {worst:e}", golden.name);
                }
                println!("{}, portable {portable}: off by {off:.1e}, gradients by {worst:.1e}", golden.name);
            };
            if portable { Backend::portable_only(compare) } else { compare() }
        }
    }
}

/// Both terms add up, recomputed or not, and a frozen router passes its gradient to the adapters below.
#[test]
fn it_adds_to_the_gradient_of_the_loss() {
    for golden in mixtures() {
        for mut model in [golden.load_adapted("all-linear"), golden.load_full()] {
            let batch = golden.packed();
            let plain = gradient(&model, &batch, 0.01).all_values();
            model.set_router_aux_loss(0.5 / batch.tokens() as f32);
            let [alone, both] = [0.0, 0.01].map(|nll| gradient(&model, &batch, nll).all_values());
            assert!(alone.iter().any(|&x| x != 0.0), "{}", golden.name);
            let sum: Vec<f32> = plain.iter().zip(&alone).map(|(a, b)| a + b).collect();
            let error = relative_distance(&both, &sum);
            assert!(error <= BOUND, "{}: off by {error:e}", golden.name);
            model.set_gradient_checkpointing(GradientCheckpointing::Block);
            assert!(gradient(&model, &batch, 0.01).all_values() == both, "{}: recomputed", golden.name);
        }
    }
}

/// A step reports the mean over the tokens of its micro-batches, and its loss has the coefficient times that.
#[test]
fn a_step_reports_it_and_adds_it_to_the_loss() {
    let golden = Golden::open("families/mixtral");
    let batches = [golden.batch(&[0, 1]), golden.batch(&[2])];
    let step = |router_aux_loss_coef: f64, optimizer_in_bwd: bool, batches: &[Batch]| {
        let mut model = golden.load_full();
        let config = SftConfig { router_aux_loss_coef, optimizer_in_bwd, ..SftConfig::default() };
        let mut optimizer = Optimizer::new(&model, OptimizerConfig::from(&config), 1).expect("all is trained");
        (optimizer.step(&mut model, &Sft, batches, 1e-3).expect("golden rows fit"), model.params().all_values())
    };
    let (plain, before) = step(0.0, false, &batches);
    let (with, after) = step(0.02, false, &batches);
    assert!(plain.metrics.is_empty() && before != after);
    let mut model = golden.load_full();
    model.set_router_aux_loss(1.0);
    let sums = batches.each_ref().map(|batch| aux_loss(&model, batch) * batch.tokens() as f64);
    let mean = sums.iter().sum::<f64>() / batches.iter().map(Batch::tokens).sum::<usize>() as f64;
    let [(name, reported)] = with.metrics[..] else { panic!("{:?}", with.metrics) };
    assert_eq!(name, "aux_loss");
    assert!((reported - mean).abs() < 1e-12, "{reported} is not {mean}");
    assert!((with.loss - plain.loss - 0.02 * mean).abs() < 1e-12, "{} and {}", with.loss, plain.loss);

    let one = [golden.packed()];
    let ((late, _), (early, _)) = (step(0.02, false, &one), step(0.02, true, &one));
    assert_eq!((late.loss, late.metrics), (early.loss, early.metrics), "updated in the backward");
}

#[test]
fn it_is_refused_for_a_model_without_experts() {
    let golden = Golden::open("qwen3-tied");
    let config = OptimizerConfig::from(&SftConfig { router_aux_loss_coef: 0.01, ..SftConfig::default() });
    let error = Optimizer::new(&golden.load_full(), config, 1).expect_err("it is dense").to_string();
    assert!(error.contains("router_aux_loss_coef balances the experts of a mixture"), "{error}");
    let mut model = golden.load_full();
    model.set_router_aux_loss(1.0);
    assert!(model.forward(&golden.packed(), None).expect("golden rows fit").router_loss().is_none());
}

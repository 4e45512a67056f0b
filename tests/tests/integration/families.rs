//! Every family in `goldens/families` against transformers and PEFT: losses, gradients, greedy tokens, trajectories, and
//! what holds for any model: packing, recomputation, the base beside its adapter, saving and quantizing.

use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::Device;
use rekindle_lora::LoraConfig;
use rekindle_models::{
    Batch, CausalLm, GenerationConfig, GradientCheckpointing, LoadIn, LoadOptions, MergeOptions, quantize,
};
use rekindle_tests::{Golden, Tolerances, Trajectory, assert_nll, relative_distance, tensors, worst_nll};
use serde_json::Value;

/// Bound of a gradient against transformers, in L2 norm. Measured: at most 7.2e-6.
const GRADIENT: f64 = 1e-5;

fn nll(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    model.nll(batch).expect("golden rows fit")
}

#[test]
fn losses_are_those_of_transformers_and_peft() {
    for golden in Golden::families() {
        for (what, model, expected) in [
            ("base", golden.load(), golden.base_losses()),
            ("adapted", golden.load_adapted("all-linear"), golden.adapter_losses("all-linear")),
        ] {
            let what = format!("{}, {what}", golden.name);
            let rows: Vec<Batch> = (0..golden.rows.len()).map(|row| golden.batch(&[row])).collect();
            for batch in rows.iter().chain([&golden.packed()]) {
                let nll = nll(&model, batch);
                println!("{what}: off by {:.1e}", worst_nll(batch, &nll, &expected));
                assert_nll(&what, batch, &nll, &expected);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_transformers() {
    for golden in Golden::families() {
        let model = golden.load_full();
        let mut grads = model.params().zero_grads();
        model.forward_backward(&golden.packed(), 1.0, &mut grads, None).expect("golden rows fit");
        let expected = tensors(&golden.dir.join("gradients.safetensors"));
        assert_eq!(model.params().infos().len(), expected.len(), "{}", golden.name);
        let mut worst = 0.0f64;
        for info in model.params().infos() {
            let (_, want) = &expected[&info.name];
            let error = relative_distance(&grads.values(info.at), want);
            worst = worst.max(error);
            assert!(error <= GRADIENT, "{}: the gradient of {} is off by {error:e}", golden.name, info.name);
        }
        println!("{}: gradients off by {worst:.1e}", golden.name);
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let ids = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).expect("a list of ids");
    for golden in Golden::families() {
        let model = golden.load();
        for expected in golden.expect["generate"].as_array().expect("a list") {
            let want = ids(&expected["ids"]);
            let config = GenerationConfig { max_new_tokens: want.len(), ..GenerationConfig::default() };
            let (got, _) = model.generate(&ids(&expected["prompt"]), &config, |_| true).expect("golden prompts fit");
            assert_eq!(got, want, "{}", golden.name);
        }
    }
}

#[test]
fn training_follows_transformers_and_peft() {
    for golden in Golden::families() {
        for (name, file) in [("lora", "adapter_model.safetensors"), ("full", "model.safetensors")] {
            let trajectory = Trajectory::open(&golden.dir.join("train").join(name));
            let mut model = match trajectory.adapter() {
                Some(adapter) => golden.load_adapted(adapter),
                None => golden.load_full(),
            };
            // A value of gpt-oss's clamped SwiGLU lies within 1e-6 of the limit at step 10 of `lora`. Its gradient is 0 on one
            // side of the limit and not on the other, and rounding decides: without AVX-512, the norm is off by 9.6e-6.
            let at_limit = golden.name == "families/gpt-oss" && name == "lora";
            let grad_norm = if at_limit { 2e-5 } else { Tolerances::CPU.grad_norm };
            let what = format!("{}/{name}", golden.name);
            trajectory.check_within(Tolerances { grad_norm, ..Tolerances::CPU }, &what, &golden, &mut model, file);
        }
    }
}

#[test]
fn an_adapter_is_written_as_peft_wrote_it() {
    for golden in Golden::families() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let adapter = golden.load_adapted("all-linear").adapter().expect("it was just loaded");
        adapter.save(dir.path()).expect("the disk has room");
        let theirs = golden.dir.join("adapters/all-linear");
        let file = "adapter_model.safetensors";
        assert_eq!(tensors(&dir.path().join(file)), tensors(&theirs.join(file)), "{}", golden.name);
        let targets =
            |dir: &Path| rekindle_tests::read_json(&dir.join("adapter_config.json"))["target_modules"].clone();
        assert_eq!(targets(dir.path()), targets(&theirs), "{}", golden.name);
    }
}

/// The gradient of all rows.
fn gradient(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let mut grads = model.params().zero_grads();
    model.forward_backward(batch, 0.01, &mut grads, None).expect("golden rows fit");
    grads.all_values()
}

#[test]
fn recomputation_changes_no_bit_of_a_gradient() {
    for golden in Golden::families() {
        for mut model in [golden.load_adapted("all-linear"), golden.load_full()] {
            let want = gradient(&model, &golden.packed());
            model.set_gradient_checkpointing(GradientCheckpointing::Block);
            assert_eq!(gradient(&model, &golden.packed()), want, "{}", golden.name);
        }
    }
}

#[test]
fn the_base_is_there_beside_its_adapter() {
    for golden in Golden::families() {
        let (batch, model) = (golden.packed(), golden.load_adapted("all-linear"));
        let want = nll(&golden.load(), &batch);
        assert_eq!(model.base_nll(&batch).expect("golden rows fit"), want, "{}", golden.name);
        assert_ne!(nll(&model, &batch), want, "{}", golden.name);
    }
}

#[test]
fn merging_changes_the_losses_by_rounding_alone() {
    for golden in Golden::families() {
        let (batch, mut model) = (golden.packed(), golden.load_adapted("all-linear"));
        model.merge_and_unload().expect("memory for it");
        assert_nll(&golden.name, &batch, &nll(&model, &batch), &golden.adapter_losses("all-linear"));
    }
}

#[test]
fn a_saved_model_is_the_checkpoint_it_came_from() {
    for golden in Golden::families() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        golden.load().save(dir.path(), Dtype::F32).expect("the disk has room");
        let file = "model.safetensors";
        assert_eq!(tensors(&dir.path().join(file)), tensors(&golden.dir.join(file)), "{}", golden.name);
    }
}

/// A checkpoint that `quantize` wrote is the model that is quantized while loading, fused linears included.
#[test]
fn quantizing_first_or_while_loading_is_the_same() {
    for golden in Golden::families() {
        for load_in in [LoadIn::FourBit(None), LoadIn::EightBit, LoadIn::Fp8] {
            let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
            let dir = tempfile::tempdir().expect("a temporary directory");
            quantize(&checkpoint, load_in, None, dir.path(), &mut |_| ()).expect("a golden checkpoint quantizes");
            let options = LoadOptions::new(Device::cpu(), rekindle_kernels::DType::F32, 128);
            let written = Checkpoint::open(dir.path()).expect("it was just written");
            let written = CausalLm::load(&written, &options, &mut |_| ()).expect("it was just written");
            let loaded = golden.load_with(|options| options.load_in = Some(load_in));
            let batch = golden.packed();
            assert_eq!(nll(&written, &batch), nll(&loaded, &batch), "{}", golden.name);
            assert_ne!(nll(&loaded, &batch), nll(&golden.load(), &batch), "{}: something is quantized", golden.name);
        }
    }
}

/// Saving, merging and quantizing keep what a checkpoint has beside the decoder, under the names that it has there.
#[test]
fn tensors_beside_the_decoder_are_written_as_they_were() {
    let golden = Golden::open("families/gemma3-multimodal");
    let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
    let beside = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).expect("a checkpoint opens");
        let views = checkpoint.names().filter(|name| !name.starts_with("language_model."));
        let views = views.map(|name| checkpoint.get(name).expect("it is listed"));
        views
            .map(|view| (view.name.to_owned(), view.dtype, view.shape.to_vec(), view.data.to_vec()))
            .collect::<Vec<_>>()
    };
    let want = beside(&golden.dir);
    assert!(want.iter().any(|(name, ..)| name.starts_with("vision_tower.")), "there is a vision tower");
    let (batch, mut model) = (golden.packed(), golden.load_adapted("all-linear"));
    let adapter = model.adapter().expect("it was just loaded");
    let written = |write: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path());
        assert_eq!(beside(dir.path()), want);
        let options = LoadOptions::new(Device::cpu(), rekindle_kernels::DType::F32, 128);
        let written = Checkpoint::open(dir.path()).expect("it was just written");
        nll(&CausalLm::load(&written, &options, &mut |_| ()).expect("it was just written"), &batch)
    };
    let merged = written(&|dir| {
        let options = MergeOptions::default();
        rekindle_models::merge(&checkpoint, &adapter, options, dir, &mut |_| ()).expect("the disk has room");
    });
    assert_nll("merged", &batch, &merged, &golden.adapter_losses("all-linear"));
    let quantized = written(&|dir| {
        quantize(&checkpoint, LoadIn::EightBit, None, dir, &mut |_| ()).expect("the disk has room");
    });
    assert_ne!(quantized, nll(&golden.load(), &batch));
    model.merge_and_unload().expect("memory for it");
    let saved = written(&|dir| model.save(dir, Dtype::F32).expect("the disk has room"));
    assert_eq!(saved, nll(&model, &batch));
}

/// PEFT looks for targets in the vision tower too, whose attention has linears of the same names.
#[test]
fn an_adapter_excludes_what_is_beside_the_decoder() {
    let mut model = Golden::open("families/gemma3-multimodal").load();
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    let adapter = model.adapter().expect("it was just added");
    assert!(adapter.factors.keys().all(|name| name.starts_with("model.language_model.layers.")));
    let excluded = adapter.config.lora().exclude_modules.clone();
    let pattern = r"model\.vision_tower\..*|model\.multi_modal_projector\..*";
    assert_eq!(excluded, Some(pattern.into()));
}

//! Checkpoints whose tensors have other prefixes: they load, merge and quantize as the same model.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle::{LoadIn, Merge, inspect};
use rekindle_hub::{Checkpoint, TensorSpec, write_safetensors};
use rekindle_models::{CausalLm, Error, LoadOptions};
use rekindle_tests::{Golden, assert_nll, goldens};

/// Gives a tensor another name.
type Renaming = fn(&str) -> String;

/// Names as other programs write them, by what writes them.
const LAYOUTS: [(&str, Renaming); 4] = [
    // An embedding model, such as Qwen3-Embedding, is saved without the head and its siblings' prefix.
    ("without model.", |name| name.replacen("model.", "", 1)),
    ("torch.compile", |name| format!("_orig_mod.{name}")),
    ("DistributedDataParallel", |name| format!("module.{name}")),
    ("PEFT", |name| format!("base_model.model.{name}")),
];

/// Writes the checkpoint `from` to the directory `to` with other names, byte for byte otherwise.
fn rename(from: &Path, to: &Path, name: impl Fn(&str) -> String) {
    let checkpoint = Checkpoint::open(from).expect("a golden checkpoint opens");
    let views: Vec<_> =
        checkpoint.names().map(|name| checkpoint.get(name).expect("a listed tensor is there")).collect();
    let specs: Vec<_> = views.iter().map(|view| TensorSpec::new(name(view.name), view.dtype, view.shape)).collect();
    std::fs::create_dir_all(to).expect("a directory");
    let path = to.join("model.safetensors");
    write_safetensors(&path, &BTreeMap::new(), &specs, |i, out| out.write_all(views[i].data)).expect("written");
    std::fs::copy(from.join("config.json"), to.join("config.json")).expect("copied");
}

fn load(dir: &Path) -> Result<CausalLm, Error> {
    let options = LoadOptions::new(rekindle_kernels::Device::cpu(), rekindle_kernels::DType::F32, 128);
    CausalLm::load(&Checkpoint::open(dir)?, &options, &mut |_| ())
}

fn names(dir: &Path) -> Vec<String> {
    Checkpoint::open(dir).expect("it opens").names().map(str::to_owned).collect()
}

#[test]
fn every_layout_gives_the_losses_of_transformers() {
    for model in ["qwen3-tied", "qwen3-untied-sharded", "llama-bias", "quantized/qwen3-tied-nf4-double"] {
        let golden = Golden::open(model);
        let want = golden.base_losses();
        for (layout, name) in LAYOUTS {
            let dir = tempfile::tempdir().expect("a temporary directory");
            rename(&golden.dir, dir.path(), name);
            let loaded = load(dir.path()).expect("another layout loads");
            let batch = golden.packed();
            assert_nll(&format!("{model}, {layout}"), &batch, &loaded.nll(&batch).expect("golden rows fit"), &want);

            let saved = dir.path().join("saved");
            std::fs::create_dir(&saved).expect("a directory");
            loaded.save(&saved, rekindle_hub::Dtype::F32).expect("it is saved");
            assert_eq!(names(&saved), names(&golden.dir), "{model}, {layout}: saved under the model's own names");
        }
    }
}

#[test]
fn every_layout_is_merged_quantized_and_inspected_as_the_model_that_it_is() {
    let golden = Golden::open("qwen3-tied");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).expect("weights");
    let made = |base: &Path, out: &Path| {
        let merge = Merge::new(goldens().join("qwen3-tied/adapters/all-linear")).base(base);
        merge.write(out.join("merged"), &mut |_, _| ()).expect("merged");
        rekindle::quantize(base, LoadIn::FourBit(None), None, out.join("nf4"), &mut |_, _| ()).expect("quantized");
        let facts = serde_json::to_value(inspect(base).expect("inspected")).expect("facts are JSON");
        (bytes(&out.join("merged")), bytes(&out.join("nf4")), facts)
    };
    let want = made(&golden.dir, &scratch.path().join("plain"));
    for (number, (layout, name)) in LAYOUTS.into_iter().enumerate() {
        let base = scratch.path().join(number.to_string());
        rename(&golden.dir, &base, name);
        assert!(made(&base, &base.join("out")) == want, "{layout}");
    }
}

#[test]
fn names_of_another_model_make_one_short_sentence() {
    let golden = Golden::open("qwen3-tied");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let refused = |name: &str, rename_to: &dyn Fn(&str) -> String| {
        let dir = scratch.path().join(name);
        rename(&golden.dir, &dir, rename_to);
        load(&dir).expect_err("these are no names of this model").to_string()
    };
    let count = names(&golden.dir).len();
    let error = refused("vision", &|name| format!("language_model.{name}"));
    let expected = format!(
        "no tensor has a name that Qwen3ForCausalLM needs (\"model.embed_tokens.weight\" [131, 40], \
         \"model.layers.0.input_layernorm.weight\" [40], \"model.layers.0.self_attn.q_proj.weight\" [96, 40] and {} more); \
         it has {count} tensors: \"language_model.model.embed_tokens.weight\", ",
        count - 3
    );
    assert!(error.contains(&expected) && error.len() < 700, "{error}");

    // Half of them fit.
    let error = refused("half", &|name| name.replace("mlp.", "feed_forward."));
    assert!(error.contains(": 9 tensors are missing: \"model.layers.0.mlp.gate_proj.weight\" [52, 40], "), "{error}");
    assert!(error.contains("; 9 tensors are not part of Qwen3ForCausalLM: "), "{error}");
    assert!(error.matches("feed_forward").count() == 3 && error.ends_with("and 6 more"), "{error}");

    let error = refused("adapted", &|name| name.replace("q_proj.", "q_proj.base_layer."));
    assert!(error.contains("it was saved with an adapter attached; call merge_and_unload before saving"), "{error}");
}

/// transformers makes such a head up; here it is an error.
#[test]
fn an_untied_model_without_its_head_is_refused() {
    let golden = Golden::open("llama-bias");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    rename(&golden.dir, scratch.path(), |name| name.replacen("model.", "", 1).replace("lm_head", "score"));
    let error = load(scratch.path()).expect_err("there is no head").to_string();
    assert!(error.contains("tensor \"lm_head.weight\"") && error.contains("is missing"), "{error}");
}

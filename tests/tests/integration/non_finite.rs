//! Outside of training, a number that is not finite is an error that names the weight it comes from.

use std::path::Path;

use rekindle::{
    DataSource, DeviceKind, Dtype, Error, ErrorKind, FastLanguageModel, GenerationConfig, LoadIn, Merge, Model,
    NonFinite,
};
use rekindle_models::Error as ModelError;
use rekindle_tests::{Golden, poison, poisoned};

fn load(dir: &Path) -> Model {
    FastLanguageModel::from_pretrained(dir).device(DeviceKind::Cpu).load_model().expect("a golden loads")
}

/// The weight that an error outside of training names.
fn blamed(error: &Error) -> String {
    assert_eq!(error.kind(), ErrorKind::Diverged, "{error}");
    let (Error::Model(inner) | Error::Train(rekindle_train::Error::Model(inner))) = error else { panic!("{error}") };
    let ModelError::NonFinite { found: Some(NonFinite::Weight { name, .. }), .. } = inner else { panic!("{error}") };
    assert!(error.to_string().contains(name), "{error}");
    name.clone()
}

#[test]
fn no_token_is_chosen_from_logits_that_are_not_finite() {
    for tensor in ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"] {
        let (_dir, golden) = poisoned("qwen3-tied", tensor, 7);
        let model = load(&golden.dir);
        for temperature in [0.0, 1.0] {
            let config = GenerationConfig { max_new_tokens: 4, temperature, ..GenerationConfig::default() };
            let mut chosen = 0;
            let error = model.generate(&[5, 6], &config, |_| {
                chosen += 1;
                true
            });
            let error = error.expect_err("every logit is NaN");
            assert_eq!((blamed(&error).as_str(), chosen), (tensor, 0));
            assert!(error.to_string().contains("new token 1 "), "{error}");
        }
    }
}

/// One row of the head: one logit, which no text need have as a target.
#[test]
fn a_single_logit_is_enough() {
    let hidden = 40;
    let (_dir, golden) = poisoned("qwen3-tied", "model.embed_tokens.weight", 130 * hidden + 1);
    let error = load(&golden.dir).generate(&[5, 6], &GenerationConfig::default(), |_| true).expect_err("one is NaN");
    assert_eq!(blamed(&error), "model.embed_tokens.weight");
}

#[test]
fn codes_do_not_hide_what_is_not_finite() {
    for tensor in ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"] {
        let (_dir, golden) = poisoned("qwen3-tied", tensor, 7);
        let out = golden.dir.join("quantized");
        for load_in in [LoadIn::FourBit(None), LoadIn::EightBit] {
            let error = rekindle::quantize(&golden.dir, load_in, None, &out, &mut |_, _| ()).expect_err("NaN");
            assert_eq!(blamed(&error), tensor);
            assert!(!out.exists());
        }
    }
    let tensor = "model.layers.1.mlp.down_proj.weight";
    let (_dir, golden) = poisoned("qwen3-tied", tensor, 7);
    let loader = FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu);
    let loaded = [loader.load_in_4bit(true), FastLanguageModel::from_pretrained(&golden.dir).load_in_8bit(true)];
    for loader in loaded {
        assert_eq!(blamed(&loader.load_model().expect_err("NaN has no code")), tensor);
    }
}

#[test]
fn nothing_is_merged_that_is_not_finite() {
    let golden = Golden::open("qwen3-tied");
    let adapter = tempfile::tempdir().expect("a temporary directory");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let mut bytes = std::fs::read(golden.dir.join("adapters/all-linear").join(name)).expect("it is there");
        if name.ends_with(".safetensors") {
            poison(&mut bytes, "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", 3);
        }
        std::fs::write(adapter.path().join(name), bytes).expect("the disk has room");
    }
    let out = adapter.path().join("merged");
    let merge = |adapter: &Path, base: &Path| Merge::new(adapter).base(base).write(&out, &mut |_, _| ());
    let error = merge(adapter.path(), &golden.dir).expect_err("the adapter has NaN");
    assert_eq!(blamed(&error), "model.layers.1.mlp.up_proj.lora_B");
    let error = load(&golden.dir).load_adapter(adapter.path()).expect("it loads").merge_and_unload();
    assert_eq!(blamed(&error.expect_err("the adapter has NaN")), "model.layers.1.mlp.up_proj.lora_B");

    let (_dir, broken) = poisoned("qwen3-tied", "model.norm.weight", 0);
    let fine = golden.dir.join("adapters/all-linear");
    let error = merge(&fine, &broken.dir).expect_err("the base has NaN");
    assert_eq!(error.kind(), ErrorKind::Diverged);
    assert!(error.to_string().contains("\"model.norm.weight\""), "{error}");
    assert!(!out.exists());
}

/// The rows are those of the first batch with one that has the token.
#[test]
fn an_evaluation_names_the_row_and_the_weight() {
    let rows = Golden::open("qwen3-untied-sharded").rows;
    let counts = |id: u32| rows.iter().filter(|row| row.input_ids.contains(&id)).count();
    let id = rows.iter().flat_map(|row| &row.input_ids).find(|id| counts(**id) == 1).expect("some token is rare");
    let line = rows.iter().position(|row| row.input_ids.contains(id)).expect("it occurs") + 1;
    let config = rekindle_tests::read_json(&Golden::open("qwen3-untied-sharded").dir.join("config.json"));
    let hidden = config["hidden_size"].as_u64().expect("a number") as usize;
    let tensor = "model.embed_tokens.weight";
    let (_dir, golden) = poisoned("qwen3-untied-sharded", tensor, *id as usize * hidden + 3);
    let rows = DataSource::new(golden.dir.join("rows.jsonl"));
    let error = load(&golden.dir).evaluate(None, &rows, &mut |_| ()).expect_err("a row has that token");
    assert_eq!(blamed(&error), tensor);
    assert!(
        error
            .to_string()
            .contains(&format!("the loss of {}:{line} is not finite", golden.dir.join("rows.jsonl").display())),
        "{error}"
    );
}

#[test]
fn a_merged_model_that_is_not_finite_is_not_verified() {
    let golden = Golden::open("qwen3-tied");
    let (_dir, broken) = poisoned("qwen3-tied", "model.layers.0.mlp.gate_proj.weight", 0);
    let merge = Merge::new(golden.dir.join("adapters/all-linear")).base(&golden.dir);
    let error = merge.verify(&broken.dir, DeviceKind::Cpu).expect_err("NaN is no loss");
    assert_eq!(blamed(&error), "model.layers.0.mlp.gate_proj.weight");
    assert!(error.to_string().contains("the merged model"), "{error}");
}

/// Above 65,504 nothing is a number of f16.
#[test]
fn a_dtype_that_cannot_hold_a_merged_weight_is_refused() {
    let golden = Golden::open("qwen3-tied");
    let adapter = tempfile::tempdir().expect("a temporary directory");
    let mut model = golden.load_adapted("all-linear");
    let values = model.params().all_values().into_iter().map(|value| value * 1e4).collect();
    model.params_mut().set_all_values(values);
    model.adapter().expect("it was loaded").save(adapter.path()).expect("the disk has room");
    let out = adapter.path().join("merged");
    let merge = |dtype| Merge::new(adapter.path()).base(&golden.dir).dtype(dtype).write(&out, &mut |_, _| ());
    let error = merge(Dtype::F16).expect_err("it is too large");
    assert_eq!(error.kind(), ErrorKind::Diverged);
    for part in ["in the merged \"model.layers.", "outside the range of F16", "merge with dtype bf16 or f32"] {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
    assert!(!out.exists());
    merge(Dtype::Bf16).expect("bf16 has the range of f32");
}

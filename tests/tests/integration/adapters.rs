//! Tests of saved adapters: bit-identical after loading, and readable by PEFT.
//!
//! `goldens/qwen3-tied/written-here` contains an adapter written by `examples/write_adapter.rs` and, in `peft.json`, the
//! losses that PEFT computes with it (`goldens/check_adapter.py`, which also fails on any missing or unexpected key and
//! any wrong shape).

use std::path::Path;

use rekindle_hub::Dtype;
use rekindle_lora::{Bias, InitLoraWeights, LoraConfig};
use rekindle_tests::{
    Golden, MODELS, RowLosses, assert_nll, read_json, relative_distance, tensors, train_written_adapter, worst_nll,
};
use rekindle_train::save_result;

#[test]
fn a_saved_adapter_loads_bit_for_bit() {
    for name in MODELS {
        let golden = Golden::open(name);
        let mut model = golden.load();
        let config = LoraConfig::new(3).lora_alpha(7.0).use_rslora(true).init_lora_weights(InitLoraWeights::Random);
        model.add_adapter(&config).expect("a valid configuration");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let saved = dir.path().join("adapter");
        save_result(&model, &saved, &[], Dtype::F32).expect("the disk has space");
        let mut again = golden.load();
        again.load_adapter(&saved).expect("it was just written");
        assert_eq!(model.params().infos(), again.params().infos(), "{name}");
        assert_eq!(model.params().all_values(), again.params().all_values(), "{name}");
        let batch = golden.packed();
        assert_eq!(model.nll(&batch).expect("it fits"), again.nll(&batch).expect("it fits"), "{name}");
        let lora = again.lora().expect("it was just loaded");
        assert_eq!((lora.r, lora.lora_alpha, lora.use_rslora), (3, 7.0, true));
    }
}

#[test]
fn a_golden_adapter_is_saved_like_peft_saves_it() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        for adapter in golden.adapters() {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let written = golden.load_adapted(&adapter).adapter().expect("it was just loaded");
            written.save(dir.path()).expect("the disk has space");
            let file = "adapter_model.safetensors";
            let (ours, theirs) =
                (tensors(&dir.path().join(file)), tensors(&golden.dir.join("adapters").join(&adapter).join(file)));
            assert_eq!(ours, theirs, "{name}/{adapter}");
            let config = |dir: &Path| read_json(&dir.join("adapter_config.json"));
            let (ours, theirs) = (config(dir.path()), config(&golden.dir.join("adapters").join(&adapter)));
            for key in
                ["peft_type", "task_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "target_modules"]
            {
                assert_eq!(ours[key], theirs[key], "{name}/{adapter}: {key}");
            }
        }
    }
}

#[test]
fn peft_computes_the_same_losses_with_our_adapter() {
    let golden = Golden::open("qwen3-tied");
    let dir = golden.dir.join("written-here");
    let mut model = golden.load();
    model.load_adapter(&dir).expect("it was written here");
    let peft = RowLosses::list(&read_json(&dir.join("peft.json"))["rows"]);
    assert_eq!(peft.len(), golden.rows.len());
    let batch = golden.packed();
    let nll = model.nll(&batch).expect("golden rows fit");
    assert_nll("written here", &batch, &nll, &peft);
    assert!(worst_nll(&batch, &nll, &golden.base_losses()) > 0.1, "the adapter changes the losses");
}

#[test]
fn the_adapter_read_by_peft_is_still_what_we_write() {
    let golden = Golden::open("qwen3-tied").dir.join("written-here");
    let dir = tempfile::tempdir().expect("a temporary directory");
    train_written_adapter().save(dir.path()).expect("the disk has space");
    let config = |dir: &Path| std::fs::read_to_string(dir.join("adapter_config.json")).expect("it was written");
    assert_eq!(config(dir.path()), config(&golden));
    let all = |dir: &Path| tensors(&dir.join("adapter_model.safetensors"));
    let (now, then) = (all(dir.path()), all(&golden));
    assert_eq!(now.keys().collect::<Vec<_>>(), then.keys().collect::<Vec<_>>());
    for ((key, (shape, now)), (then_shape, then)) in now.iter().zip(then.values()) {
        assert_eq!(shape, then_shape, "{key}");
        // Another processor may sum in another order, hence the trajectories' tolerance; one machine gives the same
        // bits.
        assert!(relative_distance(now, then) <= 1e-3, "{key}");
    }
}

/// Not every program that reads adapters knows the word, and PEFT too resolves it before it saves.
/// The base model's losses beside an active adapter, to the bit: of linears, magnitudes, biases and whole modules.
#[test]
fn the_base_is_there_beside_its_adapter() {
    for name in MODELS {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let want = golden.load().nll(&batch).expect("golden rows fit");
        let lora = LoraConfig::new(3).init_lora_weights(InitLoraWeights::Random).lora_dropout(0.5);
        let mut dora = lora.clone().bias(Bias::All);
        dora.use_dora = true;
        let mut whole = lora.clone();
        whole.modules_to_save = vec!["embed_tokens".to_owned(), "lm_head".to_owned()];
        for config in [lora, dora, whole] {
            let mut model = golden.load();
            model.add_adapter(&config).expect("a valid configuration");
            let moved = model.params().all_values().iter().map(|value| value * 1.5 + 0.01).collect();
            model.params_mut().set_all_values(moved);
            assert_ne!(model.nll(&batch).expect("golden rows fit"), want, "{name}");
            assert_eq!(model.base_nll(&batch).expect("golden rows fit"), want, "{name}");
        }
        let mut model = golden.load();
        let config = LoraConfig::new(3).init_lora_weights(InitLoraWeights::Olora);
        model.add_adapter(&config).expect("a valid configuration");
        let text = model.base_nll(&batch).expect_err("the base lost a part").to_string();
        assert!(text.contains("subtracted its initial B·A from the base"), "{text}");
    }
}

#[test]
fn all_linear_is_saved_as_names() {
    let mut model = Golden::open("qwen3-tied").load();
    model.add_adapter(&LoraConfig::new(2).target_modules("all-linear")).expect("a valid configuration");
    let mut names = rekindle_lora::BLOCK_LINEARS;
    names.sort_unstable();
    let config = model.adapter().expect("it was just added").config;
    assert_eq!(config.lora().target_modules, names.into());
}

#[test]
fn a_missing_tensor_of_a_module_is_reported() {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    let mut adapter = model.adapter().expect("it was just added");
    adapter.factors.remove("model.layers.1.mlp.up_proj");
    let dir = tempfile::tempdir().expect("a temporary directory");
    adapter.save(dir.path()).expect("the disk has space");
    let error = golden.load().load_adapter(dir.path()).expect_err("incomplete").to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.lora_A.weight\" is missing"), "{error}");
}

//! Adapters written here: read again bit for bit, and read by PEFT.
//!
//! `goldens/qwen3-tied/written-here` holds an adapter that `examples/write_adapter.rs` wrote and, in
//! `peft.json`, the losses that PEFT computes with it (`goldens/check_adapter.py`, which also fails on any
//! missing, unexpected or misshaped key).

use std::path::Path;

use rekindle_hub::Dtype;
use rekindle_lora::{Bias, InitLoraWeights, LoraConfig};
use rekindle_tests::{
    Golden, MODELS, RowLosses, assert_nll, read_json, relative_distance, tensors, train_written_adapter, worst_nll,
};
use rekindle_train::save_result;

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    for name in MODELS {
        let golden = Golden::open(name);
        let mut model = golden.load();
        let config = LoraConfig::new(3).lora_alpha(7.0).use_rslora(true).init_lora_weights(InitLoraWeights::Random);
        model.add_adapter(&config).expect("a valid configuration");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let saved = dir.path().join("adapter");
        save_result(&model, &saved, &[], Dtype::F32).expect("the disk has room");
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
fn a_golden_adapter_is_written_as_peft_wrote_it() {
    for name in ["qwen3-tied", "qwen2", "llama3"] {
        let golden = Golden::open(name);
        for adapter in golden.adapters() {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let written = golden.load_adapted(&adapter).adapter().expect("it was just loaded");
            written.save(dir.path()).expect("the disk has room");
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
fn peft_gives_the_losses_that_we_give_with_our_adapter() {
    let golden = Golden::open("qwen3-tied");
    let dir = golden.dir.join("written-here");
    let mut model = golden.load();
    model.load_adapter(&dir).expect("it was written here");
    let peft = RowLosses::list(&read_json(&dir.join("peft.json"))["rows"]);
    assert_eq!(peft.len(), golden.rows.len());
    let batch = golden.packed();
    let nll = model.nll(&batch).expect("golden rows fit");
    assert_nll("written here", &batch, &nll, &peft);
    assert!(worst_nll(&batch, &nll, &golden.base_losses()) > 0.1, "the adapter is felt");
}

#[test]
fn we_still_write_the_adapter_that_peft_read() {
    let golden = Golden::open("qwen3-tied").dir.join("written-here");
    let dir = tempfile::tempdir().expect("a temporary directory");
    train_written_adapter().save(dir.path()).expect("the disk has room");
    let config = |dir: &Path| std::fs::read_to_string(dir.join("adapter_config.json")).expect("it was written");
    assert_eq!(config(dir.path()), config(&golden));
    let all = |dir: &Path| tensors(&dir.join("adapter_model.safetensors"));
    let (now, then) = (all(dir.path()), all(&golden));
    assert_eq!(now.keys().collect::<Vec<_>>(), then.keys().collect::<Vec<_>>());
    for ((key, (shape, now)), (then_shape, then)) in now.iter().zip(then.values()) {
        assert_eq!(shape, then_shape, "{key}");
        // Another processor adds in another order; the trajectories' tolerance, and the same bits on one machine.
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
fn a_module_without_its_tensors_is_missing() {
    let golden = Golden::open("qwen3-tied");
    let mut model = golden.load();
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    let mut adapter = model.adapter().expect("it was just added");
    adapter.factors.remove("model.layers.1.mlp.up_proj");
    let dir = tempfile::tempdir().expect("a temporary directory");
    adapter.save(dir.path()).expect("the disk has room");
    let error = golden.load().load_adapter(dir.path()).expect_err("incomplete").to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.lora_A.weight\" is missing"), "{error}");
}

//! Compares fp8 bases in every layout with transformers and PEFT over the decoded weights: losses, training, files; and
//! quantizing while loading.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::{DType, Device};
use rekindle_lora::{InitLoraWeights, LoraConfig};
use rekindle_models::{CausalLm, LoadIn, LoadOptions, MemoryClass, MergeOptions, merge, quantize};
use rekindle_tests::{Golden, RowLosses, Trajectory, assert_nll, goldens, read_json, worst_nll};
use serde_json::{Value, json};

const LAYOUTS: [&str; 6] =
    ["fp8/block", "fp8/block-ue8m0", "fp8/tensor-static", "fp8/fbgemm", "fp8/channel", "fp8/compressed-block"];

#[test]
fn every_layout_gives_the_losses_of_its_decoded_weights() {
    for name in LAYOUTS {
        let golden = Golden::open(name);
        let (model, batch) = (golden.load(), golden.packed());
        let nll = model.nll(&batch).expect("golden rows fit");
        let expected = RowLosses::list(&golden.expect["rows"]);
        println!("{name}: off by {:.1e}", worst_nll(&batch, &nll, &expected));
        assert_nll(name, &batch, &nll, &expected);
        let report = model.memory_report();
        let codes = report.line(MemoryClass::PackedCodes).expect("linears are quantized");
        assert_eq!(codes.bytes, codes.weights, "{name}: a byte for each weight");
    }
}

#[test]
fn adapters_over_fp8_weights_follow_the_golden_trajectories() {
    for name in ["fp8/block", "fp8/channel"] {
        let golden = Golden::open(name);
        let mut model = golden.load_adapted("all-linear");
        let batch = golden.packed();
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(name, &batch, &nll, &golden.adapter_losses("all-linear"));
        let trajectory = Trajectory::open(&golden.dir.join("train/lora"));
        trajectory.check(name, &golden, &mut model, "adapter_model.safetensors");
    }
}

type Contents = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn contents(dir: &Path) -> Contents {
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint opens");
    let tensor = |name: &str| {
        let view = checkpoint.get(name).expect("a listed tensor is there");
        (name.to_owned(), (view.dtype, view.shape.to_vec(), view.data.to_vec()))
    };
    checkpoint.names().map(tensor).collect()
}

#[test]
fn a_loaded_checkpoint_is_saved_byte_for_byte() {
    for name in LAYOUTS {
        let golden = Golden::open(name);
        let out = tempfile::tempdir().expect("a temporary directory");
        golden.load().save(out.path(), Dtype::BF16).expect("the disk has space");
        assert!(contents(out.path()) == contents(&golden.dir), "{name}");
        let config = |dir: &Path| read_json(&dir.join("config.json"));
        assert_eq!(config(out.path()), config(&golden.dir), "{name}");
    }
}

#[test]
fn a_merge_decodes_the_base() {
    for name in ["fp8/block", "fp8/channel"] {
        let golden = Golden::open(name);
        let adapter = golden.load_adapted("all-linear").adapter().expect("it was loaded");
        let base = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
        let merged = |dtype| {
            let out = tempfile::tempdir().expect("a temporary directory");
            let options = MergeOptions { dtype, ..MergeOptions::default() };
            merge(&base, &adapter, options, out.path(), &mut |_| ()).expect("the disk has space");
            assert!(read_json(&out.path().join("config.json")).get("quantization_config").is_none());
            out
        };
        let out = merged(Some(Dtype::F32));
        let dense = Golden { dir: out.path().to_owned(), ..Golden::open(name) };
        let batch = golden.packed();
        let nll = dense.load().nll(&batch).expect("golden rows fit");
        assert_nll(name, &batch, &nll, &golden.adapter_losses("all-linear"));
        let (dtype, ..) = &contents(merged(None).path())["model.layers.0.self_attn.q_proj.weight"];
        assert_eq!(*dtype, Dtype::BF16, "decoded to 16 bits unless asked otherwise");
    }
}

#[test]
fn quantizing_on_load_equals_loading_a_quantized_checkpoint() {
    let base = Golden::open("qwen3-tied");
    for skip in [None, Some(vec!["lm_head".to_owned(), "model.layers.0".to_owned(), "down_proj".to_owned()])] {
        let out = tempfile::tempdir().expect("a temporary directory");
        let checkpoint = Checkpoint::open(&base.dir).expect("a golden checkpoint opens");
        quantize(&checkpoint, LoadIn::Fp8, skip.as_deref(), out.path(), &mut |_| ()).expect("the disk has space");
        let stored = Golden { dir: out.path().to_owned(), ..Golden::open("qwen3-tied") };
        let while_loading = base.load_with(|options| {
            options.load_in = Some(LoadIn::Fp8);
            options.skip_modules = skip;
        });
        let batch = base.packed();
        let (a, b) = (while_loading.nll(&batch), stored.load().nll(&batch));
        assert_eq!(a.expect("golden rows fit"), b.expect("golden rows fit"));
        assert_eq!(while_loading.memory_report(), stored.load().memory_report());
        let saved = tempfile::tempdir().expect("a temporary directory");
        while_loading.save(saved.path(), Dtype::F32).expect("the disk has space");
        assert!(contents(saved.path()) == contents(out.path()), "saved while loading");
        let config = |dir: &Path| read_json(&dir.join("config.json"))["quantization_config"].clone();
        assert_eq!(config(saved.path()), config(out.path()));
        assert_eq!(config(out.path())["quant_method"], "compressed-tensors");
        // A request for fp8 is satisfied by the checkpoint, whatever its scales.
        stored.load_with(|options| options.load_in = Some(LoadIn::Fp8));
    }
    Golden::open("fp8/block").load_with(|options| options.load_in = Some(LoadIn::Fp8));
}

fn load(dir: &Path, change: impl FnOnce(&mut LoadOptions)) -> Result<CausalLm, rekindle_models::Error> {
    let mut options = LoadOptions::new(Device::cpu(), DType::F32, 64);
    change(&mut options);
    let checkpoint = Checkpoint::open(dir).expect("a golden checkpoint opens");
    CausalLm::load(&checkpoint, &options, &mut |_| ())
}

#[test]
fn requests_that_fp8_cannot_satisfy_are_refused() {
    let refused = |golden: &str, change: fn(&mut LoadOptions)| {
        load(&goldens().join(golden), change).expect_err("it is refused").to_string()
    };
    for (load_in, argument) in [
        (LoadIn::FourBit(None), "load_in_4bit"),
        (LoadIn::EightBit, "load_in_8bit"),
        (LoadIn::SixteenBit, "load_in_16bit"),
    ] {
        let text = load(&goldens().join("fp8/block"), |options| options.load_in = Some(load_in))
            .expect_err("it is refused")
            .to_string();
        for part in ["is already quantized, fp8 (E4M3, a scale per 128 × 128 block)", argument] {
            assert!(text.contains(part), "\"{part}\" is not in: {text}");
        }
    }
    let text = refused("quantized/qwen3-tied-nf4", |options| options.load_in = Some(LoadIn::Fp8));
    assert!(text.contains("4-bit (nf4)") && text.contains("load_in_fp8"), "{text}");
    let text = refused("qwen3-tied", |options| {
        options.load_in = Some(LoadIn::Fp8);
        options.full_finetuning = true;
    });
    assert!(text.contains("load_in_fp8 = true") && text.contains("does not support full_finetuning"), "{text}");
    let text = refused("fp8/fbgemm", |options| options.full_finetuning = true);
    assert!(text.contains("of the checkpoint") && text.contains("does not support full_finetuning"), "{text}");
    let mut model = Golden::open("qwen3-tied").load_with(|options| options.load_in = Some(LoadIn::Fp8));
    let loftq = LoraConfig { init_lora_weights: InitLoraWeights::Loftq, ..LoraConfig::new(2) };
    let text = model.add_adapter(&loftq).expect_err("it is refused").to_string();
    assert!(text.contains("\"loftq\" is not supported over fp8"), "{text}");
}

#[test]
fn checkpoints_that_contradict_their_configuration_are_refused() {
    let altered = |golden: &str, key: &str, value: Value| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for file in ["model.safetensors", "config.json"] {
            std::fs::copy(goldens().join(golden).join(file), dir.path().join(file)).expect("the disk has space");
        }
        let mut config = read_json(&dir.path().join("config.json"));
        config["quantization_config"][key] = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("the disk has space");
        load(dir.path(), |_| ()).expect_err("it is refused").to_string()
    };
    let q_proj = "\"model.layers.0.self_attn.q_proj.weight\"";
    let blocks = "has a scale per 128 × 128 block, but quantization_config says fp8 (E4M3, one scale)";
    for (golden, key, value, parts) in [
        ("fp8/block", "weight_block_size", Value::Null, [q_proj, blocks]),
        ("fp8/block", "weight_block_size", json!([64, 64]), ["quantization_config", "weight_block_size is [64,64]"]),
        (
            "fp8/block",
            "modules_to_not_convert",
            json!(["model.layers.0", "model.layers.1.mlp"]),
            [q_proj, "is in fp8, but quantization_config lists \"model.layers.0.self_attn.q_proj\""],
        ),
        (
            "fp8/block",
            "modules_to_not_convert",
            json!(["lm_head"]),
            ["\"model.layers.1.mlp.gate_proj.weight\" has no scales", "does not list"],
        ),
        ("fp8/block", "quant_method", json!("gptq"), ["quant_method \"gptq\" is not supported", "\"fp8\""]),
        ("fp8/channel", "format", json!("pack-quantized"), ["format is \"pack-quantized\"", "float-quantized"]),
    ] {
        let text = altered(golden, key, value);
        for part in parts {
            assert!(text.contains(part), "\"{part}\" is not in: {text}");
        }
    }
    // Without a configuration the codes would be read as weights.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let golden = goldens().join("fp8/block");
    std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors")).expect("it copies");
    let mut config = read_json(&golden.join("config.json"));
    config.as_object_mut().expect("an object").remove("quantization_config");
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("the disk has space");
    let text = load(dir.path(), |_| ()).expect_err("it is refused").to_string();
    assert!(text.contains("fp8 (F8_E4M3)") || text.contains("do not fit config.json"), "{text}");
}

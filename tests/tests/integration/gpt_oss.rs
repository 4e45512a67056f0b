//! gpt-oss beyond what `families.rs` and `moe.rs` hold for every family and mixture: experts in MXFP4, the layout of its
//! adapters, and refusals.

use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::{DType, Device};
use rekindle_lora::{InitLoraWeights, LoraConfig};
use rekindle_models::{Batch, CausalLm, LoadIn, LoadOptions, MemoryClass, MergeOptions, merge};
use rekindle_quant::Mxfp4Tensor;
use rekindle_tests::{Golden, Trajectory, assert_nll, read_json, tensors};
use serde_json::Value;

const TENSORS: &str = "model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";

fn dense() -> Golden {
    Golden::open("families/gpt-oss")
}

fn mxfp4() -> Golden {
    Golden::open("families/gpt-oss/mxfp4")
}

fn nll(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    model.nll(batch).expect("golden rows fit")
}

fn load(dir: &Path) -> Result<CausalLm, rekindle_models::Error> {
    let options = LoadOptions::new(Device::cpu(), DType::F32, 128);
    CausalLm::load(&Checkpoint::open(dir).expect("a checkpoint opens"), &options, &mut |_| ())
}

/// A copy of the quantized golden whose config.json was changed.
fn changed(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let (golden, dir) = (mxfp4(), tempfile::tempdir().expect("a temporary directory"));
    std::fs::copy(golden.dir.join(TENSORS), dir.path().join(TENSORS)).expect("the disk has room");
    let mut config = read_json(&golden.dir.join("config.json"));
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("the disk has room");
    dir
}

fn stored(dir: &Path) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint opens");
    let views = checkpoint.names().map(|name| checkpoint.get(name).expect("it is listed"));
    views.map(|view| (view.name.to_owned(), view.dtype, view.shape.to_vec(), view.data.to_vec())).collect()
}

#[test]
fn experts_in_mxfp4_have_the_losses_of_transformers() {
    let golden = mxfp4();
    for (what, model, expected) in [
        ("base", golden.load(), golden.base_losses()),
        ("adapted", golden.load_adapted("experts"), golden.adapter_losses("experts")),
    ] {
        let batch = golden.packed();
        assert_nll(what, &batch, &nll(&model, &batch), &expected);
    }
}

/// `load_in_4bit` leaves the experts as they are and quantizes attention beside them, which files have in 16 bits.
#[test]
fn attention_can_be_quantized_beside_mxfp4() {
    let golden = mxfp4();
    let load_in = Some(LoadIn::FourBit(None));
    let options = LoadOptions { load_in, ..LoadOptions::new(Device::cpu(), DType::F32, 128) };
    let model =
        CausalLm::load(&Checkpoint::open(&golden.dir).expect("a golden"), &options, &mut |_| ()).expect("it loads");
    let codes = |model: &CausalLm| model.memory_report().line(MemoryClass::PackedCodes).expect("the experts").weights;
    // Queries, keys, values and output of both layers; routers and the head stay dense.
    assert_eq!(codes(&model) - codes(&golden.load()), 2 * (2 * 64 * 64 + 2 * 32 * 64));
    let json = read_json(&golden.dir.join("config.json"));
    let options = LoadOptions { device: Device::meta(), ..options };
    let planned = CausalLm::on_meta(&json, &golden.dir, &options).expect("it is planned");
    assert_eq!(planned.memory_report(), model.memory_report());

    let dir = tempfile::tempdir().expect("a temporary directory");
    model.save(dir.path(), Dtype::F32).expect("the disk has room");
    for ((name, dtype, shape, bytes), (_, dtype_before, shape_before, before)) in
        stored(dir.path()).into_iter().zip(stored(&golden.dir))
    {
        assert_eq!((dtype, shape), (dtype_before, shape_before), "{name}");
        let is_rounded = name.contains("_proj.weight") && name.contains("self_attn");
        assert_eq!(bytes != before, is_rounded, "{name}");
    }
    let [want, got] =
        [model, load(dir.path()).expect("it was just written")].map(|model| nll(&model, &golden.packed()));
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-5 * b.abs().max(1.0)));
}

#[test]
fn training_over_mxfp4_follows_transformers_and_peft() {
    let golden = mxfp4();
    let trajectory = Trajectory::open(&golden.dir.join("train/experts"));
    let mut model = golden.load_adapted("experts");
    trajectory.check("gpt-oss/mxfp4", &golden, &mut model, ADAPTER);
}

#[test]
fn experts_stay_in_mxfp4() {
    let golden = mxfp4();
    let model = golden.load();
    let report = model.memory_report();
    let (codes, scales) = (report.line(MemoryClass::PackedCodes), report.line(MemoryClass::Scales));
    let (codes, scales) = (codes.expect("the experts"), scales.expect("their scales"));
    // Two layers of six experts: 64 × 64 and 64 × 32.
    assert_eq!((codes.weights, codes.bytes), (2 * 6 * 64 * 96, 2 * 6 * 64 * 96 / 2));
    // One byte for 32 weights, and the few floats of stacking.
    assert!(scales.bytes < codes.weights / 32 + 2 * 2 * 6 * 16, "{} bytes of scales", scales.bytes);

    let dir = tempfile::tempdir().expect("a temporary directory");
    model.save(dir.path(), Dtype::F32).expect("the disk has room");
    assert_eq!(stored(dir.path()), stored(&golden.dir));
    let config = |dir: &Path| read_json(&dir.join("config.json"))["quantization_config"].clone();
    assert_eq!(config(dir.path()), config(&golden.dir));

    // Beside a merged adapter on attention too.
    let mut model = golden.load();
    let config = LoraConfig::new(2).target_modules(["q_proj"]).init_lora_weights(InitLoraWeights::Random);
    model.add_adapter(&config).expect("the target is there");
    let want = nll(&model, &golden.packed());
    model.merge_and_unload().expect("memory for it");
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.save(dir.path(), Dtype::F32).expect("the disk has room");
    let names = |dir: &Path| stored(dir).into_iter().map(|(name, ..)| name).collect::<Vec<_>>();
    assert_eq!(names(dir.path()), names(&golden.dir));
    let merged = nll(&load(dir.path()).expect("it was just written"), &golden.packed());
    assert!(merged.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-5 * b.abs().max(1.0)));
}

/// The codes of the golden are those that our own encoder makes, and both decode to what transformers decoded.
#[test]
fn codes_are_those_of_the_specification() {
    let golden = mxfp4();
    let (decoded, whole) = (tensors(&golden.dir.join("decoded.safetensors")), tensors(&dense().dir.join(TENSORS)));
    let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
    for (name, (shape, expected)) in decoded {
        let bytes = |suffix: &str| checkpoint.get(&format!("{name}{suffix}")).expect("it is there").data.to_vec();
        // Files have [experts, in, out].
        let &[experts, input, out] = &shape[..] else { panic!("{name}") };
        let rows = |values: &[f32]| -> Vec<f32> {
            let of = |e: usize, row: usize| (0..input).map(move |column| (e * input + column) * out + row);
            let places = (0..experts).flat_map(|e| (0..out).flat_map(move |row| of(e, row)));
            places.map(|place| values[place]).collect()
        };
        let stored = Mxfp4Tensor::from_parts(vec![experts, out, input], bytes("_blocks"), bytes("_scales"));
        let stored = stored.expect("whole blocks");
        assert_eq!(stored.dequantize::<f32>(), rows(&expected), "{name}");
        let ours = Mxfp4Tensor::quantize(&rows(&whole[&name].1), &[experts, out, input]).expect("whole blocks");
        assert!(ours == stored, "{name}");
    }
}

#[test]
fn merged_experts_are_dense_in_the_layout_of_the_family() {
    let golden = mxfp4();
    let adapter = golden.load_adapted("experts").adapter().expect("it was just loaded");
    let base = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
    merge(&base, &adapter, options, dir.path(), &mut |_| ()).expect("the disk has room");
    let shapes = |dir: &Path| stored(dir).into_iter().map(|(name, _, shape, _)| (name, shape)).collect::<Vec<_>>();
    assert_eq!(shapes(dir.path()), shapes(&dense().dir));
    let batch = golden.packed();
    let losses = golden.adapter_losses("experts");
    assert_nll("merged on disk", &batch, &nll(&load(dir.path()).expect("it was just written"), &batch), &losses);
    let mut model = golden.load_adapted("experts");
    model.merge_and_unload().expect("memory for it");
    assert_nll("merged in memory", &batch, &nll(&model, &batch), &losses);
}

/// PEFT knows gpt-oss's experts by their parameters alone, whatever targets select them here.
#[test]
fn a_new_adapter_on_experts_names_their_parameters() {
    let golden = dense();
    let configs = [
        LoraConfig::new(2).target_modules(["q_proj", "gate_up_proj", "down_proj"]),
        LoraConfig::new(2).target_modules("all-linear"),
        // The default names: gate_proj and up_proj are one linear here.
        LoraConfig::new(2),
    ];
    for config in configs {
        let mut model = golden.load();
        let config = config.init_lora_weights(InitLoraWeights::Random);
        model.add_adapter(&config).expect("the targets are there");
        let want = nll(&model, &golden.packed());
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.adapter().expect("it was just added").save(dir.path()).expect("the disk has room");
        let parameters = read_json(&dir.path().join("adapter_config.json"))["target_parameters"].clone();
        assert_eq!(parameters, serde_json::json!(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]));
        let written = tensors(&dir.path().join(ADAPTER));
        assert!(written.keys().all(|name| !name.contains("router")), "{:?}", written.keys());
        let inner = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight";
        assert_eq!(written[inner].0, [64, 12]);
        let mut again = golden.load();
        again.load_adapter(dir.path()).expect("it was just written");
        assert_eq!(nll(&again, &golden.packed()), want);
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |dir: &tempfile::TempDir| load(dir.path()).expect_err("it does not fit").to_string();
    let error = refused(&changed(|config| config["hidden_size"] = 96.into()));
    assert!(
        error.contains(
            "\"model.layers.0.mlp.experts.gate_up_proj_blocks\" has shape [6, 64, 2, 16], expected [6, 64, 3, 16]"
        ),
        "{error}"
    );
    let error = refused(&changed(|config| config["num_local_experts"] = 5.into()));
    assert!(error.contains("experts.gate_up_proj_scales\" has shape [6, 64, 2], expected [5, 64, 2]"), "{error}");
    let error = refused(&changed(|config| config["quantization_config"]["quant_method"] = "mxfp8".into()));
    assert!(error.contains("quant_method \"mxfp8\" is not supported; supported: \"bitsandbytes\""), "{error}");
    for (key, value, want) in [
        ("swiglu_limit", Value::from(0), "swiglu_limit is 0; expected a number above 0"),
        ("hidden_act", Value::from("gelu"), "hidden_act is \"gelu\""),
        ("attention_dropout", Value::from(0.1), "attention_dropout is 0.1; only 0.0 is supported"),
        ("rope_parameters", Value::Null, "rope_parameters is missing"),
    ] {
        let error = refused(&changed(|config| config[key] = value));
        assert!(error.contains(want), "{error}");
    }
    // Trained weights have no codes to go to.
    let options = LoadOptions { full_finetuning: true, ..LoadOptions::new(Device::cpu(), DType::F32, 128) };
    let checkpoint = Checkpoint::open(&mxfp4().dir).expect("a golden checkpoint opens");
    let error = CausalLm::load(&checkpoint, &options, &mut |_| ()).expect_err("MXFP4 is not trained").to_string();
    assert!(error.contains("gate_up_proj\" of the checkpoint is in MXFP4, which does not support training"), "{error}");
    // An adapter of a model with as many experts and other widths.
    let mut other = Golden::open("families/qwen3-moe-sparse").load();
    let error = other.load_adapter(&dense().dir.join("adapters/experts")).expect_err("other widths").to_string();
    assert!(error.contains("6 experts with r = 3 have"), "{error}");
}

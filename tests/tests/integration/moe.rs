//! Mixtures of experts, beyond what `families.rs` holds for every family: adapters on the experts in both of PEFT's
//! layouts, checkpoints with the experts of a layer in one tensor, quantized experts, and refusals.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype, TensorSpec, write_f32, write_safetensors};
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_lora::{InitLoraWeights, LoraConfig};
use rekindle_models::{
    Batch, CausalLm, GradientCheckpointing, LoadIn, LoadOptions, MemoryClass, MergeOptions, NonFinite, Sft, merge,
    quantize,
};
use rekindle_quant::QuantConfig;
use rekindle_tests::{Golden, Trajectory, assert_nll, read_json, relative_distance, tensors};

/// The adapters on experts that PEFT made.
const STACKED: [&str; 2] = ["experts", "experts-rslora"];

const TENSORS: &str = "model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";

/// Those whose checkpoints have a tensor for each linear of each expert.
fn linear_by_linear() -> Vec<Golden> {
    let names = ["qwen3-moe", "qwen3-moe-sparse", "qwen2-moe", "mixtral", "qwen3_5-moe"];
    names.map(|name| Golden::open(&format!("families/{name}"))).into()
}

fn mixtures() -> Vec<Golden> {
    let stacked = ["gpt-oss", "granite-moe"].map(|name| Golden::open(&format!("families/{name}")));
    linear_by_linear().into_iter().chain(stacked).collect()
}

fn nll(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    model.nll(batch).expect("golden rows fit")
}

fn gradient(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let mut grads = model.params().zero_grads();
    model.forward_backward(batch, 0.01, &mut grads, None).expect("golden rows fit");
    grads.all_values()
}

fn load(dir: &Path, change: impl FnOnce(&mut LoadOptions)) -> CausalLm {
    let mut options = LoadOptions::new(Device::cpu(), DType::F32, 128);
    change(&mut options);
    CausalLm::load(&Checkpoint::open(dir).expect("it was just written"), &options, &mut |_| ()).expect("it loads")
}

/// An adapter on attention and on every linear of the experts, with B that is not zero.
fn per_expert() -> LoraConfig {
    let targets = ["q_proj", "gate_proj", "up_proj", "down_proj"];
    LoraConfig::new(3).lora_alpha(6.0).target_modules(targets).init_lora_weights(InitLoraWeights::Random)
}

#[test]
fn adapters_on_experts_have_the_losses_of_peft() {
    for golden in mixtures() {
        for adapter in STACKED {
            let (model, batch) = (golden.load_adapted(adapter), golden.packed());
            let what = format!("{}/{adapter}", golden.name);
            assert_nll(&what, &batch, &nll(&model, &batch), &golden.adapter_losses(adapter));
            let dir = tempfile::tempdir().expect("a temporary directory");
            model.adapter().expect("it was just loaded").save(dir.path()).expect("the disk has room");
            let theirs = golden.dir.join("adapters").join(adapter);
            assert_eq!(tensors(&dir.path().join(ADAPTER)), tensors(&theirs.join(ADAPTER)), "{what}");
            let parameters = |dir: &Path| {
                let mut names: Vec<String> =
                    serde_json::from_value(read_json(&dir.join("adapter_config.json"))["target_parameters"].clone())
                        .expect("a list of names");
                names.sort();
                names
            };
            assert_eq!(parameters(dir.path()), parameters(&theirs), "{what}");
        }
    }
}

#[test]
fn training_adapters_on_experts_follows_peft() {
    for golden in mixtures() {
        let trajectory = Trajectory::open(&golden.dir.join("train/experts"));
        let mut model = golden.load_adapted(trajectory.adapter().expect("it trains an adapter"));
        trajectory.check(&format!("{}/experts", golden.name), &golden, &mut model, ADAPTER);
    }
}

/// Each row alone and among others; rows of few tokens leave most experts without one.
#[test]
fn a_packed_row_has_the_bits_of_the_row_alone() {
    for golden in mixtures() {
        for model in [golden.load(), golden.load_adapted("experts")] {
            let batch = golden.packed();
            let packed = nll(&model, &batch);
            for (row, document) in batch.documents().enumerate() {
                let alone = nll(&model, &golden.batch(&[row]));
                assert_eq!(alone, packed[document], "{}, row {row}", golden.name);
            }
        }
    }
}

#[test]
fn merged_experts_have_the_adapters_losses_and_the_bases_names() {
    for golden in mixtures() {
        for adapter in STACKED {
            let (batch, what) = (golden.packed(), format!("{}/{adapter}", golden.name));
            let want = golden.adapter_losses(adapter);
            let mut model = golden.load_adapted(adapter);
            model.merge_and_unload().expect("memory for it");
            assert_nll(&what, &batch, &nll(&model, &batch), &want);

            let dir = tempfile::tempdir().expect("a temporary directory");
            let base = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
            let saved = golden.load_adapted(adapter).adapter().expect("it was just loaded");
            merge(&base, &saved, MergeOptions::default(), dir.path(), &mut |_| ()).expect("the disk has room");
            assert_nll(&what, &batch, &nll(&load(dir.path(), |_| ()), &batch), &want);
            let names = |dir: &Path| tensors(&dir.join(TENSORS)).into_keys().collect::<Vec<_>>();
            assert_eq!(names(dir.path()), names(&golden.dir), "{what}");
        }
    }
}

/// The default layout has a key for each linear of each expert, under the names of the checkpoint.
#[test]
fn an_adapter_on_experts_is_saved_linear_by_linear_and_loaded_again() {
    for golden in linear_by_linear() {
        let (batch, mut model) = (golden.packed(), golden.load());
        model.add_adapter(&per_expert()).expect("the targets are there");
        let (want, want_gradient) = (nll(&model, &batch), gradient(&model, &batch));
        assert_ne!(want, nll(&golden.load(), &batch), "{}", golden.name);
        model.set_gradient_checkpointing(GradientCheckpointing::Block);
        assert_eq!(gradient(&model, &batch), want_gradient, "{}: recomputed", golden.name);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let adapter = model.adapter().expect("it was just added");
        adapter.save(dir.path()).expect("the disk has room");

        let written = tensors(&dir.path().join(ADAPTER));
        let module = |name: &str| name.trim_start_matches("base_model.model.").replace(".lora_A.weight", ".weight");
        let stored = tensors(&golden.dir.join(TENSORS));
        for (name, (shape, _)) in written.iter().filter(|(name, _)| name.ends_with("lora_A.weight")) {
            let (base, _) = stored.get(&module(name)).unwrap_or_else(|| panic!("{name} is on no tensor"));
            assert_eq!(shape, &[3, base[1]], "{name}");
        }
        let of_experts = written.keys().filter(|name| name.contains(".experts.")).count();
        let experts = stored.keys().filter(|name| name.contains(".experts.")).count();
        assert_eq!(of_experts, 2 * experts, "{}", golden.name);
        let mut again = golden.load();
        again.load_adapter(dir.path()).expect("it was just written");
        assert_eq!(nll(&again, &batch), want, "{}", golden.name);
        assert_eq!(gradient(&again, &batch), want_gradient, "{}", golden.name);

        model.merge_and_unload().expect("memory for it");
        let merged = nll(&model, &batch);
        assert!(merged.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-5 * b.abs().max(1.0)), "{}", golden.name);
    }
}

/// `goldens/families/mixtral/written-here` was written by Rekindle and read by PEFT, which turned it into stacked factors.
#[test]
fn peft_reads_an_adapter_that_was_saved_linear_by_linear() {
    let golden = Golden::open("families/mixtral");
    let dir = golden.dir.join("written-here");
    let mut model = golden.load();
    model.load_adapter(&dir).expect("it was written here");
    let expected = rekindle_tests::RowLosses::list(&read_json(&dir.join("peft.json"))["rows"]);
    let batch = golden.packed();
    assert_nll("written here", &batch, &nll(&model, &batch), &expected);
}

/// One adapter for both outputs and one for each are the same function when they share A.
#[test]
fn joined_and_separate_adapters_are_one_function() {
    let golden = Golden::open("families/qwen3-moe");
    let (batch, mut joined) = (golden.packed(), golden.load_adapted("experts"));
    let adapter = joined.adapter().expect("it was just loaded");
    let mut separate = adapter.clone();
    separate.factors.clear();
    for (name, factors) in &adapter.factors {
        let Some(expert) = name.strip_suffix(".gate_up_proj") else {
            separate.factors.insert(name.clone(), factors.clone());
            continue;
        };
        let half = factors.b.len() / 2;
        for (linear, b) in [("gate_proj", &factors.b[..half]), ("up_proj", &factors.b[half..])] {
            let part = rekindle_lora::LoraFactors { b: b.to_vec(), ..factors.clone() };
            separate.factors.insert(format!("{expert}.{linear}"), part);
        }
    }
    let targets = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let config = LoraConfig::new(3).lora_alpha(6.0).target_modules(targets);
    let names: Vec<String> = separate.factors.keys().cloned().collect();
    separate.config = rekindle_lora::peft::AdapterConfig::new(&config, None, &names);
    let dir = tempfile::tempdir().expect("a temporary directory");
    separate.save(dir.path()).expect("the disk has room");
    let mut model = golden.load();
    model.load_adapter(dir.path()).expect("it was just written");
    let (one, two) = (nll(&joined, &batch), nll(&model, &batch));
    assert!(one.iter().zip(&two).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs().max(1.0)));
    joined.remove_adapter();
    assert_eq!(nll(&joined, &batch), nll(&golden.load(), &batch), "the base is what it was");
}

/// The golden's checkpoint with the experts of each layer in one tensor, as transformers 5 has them in memory.
fn stacked_checkpoint(golden: &Golden, dir: &Path) {
    let mut stored = tensors(&golden.dir.join(TENSORS));
    type Parts = BTreeMap<(usize, bool), (Vec<usize>, Vec<f32>)>;
    let mut stacks: BTreeMap<(String, bool), Parts> = BTreeMap::new();
    let experts: Vec<String> = stored.keys().filter(|name| name.contains(".experts.")).cloned().collect();
    for name in experts {
        let tensor = stored.remove(&name).expect("it is listed");
        let (module, rest) = name.split_once(".experts.").expect("of an expert");
        let [expert, linear, _] = rest.split('.').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let module = module.replace("block_sparse_moe", "mlp");
        let is_down = matches!(linear, "down_proj" | "w2");
        let place = (expert.parse().expect("an index"), matches!(linear, "up_proj" | "w3"));
        stacks.entry((module, is_down)).or_default().insert(place, tensor);
    }
    for ((module, is_down), parts) in stacks {
        let experts = parts.keys().map(|(expert, _)| expert + 1).max().expect("there are experts");
        let (rows, cols) = (parts.len() / experts * parts[&(0, false)].0[0], parts[&(0, false)].0[1]);
        let values = parts.into_values().flat_map(|(_, values)| values).collect();
        let last = if is_down { "down_proj" } else { "gate_up_proj" };
        stored.insert(format!("{module}.experts.{last}"), (vec![experts, rows, cols], values));
    }
    let specs: Vec<TensorSpec> =
        stored.iter().map(|(name, (shape, _))| TensorSpec::new(name, Dtype::F32, shape.clone())).collect();
    let values: Vec<&Vec<f32>> = stored.values().map(|(_, values)| values).collect();
    let write = |index: usize, out: &mut dyn std::io::Write| write_f32(out, Dtype::F32, values[index]);
    write_safetensors(&dir.join(TENSORS), &BTreeMap::new(), &specs, write).expect("the disk has room");
    std::fs::copy(golden.dir.join("config.json"), dir.join("config.json")).expect("the disk has room");
}

#[test]
fn stacked_experts_are_the_same_model_and_stay_stacked() {
    for golden in linear_by_linear() {
        let (batch, dir) = (golden.packed(), tempfile::tempdir().expect("a temporary directory"));
        stacked_checkpoint(&golden, dir.path());
        let model = load(dir.path(), |_| ());
        assert_eq!(nll(&model, &batch), nll(&golden.load(), &batch), "{}", golden.name);
        let whole = tensors(&dir.path().join(TENSORS));
        let out = tempfile::tempdir().expect("a temporary directory");
        model.save(out.path(), Dtype::F32).expect("the disk has room");
        assert_eq!(tensors(&out.path().join(TENSORS)), whole, "{}", golden.name);
        let full = load(dir.path(), |options| options.full_finetuning = true);
        let out = tempfile::tempdir().expect("a temporary directory");
        full.save(out.path(), Dtype::F32).expect("the disk has room");
        assert_eq!(tensors(&out.path().join(TENSORS)), whole, "{}", golden.name);

        // Quantized alike, and written linear by linear, which is the only layout of codes.
        let nf4 = |dir: &Path| load(dir, |options| options.load_in = Some(LoadIn::FourBit(None)));
        assert_eq!(nll(&nf4(dir.path()), &batch), nll(&nf4(&golden.dir), &batch), "{}", golden.name);
        let quantized = |from: &Path| {
            let (out, base) = (tempfile::tempdir().expect("a temporary directory"), Checkpoint::open(from));
            let base = base.expect("it opens");
            quantize(&base, LoadIn::FourBit(None), None, out.path(), &mut |_| ()).expect("it quantizes");
            std::fs::read(out.path().join(TENSORS)).expect("it was just written")
        };
        assert_eq!(quantized(dir.path()), quantized(&golden.dir), "{}", golden.name);

        // An adapter merged on disk keeps the layout too.
        let adapter = golden.load_adapted("experts").adapter().expect("it was just loaded");
        let base = Checkpoint::open(dir.path()).expect("it was just written");
        let out = tempfile::tempdir().expect("a temporary directory");
        merge(&base, &adapter, MergeOptions::default(), out.path(), &mut |_| ()).expect("the disk has room");
        let merged = tensors(&out.path().join(TENSORS));
        assert!(merged.keys().eq(whole.keys()), "{}", golden.name);
        let losses = golden.adapter_losses("experts");
        assert_nll(&golden.name, &batch, &nll(&load(out.path(), |_| ()), &batch), &losses);
    }
}

/// Every quantized format against the dense model of the decoded weights, losses and the gradients of an adapter; and the
/// checkpoint that is written back is the one that `quantize` makes.
#[test]
fn quantized_experts_are_their_decoded_weights() {
    for golden in mixtures() {
        let (batch, base) = (golden.packed(), Checkpoint::open(&golden.dir).expect("a golden checkpoint opens"));
        let single = QuantConfig { double_quant: false, ..QuantConfig::default() };
        for load_in in [LoadIn::FourBit(None), LoadIn::FourBit(Some(single)), LoadIn::EightBit, LoadIn::Fp8] {
            let what = format!("{} {load_in:?}", golden.name);
            let quantized = tempfile::tempdir().expect("a temporary directory");
            quantize(&base, load_in, None, quantized.path(), &mut |_| ()).expect("it quantizes");
            let mut model = golden.load_with(|options| options.load_in = Some(load_in));
            let report = model.memory_report();
            let codes = report.line(MemoryClass::PackedCodes).expect("something is quantized").weights;
            let linears: usize =
                model.linears().iter().filter(|(name, ..)| !is_router(name)).map(|(_, i, o)| i * o).sum();
            assert_eq!(codes, linears as u64, "{what}: all linears but routers are quantized");
            let out = tempfile::tempdir().expect("a temporary directory");
            model.save(out.path(), Dtype::F32).expect("the disk has room");
            let bytes = |dir: &Path| std::fs::read(dir.join(TENSORS)).expect("it was just written");
            if load_in == LoadIn::FourBit(None) {
                // The few scales of an expert of this size don't fill a block of 256, so the stack holds them in f32.
                assert_eq!(nll(&load(out.path(), |_| ()), &batch), nll(&model, &batch), "{what}: saved and loaded");
            } else {
                assert!(bytes(out.path()) == bytes(quantized.path()), "{what}: saved as it would be quantized");
            }

            // A merge with an adapter that does nothing decodes every weight.
            let mut zero = golden.load();
            zero.add_adapter(&LoraConfig::new(1).target_modules(["q_proj"])).expect("the target is there");
            let (dense, stored) = (tempfile::tempdir().expect("a directory"), Checkpoint::open(quantized.path()));
            let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
            let adapter = zero.adapter().expect("it was just added");
            merge(&stored.expect("it opens"), &adapter, options, dense.path(), &mut |_| ()).expect("room on the disk");
            let mut decoded = load(dense.path(), |_| ());
            let (got, want) = (nll(&model, &batch), nll(&decoded, &batch));
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs().max(1.0)), "{what}");
            for model in [&mut model, &mut decoded] {
                let config = per_expert();
                let is_joined = golden.name.ends_with("gpt-oss");
                let joined = config.clone().target_modules(["q_proj", "gate_up_proj", "down_proj"]);
                model.add_adapter(if is_joined { &joined } else { &config }).expect("the targets are there");
            }
            let error = relative_distance(&gradient(&model, &batch), &gradient(&decoded, &batch));
            assert!(error < 1e-5, "{what}: gradients are off by {error:e}");
        }
    }
}

/// The memory report shows experts in 16 bits, as bitsandbytes leaves stacked experts without a message.
#[test]
fn experts_that_stay_dense_are_a_line_of_the_memory_report() {
    for golden in mixtures() {
        let skip = vec![".*experts".to_owned()];
        let model = golden.load_with(|options| {
            options.load_in = Some(LoadIn::FourBit(None));
            options.skip_modules = Some(skip);
        });
        let report = model.memory_report();
        let of_experts = |(name, ..): &&(String, usize, usize)| name.contains(".experts.");
        let elements: usize = model.linears().iter().filter(of_experts).map(|(_, input, out)| input * out).sum();
        let line = report.line(MemoryClass::DenseExperts).expect("the experts are not quantized");
        assert_eq!((line.weights, line.bytes), (elements as u64, 4 * elements as u64), "{}", golden.name);
        assert!(report.to_string().contains("dense experts"), "{report}");
        assert!(report.line(MemoryClass::PackedCodes).is_some(), "{}: attention is quantized", golden.name);
    }
}

fn is_router(linear: &str) -> bool {
    linear.ends_with(".gate") || linear.ends_with(".router") || linear.ends_with(".shared_expert_gate")
}

#[test]
fn experts_are_trained_in_place_too() {
    let golden = Golden::open("families/qwen3-moe");
    for load_in in [None, Some(LoadIn::EightBit)] {
        let model = golden.load_with(|options| {
            options.full_finetuning = true;
            options.load_in = load_in;
            options.stochastic_rounding = load_in.is_none();
        });
        assert!(model.params().are_in_place());
        let grads = gradient(&model, &golden.packed());
        let at = model.params().infos().iter().find(|info| info.name.ends_with("experts.gate_up_proj"));
        let range = at.expect("the experts are one parameter").at.range();
        assert!(grads[range].iter().any(|g| *g != 0.0));
        let out = tempfile::tempdir().expect("a temporary directory");
        model.save(out.path(), Dtype::BF16).expect("the disk has room");
        let names = |dir: &Path| tensors(&dir.join(TENSORS)).into_keys().collect::<Vec<_>>();
        assert_eq!(names(out.path()), names(&golden.dir));
    }
}

#[test]
fn the_router_is_trained_only_where_it_is_a_target() {
    let golden = Golden::open("families/qwen3-moe");
    let trained = |config: &LoraConfig| {
        let mut model = golden.load();
        model.add_adapter(config).expect("the targets are there");
        let grads = gradient(&model, &golden.packed());
        let names: Vec<String> = model.params().infos().iter().map(|info| info.name.clone()).collect();
        assert!(grads.iter().any(|g| *g != 0.0));
        names.iter().any(|name| name.contains(".mlp.gate."))
    };
    assert!(!trained(&LoraConfig::new(2).target_modules("all-linear")));
    assert!(trained(&LoraConfig::new(2).target_modules(["gate"])));
}

#[test]
fn a_damaged_expert_is_found_by_name() {
    let golden = Golden::open("families/qwen2-moe");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut stored = tensors(&golden.dir.join(TENSORS));
    let name = "model.layers.1.mlp.experts.5.up_proj.weight";
    stored.get_mut(name).expect("it is there").1[7] = f32::NAN;
    let specs: Vec<TensorSpec> =
        stored.iter().map(|(name, (shape, _))| TensorSpec::new(name, Dtype::F32, shape.clone())).collect();
    let values: Vec<&Vec<f32>> = stored.values().map(|(_, values)| values).collect();
    let write = |index: usize, out: &mut dyn std::io::Write| write_f32(out, Dtype::F32, values[index]);
    write_safetensors(&dir.path().join(TENSORS), &BTreeMap::new(), &specs, write).expect("the disk has room");
    std::fs::copy(golden.dir.join("config.json"), dir.path().join("config.json")).expect("the disk has room");
    let found =
        load(dir.path(), |_| ()).first_non_finite(&Sft, &[golden.packed()], 1.0, None).expect("the CPU does not fail");
    let Some(NonFinite::Weight { name: found, trained: false, .. }) = found else { panic!("{found:?}") };
    assert_eq!(found, name);
}

#[test]
fn adapters_of_other_mixtures_are_refused_with_what_is_wrong() {
    let (golden, other) = (Golden::open("families/qwen3-moe"), Golden::open("families/qwen2-moe"));
    let refused = |golden: &Golden, dir: &Path| {
        let error = golden.load().load_adapter(dir).expect_err("it is another model's");
        error.to_string()
    };
    // Eight experts both; the widths differ.
    let error = refused(&other, &golden.dir.join("adapters/experts"));
    assert!(error.contains("experts with r = 3 have"), "{error}");
    // Another number of experts.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let adapter = golden.dir.join("adapters/experts");
    let mut stored = tensors(&adapter.join(ADAPTER));
    for (shape, values) in stored.values_mut().filter(|(shape, _)| shape[0] == 24) {
        shape[0] = 21;
        values.truncate(21 * shape[1]);
    }
    let specs: Vec<TensorSpec> =
        stored.iter().map(|(name, (shape, _))| TensorSpec::new(name, Dtype::F32, shape.clone())).collect();
    let values: Vec<&Vec<f32>> = stored.values().map(|(_, values)| values).collect();
    let write = |index: usize, out: &mut dyn std::io::Write| write_f32(out, Dtype::F32, values[index]);
    write_safetensors(&dir.path().join(ADAPTER), &BTreeMap::new(), &specs, write).expect("the disk has room");
    let config = "adapter_config.json";
    std::fs::copy(adapter.join(config), dir.path().join(config)).expect("the disk has room");
    let error = refused(&golden, dir.path());
    assert!(
        error.contains("have shapes [21, 32] and [48, 24]; 8 experts with r = 3 have [24, 32] and [48, 24]"),
        "{error}"
    );

    let mut model = golden.load();
    let error = model.add_adapter(&LoraConfig::new(2).lora_dropout(0.1)).expect_err("experts have no dropout");
    assert!(error.to_string().contains("lora_dropout is 0.1, and adapters on experts have none"), "{error}");
    let parameters = LoraConfig::new(2).target_parameters(["mlp.experts.gate_up"]);
    let error = model.add_adapter(&parameters).expect_err("there is no such parameter");
    assert!(error.to_string().contains("is no parameter of this model's experts"), "{error}");
}

/// A checkpoint in which some experts lack a tensor, or the stacked tensor has another number of experts.
#[test]
fn missing_experts_are_named() {
    let golden = Golden::open("families/qwen3-moe");
    let dir = tempfile::tempdir().expect("a temporary directory");
    stacked_checkpoint(&golden, dir.path());
    let mut config = read_json(&golden.dir.join("config.json"));
    let key = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    config[key] = 7.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("the disk has room");
    let options = LoadOptions::new(Device::cpu(), DType::F32, 128);
    let open = |dir: &Path| Checkpoint::open(dir).expect("it opens");
    let error = CausalLm::load(&open(dir.path()), &options, &mut |_| ()).expect_err("it has eight experts");
    let error = error.to_string();
    assert!(
        error.contains("\"model.layers.0.mlp.experts.gate_up_proj\" has shape [8, 48, 32], expected [7, 48, 32]"),
        "{error}"
    );
    config[key] = 9.into();
    let copy = tempfile::tempdir().expect("a temporary directory");
    std::fs::copy(golden.dir.join(TENSORS), copy.path().join(TENSORS)).expect("the disk has room");
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("the disk has room");
    let error = CausalLm::load(&open(copy.path()), &options, &mut |_| ()).expect_err("it has eight experts");
    assert!(error.to_string().contains("experts.8."), "{error}");
}

/// Two tokens of one document reach at most six of eight experts, and a single token exactly top_k.
#[test]
fn few_tokens_leave_experts_without_rows() {
    let golden = Golden::open("families/qwen3-moe");
    let model = golden.load_adapted("experts");
    let ids = &golden.rows[2].input_ids;
    let logits = |ids: &[u32]| {
        let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        nll(&model, &Batch::from_rows([(ids, &labels[..])], 0))
    };
    let long = logits(&ids[..9]);
    assert_eq!(logits(&ids[..2])[..1], long[..1], "a prefix has the bits of the whole");
    assert_eq!(logits(&ids[..3])[..2], long[..2]);
    let grads = gradient(&model, &Batch::from_rows([(&ids[..2], &[-100, ids[1] as i32][..])], 0));
    assert!(grads.iter().all(|g| g.is_finite()) && grads.contains(&0.0), "experts without rows have no gradient");
    let one: Vec<u32> = vec![ids[0]];
    let config = rekindle_models::GenerationConfig { max_new_tokens: 3, ..Default::default() };
    let (tokens, _) = model.generate(&one, &config, |_| true).expect("the prompt fits");
    assert_eq!(tokens.len(), 3);
}

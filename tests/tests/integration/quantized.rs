//! Compares quantized bases with transformers and bitsandbytes: losses, files byte for byte, and quantizing on load.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, CheckpointHeaders, Dtype};
use rekindle_models::{LoadIn, MemoryClass, MemoryReport, quantize};
use rekindle_quant::{QuantConfig, QuantType};
use rekindle_tests::{Golden, RowLosses, assert_nll, goldens, read_json, worst_nll};

/// Returns every checkpoint that bitsandbytes wrote, with the key of its losses in `expect.json`. bitsandbytes decodes
/// weights quantized from bfloat16 to bfloat16 regardless of the compute dtype; Rekindle decodes to the compute dtype.
fn checkpoints() -> Vec<(String, &'static str)> {
    let entries = std::fs::read_dir(goldens().join("quantized")).expect("the quantized goldens");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.join("config.json").exists())
        .map(|path| format!("quantized/{}", path.file_name().expect("a name").to_string_lossy()))
        .collect();
    names.sort();
    assert_eq!(names.len(), 13, "checkpoints listed in the goldens' README");
    let key = |name: &str| if name.contains("bfloat16-nf4") { "decoded_in_float32" } else { "rows" };
    names.into_iter().map(|name| (name.clone(), key(&name))).collect()
}

#[test]
fn every_checkpoint_gives_the_losses_of_its_dequantized_weights() {
    for (name, key) in checkpoints() {
        let golden = Golden::open(&name);
        let rows = if key == "rows" { &golden.expect[key] } else { &golden.expect[key]["rows"] };
        let (model, batch) = (golden.load(), golden.packed());
        let nll = model.nll(&batch).expect("golden rows fit");
        assert_nll(&name, &batch, &nll, &RowLosses::list(rows));
        println!("{name}: off by {:.1e}", worst_nll(&batch, &nll, &RowLosses::list(rows)));
        let report = model.memory_report();
        assert!(report.line(MemoryClass::PackedCodes).is_some_and(|line| line.bytes > 0), "{name}:\n{report}");
    }
}

#[test]
fn adapters_work_over_quantized_like_over_dequantized_weights() {
    let golden = Golden::open("quantized/qwen3-tied-nf4-double");
    let model = golden.load_adapted("all-linear");
    let batch = golden.packed();
    let nll = model.nll(&batch).expect("golden rows fit");
    assert_nll("nf4 with adapter", &batch, &nll, &golden.adapter_losses("all-linear"));
}

/// Returns the dtype, shape and bytes of every tensor of a checkpoint.
fn contents(dir: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint opens");
    let tensor = |name: &str| {
        let view = checkpoint.get(name).expect("a listed tensor is there");
        (name.to_owned(), (view.dtype, view.shape.to_vec(), view.data.to_vec()))
    };
    checkpoint.names().map(tensor).collect()
}

fn assert_same(what: &str, got: &Path, want: &Path) {
    let (got, want) = (contents(got), contents(want));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    for (name, want) in want {
        assert!(got[&name] == want, "{what}: \"{name}\" changed");
    }
}

#[test]
fn a_loaded_checkpoint_is_saved_byte_for_byte() {
    for (name, _) in checkpoints() {
        let golden = Golden::open(&name);
        let out = tempfile::tempdir().expect("a temporary directory");
        golden.load().save(out.path(), Dtype::F32).expect("the disk has space");
        assert_same(&name, out.path(), &golden.dir);
        let config = |dir: &Path| read_json(&dir.join("config.json"));
        assert_eq!(config(out.path()), config(&golden.dir), "{name}");
    }
}

/// The tolerance for the offset of double quantization, a mean whose last bits depend on the GPU's summation order.
const OFFSET_ULPS: u32 = 2;

#[test]
fn quantize_writes_the_files_of_bitsandbytes() {
    let four_bit = |quant_type, double_quant| {
        LoadIn::FourBit(Some(QuantConfig { quant_type, double_quant, ..QuantConfig::default() }))
    };
    for (base, made, load_in) in [
        ("qwen3-tied", "qwen3-tied-nf4", four_bit(QuantType::Nf4, false)),
        ("qwen3-tied", "qwen3-tied-fp4", four_bit(QuantType::Fp4, false)),
        ("qwen3-tied", "qwen3-tied-int8", LoadIn::EightBit),
        ("qwen2", "qwen2-int8", LoadIn::EightBit),
        ("llama3", "llama3-int8", LoadIn::EightBit),
        ("qwen3-tied", "qwen3-tied-nf4-double", LoadIn::FourBit(None)),
        ("qwen2", "qwen2-nf4-double", LoadIn::FourBit(None)),
    ] {
        let out = tempfile::tempdir().expect("a temporary directory");
        let checkpoint = Checkpoint::open(&goldens().join(base)).expect("a golden checkpoint opens");
        let report = quantize(&checkpoint, load_in, None, out.path(), &mut |_| ()).expect("the disk has space");
        let want = goldens().join("quantized").join(made);
        assert_eq!(
            report,
            MemoryReport::of_headers(&CheckpointHeaders::open(out.path()).expect("just written"), &config(&want))
        );
        if !made.ends_with("double") {
            assert_same(made, out.path(), &want);
        } else {
            assert_same_but_offsets(made, out.path(), &want);
        }
        let section = |dir: &Path| read_json(&dir.join("config.json"))["quantization_config"].clone();
        assert_eq!(section(out.path()), section(&want), "{made}");
    }
}

fn config(dir: &Path) -> rekindle_models::ModelConfig {
    let checkpoint = Checkpoint::open(dir).expect("a golden checkpoint opens");
    rekindle_models::ModelConfig::from_checkpoint(&checkpoint).expect("a golden configuration")
}

/// Asserts that codes are equal bit for bit, and nested scales up to the difference of the offset they depend on.
fn assert_same_but_offsets(what: &str, got: &Path, want: &Path) {
    let (got, want) = (contents(got), contents(want));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    let mut states = 0;
    for (name, (dtype, shape, bytes)) in &want {
        let (got_dtype, got_shape, got) = &got[name];
        if name.ends_with("bitsandbytes__nf4") {
            let offset = |bytes: &[u8]| {
                let state: serde_json::Value = serde_json::from_slice(bytes).expect("a state is JSON");
                state["nested_offset"].as_f64().expect("a number") as f32
            };
            let (got, want) = (offset(got), offset(bytes));
            assert!(got.to_bits().abs_diff(want.to_bits()) <= OFFSET_ULPS, "{what}: {name}: {got} and {want}");
            states += 1;
        } else if name.ends_with("nested_absmax") {
            for (got, want) in got.as_chunks::<4>().0.iter().zip(bytes.as_chunks::<4>().0) {
                let (got, want) = (f32::from_le_bytes(*got), f32::from_le_bytes(*want));
                // The scale is |absmax − offset|. Both are below 1 here, so an ulp of the offset is at most 2⁻²⁴.
                assert!((got - want).abs() <= 2.0 * 2f32.powi(-24), "{what}: {name}: {got} and {want}");
            }
        } else {
            assert_eq!((got_dtype, got_shape), (dtype, shape), "{what}: {name}");
            assert!(got == bytes, "{what}: {name} differs");
        }
    }
    assert!(states > 0, "{what} has no states");
}

#[test]
fn quantizing_on_load_equals_loading_a_quantized_checkpoint() {
    for load_in in [LoadIn::FourBit(None), LoadIn::EightBit] {
        let base = Golden::open("llama3");
        let out = tempfile::tempdir().expect("a temporary directory");
        let checkpoint = Checkpoint::open(&base.dir).expect("a golden checkpoint opens");
        quantize(&checkpoint, load_in, None, out.path(), &mut |_| ()).expect("the disk has space");
        let stored = Golden { dir: out.path().to_owned(), ..Golden::open("llama3") };
        let batch = base.packed();
        let while_loading = base.load_with(|options| options.load_in = Some(load_in));
        let (a, b) = (while_loading.nll(&batch), stored.load().nll(&batch));
        assert_eq!(a.expect("golden rows fit"), b.expect("golden rows fit"));
        assert_eq!(while_loading.memory_report(), stored.load().memory_report());
        let saved = tempfile::tempdir().expect("a temporary directory");
        while_loading.save(saved.path(), Dtype::F32).expect("the disk has space");
        assert_same("saved while loading", saved.path(), out.path());
    }
}

#[test]
fn skipped_modules_stay_dense() {
    let golden = Golden::open("qwen3-tied");
    let skip = vec!["lm_head".to_owned(), "model.layers.0".to_owned(), "down_proj".to_owned()];
    let model = golden.load_with(|options| {
        options.load_in = Some(LoadIn::FourBit(None));
        options.skip_modules = Some(skip);
    });
    let report = model.memory_report();
    let c = model.config();
    let one_block = model.linears().iter().take(7).map(|(_, input, out)| input * out).sum::<usize>();
    let down = c.hidden_size() * c.intermediate_size();
    let dense = report.line(MemoryClass::DenseLinears).expect("some stay dense").weights;
    assert_eq!(dense as usize, one_block + (c.num_hidden_layers() - 1) * down);
}

fn refused(golden: &str, change: impl FnOnce(&mut rekindle_models::LoadOptions)) -> String {
    let mut options =
        rekindle_models::LoadOptions::new(rekindle_kernels::Device::cpu(), rekindle_kernels::DType::F32, 64);
    change(&mut options);
    let checkpoint = Checkpoint::open(&goldens().join(golden)).expect("a golden checkpoint opens");
    let loaded = rekindle_models::CausalLm::load(&checkpoint, &options, &mut |_| ());
    loaded.expect_err("asks for what cannot be").to_string()
}

#[test]
fn a_format_other_than_the_checkpoints_is_refused() {
    let fp4 = QuantConfig { quant_type: QuantType::Fp4, ..QuantConfig::default() };
    for (golden, load_in, words) in [
        ("quantized/qwen3-tied-nf4", LoadIn::EightBit, ["4-bit (nf4)", "load_in_8bit"]),
        ("quantized/qwen3-tied-nf4", LoadIn::SixteenBit, ["4-bit (nf4)", "load_in_16bit"]),
        ("quantized/qwen2-int8", LoadIn::FourBit(None), ["8-bit (LLM.int8())", "load_in_4bit"]),
        ("quantized/qwen2-nf4-double", LoadIn::FourBit(Some(fp4)), ["4-bit (nf4)", "quant_type \"fp4\""]),
    ] {
        let text = refused(golden, |options| options.load_in = Some(load_in));
        for part in words.into_iter().chain(["is already quantized", "remove it to load the checkpoint as it is"]) {
            assert!(text.contains(part), "\"{part}\" is not in: {text}");
        }
    }
    let blocks = QuantConfig { blocksize: rekindle_quant::Blocksize::B256, ..fp4 };
    let text =
        refused("quantized/qwen3-tied-fp4-double", |options| options.load_in = Some(LoadIn::FourBit(Some(blocks))));
    assert!(text.contains("has blocks of 64, but blocksize is 256"), "{text}");
    // Requesting the checkpoint's own format is allowed.
    let golden = Golden::open("quantized/qwen3-tied-fp4-double");
    golden.load_with(|options| options.load_in = Some(LoadIn::FourBit(Some(fp4))));
    golden.load_with(|options| options.load_in = Some(LoadIn::FourBit(None)));
}

#[test]
fn unsatisfiable_arguments_are_refused() {
    let text = refused("qwen2", |options| options.skip_modules = Some(vec!["lm_head".to_owned()]));
    assert!(text.contains("nothing is quantized"), "{text}");
    let text = refused("quantized/qwen2-nf4-double", |options| options.full_finetuning = true);
    assert!(text.contains("doubly quantized scales") && text.contains("double_quant = false"), "{text}");
    let checkpoint = Checkpoint::open(&goldens().join("quantized/qwen2-int8")).expect("a golden checkpoint opens");
    let out = tempfile::tempdir().expect("a temporary directory");
    let error = quantize(&checkpoint, LoadIn::EightBit, None, out.path(), &mut |_| ()).expect_err("it is quantized");
    assert!(error.to_string().contains("use the 16-bit checkpoint"), "{error}");
}

/// Copies a quantized golden with one tensor changed or omitted.
fn damaged(golden: &str, name: &str, change: impl FnOnce(&mut Vec<u8>) -> bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut all = contents(&goldens().join(golden));
    if !change(&mut all.get_mut(name).expect("a tensor of the golden").2) {
        all.remove(name);
    }
    let count = |dtype: Dtype, shape: &[usize], bytes: usize| {
        // If the number of bytes changed, the shape becomes one-dimensional to match it.
        let fits = shape.iter().product::<usize>() * dtype.size() == bytes;
        if fits { shape.to_vec() } else { vec![bytes / dtype.size()] }
    };
    let specs: Vec<_> = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            rekindle_hub::TensorSpec::new(name, *dtype, count(*dtype, shape, bytes.len()))
        })
        .collect();
    let bytes: Vec<&[u8]> = all.values().map(|(_, _, bytes)| bytes.as_slice()).collect();
    let path = dir.path().join("model.safetensors");
    rekindle_hub::write_safetensors(&path, &BTreeMap::new(), &specs, |i, out| out.write_all(bytes[i]))
        .expect("written");
    std::fs::copy(goldens().join(golden).join("config.json"), dir.path().join("config.json")).expect("copied");
    dir
}

#[test]
fn damaged_quantized_tensors_are_named() {
    const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";
    let shorten = |bytes: &mut Vec<u8>| {
        bytes.truncate(bytes.len() - 4);
        true
    };
    let drop = |_: &mut Vec<u8>| false;
    let absmax = format!("{WEIGHT}.absmax");
    let nf4 = "quantized/qwen3-tied-nf4";
    for (dir, words) in [
        (damaged(nf4, &absmax, shorten), ["needs 60 absmax values, got 59", "[96, 40] with blocksize 64"]),
        (damaged(nf4, WEIGHT, shorten), ["needs 1920 packed bytes, got 1916", "damaged or of another shape"]),
        (
            damaged(nf4, &absmax, drop),
            ["no \"model.layers.0.self_attn.q_proj.weight.absmax\"", "are all shards of the checkpoint there?"],
        ),
        (
            damaged("quantized/qwen2-int8", "model.layers.0.mlp.up_proj.SCB", shorten),
            ["SCB values", "mlp.up_proj.weight"],
        ),
    ] {
        let checkpoint = Checkpoint::open(dir.path()).expect("the file itself is whole");
        let options =
            rekindle_models::LoadOptions::new(rekindle_kernels::Device::cpu(), rekindle_kernels::DType::F32, 64);
        let error =
            rekindle_models::CausalLm::load(&checkpoint, &options, &mut |_| ()).expect_err("damaged").to_string();
        for part in words {
            assert!(error.contains(part), "\"{part}\" is not in: {error}");
        }
    }
}

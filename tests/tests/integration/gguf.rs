//! GGUF files of the library against those of llama.cpp's converter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle::{DeviceKind, Dtype, FastLanguageModel, GgufExport, GgufFile, GgufFileType, Merge};
use rekindle_gguf::{GgmlType, GgufModel, GgufTensor, MetadataValue, interleave_rows};
use rekindle_hub::Checkpoint;
use rekindle_tests::goldens;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Keys of the converter that llama.cpp does not read for these architectures, or reads the same value from another.
const NOT_WRITTEN: [&str; 2] = ["rope.scaling.yarn_log_multiplier", "phi3.attention.sliding_window"];

/// Checkpoints that are not exported, with a part of the error.
const REFUSED: [(&str, &str); 11] = [
    ("families/qwen3-moe-sparse", "layers that differ in their sizes"),
    ("families/qwen3_5", "values of 32 channels and keys of 16"),
    ("families/qwen3_5-moe", "values of 32 channels and keys of 16"),
    ("families/qwen3_5-multimodal", "values of 32 channels and keys of 16"),
    ("families/qwen3_5-moe-multimodal", "values of 32 channels and keys of 16"),
    ("families/glm", "the heads have 64 channels and the embedding 36"),
    ("families/gpt-oss", "swiglu_limit 7"),
    ("families/exaone4", "layers have a window, but there are not 64 layers"),
    ("families/gemma2", "the attention scores are multiplied with"),
    ("families/gemma3", "the attention scores are multiplied with"),
    ("families/gemma3-multimodal", "the attention scores are multiplied with"),
];

/// Values of checkpoints that are not the converter's.
const OTHER_VALUES: [(&str, &str); 8] = [
    // The width of dense layers, of which there are none.
    ("families/qwen2-moe", "qwen2moe.feed_forward_length"),
    ("families/qwen3-moe", "qwen3moe.feed_forward_length"),
    ("gguf/qwen35-moe", "qwen35moe.feed_forward_length"),
    // The converter reads the keys of ChatGLM's own code, which transformers' config.json does not have, and takes defaults.
    ("gguf/glm", "chatglm.context_length"),
    ("gguf/glm", "chatglm.attention.layer_norm_rms_epsilon"),
    ("gguf/glm", "chatglm.rope.dimension_count"),
    // Without it, llama.cpp takes the context length, which is the same here.
    ("families/phi3", "phi3.rope.scaling.original_context_length"),
    ("families/phi4-mini", "phi3.rope.scaling.original_context_length"),
];

fn export(model: &Path, out: &Path, file_types: &[GgufFileType]) -> Result<Vec<GgufFile>, rekindle::Error> {
    GgufExport::new(model).name("tiny").write(out, file_types, &mut |_, _| ())
}

/// Returns the hash of a tensor's values, or of its blocks.
fn sha256(tensor: &GgufTensor<'_>) -> String {
    let bytes = match tensor.kind {
        GgmlType::F32 => tensor.to_f32().expect("F32").iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => tensor.data.to_vec(),
    };
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns true if a metadata value is that of the golden.
fn same(ours: &MetadataValue, golden: &Value) -> bool {
    match golden {
        Value::Number(number) => {
            let (got, expected) = (ours.as_f64().unwrap_or(f64::NAN), number.as_f64().expect("a number"));
            (got - expected).abs() <= expected.abs() * 1e-6
        }
        Value::String(text) => ours.as_str() == Some(text),
        Value::Array(list) if list.iter().all(Value::is_boolean) => {
            let flags: Vec<bool> = list.iter().filter_map(Value::as_bool).collect();
            *ours == MetadataValue::from(flags)
        }
        Value::Array(list) => {
            let numbers: Option<Vec<i64>> = list.iter().map(Value::as_i64).collect();
            ours.as_integers().map(|list| list.into_iter().map(|number| number as i64).collect()) == numbers
        }
        _ => false,
    }
}

#[test]
fn every_family_has_the_file_of_llama_cpps_converter() {
    let golden: Value = rekindle_hub::read_json(&goldens().join("gguf/converted.json")).expect("a golden");
    let mut problems = Vec::new();
    let mut compared = 0;
    for (name, expected) in golden["checkpoints"].as_object().expect("an object") {
        let out = tempfile::tempdir().expect("a temporary directory");
        let written = export(&goldens().join(name), out.path(), &[GgufFileType::F32]);
        if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| refused == name) {
            let error = written.expect_err("it is refused").to_string();
            assert!(error.contains(reason), "{name}: {error}");
            continue;
        }
        let written = match written {
            Ok(written) => written,
            Err(error) => {
                problems.push(format!("{name}: {error}"));
                continue;
            }
        };
        let model = GgufModel::open(&written[0].paths[0]).expect("just written");
        // The converter has no file for one of them.
        let Some(tensors) = expected["tensors"].as_object() else { continue };
        let text = |key: &str| model.metadata(key).and_then(MetadataValue::as_str).map(str::to_owned);
        assert_eq!(text("general.architecture").as_deref(), expected["architecture"].as_str(), "{name}");
        for (key, value) in expected["metadata"].as_object().expect("an object") {
            let is_other = OTHER_VALUES.contains(&(name.as_str(), key.as_str()));
            let is_written = !is_other && !NOT_WRITTEN.iter().any(|skipped| key.ends_with(skipped));
            if is_written && !model.metadata(key).is_some_and(|ours| same(ours, value)) {
                problems.push(format!("{name}: {key} is {:?} instead of {value}", model.metadata(key)));
            }
        }
        for (tensor, shape_and_hash) in tensors {
            let Some(ours) = model.tensor(tensor) else {
                problems.push(format!("{name}: {tensor} is missing"));
                continue;
            };
            if Value::from(ours.shape) != shape_and_hash[0] || sha256(&ours) != shape_and_hash[1] {
                problems.push(format!("{name}: {tensor} {:?} differs from {shape_and_hash}", ours.shape));
            }
            compared += 1;
        }
        if model.tensors().count() != tensors.len() {
            problems.push(format!("{name}: {} tensors instead of {}", model.tensors().count(), tensors.len()));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(compared > 500, "{compared} tensors");
}

/// Experts in MXFP4 stay as they are; other types quantize what they decode to.
#[test]
fn mxfp4_experts_are_kept_or_quantized() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let types = [GgufFileType::F32, GgufFileType::MXFP4_MOE, GgufFileType::Q8_0];
    let files = export(&goldens().join("gguf/gpt-oss"), out.path(), &types).expect("it is supported");
    let models: Vec<_> = files.iter().map(|file| GgufModel::open(&file.paths[0]).expect("just written")).collect();
    for name in ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] {
        let name = format!("blk.1.{name}.weight");
        let [exact, kept, quantized] = [0, 1, 2].map(|at: usize| models[at].tensor(&name).expect("experts"));
        assert_eq!([exact.kind, kept.kind, quantized.kind], [GgmlType::MXFP4, GgmlType::MXFP4, GgmlType::Q8_0]);
        assert!(exact.data == kept.data, "{name}");
        let columns = *exact.shape.last().expect("a dimension") as usize;
        let values = exact.to_f32().expect("it decodes");
        assert!(GgmlType::Q8_0.quantize(&values, columns, None).expect("whole blocks") == quantized.data, "{name}");
    }
    assert_eq!(models[1].tensor("blk.0.attn_q.weight").expect("a linear").kind, GgmlType::Q8_0);
}

#[test]
fn quantized_files_are_quantized_f32_files() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let types = [GgufFileType::F32, GgufFileType::BF16, GgufFileType::Q8_0, GgufFileType::Q4_K_M];
    let files = export(&goldens().join("llama2"), out.path(), &types).expect("it is supported");
    let models: Vec<_> = files.iter().map(|file| GgufModel::open(&file.paths[0]).expect("just written")).collect();
    let names: Vec<_> = files.iter().map(|file| file.paths[0].file_name().expect("a name").to_owned()).collect();
    assert_eq!(names, ["tiny-F32.gguf", "tiny-BF16.gguf", "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"]);
    for (model, file_type) in models.iter().zip(types) {
        assert_eq!(model.metadata("general.file_type"), Some(&file_type.id().into()));
        for tensor in model.tensors() {
            let exact = models[0].tensor(tensor.name).expect("the same names").to_f32().expect("F32");
            let columns = *tensor.shape.last().expect("a dimension") as usize;
            let bytes = tensor.kind.quantize(&exact, columns, None).expect("whole blocks");
            assert!(bytes == tensor.data, "{file_type} {}", tensor.name);
        }
    }
}

fn adapter(name: &str) -> PathBuf {
    goldens().join("lora-options/qwen3-tied/adapters").join(name)
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let model = GgufModel::open(path).expect("just written");
    model.tensors().map(|tensor| (tensor.name.to_owned(), tensor.to_f32().expect("a float"))).collect()
}

/// Exporting an adapter is exporting the merged checkpoint.
#[test]
fn an_adapter_is_merged_without_a_file_between() {
    for name in ["plain", "dora", "rslora", "save-both"] {
        let out = tempfile::tempdir().expect("a temporary directory");
        let base = goldens().join("qwen3-tied");
        let merged = out.path().join("merged");
        Merge::new(adapter(name)).base(&base).dtype(Dtype::F32).write(&merged, &mut |_, _| ()).expect("it fits");
        let of_merged = export(&merged, &out.path().join("a"), &[GgufFileType::F32]).expect("a checkpoint");

        let mut export = GgufExport::new(adapter(name)).base(&base).name("tiny");
        export.fetch(&mut |_, _| ()).expect("all files are there");
        let of_adapter =
            export.write(out.path().join("b"), &[GgufFileType::F32], &mut |_, _| ()).expect("it fits the base");
        let (a, b) = (tensors(&of_merged[0].paths[0]), tensors(&of_adapter[0].paths[0]));
        assert!(a == b, "{name}");
    }
}

/// A model in memory with an adapter is exported like the adapter's files.
#[test]
fn a_loaded_model_is_saved_as_gguf() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let base = goldens().join("qwen3-tied");
    let loader = FastLanguageModel::from_pretrained(&base).device(DeviceKind::Cpu).dtype(Dtype::F32);
    let model = loader.max_seq_length(64).load_model().expect("it loads");
    let plain = model.save_pretrained_gguf(out.path().join("plain"), &[GgufFileType::F32]).expect("it is supported");
    let expected = export(&base, &out.path().join("base"), &[GgufFileType::F32]).expect("it is supported");
    assert!(tensors(&plain[0].paths[0]) == tensors(&expected[0].paths[0]));
    assert_eq!(plain[0].paths[0], out.path().join("plain/plain-F32.gguf"));

    let model = model.load_adapter(adapter("plain")).expect("it fits");
    let types = [GgufFileType::F32, GgufFileType::Q8_0];
    let written = model.save_pretrained_gguf(out.path().join("tuned"), &types).expect("it is supported");
    let mut export = GgufExport::new(adapter("plain")).base(&base).name("tiny");
    export.fetch(&mut |_, _| ()).expect("all files are there");
    let expected = export.write(out.path().join("adapter"), &types, &mut |_, _| ()).expect("it fits the base");
    for (ours, expected) in written.iter().zip(&expected) {
        assert!(tensors(&ours.paths[0]) == tensors(&expected.paths[0]), "{}", ours.file_type);
    }
    let left: Vec<_> = std::fs::read_dir(out.path().join("tuned")).expect("a directory").flatten().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// The factors of a GGUF adapter have the product of PEFT's, with one scale for all.
#[test]
fn a_gguf_adapter_has_the_product_of_the_factors() {
    for name in ["plain", "rslora", "patterns"] {
        if !adapter(name).exists() {
            continue;
        }
        let out = tempfile::tempdir().expect("a temporary directory");
        let base = goldens().join("qwen3-tied");
        let mut export = GgufExport::new(adapter(name)).base(&base).name("tiny");
        export.fetch(&mut |_, _| ()).expect("all files are there");
        let path = export.write_adapter(out.path(), GgufFileType::F16).expect("factors alone");
        let file = GgufModel::open(&path).expect("just written");
        let alpha = file.metadata("adapter.lora.alpha").and_then(MetadataValue::as_f64).expect("a number");
        let merged = out.path().join("merged");
        Merge::new(adapter(name)).base(&base).dtype(Dtype::F32).write(&merged, &mut |_, _| ()).expect("it fits");
        let (merged, base) =
            (Checkpoint::open(&merged).expect("just written"), Checkpoint::open(&base).expect("a golden"));
        let (gguf, hub) = ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight");
        let [a, b] = ["lora_a", "lora_b"].map(|part| file.tensor(&format!("{gguf}.{part}")).expect("a linear"));
        let (r, columns) = (a.shape[0] as usize, a.shape[1] as usize);
        let (a, b) = (a.to_f32().expect("F16"), b.to_f32().expect("F16"));
        let values = |checkpoint: &Checkpoint| checkpoint.get(hub).expect("a linear").to_f32().expect("a float");
        let (with, without) = (values(&merged), values(&base));
        let largest = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
        for (at, (with, without)) in with.iter().zip(&without).enumerate() {
            let (row, column) = (at / columns, at % columns);
            let product: f64 = (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * columns + column])).sum();
            let expected = f64::from(with - without);
            // The factors are rounded to F16.
            assert!((alpha / r as f64 * product - expected).abs() < f64::from(largest) * 2e-3, "{name} {row} {column}");
        }
    }
    let mut export = GgufExport::new(adapter("dora")).base(goldens().join("qwen3-tied"));
    export.fetch(&mut |_, _| ()).expect("all files are there");
    for (precision, reason) in
        [(GgufFileType::F16, "DoRA's magnitudes"), (GgufFileType::Q8_0, "cannot be q8_0; use f16")]
    {
        let error = export.write_adapter("/nowhere", precision).expect_err("it is refused").to_string();
        assert!(error.contains(reason), "{error}");
    }
}

/// The rows of Llama's queries are in another order, so that pairs of channels rotate together.
#[test]
fn rows_of_queries_and_keys_are_in_the_order_of_pairs() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let files = export(&goldens().join("llama2"), out.path(), &[GgufFileType::F32]).expect("it is supported");
    let model = GgufModel::open(&files[0].paths[0]).expect("just written");
    let checkpoint = Checkpoint::open(&goldens().join("llama2")).expect("a golden");
    let head_dim = model.metadata("llama.attention.key_length").and_then(MetadataValue::as_u64).expect("a number");
    let stored = checkpoint.get("model.layers.0.self_attn.k_proj.weight").expect("a linear").to_f32().expect("a float");
    let tensor = model.tensor("blk.0.attn_k.weight").expect("a linear");
    let (rows, columns) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
    let values = tensor.to_f32().expect("F32");
    for (to, from) in interleave_rows(rows, head_dim as usize).enumerate() {
        assert_eq!(values[to * columns..][..columns], stored[from * columns..][..columns], "row {to}");
    }
}

#[test]
fn the_quickstart_model_has_its_tokenizer_and_a_modelfile() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base");
    let out = tempfile::tempdir().expect("a temporary directory");
    let files = export(&base, out.path(), &[GgufFileType::Q8_0]).expect("it is supported");
    let model = GgufModel::open(&files[0].paths[0]).expect("just written");
    let text = |key: &str| model.metadata(key).and_then(MetadataValue::as_str).unwrap_or_default().to_owned();
    assert_eq!((text("tokenizer.ggml.model").as_str(), text("tokenizer.ggml.pre").as_str()), ("gpt2", "smollm"));
    let tokens = model.metadata("tokenizer.ggml.tokens").and_then(MetadataValue::as_strings).expect("strings");
    assert_eq!(&tokens[..3], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
    assert_eq!(model.tensor("token_embd.weight").expect("a table").shape[0], tokens.len() as u64);
    let template = std::fs::read_to_string(base.join("chat_template.jinja")).expect("a template");
    assert_eq!(text("tokenizer.chat_template"), template);
    let modelfile = std::fs::read_to_string(out.path().join("Modelfile")).expect("a Modelfile");
    assert!(modelfile.starts_with("FROM ./tiny-Q8_0.gguf\n"), "{modelfile}");
    assert!(modelfile.contains("PARAMETER stop \"<|im_end|>\""), "{modelfile}");
    assert!(modelfile.contains("TEMPLATE") && modelfile.contains("<|im_start|>assistant"), "{modelfile}");
    assert!(files[0].notices.is_empty(), "{:?}", files[0].notices);
}

#[test]
fn large_models_are_split() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let export = GgufExport::new(goldens().join("qwen2")).name("tiny").max_file_bytes(40_000);
    let files = export.write(out.path(), &[GgufFileType::F32], &mut |_, _| ()).expect("it is supported");
    assert!(files[0].paths.len() > 1, "{:?}", files[0].paths);
    let whole = tempfile::tempdir().expect("a temporary directory");
    let one = self::export(&goldens().join("qwen2"), whole.path(), &[GgufFileType::F32]).expect("it is supported");
    assert_eq!(tensors(&files[0].paths[1]), tensors(&one[0].paths[0]));
    assert_eq!(files[0].bytes, one[0].bytes);
}

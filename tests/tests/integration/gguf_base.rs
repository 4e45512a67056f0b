//! GGUF files as bases: a file that was exported from a checkpoint is read as that checkpoint.

use std::path::{Path, PathBuf};

use rekindle::{GgufExport, GgufFileType};
use rekindle_data::{Tokenizer, chat_template_sources};
use rekindle_gguf::{GgmlType, GgufModel, GgufTensorSpec, MetadataValue, write_gguf_files};
use rekindle_hub::{Checkpoint, Dtype, read_json, write_atomic};
use rekindle_kernels::{DType, Device};
use rekindle_lora::LoraConfig;
use rekindle_models::{Batch, CausalLm, LoadIn, LoadOptions, ModelConfig, open_checkpoint, unpack_gguf};
use rekindle_tests::{Golden, goldens, relative_distance};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Bound of a loss of the same weights whose rotary base or divisors were rounded to f32. Measured: at most 4.8e-6.
const LOSS: f32 = 1e-5;

/// Values of `config.json` with which llama.cpp has an architecture for a golden, without the weights being others.
fn changes(name: &str) -> Value {
    match name {
        "families/gemma2" | "families/gemma3" => json!({"query_pre_attn_scalar": 16}),
        "families/exaone4" => json!({"sliding_window": null, "layer_types": vec!["full_attention"; 5]}),
        // llama.cpp ignores these windows.
        "families/mistral-window" => json!({"sliding_window": null}),
        "families/qwen2-window" => json!({"use_sliding_window": false, "layer_types": null}),
        _ => json!({}),
    }
}

/// Returns a copy of a golden checkpoint with changed values of its configuration.
fn changed(name: &str) -> (TempDir, PathBuf) {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let from = goldens().join(name);
    for entry in std::fs::read_dir(&from).expect("a golden") {
        let entry = entry.expect("an entry").path();
        if entry.is_file() {
            std::fs::copy(&entry, scratch.path().join(entry.file_name().expect("a name"))).expect("a copy");
        }
    }
    let mut config: Value = read_json(&from.join("config.json")).expect("JSON");
    for (key, value) in changes(name).as_object().expect("an object") {
        config[key] = value.clone();
    }
    write_atomic(&scratch.path().join("config.json"), config.to_string().as_bytes()).expect("it is written");
    let dir = scratch.path().to_owned();
    (scratch, dir)
}

fn export(model: &Path, out: &Path, file_type: GgufFileType) -> PathBuf {
    let files = GgufExport::new(model).name("tiny").write(out, &[file_type], &mut |_, _| ());
    files.expect("it is supported")[0].paths[0].clone()
}

/// Returns the directory that stands for a GGUF file, and the checkpoint in it.
fn unpacked(file: &Path) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    unpack_gguf(file, dir.path()).expect("it is supported");
    let checkpoint = open_checkpoint(dir.path()).expect("it was just written");
    (dir, checkpoint)
}

fn load(checkpoint: &Checkpoint) -> CausalLm {
    let options = LoadOptions::new(Device::cpu(), DType::F32, 128);
    CausalLm::load(checkpoint, &options, &mut |_| ()).expect("it loads")
}

#[test]
fn every_family_is_read_back() {
    let golden: Value = read_json(&goldens().join("gguf/converted.json")).expect("a golden");
    let mut compared = 0;
    for name in golden["checkpoints"].as_object().expect("an object").keys() {
        // The text part of a multimodal model is that of a text model; others are not exported, or not read.
        let is_left_out = ["-multimodal", "-sparse"].iter().any(|part| name.contains(part))
            || ["families/glm", "families/qwen3_5", "families/qwen3_5-moe"].contains(&name.as_str())
            || ["exaone4", "gemma2", "gemma3"].iter().any(|part| *name == format!("gguf/{part}"))
            || name == "families/gpt-oss";
        if is_left_out {
            continue;
        }
        let (_scratch, dir) = changed(name);
        let out = tempfile::tempdir().expect("a temporary directory");
        let file = export(&dir, out.path(), GgufFileType::F32);
        let (_dir, read) = unpacked(&file);
        let original = Checkpoint::open(&dir).expect("a golden checkpoint");
        for tensor in read.names() {
            let (ours, theirs) = (read.get(tensor).expect("listed"), original.get(tensor));
            // The linears of experts may be stacked there, and Granite's routers have another name; then the losses tell.
            let Some(theirs) = theirs else {
                let is_other = tensor.contains(".experts.") || tensor.contains(".block_sparse_moe.router.");
                assert!(is_other, "{name}: {tensor} is none of the checkpoint's");
                continue;
            };
            assert_eq!(ours.shape, theirs.shape, "{name}: {tensor}");
            let (ours, theirs) = (ours.to_f32().expect("a float"), theirs.to_f32().expect("a float"));
            // Norms of Gemma and Qwen3.5 are stored with 1 added, and −exp(A_log) in the place of A_log.
            let adds_one = name.contains("gemma") || name.contains("qwen35");
            let bound = match tensor {
                _ if tensor.ends_with("A_log") => 5e-7,
                _ if adds_one && tensor.contains("norm") => 1e-7,
                _ => 0.0,
            };
            let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= bound, "{name}: {tensor} is off by {off:e}");
            compared += 1;
        }
        let ids: Vec<u32> = (0..40).map(|at| at * 37 % 83).collect();
        let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let batch = Batch::from_rows([(ids.as_slice(), labels.as_slice())], 0);
        let saved = tempfile::tempdir().expect("a temporary directory");
        load(&read).save(saved.path(), Dtype::F32).expect("it is written");
        let again = Checkpoint::open(saved.path()).expect("it was just written");
        let losses = [&read, &original, &again].map(|checkpoint| load(checkpoint).nll(&batch).expect("it fits"));
        let [ours, theirs, again] = losses;
        assert!(ours == again, "{name}: a saved model has other losses");
        let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: losses off by {off:.1e}");
        assert!(off <= LOSS, "{name}: losses are off by {off:e}");
    }
    assert!(compared > 500, "{compared} tensors");
}

/// gpt-oss's experts stay in MXFP4, with gate and up alternating as the model has them; other types are decoded or kept alike.
#[test]
fn experts_of_gpt_oss_stay_in_mxfp4() {
    let dir = goldens().join("gguf/gpt-oss");
    let out = tempfile::tempdir().expect("a temporary directory");
    let ids: Vec<u32> = (0..40).map(|at| at * 37 % 96).collect();
    let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let batch = Batch::from_rows([(ids.as_slice(), labels.as_slice())], 0);
    let (_dir, read) = unpacked(&export(&dir, out.path(), GgufFileType::MXFP4_MOE));
    let name = "model.layers.1.mlp.experts.2.gate_up_proj";
    assert_eq!(read.config()["quantization_config"]["types"][name], "MXFP4");
    let gguf = GgufModel::open(&out.path().join("tiny-MXFP4_MOE.gguf")).expect("just written");
    let values = read.get(&format!("{name}.weight")).expect("an expert").to_f32().expect("it decodes");
    let [gates, ups] = ["gate", "up"].map(|part| {
        let tensor = gguf.tensor(&format!("blk.1.ffn_{part}_exps.weight")).expect("experts");
        let values = tensor.to_f32().expect("it decodes");
        values.chunks_exact(values.len() / 6).nth(2).expect("six experts").to_vec()
    });
    for (at, pair) in values.chunks_exact(2 * 64).enumerate() {
        assert!(pair[..64] == gates[at * 64..][..64] && pair[64..] == ups[at * 64..][..64], "row {at}");
    }
    let kept = load(&read);
    let options = LoadOptions { load_in: Some(LoadIn::SixteenBit), ..LoadOptions::new(Device::cpu(), DType::F32, 128) };
    let decoded = CausalLm::load(&read, &options, &mut |_| ()).expect("it loads");
    let [ours, theirs] = [&kept, &decoded].map(|model| model.nll(&batch).expect("it fits"));
    let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off <= LOSS, "losses are off by {off:e}");
    assert!(kept.memory_report().bytes() < decoded.memory_report().bytes() * 3 / 4);
    // A checkpoint with dense experts, which are stored transposed, has the same values in a file.
    let saved = out.path().join("dense");
    std::fs::create_dir(&saved).expect("a directory");
    decoded.save(&saved, Dtype::F32).expect("it is written");
    let dense = GgufModel::open(&export(&saved, &out.path().join("b"), GgufFileType::F32)).expect("just written");
    for part in ["gate", "up", "down"] {
        let name = format!("blk.0.ffn_{part}_exps.weight");
        let [ours, theirs] =
            [&dense, &gguf].map(|model| model.tensor(&name).expect("experts").to_f32().expect("it decodes"));
        assert!(ours == theirs, "{name}");
    }
}

/// Quantized tensors have the values that their blocks decode to.
#[test]
fn blocks_are_decoded() {
    let out = tempfile::tempdir().expect("a temporary directory");
    for file_type in [GgufFileType::Q4_K_M, GgufFileType::Q8_0, GgufFileType::F16, GgufFileType::IQ4_NL] {
        let file = export(&goldens().join("llama2"), out.path(), file_type);
        let (_dir, read) = unpacked(&file);
        let gguf = GgufModel::open(&file).expect("just written");
        for (own, stored) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ] {
            let expected = gguf.tensor(stored).expect("a tensor").to_f32().expect("a float");
            assert!(read.get(own).expect("a tensor").to_f32().expect("a float") == expected, "{file_type}: {own}");
        }
        // Rows of keys are in another order, and are in that of the checkpoint again.
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for (checkpoint, name) in
            [(Some(&read), "model.layers.0.self_attn.k_proj.weight"), (None, "blk.0.attn_k.weight")]
        {
            let values = match checkpoint {
                Some(checkpoint) => checkpoint.get(name).expect("a tensor").to_f32(),
                None => gguf.tensor(name).expect("a tensor").to_f32().map_err(|_| unreachable!()),
            };
            let mut sorted = values.expect("floats");
            sorted.sort_by(f32::total_cmp);
            rows.push(sorted);
        }
        assert!(rows[0] == rows[1], "{file_type}");
        let losses = load(&read).nll(&Golden::open("llama2").packed()).expect("it fits");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{file_type}");
    }
}

#[test]
fn the_tokenizer_and_the_template_are_rebuilt() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base");
    let out = tempfile::tempdir().expect("a temporary directory");
    let (dir, checkpoint) = unpacked(&export(&base, out.path(), GgufFileType::Q8_0));
    let [original, read] = [&base, dir.path()].map(|dir: &Path| Tokenizer::from_dir(dir).expect("a tokenizer"));
    assert_eq!((original.eos_ids(), original.bos_id()), (read.eos_ids(), read.bos_id()));
    assert_eq!(
        chat_template_sources(&base).expect("a template"),
        chat_template_sources(dir.path()).expect("a template")
    );
    for text in [
        "Hello, world! I'm 1234 years old.",
        "Grüße aus München — schön!",
        "<|im_start|>user\nWhat is a whale?<|im_end|>\n",
        "  spaces   and\ttabs\n\nлиния 日本語",
    ] {
        let ids = original.encode(text, true).expect("it is encoded");
        assert_eq!(read.encode(text, true).expect("it is encoded"), ids, "{text}");
        assert_eq!(read.decode(&ids, false).expect("it is decoded"), text);
    }
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("it is supported");
    let expected = ModelConfig::from_checkpoint(&Checkpoint::open(&base).expect("a checkpoint")).expect("supported");
    assert_eq!(config.spec, expected.spec);
}

/// Linears that stay in their blocks give the losses and the gradients of decoded ones, in a fraction of the memory.
#[test]
fn kept_blocks_compute_as_decoded_weights() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base");
    let ids: Vec<u32> = (0..40).map(|at| at * 37 % 500 + 3).collect();
    let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let batch = Batch::from_rows([(ids.as_slice(), labels.as_slice())], 0);
    for file_type in
        [GgufFileType::Q8_0, GgufFileType::Q4_0, GgufFileType::Q4_1, GgufFileType::Q4_K_M, GgufFileType::Q6_K]
    {
        let (dir, read) = unpacked(&export(&base, out.path(), file_type));
        let load = |load_in| {
            let options = LoadOptions { load_in, ..LoadOptions::new(Device::cpu(), DType::F32, 128) };
            let mut model = CausalLm::load(&read, &options, &mut |_| ()).expect("it loads");
            model.add_adapter(&LoraConfig::new(4)).expect("a valid configuration");
            model
        };
        let [kept, decoded] = [load(None), load(Some(LoadIn::SixteenBit))];
        let [ours, theirs] = [&kept, &decoded].map(|model| model.nll(&batch).expect("it fits"));
        let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(distance(&ours, &theirs) <= LOSS, "{file_type}: {:e}", distance(&ours, &theirs));
        let gradients = [&kept, &decoded].map(|model| {
            let mut grads = model.params().zero_grads();
            model.forward_backward(&batch, 1.0, &mut grads, None).expect("it fits");
            model.params().infos().iter().flat_map(|info| grads.values(info.at)).collect::<Vec<f32>>()
        });
        assert!(relative_distance(&gradients[0], &gradients[1]) < 1e-6, "{file_type}");
        let bytes = [&kept, &decoded].map(|model| model.memory_report().bytes());
        assert!(bytes[0] < bytes[1] * 3 / 4, "{file_type}: {bytes:?}");

        // What is saved without an adapter is what the blocks decode to.
        let plain =
            CausalLm::load(&read, &LoadOptions::new(Device::cpu(), DType::F32, 128), &mut |_| ()).expect("it loads");
        let saved = tempfile::tempdir().expect("a temporary directory");
        plain.save(saved.path(), Dtype::F32).expect("it is written");
        let again = load_dir(saved.path()).nll(&batch).expect("it fits");
        assert!(distance(&again, &ours) <= LOSS, "{file_type}: {:e}", distance(&again, &ours));
        // A plan without values has the same sizes.
        let json: Value = read_json(&dir.path().join("config.json")).expect("JSON");
        let options = LoadOptions::new(Device::meta(), DType::F32, 128);
        let planned = CausalLm::on_meta(&json, dir.path(), &options).expect("it is planned");
        assert_eq!(planned.memory_report(), plain.memory_report(), "{file_type}");
    }
}

fn load_dir(dir: &Path) -> CausalLm {
    load(&Checkpoint::open(dir).expect("it was just written"))
}

/// Returns the error of loading a file with these keys and one tensor.
fn refusal(change: impl FnOnce(&mut Vec<(String, MetadataValue)>, &mut Vec<GgufTensorSpec>)) -> String {
    let out = tempfile::tempdir().expect("a temporary directory");
    let key = |name: &str, value: MetadataValue| (name.to_owned(), value);
    let mut metadata = vec![
        key("general.architecture", "llama".into()),
        key("llama.block_count", 1_u32.into()),
        key("llama.embedding_length", 32_u32.into()),
        key("llama.feed_forward_length", 64_u32.into()),
        key("llama.context_length", 64_u32.into()),
        key("llama.attention.head_count", 2_u32.into()),
        key("llama.attention.layer_norm_rms_epsilon", 1e-5_f32.into()),
    ];
    let mut tensors = vec![GgufTensorSpec::new("token_embd.weight", GgmlType::F32, [8, 32])];
    change(&mut metadata, &mut tensors);
    let path = out.path().join("a.gguf");
    write_gguf_files(&path, None, &metadata, &tensors, |index, out| {
        out.write_all(&vec![0; tensors[index].bytes().expect("it fits") as usize])
    })
    .expect("it is valid");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let opened = unpack_gguf(&path, dir.path()).and_then(|()| open_checkpoint(dir.path()));
    let options = LoadOptions::new(Device::cpu(), DType::F32, 16);
    match opened.and_then(|checkpoint| CausalLm::load(&checkpoint, &options, &mut |_| ())) {
        Ok(_) => panic!("it has one tensor"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_cannot_be_loaded_is_an_error() {
    let set = |name: &'static str, value: MetadataValue| {
        move |metadata: &mut Vec<(String, MetadataValue)>, _: &mut Vec<GgufTensorSpec>| {
            metadata.retain(|(key, _)| key != name);
            metadata.push((name.to_owned(), value));
        }
    };
    let cases = [
        (refusal(set("general.architecture", "mamba".into())), "architecture \"mamba\""),
        (refusal(set("general.architecture", "gpt2".into())), "architecture \"gpt2\", which cannot be loaded"),
        (refusal(set("llama.block_count", 0_u32.into())), "llama.block_count is 0; expected a positive integer"),
        (refusal(set("llama.block_count", 4_000_000_000_u32.into())), "expected at most 512"),
        (refusal(set("llama.expert_count", 4_000_000_000_u32.into())), "expert_used_count is missing"),
        (refusal(set("llama.attention.head_count", vec![2_u32, 4].into())), "layers that differ in their sizes"),
        (refusal(set("llama.attention.head_count", 0_u32.into())), "head_count is 0"),
        (refusal(set("llama.attention.head_count_kv", 7_u32.into())), "num_key_value_heads"),
        (refusal(set("llama.rope.scaling.type", "longrope".into())), "\"longrope\""),
        (refusal(set("llama.rope.dimension_count", 15_u32.into())), "rotary dimensions"),
        (refusal(set("llama.attention.layer_norm_rms_epsilon", f32::NAN.into())), "expected a number"),
        (refusal(set("tokenizer.ggml.model", "bert".into())), "kind \"bert\""),
        (refusal(set("tokenizer.ggml.model", "gpt2".into())), "pre-tokenizer \"default\""),
        (refusal(|_, tensors| tensors[0].name = "other.weight".to_owned()), "token_embd.weight is missing"),
        (
            refusal(|metadata, tensors| {
                metadata[2].1 = 256_u32.into();
                tensors[0] = GgufTensorSpec::new("token_embd.weight", GgmlType::IQ4_XS, [8, 256]);
            }),
            "has dtype IQ4_XS; supported",
        ),
        (refusal(|_, _| ()), "are missing"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{error:?} instead of {expected:?}");
    }
}

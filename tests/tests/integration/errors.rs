//! Tests that bad checkpoints, adapters, batches and disks give one clear error and lose no data.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype, TensorSpec, write_f32, write_safetensors};
use rekindle_kernels::DType;
use rekindle_kernels::Device;
use rekindle_lora::LoraConfig;
use rekindle_models::{Batch, CausalLm, Error, LoadOptions};
use rekindle_tests::{Golden, read_json, tensors};
use rekindle_train::save_result;
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Copies `qwen3-tied` with changed tensors and configuration.
fn broken(change_tensors: impl FnOnce(&mut Tensors), change_config: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let golden = Golden::open("qwen3-tied");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut all = tensors(&golden.dir.join("model.safetensors"));
    change_tensors(&mut all);
    write_tensors(&dir.path().join("model.safetensors"), &all);
    let mut config = read_json(&golden.dir.join("config.json"));
    change_config(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    dir
}

fn write_tensors(path: &Path, all: &Tensors) {
    let specs: Vec<_> = all.iter().map(|(name, (shape, _))| TensorSpec::new(name, Dtype::F32, shape.clone())).collect();
    let values: Vec<&[f32]> = all.values().map(|(_, values)| values.as_slice()).collect();
    write_safetensors(path, &BTreeMap::new(), &specs, |i, out| write_f32(out, Dtype::F32, values[i])).expect("written");
}

fn load(dir: &Path, max_seq_length: usize) -> Result<CausalLm, Error> {
    let options = LoadOptions::new(Device::cpu(), DType::F32, max_seq_length);
    CausalLm::load(&Checkpoint::open(dir)?, &options, &mut |_| ())
}

/// Asserts that the error message contains all these parts.
fn assert_message(error: &dyn std::error::Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "\"{part}\" is not in: {text}");
    }
}

#[test]
fn every_wrong_tensor_is_listed_at_once() {
    let dir = broken(
        |all| {
            all.remove("model.layers.1.mlp.up_proj.weight");
            all.remove("model.norm.weight");
            all.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), (vec![96], vec![0.0; 96]));
            all.insert("model.layers.0.input_layernorm.weight".to_owned(), (vec![39], vec![1.0; 39]));
            // The same number of elements, transposed.
            let (shape, _) = all.get_mut("model.layers.2.self_attn.k_proj.weight").expect("it exists");
            shape.reverse();
        },
        |_| (),
    );
    let error = load(dir.path(), 64).expect_err("five tensors are wrong");
    let Error::Tensors { problems, .. } = &error else { panic!("{error:?}") };
    assert_eq!(problems.len(), 5, "{problems:#?}");
    assert_message(
        &error,
        &[
            &dir.path().display().to_string(),
            "\"model.layers.1.mlp.up_proj.weight\" [52, 40] is missing",
            "\"model.norm.weight\" [40] is missing",
            "\"model.layers.0.self_attn.q_proj.bias\" is not part of Qwen3ForCausalLM",
            "\"model.layers.0.input_layernorm.weight\" has shape [39], expected [40]",
            "\"model.layers.2.self_attn.k_proj.weight\" has shape [40, 48], expected [48, 40]",
        ],
    );
}

#[test]
fn a_tied_model_may_store_an_equal_head_but_not_a_different_one() {
    let head = |all: &mut Tensors, factor: f32| {
        let (shape, values) = all["model.embed_tokens.weight"].clone();
        all.insert("lm_head.weight".to_owned(), (shape, values.iter().map(|v| v * factor).collect()));
    };
    load(broken(|all| head(all, 1.0), |_| ()).path(), 64).expect("the same table twice");
    let error = load(broken(|all| head(all, 2.0), |_| ()).path(), 64).expect_err("two tables");
    assert_message(&error, &["\"lm_head.weight\" differs from \"model.embed_tokens.weight\"", "tie_word_embeddings"]);
}

#[test]
fn every_unsupported_value_is_listed_at_once() {
    let dir = broken(
        |_| (),
        |config| {
            config["hidden_act"] = json!("gelu");
            config["use_sliding_window"] = json!(true);
            config["num_key_value_heads"] = json!(3);
            config["rope_parameters"] = json!({"rope_type": "linear", "rope_theta": 1e6});
            config.as_object_mut().expect("an object").remove("vocab_size");
        },
    );
    let error = load(dir.path(), 64).expect_err("five values are wrong");
    let Error::Config { path, problems } = &error else { panic!("{error:?}") };
    assert_eq!((path, problems.len()), (&dir.path().join("config.json"), 5), "{problems:#?}");
    assert_message(
        &error,
        &[
            "hidden_act is \"gelu\"; only \"silu\" is supported",
            "use_sliding_window is true",
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
            "factor",
            "vocab_size is missing",
        ],
    );
}

#[test]
fn an_unknown_architecture_is_named_with_the_supported_ones() {
    let dir = broken(|_| (), |config| config["architectures"] = json!(["MambaForCausalLM"]));
    let error = load(dir.path(), 64).expect_err("not one of ours");
    assert_message(&error, &["MambaForCausalLM", "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"]);
}

#[test]
fn a_truncated_shard_is_named() {
    let golden = Golden::open("qwen3-untied-sharded");
    let dir = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(&golden.dir).expect("a directory").map(|entry| entry.expect("an entry").path()) {
        if entry.is_file() {
            std::fs::copy(&entry, dir.path().join(entry.file_name().expect("a name"))).expect("copied");
        }
    }
    load(dir.path(), 64).expect("the copy is whole");
    let name = "model-00002-of-00003.safetensors";
    let bytes = std::fs::read(dir.path().join(name)).expect("it exists");
    // Truncated in the header's length, in the header, and in the last tensor.
    for keep in [0, 5, 200, bytes.len() - 1] {
        std::fs::write(dir.path().join(name), &bytes[..keep]).expect("written");
        let error = load(dir.path(), 64).expect_err("a shard is cut");
        assert!(matches!(&error, Error::File(rekindle_hub::Error::Malformed { .. })), "{keep}: {error:?}");
        assert_message(&error, &[name]);
    }
    std::fs::remove_file(dir.path().join(name)).expect("removed");
    let error = load(dir.path(), 64).expect_err("a shard is gone");
    assert!(matches!(&error, Error::File(rekindle_hub::Error::Missing { .. })), "{error:?}");
    assert_message(&error, &[name]);
}

#[test]
fn an_adapter_must_match_its_configuration_and_the_model() {
    let golden = Golden::open("qwen3-tied");
    let source = golden.dir.join("adapters/all-linear");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let copy = |name: &str| std::fs::copy(source.join(name), dir.path().join(name)).expect("copied");
    copy("adapter_model.safetensors");
    let mut config = read_json(&source.join("adapter_config.json"));
    config["r"] = json!(8);
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).expect("written");
    let mut model = golden.load();
    let error = model.load_adapter(dir.path()).expect_err("r is 4 in the tensors");
    let Error::Lora(rekindle_lora::Error::Tensors { problems, .. }) = &error else { panic!("{error:?}") };
    assert_eq!(problems.len(), 3 * 7 * 2, "both factors of every linear");
    let key = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight";
    assert_message(&error, &[&format!("\"{key}\" has shape [4, 52], expected [8, 52]")]);
    assert!(model.lora().is_none() && model.params().numel() == 0, "the model is unchanged");

    copy("adapter_config.json");
    let error = Golden::open("qwen2").load().load_adapter(dir.path()).expect_err("of another model");
    assert_message(&error, &["model.layers.2.mlp.down_proj.lora_A.weight\" matches no adapted module of this model"]);

    let mut all = tensors(&source.join("adapter_model.safetensors"));
    all.remove(key);
    write_tensors(&dir.path().join("adapter_model.safetensors"), &all);
    let error = golden.load().load_adapter(dir.path()).expect_err("a factor is gone");
    assert_message(&error, &[&format!("\"{key}\" is missing")]);
}

#[test]
fn an_adapter_on_a_fully_finetuned_model_is_refused() {
    let golden = Golden::open("qwen2");
    let error = golden.load_full().load_adapter(&golden.dir.join("adapters/all-linear")).expect_err("both");
    assert!(matches!(error, Error::Argument(_)), "{error:?}");
    assert_message(&error, &["full_finetuning"]);
}

#[test]
fn lengths_and_ids_beyond_the_model_are_refused() {
    let golden = Golden::open("qwen3-tied");
    assert!(load(&golden.dir, 256).expect("the length of the window").context_extension().is_none());
    load(&golden.dir, 4 * 256).expect("as long as it is taken without asking");
    for (length, part) in [(0, "at least 1"), (4 * 256 + 1, "set rope_scaling to a method")] {
        let error = load(&golden.dir, length).expect_err("out of range");
        assert!(matches!(error, Error::Argument(_)), "{error:?}");
        assert_message(&error, &[&format!("max_seq_length is {length}"), part]);
    }

    let model = load(&golden.dir, 20).expect("short is fine");
    let long = golden.batch(&[1, 5]);
    let error = model.nll(&long).expect_err("48 tokens");
    assert!(matches!(error, Error::Row(_)), "{error:?}");
    assert_message(&error, &["row 5", "48 tokens", "max_seq_length 20"]);
    let mut grads = model.params().zero_grads();
    assert!(model.forward_backward(&long, 1.0, &mut grads, None).is_err());

    let beyond = |ids: &[u32], labels: &[i32]| Batch::from_rows([(&[1, 2][..], &[1, 2][..]), (ids, labels)], 0);
    for batch in [beyond(&[3, 131], &[3, 4]), beyond(&[3, 4], &[3, 131]), beyond(&[3, 4], &[3, -1])] {
        let error = model.nll(&batch).expect_err("not a token of this model");
        assert!(matches!(error, Error::Row(_)), "{error:?}");
        assert_message(&error, &["row 1", "vocabulary of 131"]);
    }
    let error = model.generate(&[131], &Default::default(), |_| true).expect_err("not a token of this model");
    assert_message(&error, &["token id 131"]);
    let error = model.generate(&[], &Default::default(), |_| true).expect_err("nothing to continue");
    assert_message(&error, &["0 tokens"]);
}

#[test]
fn saving_to_an_unwritable_path_leaves_nothing() {
    let model = Golden::open("qwen3-tied").load_adapted("all-linear");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").expect("written");
    for target in [file.clone(), file.join("adapter")] {
        save_result(&model, &target, &[], Dtype::F32).expect_err("a file is in the way");
    }
    let companion = dir.path().join("no-such-tokenizer.json");
    save_result(&model, &dir.path().join("adapter"), &[companion.into()], Dtype::F32).expect_err("a companion is gone");
    assert_eq!(std::fs::read_to_string(&file).expect("it is there"), "mine");
    assert_eq!(entries(dir.path()), ["file"], "nothing half-written");
}

/// Mounting a file system requires root; without it this test reports that and checks nothing.
#[test]
fn a_full_disk_keeps_the_earlier_save() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("not run: a tmpfs cannot be mounted here");
        return;
    };
    let golden = Golden::open("qwen3-tied");
    let target = disk.path().join("result");
    let adapter = golden.load_adapted("all-linear");
    save_result(&adapter, &target, &[], Dtype::F32).expect("an adapter fits");
    let before = tensors(&target.join("adapter_model.safetensors"));
    let mut larger = golden.load();
    larger.add_adapter(&LoraConfig::new(32)).expect("valid");
    let error = save_result(&larger, &target, &[], Dtype::F32).expect_err("a larger adapter does not fit");
    assert_message(&error, &["No space left on device"]);
    assert_eq!(tensors(&target.join("adapter_model.safetensors")), before, "the earlier save is unchanged");
    assert_eq!(entries(disk.path()), ["result"], "nothing half-written");
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A file system with space for an adapter of `qwen3-tied` with r = 4, but not for one with r = 32.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=128k", "tmpfs"]).arg(dir.path()).stderr(std::process::Stdio::null());
        command.status().is_ok_and(|status| status.success()).then_some(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

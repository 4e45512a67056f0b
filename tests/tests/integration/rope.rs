//! Tests of models beyond their window: losses of transformers (`goldens/rope`), and reloading of saved results.

use std::path::Path;

use rekindle::{DataSource, Dtype, FastLanguageModel, Loader, LoraConfig, Merge, RopeScaling, SftConfig, SftTrainer};
use rekindle_hub::Checkpoint;
use rekindle_kernels::{DType, Device, DeviceKind};
use rekindle_models::{Batch, CausalLm, LoadOptions, Positions};
use rekindle_tests::{Golden, RowLosses, assert_nll, goldens, read_json, worst_nll};
use rekindle_train::save_result;
use serde_json::{Value, json};

/// Creates a model directory with the weights of `qwen3-tied` and a changed configuration.
fn model_dir(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let golden = Golden::open("qwen3-tied");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut config = read_json(&golden.dir.join("config.json"));
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let weights = "model.safetensors";
    std::fs::copy(golden.dir.join(weights), dir.path().join(weights)).expect("copied");
    dir
}

fn native(case: &Value) -> tempfile::TempDir {
    model_dir(|config| {
        config["max_position_embeddings"] = case["window"].clone();
        config["rope_parameters"] = case["native"].clone();
    })
}

/// Creates the same in the layout of transformers 4.
fn native_older(case: &Value) -> tempfile::TempDir {
    model_dir(|config| {
        config["max_position_embeddings"] = case["window"].clone();
        let mut scaling = case["native"].clone();
        let fields = config.as_object_mut().expect("an object");
        fields.remove("rope_parameters");
        let theta = scaling.as_object_mut().expect("an object").remove("rope_theta");
        fields.insert("rope_theta".to_owned(), theta.expect("every case has one"));
        fields.insert("rope_scaling".to_owned(), scaling);
    })
}

fn load(dir: &Path, length: usize, rope_scaling: RopeScaling) -> CausalLm {
    let options = LoadOptions { rope_scaling, ..LoadOptions::new(Device::cpu(), DType::F32, length) };
    CausalLm::load(&Checkpoint::open(dir).expect("it opens"), &options, &mut |_| ()).expect("it loads")
}

/// Returns all rows of a set in one batch, with transformers' losses.
fn rows(set: &Value) -> (Batch, Vec<RowLosses>) {
    let list = |row: &Value| -> Vec<u32> { serde_json::from_value(row.clone()).expect("ids are numbers") };
    let ids: Vec<Vec<u32>> = set["input_ids"].as_array().expect("a list of rows").iter().map(list).collect();
    let labels: Vec<Vec<i32>> = ids.iter().map(|row| row.iter().map(|&id| id as i32).collect()).collect();
    let rows = ids.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice));
    (Batch::from_rows(rows, 0), RowLosses::list(&set["rows"]))
}

#[test]
fn positions_beyond_the_window_give_the_losses_of_transformers() {
    let golden = read_json(&goldens().join("rope/expect.json"));
    let cases = golden["cases"].as_array().expect("a list of cases");
    assert_eq!(cases.len(), 11);
    for case in cases {
        let length = case["length"].as_u64().expect("a length") as usize;
        let choice: RopeScaling = serde_json::from_value(case["choice"].clone()).expect("a choice");
        let what = format!("{} to {length} on {}", case["choice"], case["native"]["rope_type"]);
        let mut first = None;
        for dir in [native(case), native_older(case)] {
            let model = load(dir.path(), length, choice.clone());
            let (batch, expected) = rows(&case["asked"]);
            let nll = model.nll(&batch).expect("the rows fit");
            assert_nll(&what, &batch, &nll, &expected);
            let asked = worst_nll(&batch, &nll, &expected);
            // The saved parameters also give the same losses for short rows, in this model and in a reloaded one.
            let (mixed, expected) = rows(&case["written"]);
            let short = model.nll(&mixed).expect("the rows fit");
            assert_nll(&what, &mixed, &short, &expected);
            println!("{what}: off by {:.1e}", worst_nll(&mixed, &short, &expected).max(asked));
            let written = tempfile::tempdir().expect("a temporary directory");
            save_result(&model, &written.path().join("model"), &[], rekindle_hub::Dtype::F32).expect("saved");
            let config = read_json(&written.path().join("model/config.json"));
            assert_eq!(config["max_position_embeddings"], length, "{what}");
            assert_close(&config["rope_parameters"], &case["written"]["rope_parameters"], &what);
            let again = load(&written.path().join("model"), length, RopeScaling::Auto);
            assert!(again.context_extension().is_none(), "{what}: the extended window is now native");
            assert_eq!(again.nll(&batch).expect("the rows fit"), nll, "{what}");
            assert_eq!(*first.get_or_insert(nll.clone()), nll, "{what}: both layouts give the same model");
        }
    }
}

/// Asserts equal keys and equal numbers, except for the last digits of f64, in which Python's powers may differ.
fn assert_close(got: &Value, expected: &Value, what: &str) {
    let (got, expected) = (got.as_object().expect("an object"), expected.as_object().expect("an object"));
    assert!(got.keys().all(|key| expected.contains_key(key)) && got.len() == expected.len(), "{what}: {got:?}");
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().map_or_else(|| vec![value.clone()], Clone::clone).iter().filter_map(Value::as_f64).collect()
    };
    for (key, expected) in expected {
        let (a, b) = (numbers(&got[key]), numbers(expected));
        assert_eq!(a.len(), b.len(), "{what}: {key}");
        assert!(a.iter().zip(&b).all(|(a, b)| (a / b - 1.0).abs() < 1e-12), "{what}: {key} {a:?} {b:?}");
        assert!(!b.is_empty() || got[key] == *expected, "{what}: {key}");
    }
}

fn base() -> Loader<'static> {
    let golden = Golden::open("qwen3-tied");
    FastLanguageModel::from_pretrained(golden.dir).device(DeviceKind::Cpu).dtype(Dtype::F32)
}

#[test]
fn an_adapter_records_the_positions_it_was_trained_with() {
    let rows = DataSource::new(Golden::open("qwen3-tied").dir.join("rows.jsonl"));
    for method in [RopeScaling::Dynamic, RopeScaling::Yarn] {
        let out = tempfile::tempdir().expect("a temporary directory");
        let loader = base().max_seq_length(1024).rope_scaling(method);
        let model = loader.load_model().expect("it loads").get_peft_model(LoraConfig::new(2)).expect("valid");
        let mut model = model;
        let config = SftConfig { max_steps: Some(3), learning_rate: Some(0.01), ..SftConfig::default() };
        SftTrainer::new(&mut model, None, rows.clone(), config).train().expect("it runs");
        let adapter = out.path().join("adapter");
        model.save_pretrained(&adapter).expect("saved");
        let expected = model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit");
        let losses = |model: &rekindle::Model| model.evaluate(None, &rows, &mut |_| ()).expect("golden rows fit");

        // With or without a given length, however short.
        for loader in [base(), base().max_seq_length(100)] {
            let model = loader.for_adapter(&adapter).load_model().expect("it loads");
            let window = model.causal_lm().config().max_position_embeddings;
            let again = model.load_adapter(&adapter).expect("the same positions");
            assert_eq!((losses(&again), window), (expected.clone(), 1024));
        }
        let error = base().load_model().expect("it loads").load_adapter(&adapter).expect_err("other positions");
        assert!(error.to_string().contains(Positions::FILE), "{error}");
        let error = base().max_seq_length(1025).for_adapter(&adapter).load_model().expect_err("never trained");
        assert!(error.to_string().contains("trained with a window of 1024"), "{error}");

        // Merged from files and from memory: both are the model that was trained.
        let merged = out.path().join("merged");
        let merge = Merge::new(&adapter).base(Golden::open("qwen3-tied").dir);
        merge.write(&merged, &mut |_, _| ()).expect("written");
        merge.verify(&merged, DeviceKind::Cpu).expect("the same losses");
        let saved = out.path().join("saved");
        model.save_pretrained_merged(&saved, Dtype::Auto).expect("written");
        let config = read_json(&merged.join("config.json"));
        assert_eq!(config, read_json(&saved.join("config.json")));
        assert_eq!(config["max_position_embeddings"], 1024);
        assert_eq!(config["rope_parameters"], read_json(&adapter.join(Positions::FILE))["rope_parameters"]);
        let merged =
            FastLanguageModel::from_pretrained(&merged).device(DeviceKind::Cpu).load_model().expect("it loads");
        let loss = losses(&merged).loss;
        // Products in another order.
        assert!((loss / expected.loss - 1.0).abs() < 1e-5, "{loss} {}", expected.loss);
    }
}

#[test]
fn a_broken_file_of_positions_is_named() {
    let golden = Golden::open("qwen3-tied");
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden.dir.join("adapters/all-linear").join(name), dir.path().join(name)).expect("copied");
    }
    for (text, part) in [
        ("{", "malformed"),
        ("{\"rope_parameters\": {}}", "max_position_embeddings is missing"),
        ("{\"max_position_embeddings\": 1024}", "rope_parameters is missing"),
    ] {
        std::fs::write(dir.path().join(Positions::FILE), text).expect("written");
        let error = base().for_adapter(dir.path()).load_model().expect_err("a broken file");
        assert!(error.to_string().contains(part) && error.to_string().contains(Positions::FILE), "{error}");
    }
    let wrong = json!({ "max_position_embeddings": 1024, "rope_parameters": { "rope_type": "yarn", "factor": -1 } });
    std::fs::write(dir.path().join(Positions::FILE), wrong.to_string()).expect("written");
    let error = base().for_adapter(dir.path()).load_model().expect_err("a wrong number");
    assert!(error.to_string().contains("rope_parameters.factor is -1"), "{error}");
}

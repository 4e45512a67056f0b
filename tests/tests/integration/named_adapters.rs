//! Compares several named adapters on one model with PEFT: `combined` in `goldens/lora-options/qwen3-tied/expect.json`.

use std::path::PathBuf;

use rekindle::{DeviceKind, FastLanguageModel, Model};
use rekindle_lora::{Adapter, Bias, Combination, InitLoraWeights, LoraConfig, LoraFactors};
use rekindle_models::{CausalLm, DEFAULT_ADAPTER, LoadIn, Sft};
use rekindle_tests::{Golden, RowLosses, assert_nll, goldens, read_json, relative_distance, tensors, worst_nll};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig};
use serde_json::Value;

const BASE: &str = "qwen3-tied";
/// The adapters that PEFT combined.
const ADAPTERS: [&str; 4] = ["plain", "rslora", "patterns", "exclude-names"];

fn path(adapter: &str) -> PathBuf {
    goldens().join("lora-options").join(BASE).join("adapters").join(adapter)
}

fn combined() -> Value {
    read_json(&goldens().join("lora-options").join(BASE).join("expect.json"))["combined"].clone()
}

/// Loads the model with all of [`ADAPTERS`]; the last is active.
fn with_all() -> CausalLm {
    let mut model = Golden::open(BASE).load();
    for adapter in ADAPTERS {
        model.load_adapter_as(adapter, &path(adapter)).expect("PEFT's adapter loads");
    }
    model
}

fn losses(model: &CausalLm) -> Vec<f32> {
    model.nll(&Golden::open(BASE).packed()).expect("golden rows fit")
}

fn check(what: &str, model: &CausalLm, rows: &Value) {
    let (batch, rows) = (Golden::open(BASE).packed(), RowLosses::list(rows));
    let nll = losses(model);
    println!("{what}: off by {:.1e}", worst_nll(&batch, &nll, &rows));
    assert_nll(what, &batch, &nll, &rows);
}

fn names(list: &Value) -> Vec<String> {
    serde_json::from_value(list.clone()).expect("a list of names")
}

fn steps(model: &mut CausalLm, count: usize) {
    let mut optimizer =
        Optimizer::new(model, OptimizerConfig::from(&SftConfig::default()), 1).expect("an adapter is on");
    for _ in 0..count {
        optimizer.step(model, &Sft, &[Golden::open(BASE).packed()], 0.01).expect("golden rows fit");
    }
}

#[test]
fn the_active_adapter_determines_the_losses() {
    let mut model = with_all();
    assert_eq!(model.adapters(), ["exclude-names", "patterns", "plain", "rslora"]);
    assert_eq!(model.active_adapter(), Some("exclude-names"));
    for (number, entry) in combined()["active"].as_array().expect("a list").iter().enumerate() {
        let active = names(&entry["adapters"]);
        match &active[..] {
            [] => model.disable_adapter().expect("the CPU does not fail"),
            [one] => model.set_adapter(one).expect("it exists"),
            // Several adapters at once are summed.
            several => {
                let several: Vec<(&str, f64)> = several.iter().map(|name| (name.as_str(), 1.0)).collect();
                model.add_weighted_adapter("several", &several, Combination::Cat).expect("they add up");
            }
        }
        assert_eq!(model.active_adapter().is_some(), !active.is_empty());
        check(&format!("{number}: {active:?}"), &model, &entry["rows"]);
    }
    assert_eq!(model.params().numel(), 0, "nothing is trainable while no adapter is active");
}

#[test]
fn weighted_sums_equal_those_of_peft() {
    for entry in combined()["weighted"].as_array().expect("a list") {
        let mut model = with_all();
        let adapters = names(&entry["adapters"]);
        let weights: Vec<f64> = serde_json::from_value(entry["weights"].clone()).expect("a list of numbers");
        let parts: Vec<(&str, f64)> = adapters.iter().map(String::as_str).zip(weights).collect();
        let kind = entry["combination_type"].as_str().expect("a word");
        let what = format!("{kind} {parts:?}");
        model.add_weighted_adapter("sum", &parts, kind.parse().expect("it is known")).expect("they add up");
        assert_eq!((model.active_adapter(), model.adapters().len()), (Some("sum"), 5));
        let sum = model.adapter().expect("it is active");
        let r = entry["r"].as_u64().expect("a rank") as usize;
        assert_eq!((sum.config.lora().r, sum.config.lora().lora_alpha), (r, r as f64), "{what}");
        let factors = &sum.factors["model.layers.0.self_attn.q_proj"];
        assert_tensor(&what, &factors.a, &entry["tensors"]["model.layers.0.self_attn.q_proj.lora_A.weight"]);
        assert_tensor(&what, &factors.b, &entry["tensors"]["model.layers.0.self_attn.q_proj.lora_B.weight"]);
        // PEFT keeps use_rslora of the first adapter, which scales the sum by √r.
        let scale = entry["scale"].as_f64().expect("a number");
        assert_eq!(sum.config.lora().scale(), 1.0);
        if scale != 1.0 {
            assert!((scale - (r as f64).sqrt()).abs() < 1e-12 && entry["use_rslora"] == true);
            model.add_weighted_adapter("as in PEFT", &[("sum", scale)], Combination::Cat).expect("one is scaled");
        }
        check(&what, &model, &entry["rows"]);
        if kind == "cat" && scale == 1.0 {
            // A decomposition of full rank equals the sum.
            model.add_weighted_adapter("svd", &parts, Combination::Svd(Some(r))).expect("they add up");
            check(&format!("svd {parts:?}"), &model, &entry["rows"]);
        }
    }
}

/// Compares the first row, the last row and the norm of a tensor.
fn assert_tensor(what: &str, got: &[f32], want: &Value) {
    let list = |value: &Value| -> Vec<f32> { serde_json::from_value(value.clone()).expect("a list of numbers") };
    let (first, last) = (list(&want["first"]), list(&want["last"]));
    let width = first.len();
    // This project rounds once where PEFT rounds two or three times.
    for (got, want) in [(&got[..width], first), (&got[got.len() - width..], last)] {
        let error = relative_distance(got, &want);
        assert!(error < 1e-6, "{what}: off by {error:e}");
    }
    let norm = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    assert!((norm / want["norm"].as_f64().expect("a number") - 1.0).abs() < 1e-6, "{what}: {norm}");
}

/// All trained parameters are restored bit for bit, for every kind of adapter and base.
#[test]
fn switching_adapters_changes_no_bit() {
    let lora = || LoraConfig::new(3).lora_alpha(6.0);
    let dense = [
        lora().use_dora(true),
        lora().bias(Bias::All).modules_to_save(["embed_tokens"]),
        lora().modules_to_save(["lm_head"]).ensure_weight_tying(false),
        lora().init_lora_weights(InitLoraWeights::Pissa),
        lora().init_lora_weights(InitLoraWeights::Olora).use_rslora(true),
    ];
    let codes = [lora(), lora().init_lora_weights(InitLoraWeights::Loftq)];
    for (load_in, configs) in [(None, &dense[..]), (Some(LoadIn::FourBit(None)), &codes[..])] {
        let fresh = || Golden::open(BASE).load_with(|options| options.load_in = load_in);
        let base = losses(&fresh());
        let mut model = fresh();
        let mut trained = Vec::new();
        for (number, config) in configs.iter().enumerate() {
            model.add_adapter_as(&number.to_string(), config).expect("a valid configuration");
            steps(&mut model, 2);
            trained.push((model.params().all_values(), losses(&model)));
        }
        for (number, (values, nll)) in trained.iter().enumerate().rev() {
            let name = number.to_string();
            model.set_adapter(&name).expect("it waits");
            assert_eq!((&model.params().all_values(), &losses(&model)), (values, nll), "{:?}", configs[number]);
            // Training continues with the same steps as that of an adapter that was never deactivated.
            let mut alone = fresh();
            alone.add_adapter_as(&name, &configs[number]).expect("a valid configuration");
            steps(&mut alone, 2);
            steps(&mut alone, 1);
            steps(&mut model, 1);
            assert_eq!(losses(&model), losses(&alone), "{:?}", configs[number]);
        }
        model.disable_adapter().expect("the CPU does not fail");
        assert_eq!(losses(&model), base);
    }
}

#[test]
fn an_adapter_is_unloaded_or_merged() {
    let mut model = with_all();
    model.delete_adapter("plain").expect("it waits");
    model.delete_adapter("exclude-names").expect("it is active");
    assert_eq!((model.adapters(), model.active_adapter()), (vec!["patterns", "rslora"], None));
    assert_eq!(losses(&model), losses(&Golden::open(BASE).load()));
    model.set_adapter("rslora").expect("it waits");
    let with = losses(&model);
    model.merge_and_unload().expect("the CPU has enough memory");
    assert!(model.adapters().is_empty(), "the other adapters no longer match the merged base");
    let worst = with.iter().zip(losses(&model)).map(|(a, b)| (a - b).abs() / a.max(1.0)).fold(0.0, f32::max);
    println!("merged: off by {worst:.1e}");
    assert!(worst < 1e-5 && worst > 0.0);
}

#[test]
fn only_the_unnamed_adapter_is_replaced() {
    let mut model = with_all();
    for adapter in ["plain", "rslora"] {
        model.load_adapter(&path(adapter)).expect("PEFT's adapter loads");
        assert_eq!((model.active_adapter(), model.adapters().len()), (Some(DEFAULT_ADAPTER), 5));
    }
    model.set_adapter("plain").expect("it waits");
    model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
    assert_eq!((model.active_adapter(), model.adapters().len()), (Some(DEFAULT_ADAPTER), 5));
    assert_eq!(model.lora().expect("it is active").r, 2);
}

#[test]
fn invalid_names_are_refused() {
    let mut model = with_all();
    let before = losses(&model);
    let taken = model.add_adapter_as("plain", &LoraConfig::new(2)).expect_err("taken").to_string();
    assert!(taken.contains("an adapter \"plain\" already") && taken.contains("delete_adapter"), "{taken}");
    for name in ["", "a/b", "..", "a.b", "a\\b", "a\nb"] {
        let error = model.load_adapter_as(name, &path("plain")).expect_err(name).to_string();
        assert!(error.contains("cannot be used as a directory name"), "{error}");
    }
    for error in [
        model.set_adapter("pain"),
        model.delete_adapter("pain"),
        model.adapter_called("pain").map(|_| ()),
        model.add_weighted_adapter("sum", &[("plain", 1.0), ("pain", 1.0)], Combination::Cat),
    ] {
        let error = error.expect_err("there is none").to_string();
        assert!(error.contains("no adapter \"pain\"; the model has \"exclude-names\", \"patterns\""), "{error}");
    }
    model.load_adapter_as("dora", &path("dora")).expect("PEFT's adapter loads");
    let error = model.add_weighted_adapter("sum", &[("dora", 1.0), ("plain", 1.0)], Combination::Cat);
    assert!(error.expect_err("lengths do not add up").to_string().contains("(use_dora)"));
    assert_eq!(model.active_adapter(), Some("dora"), "a refusal changes nothing");
    model.set_adapter("exclude-names").expect("it waits");
    assert_eq!(losses(&model), before);
}

fn facade() -> Model {
    let loader = FastLanguageModel::from_pretrained(Golden::open(BASE).dir).device(DeviceKind::Cpu);
    loader.dtype(rekindle::Dtype::F32).max_seq_length(128).load_model().expect("a golden checkpoint loads")
}

/// PEFT's layout has `default` at the top and the others in directories with their names.
#[test]
fn all_adapters_are_saved_in_the_layout_of_peft() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let dir = out.path().join("adapters");
    let mut model = facade().load_adapter(path("plain")).expect("PEFT's adapter loads");
    for name in ["rslora", "dora"] {
        model.load_adapter_as(name, path(name)).expect("PEFT's adapter loads");
    }
    // Saves again over the existing files.
    for _ in 0..2 {
        model.save_pretrained(&dir).expect("the disk has space");
        for (place, name) in [(dir.clone(), "plain"), (dir.join("rslora"), "rslora"), (dir.join("dora"), "dora")] {
            let file = "adapter_model.safetensors";
            assert_eq!(tensors(&place.join(file)), tensors(&path(name).join(file)), "{name}");
            let config = "adapter_config.json";
            assert_eq!(read_json(&place.join(config)), read_json(&path(name).join(config)), "{name}");
        }
    }
    let mut again = facade().load_adapter(&dir).expect("it was just written");
    again.load_adapter_as("dora", dir.join("dora")).expect("it was just written");
    assert_eq!(losses(again.causal_lm()), losses(model.causal_lm()));

    model.save_adapter("rslora", out.path().join("one")).expect("the disk has space");
    let alone = facade().load_adapter(out.path().join("one")).expect("it was just written");
    model.set_adapter("rslora").expect("it waits");
    assert_eq!(losses(alone.causal_lm()), losses(model.causal_lm()));
    // Saving fewer adapters does not remove existing ones.
    let error = alone.save_pretrained(&dir).expect_err("others would go").to_string();
    assert!(error.contains("which saving would remove"), "{error}");
    assert!(model.save_adapter("none", out.path().join("none")).is_err() && !out.path().join("none").exists());
}

#[test]
fn several_adapters_are_loaded_as_one() {
    let entry = &combined()["weighted"][3];
    let weights: Vec<f64> = serde_json::from_value(entry["weights"].clone()).expect("a list of numbers");
    let parts: Vec<(PathBuf, f64)> = names(&entry["adapters"]).iter().map(|name| path(name)).zip(weights).collect();
    let model = facade().load_weighted_adapters(&parts, Combination::Cat).expect("they add up");
    assert_eq!(model.adapters(), [DEFAULT_ADAPTER]);
    check("by the facade", model.causal_lm(), &entry["rows"]);
}

/// An adapter that was saved this adapter is untrained has no effect, which is reported.
#[test]
fn an_adapter_without_effect_is_reported() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let lora = || LoraConfig::new(3);
    for (number, config) in [
        lora(),
        lora().use_dora(true),
        lora().modules_to_save(["lm_head"]),
        lora().modules_to_save(["lm_head"]).ensure_weight_tying(false),
    ]
    .into_iter()
    .enumerate()
    {
        let mut model = facade().get_peft_model(config.clone()).expect("a valid configuration");
        assert!(
            model.causal_lm().adapter_changes_nothing() && model.notices().is_empty(),
            "a new adapter is not reported"
        );
        let dir = out.path().join(number.to_string());
        model.save_pretrained(&dir).expect("the disk has space");
        let loaded = facade().load_adapter(&dir).expect("it was just written");
        let [notice] = loaded.notices() else { panic!("{config:?}: {:?}", loaded.notices()) };
        assert!(
            notice.starts_with(&dir.display().to_string()) && notice.contains("this adapter is untrained"),
            "{notice}"
        );
        assert_eq!(
            FastLanguageModel::from_pretrained(&dir).load_model().expect("its base is named").notices().len(),
            1
        );
        steps(model.causal_lm_mut(), 1);
        assert!(!model.causal_lm().adapter_changes_nothing(), "{config:?}");
    }
    // A trained bias, table or magnitude has an effect even if B is zero.
    let with = |config: LoraConfig, change: fn(&mut Adapter)| {
        let mut adapter = facade().get_peft_model(config).expect("a valid configuration").causal_lm().adapter();
        let adapter = adapter.as_mut().expect("it was just added");
        change(adapter);
        let dir = tempfile::tempdir().expect("a temporary directory");
        adapter.save(dir.path()).expect("the disk has space");
        facade().load_adapter(dir.path()).expect("it was just written").notices().len()
    };
    assert_eq!(with(lora(), |_| ()), 1);
    assert_eq!(with(lora().use_dora(true), |a| any(a).magnitude.as_mut().expect("DoRA has magnitudes")[3] *= 1.01), 0);
    assert_eq!(with(lora().modules_to_save(["embed_tokens"]), |a| a.saved.values_mut().for_each(|s| s.1[5] += 0.1)), 0);
    assert_eq!(with(lora(), |a| any(a).b[4] = 1e-6), 0);
    let random = lora().init_lora_weights(InitLoraWeights::Random);
    assert_eq!(with(random, |_| ()), 0, "B does not start at zero");
}

fn any(adapter: &mut Adapter) -> &mut LoraFactors {
    adapter.factors.values_mut().next().expect("it is on some linear")
}

#[test]
fn trained_biases_have_an_effect() {
    let load = || {
        let loader = FastLanguageModel::from_pretrained(Golden::open("qwen2").dir).device(DeviceKind::Cpu);
        loader.max_seq_length(128).load_model().expect("a golden checkpoint loads")
    };
    let out = tempfile::tempdir().expect("a temporary directory");
    let model = load().get_peft_model(LoraConfig::new(2).bias(Bias::All)).expect("a valid configuration");
    let mut adapter = model.causal_lm().adapter().expect("it was just added");
    adapter.save(out.path()).expect("the disk has space");
    assert_eq!(load().load_adapter(out.path()).expect("it was just written").notices().len(), 1);
    adapter.biases.values_mut().for_each(|bias| bias[0] += 0.5);
    adapter.save(out.path()).expect("the disk has space");
    assert!(load().load_adapter(out.path()).expect("it was just written").notices().is_empty());
}

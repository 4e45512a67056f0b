//! Compares adapters initialized from the weights with PEFT: `initial` in
//! `goldens/lora-options/qwen3-tied/expect.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle::{DeviceKind, FastLanguageModel};
use rekindle_hub::{Checkpoint, Dtype};
use rekindle_lora::{Adapter, InitLoraWeights, LoraConfig, LoraFactors};
use rekindle_models::{CausalLm, LoadIn, MergeOptions, Sft, merge};
use rekindle_quant::{QuantConfig, QuantizedTensor};
use rekindle_tests::{Golden, RowLosses, assert_nll, goldens, read_json, relative_distance, tensors, worst_nll};
use rekindle_train::{Optimizer, OptimizerConfig, SftConfig, save_result};
use serde_json::Value;

const BASE: &str = "qwen3-tied";
const TARGETS: [&str; 4] = ["q_proj", "k_proj", "up_proj", "down_proj"];
/// NF4 without double quantization, as in `quantized/qwen3-tied-nf4`.
const NF4: QuantConfig = QuantConfig {
    quant_type: rekindle_quant::QuantType::Nf4,
    blocksize: rekindle_quant::Blocksize::B64,
    double_quant: false,
};

fn dir() -> PathBuf {
    goldens().join("lora-options").join(BASE)
}

fn expect(method: &str) -> Value {
    read_json(&dir().join("expect.json"))["initial"][method].clone()
}

fn methods() -> [(&'static str, InitLoraWeights); 3] {
    [
        ("pissa", InitLoraWeights::Pissa),
        ("pissa_niter_4", InitLoraWeights::PissaNiter(4)),
        ("olora", InitLoraWeights::Olora),
    ]
}

fn config(init: InitLoraWeights) -> LoraConfig {
    LoraConfig::new(4).lora_alpha(6.0).target_modules(TARGETS).init_lora_weights(init)
}

fn loftq_config() -> LoraConfig {
    LoraConfig::new(4).lora_alpha(4.0).init_lora_weights(InitLoraWeights::Loftq)
}

fn with(config: &LoraConfig) -> CausalLm {
    let mut model = Golden::open(BASE).load();
    model.add_adapter(config).expect("a valid configuration");
    model
}

fn quantized(load_in: LoadIn) -> CausalLm {
    Golden::open(BASE).load_with(|options| options.load_in = Some(load_in))
}

fn losses(model: &CausalLm) -> Vec<f32> {
    model.nll(&Golden::open(BASE).packed()).expect("golden rows fit")
}

fn check(what: &str, model: &CausalLm, rows: &[RowLosses]) {
    let batch = Golden::open(BASE).packed();
    let nll = losses(model);
    println!("{what}: off by {:.1e}", worst_nll(&batch, &nll, rows));
    assert_nll(what, &batch, &nll, rows);
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / a.abs().max(1.0)).fold(0.0, f32::max)
}

fn steps(model: &mut CausalLm) {
    let mut optimizer =
        Optimizer::new(model, OptimizerConfig::from(&SftConfig::default()), 1).expect("the adapter is trained");
    for _ in 0..3 {
        optimizer.step(model, &Sft, &[Golden::open(BASE).packed()], 0.01).expect("golden rows fit");
    }
}

/// Returns the weights of the base.
fn base_of(model: &CausalLm) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let out = tempfile::tempdir().expect("a temporary directory");
    model.save(out.path(), Dtype::F32).expect("the disk has space");
    tensors(&out.path().join("model.safetensors"))
}

/// Returns the initial factors of a saved adapter: the second half of A, and that of B negated.
fn started(adapter: &Adapter) -> BTreeMap<String, LoraFactors> {
    let half = |f: &LoraFactors| {
        let r = f.r / 2;
        let b = f.b.chunks_exact(f.r).flat_map(|row| row[r..].iter().map(|b| -b)).collect();
        LoraFactors { r, a: f.a[f.a.len() / 2..].to_vec(), b, magnitude: None }
    };
    adapter.factors.iter().map(|(name, factors)| (name.clone(), half(factors))).collect()
}

/// Returns row i of A concatenated with column i of B, which is unique up to a common sign.
fn pairs(f: &LoraFactors) -> Vec<Vec<f32>> {
    let input = f.a.len() / f.r;
    let column = |k: usize| f.b.iter().skip(k).step_by(f.r);
    (0..f.r).map(|k| f.a[k * input..][..input].iter().chain(column(k)).copied().collect()).collect()
}

fn assert_same_up_to_signs(what: &str, got: &LoraFactors, want: &LoraFactors, tolerance: f64) -> f64 {
    let mut worst = 0.0f64;
    for (got, want) in pairs(got).iter().zip(pairs(want)) {
        let negative: Vec<f32> = got.iter().map(|x| -x).collect();
        let error = relative_distance(got, &want).min(relative_distance(&negative, &want));
        assert!(error <= tolerance, "{what}: off by {error:e}");
        worst = worst.max(error);
    }
    worst
}

#[test]
fn initial_factors_equal_those_of_peft() {
    let golden = Golden::open(BASE);
    for (method, init) in methods() {
        let expect = expect(method);
        let model = with(&config(init));
        check(&format!("{method}, beside the base"), &model, &golden.base_losses());
        check(&format!("{method}, beside PEFT"), &model, &RowLosses::list(&expect["start"]["rows"]));
        let start = Adapter::load(&dir().join("adapters").join(format!("{method}-start")), &model.modules());
        let start = start.expect("PEFT's start loads").factors;
        let adapter = model.adapter().expect("it was just added");
        let base = base_of(&model);
        let list = |value: &Value| -> Vec<f32> { serde_json::from_value(value.clone()).expect("a list of numbers") };
        for (name, want) in expect["residual"].as_object().expect("weights by name") {
            let (shape, got) = &base[name];
            let length = got.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
            let want_length = want["norm"].as_f64().expect("a number");
            if method == "pissa_niter_4" {
                // Different random numbers give a different subspace; the residual of the weight is nearly as small.
                assert!((length / want_length - 1.0).abs() < 0.01, "{method} {name}: {length}, not {want_length}");
                continue;
            }
            // PEFT decomposes in f32. Where the fourth and fifth singular values differ by 1 %, its result differs by
            // 2.03e-5 from a decomposition in f64, which is used here.
            let (first, last) = (&got[..shape[1]], &got[got.len() - shape[1]..]);
            let error =
                relative_distance(first, &list(&want["first"])).max(relative_distance(last, &list(&want["last"])));
            println!("{method} {name}: off by {error:.1e}");
            assert!(error < 5e-5 && (length / want_length - 1.0).abs() < 1e-6, "{method} {name}: off by {error:e}");
        }
        if method != "pissa_niter_4" {
            let errors = started(&adapter)
                .into_iter()
                .map(|(name, got)| assert_same_up_to_signs(&format!("{method} {name}"), &got, &start[&name], 1e-4));
            println!("{method}: factors off by {:.1e}", errors.fold(0.0, f64::max));
        }
    }
}

/// A saved adapter applies to the base as stored in its checkpoint, for every reader.
#[test]
fn a_trained_adapter_is_saved_for_the_original_base() {
    let golden = Golden::open(BASE);
    let untouched = losses(&golden.load());
    let configs = methods().map(|(_, init)| config(init)).into_iter().chain([
        config(InitLoraWeights::Pissa).use_dora(true),
        config(InitLoraWeights::Olora).use_rslora(true).alpha_pattern([("q_proj", 3.0)]).rank_pattern([("up_proj", 2)]),
    ]);
    for config in configs {
        let mut model = with(&config);
        assert!(apart(&losses(&model), &untouched) < 1e-5, "{config:?}");
        steps(&mut model);
        let trained = losses(&model);
        assert!(apart(&trained, &untouched) > 0.05, "{config:?}: training has an effect");

        let out = tempfile::tempdir().expect("a temporary directory");
        let saved = out.path().join("adapter");
        save_result(&model, &saved, &[], Dtype::F32).expect("the disk has space");
        let mut again = golden.load();
        again.load_adapter(&saved).expect("it was just written");
        let grown = if config.use_rslora { core::f64::consts::SQRT_2 } else { 2.0 };
        let lora = again.lora().expect("it was just loaded").clone();
        assert_eq!((lora.r, lora.lora_alpha), (8, 6.0 * grown));
        assert_eq!(lora.init_lora_weights, InitLoraWeights::Default);
        for name in model.adapter().expect("it is active").factors.keys() {
            assert!((lora.scale_of(name) / config.scale_of(name) - 1.0).abs() < 1e-15, "{name}");
        }
        // W − s·B·A and the sum with twice the rank are rounded separately.
        assert!(apart(&losses(&again), &trained) < 1e-5, "{config:?}: {:e}", apart(&losses(&again), &trained));

        let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
        let merged = tempfile::tempdir().expect("a temporary directory");
        let adapter = model.adapter().expect("it is active");
        merge(&checkpoint, &adapter, MergeOptions::default(), merged.path(), &mut |_| ()).expect("the disk has space");
        let on_disk = Golden { dir: merged.path().to_owned(), ..Golden::open(BASE) }.load();
        assert!(apart(&losses(&on_disk), &trained) < 1e-5, "{config:?}: {:e}", apart(&losses(&on_disk), &trained));

        let mut in_memory = with(&config);
        in_memory.params_mut().clone_from(model.params());
        assert_eq!(losses(&in_memory), trained, "{config:?}");
        in_memory.merge_and_unload().expect("the CPU has enough memory");
        assert!(apart(&losses(&in_memory), &trained) < 1e-5, "{config:?}");

        // Removing or replacing the adapter restores the base bit for bit.
        model.add_adapter(&LoraConfig::new(2)).expect("a valid configuration");
        assert_eq!(losses(&model), untouched, "{config:?}");
        let mut model = with(&config);
        model.remove_adapter();
        assert_eq!(losses(&model), untouched, "{config:?}");
        let mut model = with(&config);
        model.load_adapter(&saved).expect("it was just written");
        assert_eq!(losses(&model), losses(&again), "{config:?}");
    }
}

/// Weights that are not in the checkpoint are kept in memory.
#[test]
fn the_weights_of_a_merged_model_are_restored() {
    let mut model = Golden::open(BASE).load_adapted("all-linear");
    model.merge_and_unload().expect("the CPU has enough memory");
    let merged = losses(&model);
    assert_ne!(merged, losses(&Golden::open(BASE).load()));
    model.add_adapter(&config(InitLoraWeights::Pissa)).expect("a valid configuration");
    assert!(apart(&losses(&model), &merged) < 1e-5);
    model.remove_adapter();
    assert_eq!(losses(&model), merged);
}

/// PEFT's converted adapters and ours have the same products B·A.
#[test]
fn a_trained_adapter_is_converted_like_in_peft() {
    for method in ["pissa", "olora"] {
        let mut model = Golden::open(BASE).load();
        let converted = dir().join("adapters").join(format!("{method}-converted"));
        model.load_adapter(&converted).expect("PEFT's file loads");
        check(&format!("{method} converted"), &model, &RowLosses::list(&expect(method)["converted"]["rows"]));
        let theirs = Adapter::load(&converted, &model.modules()).expect("PEFT's file loads");
        let init = if method == "pissa" { InitLoraWeights::Pissa } else { InitLoraWeights::Olora };
        let ours = with(&config(init)).adapter().expect("it was just added");
        // The second half has the initial factors of both.
        for (name, want) in started(&theirs) {
            assert_same_up_to_signs(&format!("{method} {name}"), &started(&ours)[&name], &want, 1e-4);
        }
        assert_eq!((ours.config.lora().r, ours.config.lora().lora_alpha), (8, 12.0));
        assert_eq!((theirs.config.lora().r, theirs.config.lora().lora_alpha), (8, 12.0));
    }
}

#[test]
fn loftq_starts_closer_to_the_base_than_plain_quantization() {
    let golden = Golden::open(BASE);
    let expect = expect("loftq");
    let dense = losses(&golden.load());
    let mean = |nll: &[f32]| nll.iter().zip(&dense).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
    for load_in in [LoadIn::FourBit(Some(NF4)), LoadIn::FourBit(None), LoadIn::EightBit] {
        let mut model = quantized(load_in);
        let plain = losses(&model);
        model.add_adapter(&loftq_config()).expect("a valid configuration");
        let start = losses(&model);
        println!("{load_in:?}: Σ|Δnll| {:.3} quantized only, {:.3} with loftq", mean(&plain), mean(&start));
        assert!(mean(&start) < 0.95 * mean(&plain), "{load_in:?}");
        if load_in == LoadIn::FourBit(Some(NF4)) {
            check("loftq", &model, &RowLosses::list(&expect["rows"]));
            let theirs = Adapter::load(&dir().join("adapters/loftq"), &model.modules()).expect("it loads").factors;
            for (name, got) in model.adapter().expect("it was just added").factors {
                assert_same_up_to_signs(&name, &got, &theirs[&name], 1e-3);
            }
        }
        steps(&mut model);
        let trained = losses(&model);

        let out = tempfile::tempdir().expect("a temporary directory");
        let saved = out.path().join("adapter");
        save_result(&model, &saved, &[], Dtype::F32).expect("the disk has space");
        let mut again = quantized(load_in);
        again.load_adapter(&saved).expect("it was just written");
        assert_eq!(losses(&again), trained, "{load_in:?}");
        assert_eq!((again.lora().expect("it is active").r, again.lora().expect("it is active").lora_alpha), (4, 4.0));
        let error = golden.load().load_adapter(&saved).expect_err("the base is dense").to_string();
        assert!(error.contains("initialized by LoftQ") && error.contains(load_in.argument()), "{error}");

        // The linears without an adapter must match too.
        let beside = Golden::open(BASE).load_with(|options| {
            options.load_in = Some(load_in);
            options.skip_modules = Some(vec!["o_proj".to_owned()]);
        });
        let error = { beside }.load_adapter(&saved).expect_err("o_proj is dense").to_string();
        assert!(error.contains("o_proj is not quantized so"), "{error}");

        // The adapter records how its base is quantized.
        let loader =
            FastLanguageModel::from_pretrained(&golden.dir).device(DeviceKind::Cpu).dtype(rekindle::Dtype::F32);
        let brought = loader.for_adapter(&saved).load_model().and_then(|model| model.load_adapter(&saved));
        assert_eq!(losses(brought.expect("the base is quantized as the adapter says").causal_lm()), trained);

        // Merges onto the quantized weights it was trained on, recreated from the dense checkpoint.
        let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
        let adapter = Adapter::load(&saved, &model.modules()).expect("it was just written");
        let merged = out.path().join("merged");
        std::fs::create_dir(&merged).expect("the disk has space");
        merge(&checkpoint, &adapter, MergeOptions::default(), &merged, &mut |_| ()).expect("the disk has space");
        let others = Checkpoint::open(&goldens().join("quantized/qwen3-tied-fp4")).expect("a golden checkpoint opens");
        let error = merge(&others, &adapter, MergeOptions::default(), &out.path().join("wrong"), &mut |_| ());
        assert!(error.is_err(), "{load_in:?}: the quantized weights differ");
        model.merge_and_unload().expect("the CPU has enough memory");
        for merged in [Golden { dir: merged, ..Golden::open(BASE) }.load(), model] {
            assert!(apart(&losses(&merged), &trained) < 1e-5, "{load_in:?}: {:e}", apart(&losses(&merged), &trained));
        }
    }
}

/// Compares the residual over all weights after one iteration and after five.
#[test]
fn loftqs_residual_equals_that_of_the_reference_algorithm() {
    let modules = Golden::open(BASE).load().modules();
    let weights = tensors(&Golden::open(BASE).dir.join("model.safetensors"));
    for (method, iterations) in [("loftq", 1), ("loftq-5-iterations", 5)] {
        let mut square = 0.0;
        for linear in &modules.linears {
            let w = &weights[&format!("{}.weight", linear.name)].1;
            let shape = [linear.out, linear.input];
            let quantize = |w: &[f32]| -> Vec<f32> {
                QuantizedTensor::quantize(w, &shape, &NF4).expect("a matrix is quantized").dequantize()
            };
            let start = rekindle_lora::loftq(&loftq_config(), &linear.name, w, shape, iterations, quantize);
            let mut sum = start.base;
            rekindle_lora::merge(&mut sum, shape, &start.factors, 1.0, None);
            square += sum.iter().zip(w).map(|(sum, w)| f64::from(sum - w).powi(2)).sum::<f64>();
        }
        let want = expect(method)["weight_error"]["loftq"].as_f64().expect("a number");
        println!("{method}: {} beside {want}", square.sqrt());
        // A value halfway between two codes may round either way; the measured difference is 1.4e-8.
        assert!((square.sqrt() / want - 1.0).abs() < 1e-6, "{}", square.sqrt());
    }
}

/// An adapter on some linears was trained together with the others in their format.
#[test]
fn loftq_requires_the_other_linears_in_the_same_format() {
    let base = |skip: Option<&[&str]>| {
        Golden::open(BASE).load_with(|options| {
            options.load_in = Some(LoadIn::FourBit(None));
            options.skip_modules = skip.map(|names| names.iter().map(ToString::to_string).collect());
        })
    };
    let config = loftq_config().target_modules(["q_proj"]);
    let out = tempfile::tempdir().expect("a temporary directory");
    for (skip, other, parts) in [
        (Some(&["up_proj"][..]), None, ["up_proj dense, which is different", "with skip_modules = [\"up_proj\"]"]),
        (None, Some(&["up_proj"][..]), ["up_proj in codes, which is different", "load the base without skip_modules"]),
    ] {
        let mut model = base(skip);
        model.add_adapter(&config).expect("a valid configuration");
        model.adapter().expect("it was just added").save(out.path()).expect("the disk has space");
        base(skip).load_adapter(out.path()).expect("it is the base that it was trained on");
        let error = base(other).load_adapter(out.path()).expect_err("another linear is otherwise").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn unsuitable_bases_are_refused() {
    let refused = |mut model: CausalLm, config: &LoraConfig, parts: &[&str]| {
        let error = model.add_adapter(config).expect_err("refused").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let pissa = config(InitLoraWeights::Pissa);
    refused(
        quantized(LoadIn::EightBit),
        &pissa,
        &["\"pissa\" subtracts from the base", "q_proj is quantized", "\"loftq\""],
    );
    refused(Golden::open(BASE).load(), &loftq_config(), &["\"loftq\" starts from", "is not quantized", "load_in_4bit"]);
    let stored = Golden::open("quantized/qwen3-tied-nf4").load();
    refused(stored, &loftq_config(), &["contains only quantized weights", "16-bit checkpoint"]);
    let mut asked = loftq_config();
    asked.loftq_config = Some(rekindle_lora::LoftqConfig::default());
    refused(quantized(LoadIn::EightBit), &asked, &["loftq_bits is 4", "8 bits", "load_in_4bit"]);
    let misspelt = config(InitLoraWeights::Other("pisa".to_owned()));
    refused(Golden::open(BASE).load(), &misspelt, &["init_lora_weights \"pisa\"", "nearest: \"pissa\""]);
}

#[test]
fn saved_adapters_have_the_keys_and_shapes_of_pefts_converted_ones() {
    let out = tempfile::tempdir().expect("a temporary directory");
    for (method, init) in methods() {
        let mut model = with(&config(init));
        steps(&mut model);
        let saved = out.path().join(method);
        save_result(&model, &saved, &[], Dtype::F32).expect("the disk has space");
        let keys = |path: &Path| tensors(path).into_iter().map(|(key, (shape, _))| (key, shape)).collect::<Vec<_>>();
        let theirs = dir().join("adapters").join(format!("{method}-converted"));
        let [ours, theirs] = [saved, theirs].map(|dir| keys(&dir.join("adapter_model.safetensors")));
        assert_eq!(ours, theirs, "{method}");
    }
}

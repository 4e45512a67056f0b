//! Compares products in fp8 with PyTorch's casts: results and every gradient of two linears with adapters.

use rekindle_hub::Checkpoint;
use rekindle_kernels::fp8::Fp8Products;
use rekindle_kernels::quantized::{Fp8Scaling, QuantizedData, QuantizedFormat};
use rekindle_kernels::{DType, Device, ParamsBuilder, QuantizedWeight, Tensor, Weight, from_f32, to_f32};
use rekindle_lora::{Bias, Linear, LinearContext, LinearGroup, LoraConfig, LoraFactors, LoraInit};
use rekindle_models::{CausalLm, LoadIn, LoadOptions, MemoryClass};
use rekindle_tests::{Golden, goldens, read_json};
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f32> {
    let list = value.as_array().expect("a list of numbers");
    list.iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

fn assert_close(what: &str, got: &[f32], want: &Value) {
    let want = numbers(want);
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        // Sums of at most 48 products in f32; a code that is rounded differently would be off by 1/16 of a value.
        assert!((got - want).abs() <= 48.0 * f32::EPSILON * largest, "{what} [{i}]: {got}, not {want}");
    }
}

#[test]
fn a_group_of_linears_equals_pytorchs_casts() {
    let golden = read_json(&goldens().join("fp8-products/linear.json"));
    let size = |key: &str| golden[key].as_u64().expect("a size") as usize;
    let (tokens, input, r) = (size("tokens"), size("input"), size("r"));
    let device = Device::cpu();
    let matrix = |values: Vec<f32>, width: usize| -> Tensor<2> {
        let rows = values.len() / width;
        from_f32(values, [rows, width], &device, DType::F32)
    };
    let linears = golden["linears"].as_array().expect("two linears");
    for (products, dx) in [(Fp8Products::ForwardAndBackward, "dx"), (Fp8Products::Forward, "dx_forward_only")] {
        let linear = |(index, golden): (usize, &Value)| {
            let scales = numbers(&golden["scales"]);
            let (out, codes) = (scales.len(), numbers(&golden["codes"]).into_iter().map(|code| code as u8).collect());
            let format = QuantizedFormat::Fp8 { codes, scales, scaling: Fp8Scaling::Row, section: out };
            let weight = QuantizedWeight::new(QuantizedData { dims: [out, input], format }, &device);
            let bias = Weight::Frozen(from_f32(numbers(&golden["bias"]), [1, out], &device, DType::F32));
            Linear::new(index.to_string(), Weight::Quantized(weight), Some(bias))
        };
        let mut group = LinearGroup::new(linears.iter().enumerate().map(linear).collect());
        group.multiply_in_fp8(products).expect("fp8 with a scale for each row");
        let mut params = ParamsBuilder::new(&device, DType::F32);
        group.adapt(&mut params, 0, |linear| {
            let golden = &linears[linear.name.parse::<usize>().expect("an index")];
            let factors = LoraFactors { r, a: numbers(&golden["a"]), b: numbers(&golden["b"]), magnitude: None };
            LoraInit { factors: Some((factors, golden["scale"].as_f64().expect("a number"))), bias: None }
        });
        let params = params.build();
        let (ctx, x) = (LinearContext::new(&params), matrix(numbers(&golden["x"]), input));
        assert_eq!(x.dims()[0], tokens);
        let (ys, saved) = group.forward(ctx, &x);
        let dys: Vec<Tensor<2>> =
            linears.iter().zip(&ys).map(|(golden, y)| matrix(numbers(&golden["dy"]), y.dims()[1])).collect();
        let mut grads = params.zero_grads();
        let got = group.backward(ctx, &mut grads, &x, &saved, &dys, true).expect("asked for");
        assert_close(dx, &to_f32(got), &golden[dx]);
        for (i, (y, golden)) in ys.into_iter().zip(linears).enumerate() {
            assert_close(&format!("y of {i}"), &to_f32(y), &golden["y"]);
        }
        let trained: Vec<_> = group.trained_params().collect();
        let names = [("0", "da"), ("0", "db"), ("1", "da"), ("1", "db")];
        for (at, (linear, key)) in trained.iter().zip(names) {
            let index: usize = linear.parse().expect("an index");
            assert_close(&format!("{key} of {linear}"), &grads.values(*at), &linears[index][key]);
        }
    }
}

#[test]
fn a_model_multiplies_in_fp8() {
    for name in ["qwen3-tied", "llama-bias", "fp8/fbgemm"] {
        let golden = Golden::open(name);
        let batch = golden.packed();
        let mean = |model: &CausalLm| {
            let nll = model.nll(&batch).expect("golden rows fit");
            nll.iter().map(|nll| f64::from(*nll)).sum::<f64>() / nll.len() as f64
        };
        let dense = mean(&golden.load());
        let model = golden.load_with(|options| options.fp8 = Some(Fp8Products::Forward));
        let report = model.memory_report();
        assert!(report.line(MemoryClass::PackedCodes).is_some_and(|line| line.bytes > 0), "{name}:\n{report}");
        let fp8 = mean(&model);
        // Random weights: rounding moves the losses of tokens both ways.
        assert!(fp8 != dense && (fp8 - dense).abs() < 0.01 * dense, "{name}: {fp8}, {dense} without fp8");
        let both = golden.load_with(|options| options.fp8 = Some(Fp8Products::ForwardAndBackward));
        assert_eq!(mean(&both), fp8, "{name}: the choice is about the backward");
    }
}

#[test]
fn what_is_not_computed_in_fp8_is_refused() {
    let golden = Golden::open("llama-bias");
    let fp8 = Some(Fp8Products::ForwardAndBackward);
    let refusal_of = |golden: &Golden, change: &dyn Fn(&mut LoadOptions)| {
        let mut options = LoadOptions::new(Device::cpu(), DType::F32, 64);
        options.fp8 = fp8;
        change(&mut options);
        let checkpoint = Checkpoint::open(&golden.dir).expect("a golden checkpoint opens");
        CausalLm::load(&checkpoint, &options, &mut |_| ()).expect_err("not in fp8").to_string()
    };
    let refusal = |change: &dyn Fn(&mut LoadOptions)| refusal_of(&golden, change);
    let trained = refusal(&|options| options.full_finetuning = true);
    assert!(trained.contains("is trained"), "{trained}");
    let quantized = refusal(&|options| options.load_in = Some(LoadIn::EightBit));
    assert!(quantized.contains("is kept in 8-bit codes"), "{quantized}");
    let blocks = refusal_of(&Golden::open("fp8/block"), &|_| ());
    assert!(blocks.contains("a scale for each block of 128 × 128"), "{blocks}");
    let skipped = refusal(&|options| options.skip_modules = Some(vec!["q_proj".to_owned(), "lm_head".to_owned()]));
    assert!(skipped.contains("q_proj\" is dense"), "{skipped}");
    let mut model = golden.load_with(|options| options.fp8 = fp8);
    for (config, option) in
        [(LoraConfig::new(4).use_dora(true), "use_dora"), (LoraConfig::new(4).bias(Bias::All), "bias")]
    {
        let error = model.add_adapter(&config).expect_err("not in fp8").to_string();
        assert!(error.contains(option), "{error}");
    }
    model.add_adapter(&LoraConfig::new(4)).expect("a plain adapter");
}

use rekindle_kernels::dropout::{Dropout, Token, Tokens};
use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::runtime::{Cuda, DeviceProps, MemoryUse};
use rekindle_kernels::{
    DType, Device, Grads, Params, ParamsBuilder, QuantizedWeight, RngKey, Tensor, Weight, from_f32, to_f32, unfilled,
};

use super::LinearContext;
use crate::{Linear, LinearGroup, LoraFactors, LoraInit};

const TOKENS: usize = 5;
const INPUT: usize = 6;
const OUTPUTS: [usize; 3] = [8, 4, 4];
const R: usize = 2;

/// Numbers between −1 and 1 without a pattern.
fn values(seed: u32, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| ((seed + i).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

fn matrix(seed: u32, shape: [usize; 2]) -> Tensor<2> {
    from_f32(values(seed, shape[0] * shape[1]), shape, &Device::cpu(), DType::F32)
}

fn magnitude(name: &str, out: usize, use_dora: bool) -> Option<Vec<f32>> {
    use_dora.then(|| values(name.len() as u32, out).iter().map(|m| 1.5 + m).collect())
}

fn adapted(mut group: LinearGroup, factors: impl Fn(&Linear) -> LoraFactors, bias: bool) -> (LinearGroup, Params) {
    let mut params = ParamsBuilder::new(&Device::cpu(), DType::F32);
    group.adapt(&mut params, 0, |linear| LoraInit {
        factors: Some((factors(linear), 0.5)),
        bias: bias.then(|| values(99, linear.weight.dims()[0])),
    });
    (group, params.build())
}

/// The outputs, the gradient to x and all gradients of parameters, for fixed x and gradients to the outputs.
fn run(group: &LinearGroup, params: &Params, adapters: bool) -> (Vec<Vec<f32>>, Vec<f32>, Grads) {
    let ctx = LinearContext { adapters, ..LinearContext::new(params) };
    let x = matrix(1, [TOKENS, INPUT]);
    let (ys, saved) = group.forward(ctx, &x);
    let dys: Vec<Tensor<2>> =
        ys.iter().zip(20u32..).map(|(y, seed)| matrix(1000 * seed, [TOKENS, y.dims()[1]])).collect();
    let mut grads = params.zero_grads();
    let dx = group.backward(ctx, &mut grads, &x, &saved, &dys, true).expect("asked for");
    (ys.into_iter().map(to_f32).collect(), to_f32(dx), grads)
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Sums of at most 16 products of numbers up to 2.
        assert!((got - want).abs() <= 16.0 * f32::EPSILON * 16.0, "{what} [{i}]: {got}, not {want}");
    }
}

/// A fused linear is the separate ones with one A: its outputs are theirs, and its dA is the sum of their dA.
#[test]
fn a_fused_linear_is_its_parts() {
    let total: usize = OUTPUTS.iter().sum();
    let (w, b) = (values(7, total * INPUT), values(8, total * R));
    let a = values(9, R * INPUT);
    let (from, to) = (|i: usize| OUTPUTS[..i].iter().sum::<usize>(), |i: usize| OUTPUTS[..=i].iter().sum::<usize>());
    let frozen =
        |values: &[f32], rows| Weight::Frozen(from_f32(values.to_vec(), [rows, INPUT], &Device::cpu(), DType::F32));
    for use_dora in [false, true] {
        let lengths: Vec<f32> =
            (0..3).flat_map(|i| magnitude(["q", "kk", "vvv"][i], OUTPUTS[i], use_dora).unwrap_or_default()).collect();
        let fused = Linear::fused("qkv", frozen(&w, total), None, OUTPUTS.to_vec());
        let whole = || LoraFactors { r: R, a: a.clone(), b: b.clone(), magnitude: use_dora.then(|| lengths.clone()) };
        let (fused, fused_params) = adapted(LinearGroup::new(vec![fused]), |_| whole(), true);

        let part = |i: usize| {
            let rows = &w[from(i) * INPUT..to(i) * INPUT];
            Linear::new(["q", "kk", "vvv"][i], frozen(rows, OUTPUTS[i]), None)
        };
        let factors = |linear: &Linear| {
            let i = linear.name.len() - 1;
            let magnitude = magnitude(&linear.name, OUTPUTS[i], use_dora);
            LoraFactors { r: R, a: a.clone(), b: b[from(i) * R..to(i) * R].to_vec(), magnitude }
        };
        let mut parts = LinearGroup::new((0..3).map(part).collect());
        let mut params = ParamsBuilder::new(&Device::cpu(), DType::F32);
        let bias = values(99, total);
        parts.adapt(&mut params, 0, |linear| {
            let i = linear.name.len() - 1;
            LoraInit { factors: Some((factors(linear), 0.5)), bias: Some(bias[from(i)..to(i)].to_vec()) }
        });
        let params = params.build();

        let (ys, dx, grads) = run(&fused, &fused_params, true);
        let (want_ys, want_dx, want_grads) = run(&parts, &params, true);
        assert_eq!(ys.len(), 3);
        ys.iter().zip(&want_ys).for_each(|(y, want)| assert_close("y", y, want));
        assert_close("dx", &dx, &want_dx);
        let of = |params: &Params, grads: &Grads, end: &str| -> Vec<Vec<f32>> {
            let infos = params.infos().iter().filter(|info| info.name.ends_with(end));
            infos.map(|info| grads.values(info.at)).collect()
        };
        for end in [".lora_B.weight", ".bias", ".lora_magnitude_vector.weight"] {
            let (got, want) = (of(&fused_params, &grads, end), of(&params, &want_grads, end));
            assert_close(end, &got.concat(), &want.concat());
        }
        let want = of(&params, &want_grads, ".lora_A.weight");
        let sum: Vec<f32> = (0..R * INPUT).map(|i| want.iter().map(|part| part[i]).sum()).collect();
        assert_close("dA", &of(&fused_params, &grads, ".lora_A.weight").concat(), &sum);
    }
}

/// With adapters switched off a group computes what it did before it had one, to the bit, and trains nothing.
#[test]
fn adapters_can_be_switched_off_for_one_pass() {
    let base = || {
        let linear = |name: &str, seed, out| {
            let bias = Weight::Frozen(matrix(seed + 1, [1, out]));
            Linear::new(name, Weight::Frozen(matrix(seed, [out, INPUT])), Some(bias))
        };
        let fused = Linear::fused("gate_up", Weight::Frozen(matrix(5, [8, INPUT])), None, vec![4, 4]);
        LinearGroup::new(vec![linear("q", 2, 8), fused, linear("v", 3, 4)])
    };
    let none = ParamsBuilder::new(&Device::cpu(), DType::F32).build();
    let (want_ys, want_dx, _) = run(&base(), &none, true);
    for use_dora in [false, true] {
        let factors = |linear: &Linear| {
            let out = linear.weight.dims()[0];
            let magnitude = magnitude(&linear.name, out, use_dora);
            LoraFactors { r: R, a: values(4, R * INPUT), b: values(6, out * R), magnitude }
        };
        let (group, params) = adapted(base(), factors, true);
        let (ys, dx, grads) = run(&group, &params, false);
        assert_eq!((ys, dx), (want_ys.clone(), want_dx.clone()));
        assert!(grads.all_values().iter().all(|&g| g == 0.0));
        assert_ne!(run(&group, &params, true).0, want_ys, "the adapter does change the result");
    }
}

/// On CUDA the weights of a group move into one matrix, which takes the memory that they had, and so after every adapter.
#[test]
fn on_cuda_the_weights_of_a_group_need_no_more_memory_than_alone() {
    const WIDTH: usize = 256;
    const ROWS: [usize; 3] = [64, 32, 16];
    for usage in [MemoryUse::Weights, MemoryUse::QuantizedWeights] {
        let cuda = Cuda::planned(DeviceProps::hopper(1 << 30));
        let device = Device::Cuda(cuda.clone());
        let weights = ROWS.map(|out| match usage {
            MemoryUse::Weights => Weight::Frozen(unfilled([out, WIDTH], &device, DType::BF16)),
            _ => {
                let zeros = QuantizedData::four_bit_zeros([out, WIDTH], 1, 64, Some(16));
                Weight::Quantized(QuantizedWeight::new(zeros, &device))
            }
        });
        let before = cuda.memory();
        assert_eq!(before.by_use.iter().map(|(usage, _)| *usage).collect::<Vec<_>>(), [usage]);
        let linears = weights.into_iter().enumerate().map(|(i, weight)| Linear::new(format!("{i}"), weight, None));
        let mut group = LinearGroup::new(linears.collect());
        let alone = cuda.memory();
        // Offsets of 4-bit scales are repeated: one for every 16 rows.
        assert!(alone.in_use <= before.in_use + 4096, "{alone:?} after {before:?}");

        for use_dora in [false, true] {
            let mut params = ParamsBuilder::new(&device, DType::BF16);
            group.adapt(&mut params, 0, |linear| {
                let [out, input] = linear.weight.dims();
                let magnitude = use_dora.then(|| vec![0.0; out]);
                let factors = LoraFactors { r: 8, a: vec![0.0; 8 * input], b: vec![0.0; 8 * out], magnitude };
                LoraInit { factors: Some((factors, 1.0)), bias: use_dora.then(|| vec![0.0; out]) }
            });
            assert!(group.keeps_input() && group.room() == 24 && !group.has_separate_products());
            let params = params.build();
            let x = unfilled([3, WIDTH], &device, DType::BF16);
            let tokens = Tokens::new(vec![Token { row: 0, position: 0 }; 3], &device);
            for p in [None, Some(0.5)] {
                let dropout = p.map(|p| Dropout { p, key: RngKey { seed: 1, step: 1 }, tokens: &tokens });
                let ctx = LinearContext::new(&params).with_dropout(dropout);
                let (ys, saved) = group.forward(ctx, &x);
                assert_eq!(saved.is_small(), !use_dora);
                let mut grads = params.zero_grads();
                let dx = group.backward(ctx, &mut grads, &x, &saved, &ys, true).expect("asked for");
                assert_eq!(dx.dims(), [3, WIDTH]);
            }
        }
        let mut none = ParamsBuilder::new(&device, DType::BF16);
        group.adapt(&mut none, 0, |_| LoraInit::default());
        assert!(!group.keeps_input());
        group.replace_weights(|linear| linear.name == "1");
        device.check().expect("nothing failed");
        // The scratch memory of products stays.
        let mut left = cuda.memory().by_use;
        left.retain(|(usage, _)| *usage != MemoryUse::Workspace);
        assert_eq!(left, alone.by_use);

        let none = none.build();
        let x = unfilled([3, WIDTH], &device, DType::BF16);
        let (ys, saved) = group.forward(LinearContext::new(&none), &x);
        assert_eq!(ys.iter().map(Tensor::dims).collect::<Vec<_>>(), ROWS.map(|out| [3, out]));
        let dx = group.backward(LinearContext::new(&none), &mut none.zero_grads(), &x, &saved, &ys, true);
        assert_eq!(dx.expect("asked for").dims(), [3, WIDTH]);
        drop(group);
        device.check().expect("nothing failed");
    }
}

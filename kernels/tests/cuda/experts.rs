//! Quantized experts that are decoded some at a time.

use burn::tensor::DType;
use rekindle_kernels::grouped::{self, GroupedRows};
use rekindle_kernels::quantized::{Absmax, BlockCodec, Fp8Scaling, QuantizedData, QuantizedFormat};
use rekindle_kernels::routing::Dispatch;
use rekindle_kernels::{Device, QuantizedWeight, Tensor, from_f32, to_f32};

use super::common::noise;

const EXPERTS: usize = 10;
/// Output and input features. Two groups of experts share the scratch memory in 16 bits, three in f32.
const DIMS: [usize; 2] = [4096, 4096];

/// Products have the bits of those with all experts decoded at once.
pub(crate) fn groups_compute_as_one(device: &Device, dtype: DType) {
    let [n, k] = DIMS;
    // Experts 3 and 7 have no rows.
    let chosen: Vec<u32> = (0..300).map(|row| [0, 1, 2, 4, 5, 6, 8, 9, 9][row * row % 9]).collect();
    let dispatch = Dispatch::of(&chosen, EXPERTS, 1, device);
    let matrix = |seed, columns: usize| from_f32(noise(seed, 300 * columns), [300, columns], device, dtype);
    let (x, dy, beside) = (matrix(1, k), matrix(2, n), matrix(3, k));
    let is_equal = |ours: Tensor<2>, theirs: Tensor<2>| to_f32(ours) == to_f32(theirs);
    for format in formats() {
        let name = format.name();
        let weight = QuantizedWeight::new(QuantizedData { dims: [EXPERTS * n, k], format }, device);
        let dense = weight.decode(dtype);
        let (rows, grads) = (GroupedRows::Sorted(&x), GroupedRows::Tokens(&dy));
        let y = grouped::nt(rows, &dense, &dispatch);
        assert!(is_equal(weight.grouped_nt(rows, &dispatch), y), "{name}: y");
        assert!(
            is_equal(weight.grouped_nn(grads, None, &dispatch), grouped::nn(grads, &dense, &dispatch)),
            "{name}: dx"
        );
        let added = grouped::nn_add(beside.clone(), 1.0, grads, &dense, &dispatch);
        assert!(is_equal(weight.grouped_nn(grads, Some(beside.clone()), &dispatch), added), "{name}: dx added");
    }
}

/// Products of a few selections decode the chosen experts alone, or none: their rows must not depend on what the scratch
/// memory holds.
pub(crate) fn few_selections(device: &Device, dtype: DType) {
    let [n, k] = DIMS;
    // Four experts a token; experts 0, 4 and 8 have no rows.
    let chosen = [9, 1, 3, 7, 2, 9, 5, 1];
    for (tokens, format) in [1, 2].into_iter().flat_map(|tokens| formats().into_iter().map(move |f| (tokens, f))) {
        let name = format.name();
        let is_four_bit = matches!(format, QuantizedFormat::FourBit { .. });
        let weight = QuantizedWeight::new(QuantizedData { dims: [EXPERTS * n, k], format }, device);
        let dispatch = Dispatch::of(&chosen[..4 * tokens], EXPERTS, 4, device);
        // Garbage for experts that are not decoded.
        drop(from_f32(vec![f32::NAN; 1 << 26], [1 << 13, 1 << 13], device, dtype));
        for (by_token, rows) in [(true, tokens), (false, 4 * tokens)] {
            let x = from_f32(noise(3, rows * k), [rows, k], device, dtype);
            let operand = |x| if by_token { GroupedRows::Tokens(x) } else { GroupedRows::Sorted(x) };
            let ours = to_f32(weight.grouped_nt(operand(&x), &dispatch));
            let plain = to_f32(grouped::nt(operand(&x), &weight.decode(dtype), &dispatch));
            if !is_four_bit || dtype == DType::F32 {
                assert!(ours == plain, "{name}, {tokens} tokens, by token {by_token}");
                continue;
            }
            let wide = from_f32(to_f32(x.clone()), [rows, k], device, DType::F32);
            let exact = to_f32(grouped::nt(operand(&wide), &weight.decode(DType::F32), &dispatch));
            let error = |y: &[f32]| y.iter().zip(&exact).map(|(y, exact)| (y - exact).powi(2)).sum::<f32>().sqrt();
            let [ours, plain] = [error(&ours), error(&plain)];
            assert!(ours <= 2.0 * plain, "{name}, {tokens} tokens, by token {by_token}: {ours:e}, plain {plain:e}");
        }
    }
}

fn formats() -> Vec<QuantizedFormat> {
    let elements = EXPERTS * DIMS[0] * DIMS[1];
    let bytes = |count: usize| (0..count).map(|at| (at * 37 % 251) as u8).collect::<Vec<u8>>();
    let table = noise(4, 16).try_into().expect("16 values");
    let (blocks, nested) = (elements / 64, elements / 64 / 256);
    let double = Absmax::Double {
        codes: bytes(blocks),
        map: Box::new(noise(5, 256).try_into().expect("256 values")),
        nested: noise(6, nested),
        blocksize: 256,
        // One for each stored matrix, of which an expert has two.
        offsets: noise(7, 2 * EXPERTS),
    };
    let four_bit = |absmax| QuantizedFormat::FourBit { codes: bytes(elements / 2), table, blocksize: 64, absmax };
    let int8 = QuantizedFormat::Int8 {
        codes: bytes(elements).into_iter().map(u8::cast_signed).collect(),
        scales: noise(8, EXPERTS * DIMS[0]),
        factor: 1.0 / 127.0,
    };
    let fp8 = QuantizedFormat::Fp8 {
        codes: bytes(elements).into_iter().map(|code| code & 0xf7).collect(),
        scales: noise(10, EXPERTS * Fp8Scaling::Block.scales(DIMS)),
        scaling: Fp8Scaling::Block,
        section: DIMS[0],
    };
    let codec =
        BlockCodec { name: "Q4_1", elements: 32, bytes: 20, decode: |_, _| unreachable!("decoded on the device") };
    // No byte has the bits of an infinite factor.
    let stored = bytes(elements / 32 * 20).into_iter().map(|byte| byte & 0xbf).collect();
    vec![
        four_bit(Absmax::Single(noise(9, blocks))),
        four_bit(double),
        int8,
        fp8,
        QuantizedFormat::Blocks { bytes: stored, codec },
    ]
}

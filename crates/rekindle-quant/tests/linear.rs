//! Compares `QuantLinear` with Burn's gradients of the decoded weight, and checks the conversion to device weights.

#![allow(missing_docs, clippy::unwrap_used)]

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use rekindle_kernels::{Backend, Device as Place, QuantizedWeight, Tensor as Ours, quantized};
use rekindle_quant::bnb::{FourBitWeight, StoredWeight};
use rekindle_quant::{
    Blocksize, DiskMetadata, Element, Fp8Scaling, Fp8Tensor, Fp8Weight, Int8Tensor, Mxfp4Tensor, QuantConfig,
    QuantLinear, QuantType, QuantizedTensor, mxfp4,
};

/// `[tokens, out, in]`: all ones, all odd, whole blocks, and several tasks of the CPU path.
const SHAPES: [[usize; 3]; 4] = [[1, 1, 1], [3, 5, 13], [7, 64, 64], [5, 33, 1029]];

/// The minimum error bound relative to the largest value, for results that the naive computation happens to get
/// exactly.
const FLOOR: f64 = 4.0 * f32::EPSILON as f64;

/// Returns reproducible numbers in (−1, 1).
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Returns one dense weight of type `T` in every stored format.
fn stored<T: Element>([out, input]: [usize; 2]) -> Vec<StoredWeight> {
    let dense: Vec<T> = noise(1, out * input).into_iter().map(|x| T::from_f32(0.05 * x)).collect();
    let mut weights = vec![StoredWeight::Int8(Int8Tensor::quantize(&dense, [out, input]).unwrap())];
    // Rows of MXFP4 are whole blocks.
    let whole = input.next_multiple_of(mxfp4::BLOCK) == input;
    weights.extend(whole.then(|| StoredWeight::Mxfp4(Mxfp4Tensor::quantize(&dense, &[out, input]).unwrap())));
    for scaling in [Fp8Scaling::Tensor, Fp8Scaling::Row, Fp8Scaling::Block] {
        weights.push(StoredWeight::Fp8(Fp8Weight::new(Fp8Tensor::quantize(&dense, [out, input], scaling).unwrap())));
    }
    for quant_type in QuantType::ALL {
        for double_quant in [false, true] {
            for blocksize in [Blocksize::B64, Blocksize::new(32).unwrap()] {
                let config = QuantConfig { quant_type, blocksize, double_quant };
                let tensor = QuantizedTensor::quantize(&dense, &[out, input], &config).unwrap();
                weights.push(StoredWeight::FourBit(FourBitWeight::new(tensor)));
            }
        }
    }
    weights
}

fn decoded<T: Element>(weight: &StoredWeight) -> Vec<T> {
    match weight {
        StoredWeight::FourBit(weight) => weight.tensor.dequantize(),
        StoredWeight::Int8(weight) => weight.dequantize(),
        StoredWeight::Mxfp4(weight) => weight.dequantize(),
        StoredWeight::Fp8(weight) => weight.tensor.dequantize(),
    }
}

fn linear(weight: StoredWeight, bias: Option<Tensor<1>>) -> QuantLinear {
    match weight {
        StoredWeight::FourBit(weight) => {
            QuantLinear::four_bit(weight.tensor, bias.map(Into::into), &Place::cpu()).unwrap()
        }
        StoredWeight::Int8(weight) => QuantLinear::int8(weight, bias.map(Into::into), &Place::cpu()),
        StoredWeight::Mxfp4(weight) => QuantLinear::mxfp4(weight, bias.map(Into::into), &Place::cpu()).unwrap(),
        StoredWeight::Fp8(weight) => QuantLinear::fp8(weight.tensor, bias.map(Into::into), &Place::cpu()),
    }
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    let data = TensorData::new(values.to_vec(), shape).try_cast(dtype).unwrap();
    Tensor::from_data(data, (device, dtype))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data_as::<f64>().try_into_vec().unwrap()
}

/// Returns y and dx, computed by Burn from the decoded weight in `dtype`.
fn naive([tokens, out, input]: [usize; 3], weight: &[f32], dtype: DType) -> [Vec<f64>; 2] {
    let device = Device::flex().autodiff();
    let x = tensor(&noise(2, tokens * input), [tokens, input], dtype, &device).require_grad();
    let weight = tensor(weight, [out, input], dtype, &device);
    let bias = tensor(&noise(3, out), [1, out], dtype, &device);
    let dy = tensor(&noise(4, tokens * out), [tokens, out], dtype, &device);
    let y = x.clone().matmul(weight.transpose()) + bias;
    let grads = (y.clone() * dy).sum().backward();
    [values(y), values(x.grad(&grads).unwrap())]
}

fn ours([tokens, out, input]: [usize; 3], linear: &QuantLinear) -> [Vec<f64>; 2] {
    let device = Device::flex();
    let x = tensor(&noise(2, tokens * input), [tokens, input], DType::F32, &device);
    let dy = tensor(&noise(4, tokens * out), [tokens, out], DType::F32, &device);
    [values(linear.forward(&x.into()).into()), values(linear.backward(&dy.into()).into())]
}

/// Asserts that no element's error exceeds twice the largest error of the naive computation.
fn judge(what: &str, got: &[Vec<f64>; 2], naive: &[Vec<f64>; 2], truth: &[Vec<f64>; 2]) {
    for (part, name) in ["y", "dx"].into_iter().enumerate() {
        let error = |of: &[f64]| of.iter().zip(&truth[part]).fold(0.0, |e: f64, (a, t)| e.max((a - t).abs()));
        let largest = truth[part].iter().fold(0.0, |m: f64, t| m.max(t.abs()));
        let bound = 2.0 * error(&naive[part]) + FLOOR * largest;
        assert_eq!(got[part].len(), truth[part].len(), "{what}: {name}");
        assert!(got[part].iter().all(|v| v.is_finite()), "{what}: {name}");
        let error = error(&got[part]);
        assert!(error <= bound, "{what}: {name} has error {error:e}, bound {bound:e}");
    }
}

#[test]
fn forward_and_gradient_equal_those_of_the_decoded_weight() {
    for shape @ [_, out, input] in SHAPES {
        let bias = || Some(tensor(&noise(3, out), [out], DType::F32, &Device::flex()));
        let dense = noise(5, out * input);
        let matrix = tensor(&dense, [out, input], DType::F32, &Device::flex());
        let mut cases = vec![("dense".to_owned(), QuantLinear::dense(matrix.into(), bias().map(Into::into)), dense)];
        for weight in stored::<f32>([out, input]) {
            let name = match &weight {
                StoredWeight::FourBit(weight) => format!("{:?}", weight.tensor.config()),
                StoredWeight::Int8(_) => "int8".to_owned(),
                StoredWeight::Mxfp4(_) => "mxfp4".to_owned(),
                StoredWeight::Fp8(weight) => format!("fp8, {}", weight.tensor.scaling().name()),
            };
            let dense = decoded(&weight);
            cases.push((name, linear(weight, bias()), dense));
        }
        for (name, linear, weight) in cases {
            assert_eq!(linear.dims(), [out, input]);
            let (truth, naive) = (naive(shape, &weight, DType::F64), naive(shape, &weight, DType::F32));
            judge(&format!("{name} {shape:?}"), &ours(shape, &linear), &naive, &truth);
            let portable = Backend::portable_only(|| ours(shape, &linear));
            judge(&format!("{name} {shape:?} portable"), &portable, &naive, &truth);
        }
    }
}

#[test]
fn a_layer_decodes_to_the_same_bits_as_the_codec() {
    fn check<T: Element + burn::tensor::Element>(dtype: DType) {
        for [_, out, input] in SHAPES {
            for weight in stored::<T>([out, input]) {
                let expected: Vec<T> = decoded(&weight);
                let (_, codes) = DiskMetadata::split(weight.clone()).unwrap();
                let matrix = Tensor::from(QuantizedWeight::new(codes, &Place::cpu()).decode(dtype));
                let got: Vec<T> = matrix.into_data().try_into_vec().unwrap();
                assert!(got == expected, "{:?} of {weight:?}", T::DTYPE);
            }
        }
    }
    check::<f32>(DType::F32);
    check::<f16>(DType::F16);
    check::<bf16>(DType::BF16);
}

#[test]
fn split_and_restore_are_inverse() {
    for [_, out, input] in SHAPES {
        for weight in stored::<bf16>([out, input]) {
            let (metadata, codes) = DiskMetadata::split(weight.clone()).unwrap();
            let packed = QuantizedWeight::new(codes, &Place::cpu());
            assert_eq!(metadata.restore(quantized::QuantizedData::clone(&packed.data())).unwrap(), weight);
        }
    }
    let [int8, .., nf4] = &stored::<f32>([3, 8])[..] else { panic!("expected two formats") };
    let (_, codes) = DiskMetadata::split(int8.clone()).unwrap();
    let error = DiskMetadata::split(nf4.clone()).unwrap().0.restore(codes).unwrap_err().to_string();
    assert!(error.contains("was read as FourBit") && error.contains("but holds 8-bit codes"), "{error}");
    let vector = QuantizedTensor::quantize(&noise(1, 64), &[64], &QuantConfig::default()).unwrap();
    let error = QuantLinear::four_bit(vector, None, &Place::cpu()).unwrap_err().to_string();
    assert!(error.contains("[out, in]"), "{error}");
}

#[test]
fn forward_int8_equals_the_product_of_the_codec() {
    fn check<T: Element + burn::tensor::Element>(dtype: DType) {
        let (tokens, out, input) = (6, 21, 130);
        let mut x: Vec<f32> = noise(2, tokens * input).into_iter().map(|x| 2.0 * x).collect();
        x[3 * input + 7] = 40.0;
        let x: Vec<T> = x.into_iter().map(T::from_f32).collect();
        let weight = Int8Tensor::quantize(&noise(1, out * input), [out, input]).unwrap();
        let on = |device: &Device| Tensor::<2>::from_data(TensorData::new(x.clone(), [tokens, input]), (device, dtype));
        for threshold in [6.0, 0.0] {
            let mut expected = vec![T::default(); tokens * out];
            weight.matmul(&x, threshold, &mut expected);
            let linear = QuantLinear::int8(weight.clone(), None, &Place::cpu());
            let y = Tensor::from(linear.forward_int8(&on(&Device::flex()).into(), threshold).unwrap());
            assert_eq!(y.dtype(), dtype);
            assert!(y.into_data().try_into_vec::<T>().unwrap() == expected, "{dtype:?}, threshold {threshold}");

            let bias = tensor(&noise(3, out), [out], dtype, &Device::flex());
            let linear = QuantLinear::int8(weight.clone(), Some(bias.clone().into()), &Place::cpu());
            let y = values(linear.forward_int8(&on(&Device::flex()).into(), threshold).unwrap().into());
            let sum = Tensor::<2>::from_data(TensorData::new(expected, [tokens, out]), (&Device::flex(), dtype));
            assert_eq!(y, values(sum + bias.unsqueeze()));
        }
    }
    check::<f32>(DType::F32);
    check::<f16>(DType::F16);
    check::<bf16>(DType::BF16);
}

/// An activation's code is off by at most half a step of SCA/127, so a product by at most half a step per weight; the
/// outlier column has no error. The result is also rounded to f16.
#[test]
fn forward_int8_is_close_to_the_exact_product() {
    let [tokens, out, input] = [4, 9, 96];
    let mut x = noise(2, tokens * input);
    x[5] = 30.0;
    let weight = Int8Tensor::quantize(&noise(1, out * input), [out, input]).unwrap();
    let dense: Vec<f32> = weight.dequantize();
    let linear = QuantLinear::int8(weight, None, &Place::cpu());
    let x = Ours::from(tensor(&x, [tokens, input], DType::F32, &Device::flex()));
    let (exact, y) = (values(linear.forward(&x).into()), values(linear.forward_int8(&x, 6.0).unwrap().into()));
    for (i, (exact, y)) in exact.iter().zip(&y).enumerate() {
        let row = &dense[(i % out) * input..][..input];
        let sum: f64 = row.iter().map(|w| f64::from(w.abs())).sum();
        // |x| < 1 except for the outlier, x is first rounded to f16, and f16's step for sums up to 16 is 2⁻⁸.
        let bound = (0.5 / 127.0 + 2f64.powi(-11)) * sum + 2f64.powi(-8);
        assert!((exact - y).abs() <= bound, "{i}: {y} instead of {exact}, bound {bound}");
    }
}

#[test]
fn forward_int8_requires_an_int8_weight() {
    let x = Ours::from(Tensor::<2>::ones([2, 8], &Device::flex()));
    for weight in stored::<f32>([3, 8]) {
        let is_int8 = matches!(weight, StoredWeight::Int8(_));
        assert_eq!(linear(weight, None).forward_int8(&x, 6.0).is_some(), is_int8);
    }
    assert!(
        QuantLinear::dense(Tensor::<2>::ones([3, 8], &Device::flex()).into(), None).forward_int8(&x, 6.0).is_none()
    );
}

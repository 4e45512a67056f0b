//! Properties that hold for every weight over shapes, types and block sizes: the error of decoded values, and the
//! stability of codes.

use half::{bf16, f16};
use rekindle_quant::{
    Absmax, Blocksize, DoubleQuant, DynamicMap, Element, Int8Tensor, QuantConfig, QuantType, QuantizedTensor,
    blockwise, four_bit,
};

/// Shapes whose sizes are not multiples of a block, of a thread pool task, or of two.
const SHAPES: [&[usize]; 8] = [&[1], &[2], &[63], &[64, 1], &[5, 13], &[3, 7, 31], &[37, 61], &[1, 17_001]];

/// Returns half the widest gap of the sorted values plus the rounding of thresholds, product and reciprocal.
fn half_gap(quant_type: QuantType) -> f32 {
    let mut values = four_bit::values(quant_type);
    values.sort_by(f32::total_cmp);
    widest_gap(&values) / 2.0 + 5e-7
}

fn widest_gap(values: &[f32]) -> f32 {
    values.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max)
}

#[test]
fn four_bit_error_is_within_half_the_widest_gap() {
    for_weights(|values: &[f32], shape| {
        for config in configs(false) {
            let tensor = QuantizedTensor::quantize(values, shape, &config).expect("shape fits");
            let (decoded, absmax) = (tensor.dequantize::<f32>(), tensor.absmax().values());
            for (i, (x, y)) in values.iter().zip(&decoded).enumerate() {
                let bound = absmax[i / config.blocksize.get()] * half_gap(config.quant_type);
                assert!((x - y).abs() <= bound, "{config:?} {shape:?}, element {i}: {x} became {y}");
            }
        }
    });
}

/// encode(decode(q)) = q if decoding does not round, for both codes and scales.
#[test]
fn four_bit_codes_are_stable() {
    fn check<T: Element>() {
        for_weights(|values: &[T], shape| {
            for config in configs(false) {
                let once = QuantizedTensor::quantize(values, shape, &config).expect("shape fits");
                let again = QuantizedTensor::quantize(&once.dequantize::<T>(), shape, &config).expect("shape fits");
                assert_eq!(once.absmax(), again.absmax(), "{config:?} {shape:?} {:?}", T::DTYPE);
                assert_eq!(plain(&once), plain(&again), "{config:?} {shape:?} {:?}", T::DTYPE);
            }
        });
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

/// Returns the codes, with FP4's negative zero replaced by the zero it is encoded to.
fn plain(tensor: &QuantizedTensor) -> Vec<u8> {
    let fp4 = tensor.config().quant_type == QuantType::Fp4;
    let plain = |code: u8| if code == 8 && fp4 { 0 } else { code };
    tensor.codes().iter().map(|byte| plain(byte >> 4) << 4 | plain(byte & 15)).collect()
}

/// Double quantization changes each scale by at most half the widest gap of the 8-bit map times the nested scale, and
/// each element by at most that, since |value| ≤ 1.
#[test]
fn double_quantization_adds_the_error_of_its_scales() {
    let map_gap = widest_gap(DynamicMap::signed().values()) / 2.0 + 3e-7;
    for_weights(|values: &[f32], shape| {
        for config in configs(true) {
            let tensor = QuantizedTensor::quantize(values, shape, &config).expect("shape fits");
            let (_, absmax) = four_bit::encode(values, config.quant_type, config.blocksize);
            let Absmax::Double(double) = tensor.absmax() else { panic!("{config:?} has double quantization") };
            let scales = double.absmax();
            let moved = |block: usize| {
                // Subtracting and adding the offset each round once.
                let rounded = (absmax[block] + double.offset()) * f32::EPSILON;
                double.nested_absmax()[block / 256] * map_gap + rounded
            };
            for (block, (a, b)) in absmax.iter().zip(&scales).enumerate() {
                assert!((a - b).abs() <= moved(block), "{config:?} {shape:?}, scale {block}: {a} became {b}");
            }
            for (i, (x, y)) in values.iter().zip(tensor.dequantize::<f32>()).enumerate() {
                let block = i / config.blocksize.get();
                let bound = absmax[block] * half_gap(config.quant_type) + moved(block);
                assert!((x - y).abs() <= bound, "{config:?} {shape:?}, element {i}: {x} became {y}");
            }
        }
    });
}

/// The scales of bell-shaped weights vary little, so double quantization adds little error. The bounds are the largest
/// relative errors of a scale measured over 2¹⁹ weights, rounded up in the last digit.
#[test]
fn double_quantization_of_bell_shaped_weights_adds_little_error() {
    let mut noise = Noise(17);
    let values: Vec<f32> = (0..1 << 19).map(|_| 0.02 * noise.bell()).collect();
    let bounds = [0.0080, 0.0067, 0.0050, 0.0038, 0.0032, 0.0027, 0.0021, 0.0017];
    for (blocksize, bound) in Blocksize::ALL.into_iter().zip(bounds) {
        let (_, absmax) = four_bit::encode(&values, QuantType::Nf4, blocksize);
        let scales = DoubleQuant::quantize(&absmax).absmax();
        let worst = absmax.iter().zip(&scales).map(|(a, b)| (a - b).abs() / a).fold(0.0, f32::max);
        assert!(worst <= bound, "{blocksize:?}: {worst}");
    }
}

/// The bound is half a code, 1/254 of the scale, plus the rounding of the reciprocal and of the products, relative to
/// the weight rounded to f16.
#[test]
fn int8_error_is_within_half_a_code_and_codes_are_stable() {
    for_weights(|values: &[f16], shape| {
        let columns = shape[shape.len() - 1];
        let shape = [values.len() / columns, columns];
        let once = Int8Tensor::quantize(values, shape).expect("shape fits");
        let decoded: Vec<f32> = once.dequantize();
        for (i, (x, y)) in values.iter().zip(&decoded).enumerate() {
            let bound = once.scb()[i / columns] * (1.0 / 254.0 + 3e-7);
            assert!((x.to_f32() - y).abs() <= bound, "{shape:?}, element {i}: {x} became {y}");
        }
        let again = Int8Tensor::quantize(&decoded, shape).expect("shape fits");
        assert_eq!(once.codes(), again.codes(), "{shape:?}");
    });
}

#[test]
fn dynamic_block_error_is_within_half_the_widest_gap_and_codes_are_stable() {
    for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
        let unsigned = map == DynamicMap::unsigned();
        // The signed map ends at 1 and −0.992…; beyond an end the error is the distance to it.
        let end = (map.values()[0] + 1.0) * if unsigned { 0.0 } else { 1.0 };
        let gap = (widest_gap(map.values()) / 2.0).max(end) + 3e-7;
        for_weights(|values: &[f32], shape| {
            let values: Vec<f32> = values.iter().map(|x| if unsigned { x.abs() } else { *x }).collect();
            for blocksize in Blocksize::ALL {
                let (codes, absmax) = blockwise::encode(&values, &map, blocksize);
                let mut decoded = vec![0.0f32; values.len()];
                blockwise::decode(&codes, &absmax, &map, blocksize, &mut decoded);
                for (i, (x, y)) in values.iter().zip(&decoded).enumerate() {
                    let bound = absmax[i / blocksize.get()] * gap;
                    assert!((x - y).abs() <= bound, "{blocksize:?} {shape:?}, element {i}: {x} became {y}");
                }
            }
        });
    }
}

fn configs(double_quant: bool) -> impl Iterator<Item = QuantConfig> {
    let config = move |quant_type, blocksize| QuantConfig { quant_type, blocksize, double_quant };
    QuantType::ALL.into_iter().flat_map(move |quant_type| Blocksize::ALL.map(|blocksize| config(quant_type, blocksize)))
}

/// Calls `check` with weights from several distributions in each of [`SHAPES`].
fn for_weights<T: Element>(mut check: impl FnMut(&[T], &[usize])) {
    let mut noise = Noise(1);
    for shape in SHAPES {
        let len: usize = shape.iter().product();
        let mut weights = |draw: &mut dyn FnMut(&mut Noise, usize) -> f32| {
            let values: Vec<T> = (0..len).map(|i| T::from_f32(draw(&mut noise, i))).collect();
            check(&values, shape);
        };
        weights(&mut |noise, _| 0.02 * noise.bell());
        weights(&mut |noise, _| noise.uniform() * 2.0 - 1.0);
        // Scales that differ by a factor of up to 2²⁰ between groups of 64.
        weights(&mut |noise, i| noise.bell() * 2.0_f32.powi((i / 64 % 21) as i32 - 10));
        // Mostly zeros, with whole blocks of them.
        weights(&mut |noise, i| if i % 97 == 0 && noise.uniform() < 0.5 { noise.bell() } else { 0.0 });
        weights(&mut |_, i| if i % 2 == 0 { 0.25 } else { -0.25 });
    }
}

struct Noise(u64);

impl Noise {
    /// Returns a number in [0, 1) from xorshift64*.
    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 24) as f32
    }

    /// Returns a bell-shaped number of mean 0 and variance 1.
    fn bell(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

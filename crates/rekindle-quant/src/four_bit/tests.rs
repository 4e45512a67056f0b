use half::{bf16, f16};

use super::*;
use crate::QuantType::{Fp4, Nf4};

#[test]
fn a_block_by_hand() {
    // absmax is 2: 2 → 1, −2 → −1, 0.2 → 0.1, 1.3 → 0.65 …; two codes per byte with the even element high.
    let (codes, absmax) = encode(&[2.0f32, -2.0, 0.2, 1.3, 0.0], Nf4, Blocksize::B64);
    assert_eq!(absmax, [2.0]);
    assert_eq!(codes, [0xf0, 0x8e, 0x77]);
    let mut decoded = [0.0f32; 5];
    decode(&codes, &absmax, Nf4, Blocksize::B64, &mut decoded);
    assert_eq!(decoded, [2.0, -2.0, 0.079_580_3 * 2.0, 0.722_956_84 * 2.0, 0.0]);

    let (codes, absmax) = encode(&[12.0f32, -8.0, 6.1, 0.06, -0.0], Fp4, Blocksize::B64);
    assert_eq!((codes, absmax), (vec![0x3a, 0x51, 0x00], vec![12.0]));
}

/// 7/24, 7/12, 5/12 and 5/24 of absmax are FP4's midpoints. The rounding of 1/24 and of the product decides: 7/24 comes
/// out an ulp above its threshold and 5/12 on it; the thresholds of 7/12 and 5/24 are below the midpoints.
#[test]
fn ties_of_16_bit_weights_match_bitsandbytes() {
    let block: Vec<bf16> = [24.0, 7.0, -7.0, 14.0, 10.0, 5.0].map(bf16::from_f32).to_vec();
    let (codes, _) = encode(&block, Fp4, Blocksize::B64);
    assert_eq!(codes, [0x34, 0xc2, 0x47]);
}

#[test]
fn blocks_without_a_magnitude_get_code_zero() {
    for quant_type in QuantType::ALL {
        for value in [0.0, -0.0, 1e-40] {
            let (codes, absmax) = encode(&[value; 67], quant_type, Blocksize::B64);
            assert_eq!((codes, absmax), (vec![0; 34], vec![0.0; 2]), "{quant_type:?} of {value}");
        }
    }
}

#[test]
fn non_finite_values_match_bitsandbytes() {
    let (codes, absmax) = encode(&[f32::INFINITY, 1.0, f32::NEG_INFINITY, -1.0], Nf4, Blocksize::B64);
    assert_eq!((codes, absmax), (vec![0x07, 0x07], vec![f32::INFINITY]));
    let (codes, absmax) = encode(&[f32::NAN, 1.0, -1.0, 0.5], Nf4, Blocksize::B64);
    assert_eq!((codes, absmax), (vec![0x0f, 0x0c], vec![1.0]));
    let (_, absmax) = encode(&[f32::NAN; 64], Nf4, Blocksize::B64);
    assert_eq!(absmax, [-f32::MAX]);
    // 1/absmax underflows.
    let (codes, _) = encode(&[f32::MAX, -f32::MAX], Nf4, Blocksize::B64);
    assert_eq!(codes, [0x77]);
}

#[test]
fn results_do_not_depend_on_tasks_and_blocks() {
    // More than one task, an odd tail, and every block size: encoding each block alone gives the same codes.
    let values = noise(2 * TASK + 4099, 1);
    for quant_type in QuantType::ALL {
        for blocksize in Blocksize::ALL {
            let (codes, absmax) = encode(&values, quant_type, blocksize);
            for (i, block) in values.chunks(blocksize.get()).enumerate() {
                let (block_codes, block_absmax) = encode(block, quant_type, blocksize);
                let start = i * blocksize.get() / 2;
                assert_eq!(codes[start..start + block_codes.len()], block_codes);
                assert_eq!(absmax[i..=i], block_absmax);
            }
        }
    }
}

#[test]
fn the_error_is_within_half_the_widest_gap() {
    for quant_type in QuantType::ALL {
        let mut sorted = values(quant_type);
        sorted.sort_by(f32::total_cmp);
        let widest = sorted.windows(2).map(|w| w[1] - w[0]).fold(0.0, f32::max);
        for (seed, blocksize) in Blocksize::ALL.into_iter().enumerate() {
            let dense = noise(9001, seed as u64);
            let (codes, absmax) = encode(&dense, quant_type, blocksize);
            let mut decoded = vec![0.0f32; dense.len()];
            decode(&codes, &absmax, quant_type, blocksize, &mut decoded);
            for (i, (x, y)) in dense.iter().zip(&decoded).enumerate() {
                // The thresholds' literals differ from the midpoints by up to 4e-7.
                let bound = absmax[i / blocksize.get()] * (widest / 2.0 + 4e-7);
                assert!((x - y).abs() <= bound, "{quant_type:?}, element {i}: {x} became {y}");
            }
        }
    }
}

#[test]
fn decoded_codes_encode_to_themselves() {
    fn check<T: Element>() {
        for quant_type in QuantType::ALL {
            for blocksize in Blocksize::ALL {
                let dense: Vec<T> = noise(8193, 5).into_iter().map(T::from_f32).collect();
                let (codes, absmax) = encode(&dense, quant_type, blocksize);
                let mut decoded = vec![T::default(); dense.len()];
                decode(&codes, &absmax, quant_type, blocksize, &mut decoded);
                let again = encode(&decoded, quant_type, blocksize);
                // FP4's code 8, a negative value that became zero, is encoded as 0.
                let plain = |c: u8| if c == 8 && quant_type == Fp4 { 0 } else { c };
                let plain: Vec<u8> = codes.iter().map(|b| plain(b >> 4) << 4 | plain(b & 15)).collect();
                assert_eq!(again, (plain, absmax), "{quant_type:?} {blocksize:?} {:?}", T::DTYPE);
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn sixteen_bit_input_encodes_like_its_f32_value() {
    let narrow: Vec<f16> = noise(1000, 3).into_iter().map(f16::from_f32).collect();
    let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
    for quant_type in QuantType::ALL {
        assert_eq!(encode(&narrow, quant_type, Blocksize::B64), encode(&wide, quant_type, Blocksize::B64));
    }
}

/// Returns bell-shaped values of both signs whose scale changes every 64 elements.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut uniform = || {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|i| (uniform() + uniform() + uniform()) * 2.0_f32.powi((i / 64 % 21) as i32 - 10)).collect()
}

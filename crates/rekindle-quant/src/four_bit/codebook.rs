//! The two code tables and their thresholds.

use crate::reciprocal::flush;

/// A code table with a branch-free encoder for normalized values.
pub(super) trait Codebook {
    /// Returns the code of `x`, nominally in [−1, 1]; 0 if `x` is NaN.
    fn code(x: f32) -> u32;
}

pub(super) struct Nf4;
pub(super) struct Fp4;

pub(super) const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

pub(super) const FP4_VALUES: [f32; 16] = {
    let magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        values[code] = magnitudes[code] / 12.0;
        values[code + 8] = -magnitudes[code] / 12.0;
        code += 1;
    }
    values
};

/// The thresholds between NF4's codes, with bitsandbytes' f64 digits: several lie so close to halfway between two f32
/// that fewer digits would round to the other one.
#[expect(clippy::excessive_precision, reason = "the digits decide the rounding")]
const NF4_THRESHOLDS: [f32; 15] = [
    -0.848_096_400_499_343_9,
    -0.610_632_926_225_662_2,
    -0.459_995_269_775_390_6,
    -0.339_679_434_895_515_44,
    -0.234_607_405_960_559_84,
    -0.137_911_733_239_889_14,
    -0.045_525_018_125_772_476,
    0.039_790_149_778_127_67,
    0.120_255_250_483_751_3,
    0.203_521_251_678_466_8,
    0.292_013_771_831_989_3,
    0.389_312_535_524_368_3,
    0.501_663_416_624_069_2,
    0.642_786_920_070_648_2,
    0.861_478_418_111_801_1,
];

/// The thresholds between FP4's magnitudes. They are bitsandbytes' rounded literals, not the midpoints: 0.583333 is
/// below 7/12, so 7/12 itself rounds up.
const FP4_THRESHOLDS: [f32; 7] =
    [0.002_604_17, 0.085_937_5, 0.208_333_33, 0.291_666_66, 0.416_666_7, 0.583_333, 0.833_333_3];

impl Codebook for Nf4 {
    #[inline(always)]
    fn code(x: f32) -> u32 {
        rank(x, &NF4_THRESHOLDS)
    }
}

impl Codebook for Fp4 {
    #[inline(always)]
    fn code(x: f32) -> u32 {
        let x = flush(x);
        let rank = rank(x.abs(), &FP4_THRESHOLDS);
        // The codes in order of magnitude are 0 1 6 7 4 5 2 3.
        let magnitude = rank ^ ((rank & 2) << 1);
        magnitude | u32::from(x < 0.0) << 3
    }
}

/// Returns the number of thresholds below `x`.
#[inline(always)]
fn rank<const N: usize>(x: f32, thresholds: &[f32; N]) -> u32 {
    thresholds.iter().fold(0, |rank, &threshold| rank + u32::from(x > threshold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_encode_to_their_own_codes() {
        for code in 0..16 {
            assert_eq!(Nf4::code(NF4_VALUES[code]), code as u32);
            let expected = if code == 8 { 0 } else { code as u32 }; // −0 is not negative
            assert_eq!(Fp4::code(FP4_VALUES[code]), expected);
        }
    }

    #[test]
    fn a_threshold_rounds_down_and_the_next_float_rounds_up() {
        for (rank, &t) in NF4_THRESHOLDS.iter().enumerate() {
            assert_eq!((Nf4::code(t), Nf4::code(t.next_up())), (rank as u32, rank as u32 + 1), "NF4 at {t}");
        }
        let by_magnitude = [0, 1, 6, 7, 4, 5, 2, 3];
        for (rank, &t) in FP4_THRESHOLDS.iter().enumerate() {
            assert_eq!(Fp4::code(t), by_magnitude[rank], "FP4 at {t}");
            assert_eq!(Fp4::code(t.next_up()), by_magnitude[rank + 1], "FP4 above {t}");
            assert_eq!(Fp4::code(-t), by_magnitude[rank] + 8, "FP4 at -{t}");
        }
    }

    /// Compares each threshold with the f64 midpoint (a + b)/2 of its neighbours. NF4's literals differ by at most half
    /// an ulp of f32, FP4's by the six digits of 0.583333.
    #[test]
    fn thresholds_are_the_midpoints() {
        for (pair, &t) in NF4_VALUES.windows(2).zip(&NF4_THRESHOLDS) {
            let midpoint = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
            assert!((f64::from(t) - midpoint).abs() <= 3e-8, "{t} against {midpoint}");
        }
        let mut magnitudes = FP4_VALUES[..8].to_vec();
        magnitudes.sort_by(f32::total_cmp);
        for (pair, &t) in magnitudes.windows(2).zip(&FP4_THRESHOLDS) {
            let midpoint = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
            assert!((f64::from(t) - midpoint).abs() <= 4e-7, "{t} against {midpoint}");
        }
    }

    #[test]
    fn nan_has_code_zero() {
        assert_eq!((Nf4::code(f32::NAN), Fp4::code(f32::NAN)), (0, 0));
        assert_eq!(Fp4::code(-f32::MIN_POSITIVE / 2.0), 0, "a flushed value has no sign");
    }
}

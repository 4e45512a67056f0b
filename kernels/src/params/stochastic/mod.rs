//! Writing values into fewer bits without losing small changes on average: stochastic rounding.
//!
//! Between the neighbours a ≤ x < b that a format has, x becomes b with probability (x − a) / (b − a) and a otherwise, so
//! that E\[stored\] = x (arXiv:1502.02551). Rounding to nearest would drop every update below half a step; a weight that
//! is trained where it is kept, without an f32 master beside it, needs this.
//!
//! - bf16: neighbours are 2¹⁶ f32 apart, and 16 random bits are added below them.
//! - 4-bit codes: absmax = max |x| of each block, neighbours are those of x / absmax in the table.
//! - 8-bit codes: the scale of a row is its max |x|, neighbours are whole numbers of scale / 127.
//!
//! A value that is a code's own within rounding (4 units in the last place) keeps that code: where nothing changed,
//! nothing is drawn. The largest value of a block or row always is its own code.
//!
//! Random words are Philox4x32-10 of (seed, step, parameter, element): a step repeated from the same state ends in the
//! same bits, on the CPU and on CUDA.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::RngKey;
use crate::params::quantized::{Absmax, QuantizedData, QuantizedFormat};
use crate::rng::philox;

/// The random words of one parameter in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundingRng {
    pub(crate) key: RngKey,
    /// Number of the parameter in the model.
    pub(crate) param: u32,
}

/// A value this close to a code's, relative to it, keeps that code: 4 units in the last place.
pub(crate) const NEAR: f32 = 4.0 * f32::EPSILON;

impl RoundingRng {
    /// Four words, for the elements from `4 · four` on.
    #[inline(always)]
    pub(crate) fn words(self, four: usize) -> [u32; 4] {
        philox([four as u32, (four >> 32) as u32, self.param, self.key.step], self.key.for_rounding())
    }
}

/// x in bf16, rounded up or down by the lowest 16 of `bits`. Infinities and NaN stay what they are.
#[inline(always)]
pub(crate) fn bf16(x: f32, bits: u32) -> u16 {
    let raw = x.to_bits();
    if raw & 0x7F80_0000 == 0x7F80_0000 {
        // A NaN whose upper half is an infinity's keeps a bit.
        return (raw >> 16) as u16 | u16::from(raw & 0x007F_FFFF != 0) << 6;
    }
    ((raw + (bits & 0xFFFF)) >> 16) as u16
}

/// A table of sixteen values by size, with the codes that stand for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sorted {
    values: [f32; 16],
    codes: [u8; 16],
}

impl Sorted {
    pub(crate) fn new(table: &[f32; 16]) -> Self {
        let mut codes: [u8; 16] = core::array::from_fn(|code| code as u8);
        // Of FP4's two zeros the positive one is the later.
        codes.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&table[usize::from(b)]));
        Self { values: codes.map(|code| table[usize::from(code)]), codes }
    }

    /// The code of `x`, from −1 to 1, with `word` to decide.
    #[inline(always)]
    pub(crate) fn code(&self, x: f32, word: u32) -> u8 {
        let at = self.values[1..].iter().map(|&value| usize::from(value <= x)).sum::<usize>();
        let low = self.values[at];
        let Some(&high) = self.values.get(at + 1) else { return self.codes[at] };
        let up = if x - low <= NEAR * low.abs() {
            false
        } else if high - x <= NEAR * high.abs() {
            true
        } else {
            uniform(word) < (x - low) / (high - low)
        };
        self.codes[at + usize::from(up)]
    }
}

/// The whole number that stands for `x`, from −127 to 127, with `word` to decide.
#[inline(always)]
pub(crate) fn integer(x: f32, word: u32) -> i8 {
    let nearest = x.round_ties_even();
    if (x - nearest).abs() <= NEAR * 127.0 {
        return nearest as i8;
    }
    let low = x.floor();
    (low + f32::from(u8::from(uniform(word) < x - low))) as i8
}

/// A number in [0, 1) of the upper 24 bits.
#[inline(always)]
fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

impl QuantizedData {
    /// Replaces all values. Scales follow from them; those of 4-bit blocks are not themselves coded.
    ///
    /// # Panics
    /// If there are not as many values as codes, or the scales are in codes.
    pub(crate) fn store(&mut self, values: &[f32], rng: RoundingRng) {
        let [rows, cols] = self.dims;
        assert_eq!(values.len(), rows * cols, "values of {rows} × {cols}");
        match &mut self.format {
            QuantizedFormat::FourBit { codes, table, blocksize, absmax: Absmax::Single(absmax) } => {
                cpu::four_bit(values, codes, absmax, &Sorted::new(table), *blocksize, rng);
            }
            QuantizedFormat::FourBit { .. } => panic!("scales in codes cannot follow values that change"),
            QuantizedFormat::Fp8 { .. } => panic!("fp8 codes are only decoded"),
            QuantizedFormat::Blocks { codec, .. } => panic!("blocks of {} are only decoded", codec.name),
            QuantizedFormat::Int8 { codes, scales, .. } => cpu::int8(values, codes, scales, cols, rng),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::noise;

    fn draw(step: u32) -> RoundingRng {
        RoundingRng { key: RngKey { seed: 3407, step }, param: 5 }
    }

    fn decoded(codes: &QuantizedData) -> Vec<f32> {
        let mut out = vec![0.0; codes.dims[0] * codes.dims[1]];
        crate::params::quantized::cpu::decode_rows(codes, 0..codes.dims[0], &mut out);
        out
    }

    const NF4: [f32; 16] = [
        -1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0,
    ];
    const FP4: [f32; 16] =
        [0.0, 0.005, 0.667, 1.0, 0.333, 0.5, 0.167, 0.25, -0.0, -0.005, -0.667, -1.0, -0.333, -0.5, -0.167, -0.25];

    fn empty(dims: [usize; 2]) -> Vec<QuantizedData> {
        let n = dims[0] * dims[1];
        let four_bit = |table, blocksize: usize| QuantizedFormat::FourBit {
            codes: vec![0; n.div_ceil(2)],
            table,
            blocksize,
            absmax: Absmax::Single(vec![0.0; n.div_ceil(blocksize)]),
        };
        let int8 = QuantizedFormat::Int8 { codes: vec![0; n], scales: vec![0.0; dims[0]], factor: 1.0 / 127.0 };
        [four_bit(NF4, 64), four_bit(NF4, 32), four_bit(FP4, 64), int8]
            .map(|format| QuantizedData { dims, format })
            .to_vec()
    }

    /// The mean over many draws comes as near to the values as its own standard error allows.
    #[test]
    fn stored_values_are_right_on_average() {
        let dims = [3, 85];
        let values: Vec<f32> = noise(1, 255).into_iter().map(|x| 0.05 * x).collect();
        const DRAWS: u32 = 4000;
        for mut codes in empty(dims) {
            let (mut sum, mut squares) = (vec![0f64; 255], vec![0f64; 255]);
            for step in 0..DRAWS {
                codes.store(&values, draw(step));
                for (i, x) in decoded(&codes).into_iter().enumerate() {
                    sum[i] += f64::from(x);
                    squares[i] += f64::from(x) * f64::from(x);
                }
            }
            let name = codes.format.name();
            for (i, &x) in values.iter().enumerate() {
                let mean = sum[i] / f64::from(DRAWS);
                let variance = (squares[i] / f64::from(DRAWS) - mean * mean).max(0.0);
                // Five standard errors, and f32's own rounding.
                let bound = 5.0 * (variance / f64::from(DRAWS)).sqrt() + 1e-8;
                assert!((mean - f64::from(x)).abs() < bound, "{name}, element {i}: {mean} for {x}, bound {bound}");
            }
        }
    }

    #[test]
    fn values_that_did_not_change_keep_their_codes() {
        let values: Vec<f32> = noise(2, 40 * 96).into_iter().map(|x| 0.02 * x).collect();
        for mut codes in empty([40, 96]) {
            codes.store(&values, draw(0));
            for step in 1..20 {
                let before = codes.clone();
                codes.store(&decoded(&before), draw(step));
                match (&before.format, &codes.format) {
                    // FP4's negative zero may become the other one.
                    (QuantizedFormat::FourBit { .. }, QuantizedFormat::FourBit { .. }) => {
                        assert!(decoded(&before) == decoded(&codes))
                    }
                    (QuantizedFormat::Int8 { codes: a, .. }, QuantizedFormat::Int8 { codes: b, .. }) => assert!(a == b),
                    _ => unreachable!("the format stays"),
                }
            }
        }
    }

    #[test]
    fn zeros_and_single_values() {
        for mut codes in empty([2, 64]) {
            codes.store(&[0.0; 128], draw(1));
            assert!(decoded(&codes).iter().all(|&x| x == 0.0));
            let mut values = [0.0; 128];
            (values[3], values[70]) = (-0.25, 1e-3);
            codes.store(&values, draw(2));
            let got = decoded(&codes);
            assert_eq!((got[3], got[0]), (-0.25, 0.0), "{}", codes.format.name());
            assert!((got[70] - 1e-3).abs() < 1e-9);
        }
    }

    #[test]
    fn bf16_goes_to_a_neighbour_as_often_as_it_should() {
        assert_eq!(bf16(1.0, 0xFFFF), 0x3F80, "what bf16 holds stays");
        assert_eq!(bf16(f32::INFINITY, 0xFFFF), 0x7F80);
        assert_eq!(bf16(f32::from_bits(0x7F80_0001), 0), 0x7FC0, "a NaN");
        // 1 + 2⁻⁹ lies a quarter of the way from 1 to 1 + 2⁻⁷.
        let x = 1.0 + 1.0 / 512.0;
        let up = (0..=0xFFFF).filter(|&bits| bf16(x, bits) == 0x3F81).count();
        assert_eq!(up, 0x4000);
        let up = (0..=0xFFFF).filter(|&bits| bf16(-x, bits) == 0xBF81).count();
        assert_eq!(up, 0x4000);
    }
}

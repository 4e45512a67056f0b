//! Rows rounded to e4m3 codes on the CPU.

/// The largest value of e4m3.
const LARGEST: f32 = 448.0;

/// The least maximum of a row, so that scales and their reciprocals are normal numbers: 2⁻¹⁰⁰.
const LEAST: f32 = f32::from_bits((127 - 100) << 23);

/// Rounds a row to codes with one scale, and decodes them.
pub(super) fn round_row(row: &mut [f32]) {
    let largest = row.iter().fold(LEAST, |largest, value| largest.max(value.abs()));
    let (scale, inverse) = (largest / LARGEST, LARGEST / largest);
    for value in row {
        *value = to_e4m3(*value * inverse) * scale;
    }
}

/// The nearest number of e4m3, of two the one with an even code.
fn to_e4m3(x: f32) -> f32 {
    let magnitude = x.abs().min(LARGEST);
    // Numbers below 2⁻⁶ are as far apart as those from there to 2⁻⁵.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    ((magnitude / step).round_ties_even() * step).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::noise;
    use crate::params::quantized::fp8::value;

    #[test]
    fn numbers_round_to_the_nearest_code() {
        let codes: Vec<f32> = (0..0x7f).map(value).collect();
        let nearest = |x: f32| {
            let distance = |code: usize| (f64::from(codes[code]) - f64::from(x.abs())).abs();
            let closer = |a: usize, b: usize| if (distance(b), b % 2) < (distance(a), a % 2) { b } else { a };
            codes[(0..codes.len()).reduce(closer).expect("there are codes")].copysign(x)
        };
        let halfway = codes.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
        let some = noise(1, 4000).into_iter().flat_map(|x| [448.0 * x, x, x / 64.0, x / 512.0]);
        for x in codes.iter().copied().chain(halfway).chain(some) {
            assert_eq!(to_e4m3(x).to_bits(), nearest(x).to_bits(), "{x}");
            assert_eq!(to_e4m3(-x).to_bits(), nearest(-x).to_bits(), "-{x}");
        }
        assert_eq!(to_e4m3(448.5), 448.0);
    }

    #[test]
    fn rows_have_their_own_scales() {
        // The largest value is a code of its row; 1 of 100 is 4.48 of 448, between 4 and 4.5.
        let mut row = [100.0, 1.0, 0.0, -50.0];
        round_row(&mut row);
        assert_eq!(row, [448.0 * (100.0 / 448.0), 4.5 * (100.0 / 448.0), 0.0, -224.0 * (100.0 / 448.0)]);
        let mut zeros = [0.0; 3];
        round_row(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }
}

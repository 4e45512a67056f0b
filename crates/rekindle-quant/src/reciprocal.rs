//! Single-precision arithmetic as in bitsandbytes' kernels.
//!
//! The kernels are compiled with `--use_fast_math`: subnormal operands and results become zero, and `1 / x` is the
//! hardware's approximate reciprocal, which for 13 % of all mantissas is not the nearest float. This changes a code
//! whenever `x / absmax` lies on a threshold, which is common for 16-bit weights.

mod segments;

use segments::SEGMENTS;

/// Replaces a subnormal number with zero. The sign of that zero is lost; no caller uses it.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// Replaces a subnormal number with a zero of the same sign.
#[inline(always)]
pub(crate) fn flush_signed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { x }
}

/// `rcp.approx.ftz.f32`: 1/x within one unit in the last place.
///
/// The hardware interpolates: with x = 2ᵉ·(1 + s/128 + j/2²³), 0 ≤ j < 2¹⁶,
///
/// 2²⁴·(mantissa of 1/x) = ⌊(2¹⁴·c0 − 2·c1·j + c2·q(j) + 4046) / 2¹⁶⌋,
///
/// where q(j) is j²/2¹⁶ from a squarer that omits its low columns ([`truncated_square`]). The form is that of Oberman
/// and Siu (ARITH 2005). Coefficients and truncation were fitted to an H200; the result equals the hardware for every
/// mantissa at every exponent. Other GPU generations were not compared.
pub(crate) fn reciprocal(x: f32) -> f32 {
    let bits = x.to_bits();
    let sign = bits & 0x8000_0000;
    let exponent = bits >> 23 & 0xff;
    let mantissa = bits & 0x007f_ffff;
    match exponent {
        0 => return f32::from_bits(sign | 0x7f80_0000),
        255 if mantissa != 0 => return f32::NAN,
        255 => return f32::from_bits(sign),
        _ => {}
    }
    let (c0, c1, c2) = SEGMENTS[(mantissa >> 16) as usize];
    let j = mantissa & 0xffff;
    let sum = (u64::from(c0) << 14) - 2 * u64::from(c1) * u64::from(j) + u64::from(c2 * truncated_square(j)) + 4046;
    let scaled = (sum >> 16) as u32; // 2²³ < scaled ≤ 2²⁴, equal only for a power of two
    let (result, carry) = if scaled == 1 << 24 { (0, 1) } else { (scaled - (1 << 23), 0) };
    let exponent = 253 - exponent as i32 + carry;
    if exponent <= 0 { f32::from_bits(sign) } else { f32::from_bits(sign | (exponent as u32) << 23 | result) }
}

/// Computes ⌊j²/2¹⁶⌋ without the partial products whose weight is below 2¹⁷.
///
/// j² = Σᵢ jᵢ·4ⁱ + Σ_{k<i} jᵢ·jₖ·2^(i+k+1) over the bits of j.
fn truncated_square(j: u32) -> u32 {
    let mut sum = 0;
    for i in 0..16 {
        let below = j & ((1 << i) - 1);
        let kept = below >> (16 - i) << (16 - i);
        let diagonal = if 2 * i >= 17 { 1 << (2 * i) } else { 0 };
        sum += (j >> i & 1) * (((kept << (i + 1)) + diagonal) >> 16);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values read from the hardware: exact results, and results one unit above or below the nearest float.
    #[test]
    fn equals_the_hardware() {
        for (x, want) in [
            (0x3f80_0000, 0x3f80_0000),
            (0x3fa0_0000, 0x3f4c_cccd),
            (0x3f95_5555, 0x3f5b_6db8),
            (0x3fff_ffff, 0x3f00_0001),
            (0x3f92_3456, 0x3f60_1fe1),
        ] {
            assert_eq!(reciprocal(f32::from_bits(x)).to_bits(), want, "1/{x:#x}");
        }
    }

    /// Compares Σ (2m + 1)·bits over every 97th mantissa m with the sum of the hardware's results.
    #[test]
    fn equals_the_hardware_over_the_binade() {
        let sum = (0..1u32 << 23).step_by(97).fold(0u64, |sum, m| {
            let bits = reciprocal(f32::from_bits(0x3f80_0000 | m)).to_bits();
            sum.wrapping_add(u64::from(bits) * (2 * u64::from(m) + 1))
        });
        assert_eq!(sum, 0xa45c_e5ea_e5c8_a88f);
    }

    #[test]
    fn range_ends_as_on_the_hardware() {
        for (x, want) in [
            (0x0000_0000u32, 0x7f80_0000u32),
            (0x8000_0000, 0xff80_0000),
            (0x007f_ffff, 0x7f80_0000),
            (0x807f_ffff, 0xff80_0000),
            (0x0080_0000, 0x7e80_0000),
            (0x7e7f_ffff, 0x0080_0001),
            (0x7e80_0000, 0x0080_0000),
            (0x7e80_0001, 0),
            (0x7f7f_ffff, 0),
            (0x7f80_0000, 0),
            (0xff7f_ffff, 0x8000_0000),
        ] {
            assert_eq!(reciprocal(f32::from_bits(x)).to_bits(), want, "1/{x:#x}");
        }
        assert!(reciprocal(f32::NAN).is_nan());
    }
}

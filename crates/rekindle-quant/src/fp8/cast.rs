//! Casts between f32 and E4M3: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, without infinities; 0x7f and 0xff are NaN.

/// Rounds to nearest, ties to even, and saturates at ±448.
#[inline(always)]
pub(super) fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(super::MAX);
    // 20 mantissa bits too many; the exponent is 120 less than that of an f32.
    let bits = magnitude.to_bits();
    let normal = (bits.wrapping_add(0x7ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    // An f32 of this size has the steps of a subnormal code, 2⁻⁹.
    const STEPS: f32 = (1 << 14) as f32;
    let subnormal = (magnitude + STEPS).to_bits().wrapping_sub(STEPS.to_bits());
    let code = if magnitude < MIN_NORMAL { subnormal } else { normal } as u8;
    sign | if x.is_nan() { 0x7f } else { code }
}

/// Returns the value of a code that is not NaN.
#[inline(always)]
pub(super) fn decode(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    // With the exponent of the smallest normal number, which is then subtracted.
    let subnormal = f32::from_bits((magnitude << 20) + (121 << 23)) - MIN_NORMAL;
    let value = if magnitude < 8 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

const MIN_NORMAL: f32 = 1.0 / 64.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_value() {
        for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            let value = decode(code);
            assert_eq!(encode(value), code, "{value}");
            // Half way to the next code: the even one of the two.
            if code & 0x7f < 0x7e {
                let next = decode(code + 1);
                let middle = (value + next) / 2.0;
                let even = code + (code & 1);
                assert_eq!(encode(middle), even, "{middle}");
                let [toward, away] = [middle.to_bits() - 1, middle.to_bits() + 1].map(f32::from_bits);
                assert_eq!([encode(toward), encode(away)], [code, code + 1], "{middle}");
            }
        }
        assert_eq!([448.1, 1e30, f32::INFINITY, -f32::INFINITY].map(encode), [0x7e, 0x7e, 0x7e, 0xfe]);
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
        assert_eq!([f32::from_bits(1), -0.0].map(encode), [0, 0x80]);
    }
}

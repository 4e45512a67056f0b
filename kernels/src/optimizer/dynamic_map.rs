//! The two maps of 8-bit states, and the code of a number by one look-up.
//!
//! The maps are bitsandbytes' (arXiv:2110.02861), which `rekindle-quant` describes: decade i = 0..7 is divided evenly, into
//! 2ⁱ parts for the signed and 2^(i+1) for the unsigned map, value = 10^(i−6) · midpoint of a part of [0.1, 1], negated as
//! well in the signed map, plus 0 and 1. A number takes the code of the nearest value, halfway between two the even one.

use std::sync::LazyLock;

/// Buckets of |x|: 1/128 of a binade each, from 2^−23 to 1; the first takes all below, the last all from 1 on.
const BUCKETS: usize = 23 * 128 + 1;

/// Bytes of a table of codes on the device.
const STRIDE: usize = 2960;

/// The upper half of the bits of 2^−23.
const FIRST_BUCKET: u32 = (127 - 23) << 7;

/// A map with what encodes by it.
pub(crate) struct Map {
    pub(crate) values: [f32; 256],
    /// Code c begins above `bounds[c − 1]`; the last is infinite.
    bounds: [f32; 256],
    /// The code of the smallest number in each bucket, of positive and of negative numbers. No bucket has two bounds.
    codes: [Vec<u8>; 2],
}

/// Returns the map of first moments, over [−1, 1].
pub(crate) fn signed() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| Map::new(values(true)));
    &MAP
}

/// Returns the map of second moments, over [0, 1].
pub(crate) fn unsigned() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| Map::new(values(false)));
    &MAP
}

/// Returns the tables of the CUDA kernel: `Tables` in optimizer_8bit.cu.
pub(crate) fn tables() -> Vec<u8> {
    let (m, v) = (signed(), unsigned());
    let floats = [&m.values, &m.bounds, &v.values, &v.bounds].into_iter().flatten();
    let mut bytes: Vec<u8> = floats.flat_map(|x| x.to_le_bytes()).collect();
    for codes in [&m.codes[0], &m.codes[1], &v.codes[0]] {
        bytes.extend_from_slice(codes);
        bytes.resize(bytes.len() + STRIDE - BUCKETS, 0);
    }
    bytes
}

impl Map {
    fn new(values: [f32; 256]) -> Self {
        let bounds = core::array::from_fn(|code| {
            let Some(above) = values.get(code + 1) else { return f32::INFINITY };
            let midpoint = (values[code] + above) * 0.5;
            if code % 2 == 0 { midpoint } else { midpoint.next_down() }
        });
        let code = |x: f32| bounds.partition_point(|&bound| bound < x) as u8;
        let start = |bucket: usize| f32::from_bits((FIRST_BUCKET + bucket as u32) << 16);
        let positive = (0..BUCKETS).map(|bucket| code(if bucket == 0 { 0.0 } else { start(bucket) }));
        let negative = (0..BUCKETS)
            .map(|bucket| code(if bucket + 1 == BUCKETS { f32::NEG_INFINITY } else { -start(bucket + 1).next_down() }));
        let codes = [positive.collect(), negative.collect()];
        Self { values, bounds, codes }
    }

    /// The code of the value nearest to `x`.
    #[inline(always)]
    pub(crate) fn code(&self, x: f32) -> u8 {
        let bits = x.to_bits();
        let bucket = (bits >> 16 & 0x7fff).saturating_sub(FIRST_BUCKET).min(BUCKETS as u32 - 1);
        let code = self.codes[(bits >> 31) as usize][bucket as usize];
        code + u8::from(x > self.bounds[usize::from(code)])
    }
}

fn values(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for (decade, scale) in [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let parts = 1 << if signed { decade } else { decade + 1 };
        for part in 0..parts {
            let value = scale * ((boundary(part, parts + 1) + boundary(part + 1, parts + 1)) / 2.0);
            values.extend(if signed { vec![value, -value] } else { vec![value] });
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2·(1 + 2 + … + 64) = 2 + (2 + 4 + … + 128) = 256 values")
}

/// Point `i` of PyTorch's `linspace(0.1, 1, points)`: the first half counts from the start, the rest from the end, and
/// each product is fused with its sum.
fn boundary(i: usize, points: usize) -> f32 {
    let step = (1.0 - 0.1_f32) / (points - 1) as f32;
    if i < points / 2 { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((points - 1 - i) as f32, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends of every bucket, the bounds, and their neighbours.
    #[test]
    fn a_look_up_finds_what_a_search_finds() {
        for map in [signed(), unsigned()] {
            let ends = (0..=0xffffu32).flat_map(|b| [b << 16, b << 16 | 1, b << 16 | 0xffff]).map(f32::from_bits);
            let bounds = map.bounds.iter().flat_map(|b| [b.next_down(), *b, b.next_up()]);
            for x in ends.chain(bounds).filter(|x| !x.is_nan()) {
                let code = map.bounds.iter().filter(|&&bound| bound < x).count();
                assert_eq!(usize::from(map.code(x)), code, "{x}");
            }
            for (code, &value) in map.values.iter().enumerate() {
                assert_eq!(usize::from(map.code(value)), code);
            }
        }
    }
}

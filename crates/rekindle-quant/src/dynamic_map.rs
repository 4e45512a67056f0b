mod buckets;

use std::sync::{Arc, LazyLock, OnceLock};

use crate::Error;
use buckets::Buckets;

/// The 256 ascending values of an 8-bit code; clones share the table.
///
/// The dynamic maps work like an 8-bit float (arXiv:1511.04561, arXiv:2110.02861). Decade i = 0..7 is divided evenly,
/// into 2ⁱ parts for the signed map and 2^(i+1) parts for the unsigned one, and
///
/// value = 10^(i−6) · midpoint of a part of [0.1, 1].
///
/// The signed map also has the negated values, and both have 0 and 1.
///
/// Source: `create_dynamic_map` of bitsandbytes 0.50, on PyTorch's `linspace`; tested by `goldens/dynamic.safetensors`.
#[derive(Debug, Clone)]
pub struct DynamicMap(Arc<Table>);

#[derive(Debug)]
struct Table {
    values: [f32; 256],
    /// Code c covers the values above `bounds[c − 1]`.
    bounds: [f32; 255],
    /// A 256 KiB table, built when the first tensor is encoded with the map.
    buckets: OnceLock<Option<Buckets>>,
}

/// Two maps are equal if their values are.
impl PartialEq for DynamicMap {
    fn eq(&self, other: &Self) -> bool {
        self.0.values == other.0.values
    }
}

impl DynamicMap {
    /// Returns the map over [−1, 1], used for scales and for the first moment of optimizers.
    pub fn signed() -> Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::of(dynamic_values(true)));
        MAP.clone()
    }

    /// Returns the map over [0, 1], used for the second moment of optimizers.
    pub fn unsigned() -> Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::of(dynamic_values(false)));
        MAP.clone()
    }

    /// Creates a map from values read from a file.
    ///
    /// # Errors
    /// [`Error::Map`] unless the values are finite and ascending.
    pub fn from_values(values: [f32; 256]) -> Result<Self, Error> {
        let out_of_order = |i: &usize| !values[*i].is_finite() || (*i > 0 && values[*i] < values[*i - 1]);
        match (0..256).find(out_of_order) {
            Some(index) => Err(Error::Map { index, value: values[index] }),
            None => Ok(Self::of(values)),
        }
    }

    /// Returns the values by code.
    pub fn values(&self) -> &[f32; 256] {
        &self.0.values
    }

    /// Returns a function equal to [`code`](Self::code) that uses a table lookup instead of a search, for maps that
    /// allow it, as both dynamic maps do.
    pub(crate) fn look_up(&self) -> Option<impl Fn(f32) -> u8 + Copy + Sync + '_> {
        self.0.buckets.get_or_init(|| Buckets::new(&self.0.bounds)).as_ref().map(Buckets::code)
    }

    /// Returns the code of the value nearest to `x`: the even code for ties, and 0 if `x` is NaN.
    #[inline(always)]
    pub(crate) fn code(&self, x: f32) -> u8 {
        let mut code = 0;
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            let above = x > self.0.bounds[(code + step - 1) & 255];
            code += if above { step } else { 0 };
        }
        code as u8
    }

    fn of(values: [f32; 256]) -> Self {
        let bounds = std::array::from_fn(|code| {
            let midpoint = (values[code] + values[code + 1]) * 0.5;
            // bitsandbytes' binary search always ends on an even code, which therefore gets both its midpoints.
            if code % 2 == 0 { midpoint } else { midpoint.next_down() }
        });
        Self(Arc::new(Table { values, bounds, buckets: OnceLock::new() }))
    }
}

fn dynamic_values(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for (decade, scale) in [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let parts = 1 << if signed { decade } else { decade + 1 };
        for part in 0..parts {
            let midpoint = (boundary(part, parts + 1) + boundary(part + 1, parts + 1)) / 2.0;
            values.push(scale * midpoint);
            if signed {
                values.push(-scale * midpoint);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2·(1 + 2 + … + 64) = 2 + (2 + 4 + … + 128) = 256 values")
}

/// Returns point `i` of `linspace(0.1, 1, points)`. The first half is computed from the start and the rest from the
/// end. PyTorch's compiler fuses each product with its sum.
fn boundary(i: usize, points: usize) -> f32 {
    let step = (1.0 - 0.1_f32) / (points - 1) as f32;
    if i < points / 2 { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((points - 1 - i) as f32, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_256_distinct_values() {
        for (map, first, zero) in [(DynamicMap::signed(), -0.992_968_74, 127), (DynamicMap::unsigned(), 0.0, 0)] {
            let values = map.values();
            assert!(values.windows(2).all(|w| w[0] < w[1]));
            assert_eq!((values[0], values[zero], values[255]), (first, 0.0, 1.0));
            for (code, &value) in values.iter().enumerate() {
                assert_eq!(usize::from(map.code(value)), code);
            }
        }
    }

    #[test]
    fn ties_go_to_the_even_code() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            for code in 0..255 {
                let midpoint = (map.values()[code] + map.values()[code + 1]) * 0.5;
                let even = if code % 2 == 0 { code } else { code + 1 };
                assert_eq!(usize::from(map.code(midpoint)), even, "midpoint {midpoint}");
                assert_eq!(usize::from(map.code(midpoint.next_down())), code);
                assert_eq!(usize::from(map.code(midpoint.next_up())), code + 1);
            }
        }
    }

    /// Checks both ends of every bucket, the bounds, and their neighbours.
    #[test]
    fn the_table_lookup_equals_the_search() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            let look_up = map.look_up().expect("bounds are far enough apart");
            let ends = (0..=0xffffu32).flat_map(|b| [b << 16, b << 16 | 1, b << 16 | 0x8000, b << 16 | 0xffff]);
            let bounds = map.0.bounds.iter().flat_map(|b| [b.next_down(), *b, b.next_up()]);
            for x in ends.map(f32::from_bits).chain(bounds) {
                assert_eq!(look_up(x), map.code(x), "{x} of bits {:#x}", x.to_bits());
            }
        }
        let linear = DynamicMap::from_values(std::array::from_fn(|i| i as f32 * 1e-3 + 1.0)).expect("ascends");
        assert!(linear.look_up().is_none());
    }

    #[test]
    fn values_outside_the_map_get_the_end_codes() {
        assert_eq!([-5.0, 5.0, f32::NAN].map(|x| DynamicMap::signed().code(x)), [0, 255, 0]);
        assert_eq!(DynamicMap::unsigned().code(-0.5), 0);
    }

    #[test]
    fn a_map_must_ascend() {
        let mut values = *DynamicMap::signed().values();
        values.swap(9, 10);
        assert_eq!(DynamicMap::from_values(values), Err(Error::Map { index: 10, value: values[10] }));
        values[3] = f32::NAN;
        assert!(matches!(DynamicMap::from_values(values), Err(Error::Map { index: 3, .. })));
    }
}

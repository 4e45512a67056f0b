use crate::reciprocal::flush;

/// Maxima that are kept side by side, so that the compiler can use vectors.
const LANES: usize = 32;

/// max |x| over `block` and `floor`, without NaN; a subnormal result is zero.
#[inline(always)]
pub(crate) fn largest_magnitude(block: &[f32], floor: f32) -> f32 {
    let mut lanes = [floor; LANES];
    let (groups, rest) = block.as_chunks::<LANES>();
    for group in groups {
        lanes = std::array::from_fn(|i| larger(group[i].abs(), lanes[i]));
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(x.abs(), *lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i + width], lanes[i]);
        }
        width /= 2;
    }
    flush(lanes[0])
}

/// The larger one; `b` when `a` is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_counts() {
        for len in [1, 31, 32, 33, 100] {
            for at in 0..len {
                let mut block = vec![0.5; len];
                block[at] = -2.0;
                assert_eq!(largest_magnitude(&block, 0.0), 2.0, "{at} of {len}");
            }
        }
    }

    #[test]
    fn edges() {
        assert_eq!(largest_magnitude(&[f32::NAN, 1.0, f32::NAN], 0.0), 1.0);
        assert_eq!(largest_magnitude(&[f32::NAN; 64], -f32::MAX), -f32::MAX);
        assert_eq!(largest_magnitude(&[1e-40, -1e-39], 0.0), 0.0);
    }
}

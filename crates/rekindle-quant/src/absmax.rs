use crate::reciprocal::flush;

/// Number of maxima kept in parallel, so that the compiler can vectorize.
const LANES: usize = 32;

/// Returns max |x| over `block` and `floor`, ignoring NaN; a subnormal result becomes zero.
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

/// Returns the larger value, or `b` if `a` is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_is_found_at_every_index() {
        for len in [1, 31, 32, 33, 100] {
            for at in 0..len {
                let mut block = vec![0.5; len];
                block[at] = -2.0;
                assert_eq!(largest_magnitude(&block, 0.0), 2.0, "{at} of {len}");
            }
        }
    }

    #[test]
    fn nan_and_subnormals_are_ignored() {
        assert_eq!(largest_magnitude(&[f32::NAN, 1.0, f32::NAN], 0.0), 1.0);
        assert_eq!(largest_magnitude(&[f32::NAN; 64], -f32::MAX), -f32::MAX);
        assert_eq!(largest_magnitude(&[1e-40, -1e-39], 0.0), 0.0);
    }
}

//! A table lookup from a number to its code.
//!
//! The upper half of an f32 holds the sign, the exponent and 7 bits of mantissa. The numbers that share it form a
//! bucket that spans 1/128 of a binade. The bounds of the dynamic maps are further apart than that, so a bucket
//! contains at most one of them, and one comparison of the lower halves decides.

/// The code and bound of each of the 2¹⁶ buckets.
#[derive(Debug)]
pub(super) struct Buckets(Box<[u32; BUCKETS]>);

const BUCKETS: usize = 1 << 16;

/// The largest lower half, which no number exceeds; marks a bucket without a bound.
const NO_BOUND: u32 = 0xffff;

impl Buckets {
    /// Returns `None` if two of the ascending `bounds` share a bucket or one of them is infinite.
    pub(super) fn new(bounds: &[f32; 255]) -> Option<Self> {
        // Adding 0 turns −0 into 0: the two are equal but have different keys.
        let keys = bounds.map(|bound| key(bound + 0.0));
        let crowded = keys.windows(2).any(|pair| pair[0] >> 16 == pair[1] >> 16);
        if crowded || bounds.iter().any(|bound| bound.is_infinite()) {
            return None;
        }
        let mut entries = Vec::with_capacity(BUCKETS);
        let mut code = 0;
        for bucket in 0..BUCKETS as u32 {
            let bound = keys.get(code as usize).filter(|&key| key >> 16 == bucket);
            entries.push(code << 16 | bound.map_or(NO_BOUND, |key| key & 0xffff));
            code += u32::from(bound.is_some());
        }
        // NaN has code 0. Negative NaNs are below all bounds; positive ones are in or above infinity's bucket.
        let infinity = (key(f32::INFINITY) >> 16) as usize;
        entries[infinity] = 255 << 16; // the bound check adds 1, which wraps to 0 in a byte
        entries[infinity + 1..].fill(NO_BOUND);
        entries.try_into().ok().map(Self)
    }

    /// Returns the function from numbers to codes.
    pub(super) fn code(&self) -> impl Fn(f32) -> u8 + Copy + Sync + '_ {
        let entries: &[u32; BUCKETS] = &self.0;
        #[inline(always)]
        move |x| {
            let key = key(x);
            let entry = entries[(key >> 16) as usize];
            ((entry >> 16) + u32::from(key & 0xffff > entry & 0xffff)) as u8
        }
    }
}

/// Returns bits that, compared as integers, have the order of the numbers.
#[inline(always)]
fn key(x: f32) -> u32 {
    let bits = x.to_bits();
    bits ^ ((bits as i32 >> 31) as u32 | 0x8000_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_ascend_with_the_numbers() {
        let ascending = [f32::NEG_INFINITY, -1.5, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.3, f32::MAX, f32::INFINITY];
        assert!(ascending.windows(2).all(|pair| key(pair[0]) < key(pair[1])));
    }

    #[test]
    fn crowded_and_infinite_bounds_are_refused() {
        let spread: [f32; 255] = std::array::from_fn(|i| i as f32 - 127.0);
        assert!(Buckets::new(&spread).is_some());
        let crowded: [f32; 255] = std::array::from_fn(|i| 1.0 + i as f32 * 1e-3);
        assert!(Buckets::new(&crowded).is_none());
        let mut infinite = spread;
        infinite[254] = f32::INFINITY;
        assert!(Buckets::new(&infinite).is_none());
    }
}

//! Random numbers without a state: Philox4x32-10 (Salmon et al., SC 2011).
//!
//! A number is a function of the run's seed, the optimizer step, and where it is used; recomputing a step from the same
//! state repeats its numbers, on the CPU as on CUDA.

/// Names the random numbers of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u32,
}

impl RngKey {
    /// Returns the generator's key for one layer; [`NEFTUNE_LAYER`] is no layer's.
    pub(crate) fn for_layer(self, layer_id: u32) -> u64 {
        self.seed ^ u64::from(layer_id).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    /// Returns the generator's key for stochastic rounding.
    pub(crate) fn for_rounding(self) -> u64 {
        self.seed ^ 0x5D1F_2B6A_93C4_E807
    }
}

/// The layer of NEFTune's noise; those of dropout count up from 0.
pub(crate) const NEFTUNE_LAYER: u32 = u32::MAX;

/// Four random words for a counter.
#[inline(always)]
pub(crate) fn philox(mut counter: [u32; 4], key: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ k0, b as u32, (a >> 32) as u32 ^ counter[3] ^ k1, a as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Known-answer tests of the Random123 distribution, philox4x32-10.
        assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }
}

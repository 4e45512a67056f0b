//! Dynamic loss scaling for gradients in f16.

use serde::{Deserialize, Serialize};

/// The factor that the loss of an f16 model is multiplied with before the backward pass, so that gradients do not underflow.
///
/// The rule is that of PyTorch's `torch.amp.GradScaler` with its defaults: a step whose gradient is not finite is skipped and
/// halves the scale, and 2,000 steps in a row with finite gradients double it. Gradients are divided by the scale before they
/// are clipped. The first scale is 65,536.
///
/// Unlike PyTorch's, the scale has a lower limit: an overflow at a scale that was halved to 2⁻¹³ has another cause than the
/// scale, and ends the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    scale: f64,
    /// Steps with finite gradients since the scale last changed.
    growth_tracker: u32,
    /// Steps skipped since the run began.
    skipped: u64,
}

const GROWTH_INTERVAL: u32 = 2000;
const SMALLEST: f64 = 1.0 / 8192.0;

impl Default for LossScaler {
    fn default() -> Self {
        Self::new(65536.0)
    }
}

impl LossScaler {
    /// Returns the scaler of a new run with another first scale.
    pub fn new(scale: f64) -> Self {
        Self { scale, growth_tracker: 0, skipped: 0 }
    }

    /// Returns the scale of the next step.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the number of steps skipped since the run began.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Returns true if a smaller scale may remove an overflow.
    pub fn can_shrink(&self) -> bool {
        self.scale > SMALLEST
    }

    /// Changes the scale after a step.
    pub fn update(&mut self, gradient_is_finite: bool) {
        if !gradient_is_finite {
            self.scale *= 0.5;
            self.growth_tracker = 0;
            self.skipped += 1;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker == GROWTH_INTERVAL {
            // As in PyTorch, the scale stays finite in f32.
            if self.scale * 2.0 <= f64::from(f32::MAX) {
                self.scale *= 2.0;
            }
            self.growth_tracker = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflows_halve_the_scale_and_finite_steps_double_it() {
        let mut scaler = LossScaler::default();
        (0..1999).for_each(|_| scaler.update(true));
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(false);
        assert_eq!((scaler.scale(), scaler.skipped()), (32768.0, 1));
        (0..2000).for_each(|_| scaler.update(true));
        assert_eq!(scaler.scale(), 65536.0, "the count begins anew after an overflow");
        (0..4000).for_each(|_| scaler.update(true));
        assert_eq!((scaler.scale(), scaler.skipped()), (262_144.0, 1));
    }

    #[test]
    fn the_scale_has_limits() {
        let mut small = LossScaler::default();
        while small.can_shrink() {
            small.update(false);
        }
        assert_eq!((small.scale(), small.skipped()), (1.0 / 8192.0, 29));
        let mut large = LossScaler::new(f64::powi(2.0, 127));
        (0..2000).for_each(|_| large.update(true));
        assert_eq!(large.scale(), f64::powi(2.0, 127));
    }
}

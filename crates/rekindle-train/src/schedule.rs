//! Learning-rate schedules, as `transformers.get_scheduler` has them.

use crate::LrSchedulerType;

/// What the peak learning rate is multiplied with in step `step`, counted from 0, of `total`.
///
/// Warm-up (all but `constant`): step / warmup. After it: linear (total − step) / (total − warmup), cosine
/// ½(1 + cos(π · progress)), both at least 0.
pub fn lr_factor(kind: LrSchedulerType, step: usize, warmup: usize, total: usize) -> f64 {
    if kind == LrSchedulerType::Constant {
        return 1.0;
    }
    if step < warmup {
        return step as f64 / warmup.max(1) as f64;
    }
    let span = total.saturating_sub(warmup).max(1) as f64;
    match kind {
        LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
        LrSchedulerType::Linear => (total as f64 - step as f64).max(0.0) / span,
        LrSchedulerType::Cosine => {
            let progress = (step - warmup) as f64 / span;
            (0.5 * (1.0 + (core::f64::consts::PI * progress).cos())).max(0.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LrSchedulerType::{Constant, ConstantWithWarmup, Cosine, Linear};

    #[test]
    fn by_hand() {
        assert_eq!(lr_factor(Constant, 0, 3, 20), 1.0);
        assert_eq!(lr_factor(ConstantWithWarmup, 1, 4, 20), 0.25);
        assert_eq!(lr_factor(Linear, 0, 2, 12), 0.0);
        assert_eq!(lr_factor(Linear, 7, 2, 12), 0.5);
        assert_eq!(lr_factor(Linear, 30, 2, 12), 0.0);
        assert!((lr_factor(Cosine, 7, 2, 12) - 0.5).abs() < 1e-15);
        assert_eq!(lr_factor(Cosine, 2, 2, 12), 1.0);
    }
}

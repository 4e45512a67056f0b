//! Learning-rate schedules, as in `transformers.get_scheduler`.

use core::f64::consts::PI;

use rekindle_data::counted;
use serde::{Deserialize, Serialize};

/// The shape of a learning-rate schedule; the formulas are Hugging Face's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// The peak throughout, without warm-up.
    Constant,
    /// The peak after the warm-up.
    ConstantWithWarmup,
    /// A linear decrease to 0 at the last step.
    #[default]
    Linear,
    /// Half a cosine to 0 at the last step.
    Cosine,
    /// `num_cycles` half cosines to 0, each from the peak.
    CosineWithRestarts,
    /// A decrease with the inverse square root of the steps.
    InverseSqrt,
    /// The peak after the warm-up, and a decay in the last `num_decay_steps`.
    WarmupStableDecay,
    /// Half a cosine to `min_lr` at the last step.
    CosineWithMinLr,
}

/// Further parameters of some schedules. A parameter that the schedule does not use is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LrSchedulerKwargs {
    /// `cosine_with_restarts`: the number of half cosines. Default 1. `cosine`, `cosine_with_min_lr` and the decay of
    /// `warmup_stable_decay`: the number of waves. Default 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_cycles: Option<f64>,
    /// `inverse_sqrt`: steps from the end of the warm-up until the rate is 1/√2 of the peak. Default: the steps of
    /// warm-up, or 10,000 without warm-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timescale: Option<usize>,
    /// `warmup_stable_decay`: steps of the decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_decay_steps: Option<usize>,
    /// `warmup_stable_decay`: the decay as a share of all steps, instead of `num_decay_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_ratio: Option<f64>,
    /// `warmup_stable_decay`: the shape of the decay. Default cosine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_type: Option<LrCurve>,
    /// `warmup_stable_decay`: the shape of the warm-up. Default linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_type: Option<LrCurve>,
    /// `warmup_stable_decay`: the rate at the start of the warm-up and the end of the decay, as a share of the peak.
    /// Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_ratio: Option<f64>,
    /// `cosine_with_min_lr`: the last rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// `cosine_with_min_lr`: the last rate as a share of the peak, instead of `min_lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_rate: Option<f64>,
}

impl LrSchedulerKwargs {
    /// Returns true if no parameter is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The shape of a warm-up or decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrCurve {
    /// A line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// 1 − √progress for a decay, and its reverse for a warm-up.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// The factor of the peak learning rate in each step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    warmup: usize,
    total: usize,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Constant,
    Linear,
    Cosine { cycles: f64, min: f64 },
    Restarts { cycles: f64 },
    InverseSqrt { timescale: f64 },
    WarmupStableDecay { rise: LrCurve, fall: LrCurve, decay: usize, cycles: f64, min: f64 },
}

impl Schedule {
    /// Returns the schedule of a run of `total` steps, with `warmup` steps (none for `constant`) to the rate `peak`.
    ///
    /// # Errors
    /// One sentence for each of `kwargs` that is missing, out of range, or not used by the schedule.
    pub fn new(
        kind: LrSchedulerType,
        kwargs: &LrSchedulerKwargs,
        peak: f64,
        warmup: usize,
        total: usize,
    ) -> Result<Self, Vec<String>> {
        let mut reader = Reader { kind, problems: Vec::new() };
        let warmup = if kind == LrSchedulerType::Constant { 0 } else { warmup };
        let shape = reader.shape(kwargs, peak, warmup, total);
        if reader.problems.is_empty() { Ok(Self { warmup, total, shape }) } else { Err(reader.problems) }
    }

    /// Returns the factor of step `step`, counted from 0.
    ///
    /// Warm-up: step / warmup. After it, with progress = (step − warmup) / (total − warmup): linear 1 − progress;
    /// cosine ½(1 + cos(2π · cycles · progress)) · (1 − min) + min; with restarts ½(1 + cos(π · frac(cycles ·
    /// progress))), 0 from the last step on; inverse root 1 / √((step + timescale − warmup) / timescale).
    pub fn factor(&self, step: usize) -> f64 {
        let &Self { warmup, total, shape } = self;
        if step < warmup {
            let progress = step as f64 / warmup as f64;
            return match shape {
                Shape::WarmupStableDecay { rise, min, .. } => {
                    let risen = match rise {
                        LrCurve::Linear => progress,
                        LrCurve::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
                        LrCurve::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
                    };
                    (risen * (1.0 - min) + min).max(0.0)
                }
                _ => progress,
            };
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = (step - warmup) as f64 / span;
        let wave = |cycles: f64, progress: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos());
        match shape {
            Shape::Constant => 1.0,
            Shape::Linear => (total as f64 - step as f64).max(0.0) / span,
            Shape::Cosine { cycles, min } => (wave(cycles, progress) * (1.0 - min) + min).max(0.0),
            Shape::Restarts { .. } if progress >= 1.0 => 0.0,
            Shape::Restarts { cycles } => (0.5 * (1.0 + (PI * (cycles * progress % 1.0)).cos())).max(0.0),
            Shape::InverseSqrt { timescale } => {
                (((step as f64 + (timescale - warmup as f64)) / timescale).sqrt()).recip()
            }
            Shape::WarmupStableDecay { fall, decay, cycles, min, .. } => {
                let begin = total - decay;
                if step < begin {
                    return 1.0;
                }
                if step >= total {
                    return min;
                }
                let progress = (step - begin) as f64 / decay as f64;
                let fallen = match fall {
                    LrCurve::Linear => 1.0 - progress,
                    LrCurve::Cosine => wave(cycles, progress),
                    LrCurve::OneMinusSqrt => 1.0 - progress.sqrt(),
                };
                (fallen * (1.0 - min) + min).max(0.0)
            }
        }
    }
}

/// A reader that takes the parameters of a schedule out of the arguments.
struct Reader {
    kind: LrSchedulerType,
    problems: Vec<String>,
}

impl Reader {
    fn shape(&mut self, kwargs: &LrSchedulerKwargs, peak: f64, warmup: usize, total: usize) -> Shape {
        use LrSchedulerType as Kind;
        let mut rest = *kwargs;
        let shape = match self.kind {
            Kind::Constant | Kind::ConstantWithWarmup => Shape::Constant,
            Kind::Linear => Shape::Linear,
            Kind::Cosine => Shape::Cosine { cycles: rest.num_cycles.take().unwrap_or(0.5), min: 0.0 },
            Kind::CosineWithRestarts => Shape::Restarts { cycles: rest.num_cycles.take().unwrap_or(1.0) },
            Kind::InverseSqrt => {
                let timescale = rest.timescale.take().unwrap_or(if warmup > 0 { warmup } else { 10_000 });
                self.check(timescale > 0, "timescale is 0; it must be at least 1");
                Shape::InverseSqrt { timescale: timescale as f64 }
            }
            Kind::WarmupStableDecay => {
                let decay = self.decay_steps(rest.num_decay_steps.take(), rest.decay_ratio.take(), warmup, total);
                let min = rest.min_lr_ratio.take().unwrap_or(0.0);
                self.share("min_lr_ratio", min);
                let rise = rest.warmup_type.take().unwrap_or(LrCurve::Linear);
                let fall = rest.decay_type.take().unwrap_or(LrCurve::Cosine);
                let cycles = if fall == LrCurve::Cosine { rest.num_cycles.take() } else { None };
                Shape::WarmupStableDecay { rise, fall, decay, cycles: cycles.unwrap_or(0.5), min }
            }
            Kind::CosineWithMinLr => {
                let cycles = rest.num_cycles.take().unwrap_or(0.5);
                let min = match (rest.min_lr.take(), rest.min_lr_rate.take()) {
                    (Some(rate), None) if peak > 0.0 => {
                        let fits = (0.0..=peak).contains(&rate);
                        self.check(fits, &format!("min_lr is {rate}; it must be 0 to learning_rate, {peak}"));
                        rate / peak
                    }
                    (None, Some(share)) => {
                        self.share("min_lr_rate", share);
                        share
                    }
                    (Some(_), None) => 0.0,
                    _ => {
                        self.check(false, "\"cosine_with_min_lr\" needs one of min_lr and min_lr_rate");
                        0.0
                    }
                };
                Shape::Cosine { cycles, min }
            }
        };
        if let Some(cycles) = kwargs.num_cycles {
            let ok = cycles.is_finite() && cycles > 0.0;
            self.check(ok, &format!("num_cycles is {cycles}; it must be above 0"));
        }
        self.nothing_left(&rest);
        shape
    }

    fn decay_steps(&mut self, steps: Option<usize>, ratio: Option<f64>, warmup: usize, total: usize) -> usize {
        let decay = match (steps, ratio) {
            (Some(steps), None) => steps,
            (None, Some(ratio)) => {
                self.share("decay_ratio", ratio);
                (ratio.clamp(0.0, 1.0) * total as f64).ceil() as usize
            }
            _ => {
                self.check(false, "\"warmup_stable_decay\" needs one of num_decay_steps and decay_ratio");
                0
            }
        };
        let room = total.saturating_sub(warmup);
        self.check(
            decay <= room,
            &format!(
                "a decay of {} is longer than the {room} that remain of {} after {warmup} of warm-up",
                counted(decay, "step"),
                counted(total, "step")
            ),
        );
        decay.min(room)
    }

    fn nothing_left(&mut self, rest: &LrSchedulerKwargs) {
        let LrSchedulerKwargs { num_cycles, timescale, num_decay_steps, decay_ratio, decay_type, .. } = rest;
        let LrSchedulerKwargs { warmup_type, min_lr_ratio, min_lr, min_lr_rate, .. } = rest;
        for (name, given) in [
            ("num_cycles", num_cycles.is_some()),
            ("timescale", timescale.is_some()),
            ("num_decay_steps", num_decay_steps.is_some()),
            ("decay_ratio", decay_ratio.is_some()),
            ("decay_type", decay_type.is_some()),
            ("warmup_type", warmup_type.is_some()),
            ("min_lr_ratio", min_lr_ratio.is_some()),
            ("min_lr", min_lr.is_some()),
            ("min_lr_rate", min_lr_rate.is_some()),
        ] {
            let takes = match self.kind {
                LrSchedulerType::Cosine | LrSchedulerType::CosineWithRestarts => "num_cycles",
                LrSchedulerType::InverseSqrt => "timescale",
                LrSchedulerType::WarmupStableDecay => {
                    "num_decay_steps or decay_ratio, min_lr_ratio, warmup_type, decay_type, and num_cycles of a cosine"
                }
                LrSchedulerType::CosineWithMinLr => "min_lr or min_lr_rate, and num_cycles",
                _ => "no arguments",
            };
            let kind = serde_json::to_string(&self.kind).unwrap_or_default();
            self.check(!given, &format!("{name} has no effect with {kind}, which takes {takes}"));
        }
    }

    fn share(&mut self, name: &str, value: f64) {
        self.check((0.0..=1.0).contains(&value), &format!("{name} is {value}; it must be 0 to 1"));
    }

    fn check(&mut self, ok: bool, problem: &str) {
        if !ok {
            self.problems.push(format!("lr_scheduler_kwargs: {problem}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::LrSchedulerType::{Constant, ConstantWithWarmup, Cosine, CosineWithMinLr, Linear, WarmupStableDecay};
    use super::*;

    fn factor(kind: LrSchedulerType, step: usize, warmup: usize, total: usize) -> f64 {
        Schedule::new(kind, &LrSchedulerKwargs::default(), 1.0, warmup, total).unwrap().factor(step)
    }

    #[test]
    fn by_hand() {
        assert_eq!(factor(Constant, 0, 3, 20), 1.0);
        assert_eq!(factor(ConstantWithWarmup, 1, 4, 20), 0.25);
        assert_eq!(factor(Linear, 0, 2, 12), 0.0);
        assert_eq!(factor(Linear, 7, 2, 12), 0.5);
        assert_eq!(factor(Linear, 30, 2, 12), 0.0);
        assert!((factor(Cosine, 7, 2, 12) - 0.5).abs() < 1e-15);
        assert_eq!(factor(Cosine, 2, 2, 12), 1.0);
    }

    #[test]
    fn the_fall_is_a_number_of_steps_or_a_share() {
        let steps = LrSchedulerKwargs { num_decay_steps: Some(5), ..LrSchedulerKwargs::default() };
        let share = LrSchedulerKwargs { decay_ratio: Some(0.25), ..LrSchedulerKwargs::default() };
        let new = |kwargs| Schedule::new(WarmupStableDecay, kwargs, 1e-4, 3, 20).unwrap();
        assert_eq!(new(&steps), new(&share));
        assert_eq!([2, 3, 14, 20].map(|step| new(&steps).factor(step)), [2.0 / 3.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn arguments_that_cannot_be_met_are_named() {
        let problems = |kind, kwargs: LrSchedulerKwargs| {
            Schedule::new(kind, &kwargs, 1e-4, 8, 20).expect_err("they are wrong").join("; ")
        };
        let none = LrSchedulerKwargs::default();
        for (kind, kwargs, text) in [
            (Linear, LrSchedulerKwargs { num_cycles: Some(2.0), ..none }, "num_cycles has no effect with \"linear\""),
            (Cosine, LrSchedulerKwargs { num_cycles: Some(0.0), ..none }, "num_cycles is 0;"),
            (WarmupStableDecay, none, "needs one of num_decay_steps and decay_ratio"),
            (WarmupStableDecay, LrSchedulerKwargs { num_decay_steps: Some(13), ..none }, "longer than the 12"),
            (CosineWithMinLr, none, "needs one of min_lr and min_lr_rate"),
            (CosineWithMinLr, LrSchedulerKwargs { min_lr: Some(1.0), ..none }, "min_lr is 1; it must be 0 to"),
            (CosineWithMinLr, LrSchedulerKwargs { min_lr_rate: Some(2.0), ..none }, "min_lr_rate is 2;"),
        ] {
            assert!(problems(kind, kwargs).contains(text), "{}", problems(kind, kwargs));
        }
    }
}

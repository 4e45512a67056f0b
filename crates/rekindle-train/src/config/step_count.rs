//! Numbers of steps, absolute or as a share of a run.

use core::fmt;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of steps, or a share of a run's steps, as in `TrainingArguments` of transformers 5.
///
/// In files, a number below 1 with a decimal point is a share: `eval_steps = 0.1` is every tenth of the run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepCount {
    /// An absolute number.
    Steps(usize),
    /// A share of all steps, at least 0 and below 1, rounded up to whole steps.
    Share(f64),
}

impl StepCount {
    /// Returns the number of steps in a run of `total` steps; a share is rounded up.
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Share(share) => (share * total as f64).ceil() as usize,
        }
    }

    /// Returns true if it is zero steps in every run.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Steps(0)) || self == Self::Share(0.0)
    }
}

impl From<usize> for StepCount {
    fn from(steps: usize) -> Self {
        Self::Steps(steps)
    }
}

impl fmt::Display for StepCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => steps.fmt(f),
            Self::Share(share) => share.fmt(f),
        }
    }
}

impl Serialize for StepCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Steps(steps) => serializer.serialize_u64(steps as u64),
            Self::Share(share) => serializer.serialize_f64(share),
        }
    }
}

impl<'de> Deserialize<'de> for StepCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StepCountVisitor)
    }
}

struct StepCountVisitor;

impl Visitor<'_> for StepCountVisitor {
    type Value = StepCount;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number of steps, or a fraction of all steps between 0 and 1")
    }

    fn visit_u64<E: serde::de::Error>(self, steps: u64) -> Result<StepCount, E> {
        usize::try_from(steps).map(StepCount::Steps).map_err(|_| E::invalid_value(Unexpected::Unsigned(steps), &self))
    }

    fn visit_i64<E: serde::de::Error>(self, steps: i64) -> Result<StepCount, E> {
        usize::try_from(steps).map(StepCount::Steps).map_err(|_| E::invalid_value(Unexpected::Signed(steps), &self))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<StepCount, E> {
        match value {
            0.0..1.0 => Ok(StepCount::Share(value)),
            // What `60.0` means is beyond doubt.
            1.0..9e15 if value.fract() == 0.0 => Ok(StepCount::Steps(value as usize)),
            _ => Err(E::invalid_value(Unexpected::Float(value), &self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shares_are_rounded_up_as_in_transformers() {
        // TrainerState.compute_steps and TrainingArguments.get_warmup_steps: math.ceil(max_steps * share).
        for (share, total, steps) in [(0.1, 100, 10), (0.1, 101, 11), (0.03, 60, 2), (0.5, 1, 1), (0.0, 60, 0)] {
            assert_eq!(StepCount::Share(share).of(total), steps, "{share} of {total}");
        }
        assert_eq!(StepCount::Steps(7).of(3), 7);
    }

    #[test]
    fn whole_numbers_are_steps_and_what_is_below_one_is_a_share() {
        let read = |value| serde_json::from_value::<StepCount>(value);
        for (value, expected) in [
            (json!(5), StepCount::Steps(5)),
            (json!(0), StepCount::Steps(0)),
            (json!(1.0), StepCount::Steps(1)),
            (json!(0.25), StepCount::Share(0.25)),
        ] {
            assert_eq!(read(value).unwrap(), expected);
        }
        for value in [json!(-1), json!(-0.5), json!(1.5), json!(1e300), json!("5")] {
            let error = read(value.clone()).unwrap_err().to_string();
            assert!(error.contains("a fraction of all steps"), "{value}: {error}");
        }
        assert_eq!(serde_json::to_value(StepCount::Share(0.25)).unwrap(), json!(0.25));
        assert_eq!(serde_json::to_value(StepCount::Steps(5)).unwrap(), json!(5));
    }
}

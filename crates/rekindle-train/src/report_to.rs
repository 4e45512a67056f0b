//! `report_to`: receivers of a run's metrics.

use serde::{Deserialize, Serialize};

/// Receivers of the metrics besides `metrics.jsonl` and `report.html`, which every run writes. `TrainingArguments`
/// takes a list of programs and services; here there are only files, and nothing is sent anywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "Names")]
pub enum ReportTo {
    /// TensorBoard: event files in `tensorboard/` of the output directory.
    #[default]
    Tensorboard,
    /// No receiver.
    None,
}

/// A name or, as in Python, a list of names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Many(Vec<String>),
}

impl TryFrom<Names> for ReportTo {
    type Error = String;

    fn try_from(names: Names) -> Result<Self, String> {
        let names = match names {
            Names::One(name) => vec![name],
            Names::Many(names) => names,
        };
        match names.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["tensorboard"] => Ok(Self::Tensorboard),
            ["none"] | [] => Ok(Self::None),
            _ => Err(format!(
                "report_to = {names:?} is not supported; use \"tensorboard\", which writes files to the output \
                 directory, or \"none\""
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn as_in_training_arguments() {
        let read = |value| serde_json::from_value::<ReportTo>(value);
        for value in [json!("tensorboard"), json!(["tensorboard"])] {
            assert_eq!(read(value).unwrap(), ReportTo::Tensorboard);
        }
        for value in [json!("none"), json!([])] {
            assert_eq!(read(value).unwrap(), ReportTo::None);
        }
        for value in [json!("all"), json!(["tensorboard", "wandb"])] {
            let error = read(value.clone()).unwrap_err().to_string();
            assert!(error.contains("is not supported; use"), "{value}: {error}");
        }
        assert_eq!(serde_json::to_value(ReportTo::default()).unwrap(), json!("tensorboard"));
    }
}

//! Rewards as a run file has them.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::command::{CommandReward, CommandRewardConfig};
use crate::http::HttpRewardConfig;
use crate::model::ModelRewardConfig;
use crate::rules::{
    Choice, Contains, Exact, Format, Json, Length, Numeric, Pattern, Repetition, Rule, RuleReward, SoftOverlong,
};
use crate::{Reward, RewardError, RewardGate, RewardSet};

/// One `[[rewards]]` of a run file.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config: rekindle_rewards::RewardConfig = serde_json::from_str(
///     r#"{"type": "numeric", "column": "answer", "weight": 2.0, "gate": "format"}"#,
/// )?;
/// assert_eq!((config.name(), config.weight), ("numeric", 2.0));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RewardConfig {
    /// The name in metrics. Default: the type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The factor in the total. Default 1.
    pub weight: f64,
    /// An earlier reward: this one counts only for completions that pass it, and is null for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<String>,
    /// The smallest score of the gate that passes. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate_at_least: Option<f64>,
    /// The type with its options.
    #[serde(flatten)]
    pub kind: RewardKind,
}

/// The type of a reward, `type` in a run file, with its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RewardKind {
    /// Equality with a column.
    Exact(Exact),
    /// Occurrence of texts.
    Contains(Contains),
    /// A regular expression.
    Regex(Pattern),
    /// A number compared with a column.
    Numeric(Numeric),
    /// Multiple choice.
    Choice(Choice),
    /// JSON, checked against a schema.
    Json(Json),
    /// Tags around the sections of a completion.
    Format(Format),
    /// Length within bounds.
    Length(Length),
    /// A penalty for repeated n-grams.
    Repetition(Repetition),
    /// A penalty for overlong completions.
    SoftOverlong(SoftOverlong),
    /// A program.
    Command(CommandRewardConfig),
    /// A service.
    Http(HttpRewardConfig),
    /// A reward model.
    Model(ModelRewardConfig),
}

/// The keys that every type has.
#[derive(Debug, Deserialize)]
struct CommonKeys {
    name: Option<String>,
    weight: Option<f64>,
    gate: Option<String>,
    gate_at_least: Option<f64>,
}

impl CommonKeys {
    const NAMES: [&str; 4] = ["name", "weight", "gate", "gate_at_least"];
}

impl<'de> Deserialize<'de> for RewardConfig {
    /// Reads the common keys first, so that an unknown key is an error of the type's options, which lists them.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut keys = Map::<String, Value>::deserialize(deserializer)?;
        let common = CommonKeys::NAMES.iter().filter_map(|name| keys.remove_entry(*name)).collect();
        let about = match (&keys.get("type"), keys.get("type").and_then(Value::as_str)) {
            (None, _) => {
                return Err(D::Error::custom("a reward has no type; set type, such as type = \"exact\""));
            }
            (Some(other), None) => return Err(D::Error::custom(format!("type = {other} must be text"))),
            (_, Some(kind)) => format!("reward of type {kind:?}"),
        };
        let problem = |error: serde_json::Error| D::Error::custom(format!("{about}: {error}"));
        let common: CommonKeys = serde_json::from_value(Value::Object(common)).map_err(problem)?;
        let kind = serde_json::from_value(Value::Object(keys)).map_err(problem)?;
        Ok(Self {
            name: common.name,
            weight: common.weight.unwrap_or(1.0),
            gate: common.gate,
            gate_at_least: common.gate_at_least,
            kind,
        })
    }
}

impl RewardKind {
    /// Returns the name in a run file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exact(_) => "exact",
            Self::Contains(_) => "contains",
            Self::Regex(_) => "regex",
            Self::Numeric(_) => "numeric",
            Self::Choice(_) => "choice",
            Self::Json(_) => "json",
            Self::Format(_) => "format",
            Self::Length(_) => "length",
            Self::Repetition(_) => "repetition",
            Self::SoftOverlong(_) => "soft_overlong",
            Self::Command(_) => "command",
            Self::Http(_) => "http",
            Self::Model(_) => "model",
        }
    }
}

impl RewardConfig {
    /// Returns a reward of weight 1 without a gate, named by its type.
    pub fn new(kind: RewardKind) -> Self {
        Self { name: None, weight: 1.0, gate: None, gate_at_least: None, kind }
    }

    /// Returns the name in metrics.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.kind.name())
    }

    /// Returns the reward. A command is started here, and a reward model is loaded with `load`.
    ///
    /// # Errors
    ///
    /// [`RewardError::Config`] for an option that cannot work, [`RewardError::Failed`] for a program that does not start.
    pub(crate) fn build(&self, load: LoadRewardModel<'_>) -> Result<Box<dyn Reward>, RewardError> {
        let name = self.name().to_owned();
        match self.prepared()? {
            Prepared::Rule(rule) => Ok(Box::new(RuleReward { name, rule })),
            Prepared::Command(config) => Ok(Box::new(CommandReward::start(name, config)?)),
            Prepared::Http(config) => crate::http::connect(name, config),
            Prepared::Model(config) => load(&name, config),
        }
    }

    /// Checks the options without starting a program.
    ///
    /// # Errors
    ///
    /// [`RewardError::Config`] for an option that cannot work.
    pub fn check(&self) -> Result<(), RewardError> {
        self.prepared().map(|_| ())
    }

    /// Compiles the rule, or returns the options of a reward outside of this process.
    fn prepared(&self) -> Result<Prepared<'_>, RewardError> {
        fn rule<R: Rule + Clone + 'static>(rule: &R, problem: Option<String>) -> Result<Prepared<'static>, String> {
            problem.map_or_else(|| Ok(Prepared::Rule(Box::new(rule.clone()))), Err)
        }
        if self.name().is_empty() {
            return Err(RewardError::config("", "name is empty"));
        }
        if self.gate.is_none() && self.gate_at_least.is_some() {
            return Err(RewardError::config(self.name(), "gate_at_least has no effect without gate"));
        }
        let prepared = match &self.kind {
            RewardKind::Exact(exact) => rule(exact, None),
            RewardKind::Contains(contains) => rule(contains, contains.problem()),
            RewardKind::Regex(pattern) => pattern.compile().map(Prepared::Rule),
            RewardKind::Numeric(numeric) => numeric.compile().map(Prepared::Rule),
            RewardKind::Choice(choice) => choice.compile().map(Prepared::Rule),
            RewardKind::Json(json) => json.compile().map(Prepared::Rule),
            RewardKind::Format(format) => rule(format, format.problem()),
            RewardKind::Length(length) => rule(length, length.problem()),
            RewardKind::Repetition(repetition) => rule(repetition, repetition.problem()),
            RewardKind::SoftOverlong(overlong) => rule(overlong, overlong.problem()),
            RewardKind::Command(config) => config.problem().map_or(Ok(Prepared::Command(config)), Err),
            RewardKind::Http(config) => config.problem().map_or(Ok(Prepared::Http(config)), Err),
            RewardKind::Model(config) => config.problem().map_or(Ok(Prepared::Model(config)), Err),
        };
        prepared.map_err(|problem| RewardError::config(self.name(), problem))
    }
}

enum Prepared<'a> {
    Rule(Box<dyn Rule>),
    Command(&'a CommandRewardConfig),
    Http(&'a HttpRewardConfig),
    Model(&'a ModelRewardConfig),
}

/// A loader of reward models, given the reward's name and options.
pub type LoadRewardModel<'a> = &'a mut dyn FnMut(&str, &ModelRewardConfig) -> Result<Box<dyn Reward>, RewardError>;

impl RewardSet {
    /// Returns the rewards of a run file. Commands are started here. Reward models need
    /// [`from_configs_with`](Self::from_configs_with).
    ///
    /// # Errors
    ///
    /// [`RewardError::Config`] for an option that cannot work and for a reward model, [`RewardError::Failed`] for a program that
    /// does not start, and those of [`RewardSet::push_gated`].
    pub fn from_configs(configs: &[RewardConfig]) -> Result<Self, RewardError> {
        let problem = "type = \"model\" needs a loader of models; use RewardSet::from_configs_with";
        Self::from_configs_with(configs, &mut |name, _| Err(RewardError::config(name, problem)))
    }

    /// Returns the rewards of a run file. `load` loads a reward model, given the reward's name and options.
    ///
    /// # Errors
    ///
    /// As [`from_configs`](Self::from_configs), and those of `load`.
    pub fn from_configs_with(configs: &[RewardConfig], load: LoadRewardModel<'_>) -> Result<Self, RewardError> {
        Self::check(configs)?;
        let mut set = Self::new();
        for config in configs {
            set.push_config(config, config.build(load)?)?;
        }
        Ok(set)
    }

    /// Checks rewards of a run file, their names and their gates without starting a program.
    ///
    /// # Errors
    ///
    /// Those of [`RewardConfig::check`] and [`RewardSet::push_gated`].
    pub fn check(configs: &[RewardConfig]) -> Result<(), RewardError> {
        /// A reward that is only there for its name.
        struct Named(String);

        impl Reward for Named {
            fn name(&self) -> &str {
                &self.0
            }

            fn score(&mut self, samples: &[crate::Sample]) -> Result<Vec<Option<f64>>, RewardError> {
                Ok(vec![None; samples.len()])
            }
        }

        let mut set = Self::new();
        for config in configs {
            config.check()?;
            set.push_config(config, Box::new(Named(config.name().to_owned())))?;
        }
        Ok(())
    }

    fn push_config(&mut self, config: &RewardConfig, reward: Box<dyn Reward>) -> Result<(), RewardError> {
        match &config.gate {
            None => self.push(reward, config.weight),
            Some(gate) => {
                let gate = RewardGate { reward: gate.clone(), at_least: config.gate_at_least.unwrap_or(1.0) };
                self.push_gated(reward, config.weight, &gate)
            }
        }
    }
}

/// The default of options that are true.
pub(crate) fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Sample;

    fn read(config: Value) -> Result<RewardConfig, String> {
        serde_json::from_value(config).map_err(|error| error.to_string())
    }

    #[test]
    fn configurations_are_read_and_written() {
        for config in [
            json!({"weight": 2.0, "type": "exact", "column": "answer", "case_sensitive": false}),
            json!({"name": "n", "weight": 1.0, "gate": "f", "gate_at_least": 0.5, "type": "format", "tags": ["a"],
                   "strict": true}),
            json!({"weight": 0.1, "type": "soft_overlong", "max_completion_len": 8, "soft_punish_cache": 2}),
        ] {
            let read = read(config.clone()).unwrap();
            assert_eq!(serde_json::to_value(&read).unwrap(), config);
        }
    }

    #[test]
    fn mistakes_name_the_type_and_the_known_keys() {
        for (config, expected) in [
            (json!({"column": "a"}), "a reward has no type; set type, such as type = \"exact\""),
            (json!({"type": 3}), "type = 3 must be text"),
            (json!({"type": "exakt"}), "unknown variant `exakt`, expected one of `exact`, `contains`, `regex`"),
            (json!({"type": "exact", "colum": "a"}), "reward of type \"exact\": unknown field `colum`"),
            (json!({"type": "exact"}), "missing field `column`"),
            (json!({"type": "exact", "column": "a", "weight": "x"}), "invalid type: string \"x\", expected f64"),
        ] {
            let error = read(config.clone()).unwrap_err();
            assert!(error.contains(expected), "{config}: {error}");
        }
        let configs = |list: Vec<Value>| -> Vec<RewardConfig> { list.into_iter().map(|c| read(c).unwrap()).collect() };
        let exact = || json!({"type": "exact", "column": "a"});
        let error = RewardSet::check(&configs(vec![exact(), exact()])).unwrap_err().to_string();
        assert!(error.contains("two rewards have this name"), "{error}");
        let gated = json!({"type": "format", "gate": "answer"});
        let error = RewardSet::check(&configs(vec![gated, exact()])).unwrap_err().to_string();
        assert!(error.contains("the gate \"answer\" is no reward before this one"), "{error}");
        let threshold = json!({"type": "format", "gate_at_least": 0.5});
        let error = RewardSet::check(&configs(vec![threshold])).unwrap_err().to_string();
        assert!(error.contains("gate_at_least has no effect without gate"), "{error}");
    }

    #[test]
    fn a_set_of_a_run_file_scores() {
        let configs = [
            json!({"type": "format", "weight": 0.25}),
            json!({"type": "numeric", "column": "answer", "gate": "format", "weight": 2}),
        ];
        let configs: Vec<RewardConfig> = configs.into_iter().map(|config| read(config).unwrap()).collect();
        let mut set = RewardSet::from_configs(&configs).unwrap();
        let row = json!({"answer": 4});
        let sample = |completion| Sample {
            prompt: "2 + 2",
            completion,
            prompt_ids: &[],
            completion_ids: &[],
            truncated: false,
            row: row.as_object().unwrap(),
            messages: None,
        };
        let samples = [sample("<think>x</think>4"), sample("4"), sample("<think>x</think>5")];
        let scores = set.score(&samples).unwrap();
        assert_eq!(scores.columns[1].values, [Some(1.0), None, Some(0.0)]);
        assert_eq!(scores.totals, [Some(2.25), Some(0.0), Some(0.25)]);
    }
}

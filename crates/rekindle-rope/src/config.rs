use serde_json::{Map, Value};

use crate::parameter_reader::ParameterReader;
use crate::parse::{PROPORTIONAL, Window};
use crate::{Error, Scaling, Tables};

/// The default of transformers when a configuration has no `rope_theta` (for example Llama 2's).
const DEFAULT_THETA: f64 = 10_000.0;

/// The rotary embedding of one model: the number of rotated dimensions per head, their frequencies, and the scaling.
///
/// Pair i of the `rotary_dim / 2` pairs is rotated by `position · inv_freq[i]`, where unscaled `inv_freq[i] =
/// rope_theta^(−2i / rotary_dim)`; [`Scaling`] has the other rules. Matches transformers' `ROPE_INIT_FUNCTIONS`
/// (golden: `goldens/rope.json`).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    rotary_dim: usize,
    theta: f64,
    scaling: Scaling,
}

impl RopeConfig {
    /// Reads the position settings of a model's `config.json`.
    ///
    /// Accepts `rope_parameters` (transformers 5, with `rope_theta` and `partial_rotary_factor` inside) or
    /// `rope_scaling` (transformers 4, with those two next to it). `type` is the old name of `rope_type`. Inner values
    /// take precedence over outer ones. Without either object the type is `default`. For `llama3`, `yarn` and
    /// `longrope`, an `original_max_position_embeddings` next to the object takes precedence over the one inside; if
    /// there is none, `max_position_embeddings` is used.
    ///
    /// # Errors
    /// [`Error::UnknownType`] for an unsupported `rope_type`; [`Error::Parameters`] with one sentence for each
    /// parameter that is missing, has the wrong type, is out of range, or has no effect for the type;
    /// [`Error::Conflict`] when both objects are present and differ.
    pub fn from_config(config: &Value, head_dim: usize) -> Result<Self, Error> {
        let config = config.as_object().ok_or_else(|| one_problem("config.json is not a JSON object"))?;
        let five = section(config, "rope_parameters")?;
        let four = section(config, "rope_scaling")?;
        match (five, four) {
            (Some(five), Some(four)) => {
                let five = Self::parse(config, "rope_parameters", five, head_dim)?;
                let four = Self::parse(config, "rope_scaling", four, head_dim)?;
                if five == four { Ok(five) } else { Err(Error::Conflict) }
            }
            (Some(five), None) => Self::parse(config, "rope_parameters", five, head_dim),
            (None, Some(four)) => Self::parse(config, "rope_scaling", four, head_dim),
            (None, None) => Self::parse(config, "rope_scaling", &Map::new(), head_dim),
        }
    }

    /// Writes `rope_theta` or `partial_rotary_factor` into a model's `config.json` that has none, for families whose
    /// configuration class has another default than 10,000 or 1.
    pub fn set_default(config: &mut Value, key: &str, value: f64) {
        let Value::Object(fields) = config else { return };
        let is_set = |fields: &Map<String, Value>| fields.get(key).is_some_and(|value| !value.is_null());
        let sections = ["rope_parameters", "rope_scaling"].iter().filter_map(|key| fields.get(*key)?.as_object());
        if !is_set(fields) && !sections.into_iter().any(is_set) {
            fields.insert(key.to_owned(), value.into());
        }
    }

    /// Returns the number of rotated dimensions per head, `head_dim · partial_rotary_factor`. It is even; the other
    /// dimensions pass through unchanged.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Returns the base of the frequencies, `rope_theta`.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// Returns the scaling rule with its parameters.
    pub fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    /// Returns the radians per position of each of the `rotary_dim / 2` pairs, computed in f64 and rounded to f32 once.
    ///
    /// `seq_len` is the longest sequence of the run; only `dynamic` and `longrope` use it.
    pub fn inv_freq(&self, seq_len: usize) -> Vec<f32> {
        self.scaling.inv_freq(self.theta, self.rotary_dim, seq_len).into_iter().map(|f| f as f32).collect()
    }

    /// Returns the factor applied to cos and sin: 1 except for `yarn` and `longrope`.
    pub fn attention_factor(&self) -> f64 {
        self.scaling.attention_factor()
    }

    /// Returns the cos/sin tables of positions `0 .. seq_len`, with the frequencies for a run of that length.
    pub fn tables(&self, seq_len: usize) -> Tables {
        Tables::new(&self.inv_freq(seq_len), self.attention_factor(), seq_len)
    }

    /// Returns the theta used for sequences of `seq_len`; only `dynamic` changes it.
    pub(crate) fn theta_at(&self, seq_len: usize) -> f64 {
        self.scaling.theta_at(self.theta, self.rotary_dim, seq_len)
    }

    fn parse(
        config: &Map<String, Value>,
        name: &'static str,
        parameters: &Map<String, Value>,
        head_dim: usize,
    ) -> Result<Self, Error> {
        let mut outer = ParameterReader::new("", config);
        let mut inner = ParameterReader::new(name, parameters);

        let theta = inner.positive("rope_theta").or_else(|| outer.positive("rope_theta")).unwrap_or(DEFAULT_THETA);
        if theta <= 1.0 {
            outer.problem("rope_theta", &format!("is {theta}; expected a number above 1"));
        }
        let partial = inner.positive("partial_rotary_factor");
        let partial = partial.or_else(|| outer.positive("partial_rotary_factor")).unwrap_or(1.0);
        let rotated_dim = (head_dim as f64 * partial) as usize;
        let is_proportional = inner.string("rope_type") == Some(PROPORTIONAL);
        let rotary_dim = if is_proportional { head_dim } else { rotated_dim };
        if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            let what = format!(
                "{partial} of head_dim {head_dim} makes {rotary_dim} rotary dimensions; expected an even number from 2 to {head_dim}"
            );
            outer.problem("partial_rotary_factor", &what);
        }

        let window = Window {
            max: outer.count("max_position_embeddings"),
            outer_original: outer.count("original_max_position_embeddings"),
        };
        let scaling = Scaling::read(&mut inner, parameters, window, [rotary_dim, rotated_dim.min(rotary_dim)])?;

        let problems = [inner.into_problems(), outer.into_problems()].concat();
        match scaling {
            Some(scaling) if problems.is_empty() => Ok(Self { rotary_dim, theta, scaling }),
            _ => Err(Error::Parameters { problems }),
        }
    }
}

/// Returns the object under `key`, or `None` if it is absent or null.
fn section<'a>(config: &'a Map<String, Value>, key: &str) -> Result<Option<&'a Map<String, Value>>, Error> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(one_problem(&format!("{key} is {other}; expected an object or null"))),
    }
}

pub(crate) fn one_problem(problem: &str) -> Error {
    Error::Parameters { problems: vec![problem.to_owned()] }
}

/// Returns the parameters of `rope` in the layout of transformers 5: type, theta and partial rotary factor inside.
pub(crate) fn native_parameters(config: &Value, rope: &RopeConfig) -> Map<String, Value> {
    let sections = ["rope_parameters", "rope_scaling"].iter().filter_map(|key| config.get(*key)?.as_object());
    let mut parameters = sections.into_iter().next().cloned().unwrap_or_default();
    parameters.retain(|key, value| !value.is_null() && key != "type");
    parameters.insert("rope_type".to_owned(), rope.scaling.name().into());
    parameters.insert("rope_theta".to_owned(), rope.theta.into());
    if let Some(partial) = config.get("partial_rotary_factor").filter(|value| !value.is_null()) {
        parameters.entry("partial_rotary_factor").or_insert_with(|| partial.clone());
    }
    parameters
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(config: Value) -> String {
        RopeConfig::from_config(&config, 8).expect_err("invalid configuration").to_string()
    }

    #[test]
    fn an_empty_config_is_unscaled_with_theta_10000() {
        let rope = RopeConfig::from_config(&json!({}), 4).expect("valid");
        assert_eq!(rope.inv_freq(1), [1.0, 0.01]);
        assert_eq!(rope.attention_factor(), 1.0);
        assert_eq!(rope.rotary_dim(), 4);
    }

    #[test]
    fn a_class_default_fills_in_only_for_a_missing_theta() {
        let theta = |mut config: Value| {
            RopeConfig::set_default(&mut config, "rope_theta", 2e6);
            RopeConfig::from_config(&config, 4).expect("valid").theta()
        };
        assert_eq!(theta(json!({})), 2e6);
        assert_eq!(theta(json!({ "rope_parameters": { "rope_type": "default" } })), 2e6);
        assert_eq!(theta(json!({ "rope_theta": 5e6 })), 5e6);
        assert_eq!(theta(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 7e5 } })), 7e5);
    }

    #[test]
    fn proportional_dimensions_that_do_not_turn_stay_in_the_rotation() {
        let parameters = json!({ "rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5 });
        let rope = RopeConfig::from_config(&json!({ "rope_parameters": parameters }), 8).expect("valid");
        assert_eq!(rope.rotary_dim(), 8);
        // 100^(-2i / 8) for two of four pairs.
        assert_eq!(rope.inv_freq(1), [1.0, 0.1_f64.sqrt() as f32, 0.0, 0.0]);
    }

    #[test]
    fn the_inner_theta_takes_precedence() {
        let config = json!({ "rope_theta": 7.0, "rope_parameters": { "rope_type": "default", "rope_theta": 100.0 } });
        assert_eq!(RopeConfig::from_config(&config, 4).expect("valid").theta(), 100.0);
    }

    #[test]
    fn both_layouts_must_agree() {
        let five = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 100.0 });
        let same =
            json!({ "rope_theta": 100.0, "rope_parameters": five, "rope_scaling": { "type": "linear", "factor": 2 } });
        assert!(RopeConfig::from_config(&same, 8).is_ok());
        let other =
            json!({ "rope_theta": 100.0, "rope_parameters": five, "rope_scaling": { "type": "linear", "factor": 4 } });
        assert_eq!(RopeConfig::from_config(&other, 8), Err(Error::Conflict));
    }

    #[test]
    fn an_unknown_type_is_reported() {
        let text = message(json!({ "rope_scaling": { "type": "lineer", "factor": 2.0 } }));
        assert_eq!(
            text,
            "rope_type \"lineer\" is not supported; supported: default, linear, dynamic, yarn, llama3, longrope, proportional"
        );
    }

    #[test]
    fn every_bad_parameter_is_listed() {
        let text = message(json!({
            "max_position_embeddings": 64,
            "rope_parameters": { "rope_type": "llama3", "factor": "8", "low_freq_factor": 1.0, "beta_fast": 32 }
        }));
        assert!(text.contains("rope_parameters.factor is \"8\"; expected a number above 0"), "{text}");
        assert!(text.contains("rope_parameters.high_freq_factor is missing"), "{text}");
        assert!(text.contains("rope_parameters.beta_fast has no effect with rope_type \"llama3\""), "{text}");
    }

    #[test]
    fn parameters_without_a_type_are_refused() {
        let text = message(json!({ "rope_scaling": { "factor": 2.0 } }));
        assert!(text.contains("rope_scaling.rope_type is missing"), "{text}");
    }

    #[test]
    fn parameters_per_layer_type_are_refused() {
        let text = message(json!({ "rope_parameters": { "sliding_attention": { "rope_type": "default" } } }));
        assert!(text.contains("rope_parameters.sliding_attention is an object"), "{text}");
    }

    #[test]
    fn an_odd_rotary_dimension_is_refused() {
        let text = message(json!({ "partial_rotary_factor": 0.4 }));
        assert!(text.contains("0.4 of head_dim 8 makes 3 rotary dimensions"), "{text}");
    }

    #[test]
    fn dynamic_needs_the_window_and_more_than_one_pair() {
        let config = json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 }, "partial_rotary_factor": 0.25 });
        let text = message(config);
        assert!(text.contains("max_position_embeddings is missing"), "{text}");
        assert!(text.contains("at least 4"), "{text}");
    }

    #[test]
    fn longrope_lists_have_one_factor_per_pair() {
        let config = json!({ "max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "factor": 2.0, "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3] } });
        let text = message(config);
        assert!(text.contains("rope_scaling.long_factor is [1,2,3]; expected a list of 4 numbers"), "{text}");
    }
}

//! Values of a `config.json`, with every problem collected.

use rekindle_rope::RopeConfig;
use serde_json::Value;

use crate::spec::AttentionMask;

/// Far beyond any model; a damaged file must not fill the memory with layers.
const MOST_LAYERS: usize = 10_000;

/// Reads values from a `config.json` and collects what is wrong with them.
pub(crate) struct ConfigReader<'a> {
    json: &'a Value,
    problems: Vec<String>,
    /// A class default that matters to readers of the file itself.
    default_theta: Option<f64>,
}

impl<'a> ConfigReader<'a> {
    pub(crate) fn new(json: &'a Value) -> Self {
        Self { json, problems: Vec::new(), default_theta: None }
    }

    /// The file with the class default of `rope_theta` written out, or one sentence for each problem.
    pub(crate) fn finish(self) -> Result<Value, Vec<String>> {
        if self.problems.is_empty() { Ok(self.with_theta()) } else { Err(self.problems) }
    }

    fn with_theta(&self) -> Value {
        let mut json = self.json.clone();
        if let Some(theta) = self.default_theta {
            RopeConfig::set_default_theta(&mut json, theta);
        }
        json
    }

    /// The value under `key`, unless it is null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Adds a problem.
    pub(crate) fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// A positive integer; 1 with a problem noted if it is none.
    pub(crate) fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_u64() {
                Some(n @ 1..=0xFFFF_FFFF) => n as usize,
                _ => self.wrong(key, value, "a positive integer", 1),
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(format!("{key} is missing"));
                1
            }
        }
    }

    /// The number of layers.
    pub(crate) fn layers(&mut self) -> usize {
        let layers = self.size("num_hidden_layers", None);
        if layers > MOST_LAYERS {
            self.problem(format!("num_hidden_layers is {layers}; expected at most {MOST_LAYERS}"));
            return 1;
        }
        layers
    }

    /// A number.
    pub(crate) fn number(&mut self, key: &str, default: f64) -> f64 {
        match self.get(key) {
            Some(value) => value.as_f64().unwrap_or_else(|| self.wrong(key, value, "a number", default)),
            None => default,
        }
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            Some(value) => value.as_bool().unwrap_or_else(|| self.wrong(key, value, "true or false", default)),
            None => default,
        }
    }

    /// Adds a problem unless `key` is absent or has the one value that is supported.
    pub(crate) fn only(&mut self, key: &str, supported: impl Into<Value>) {
        let supported = supported.into();
        if let Some(value) = self.get(key) {
            let same = *value == supported || (value.as_f64().is_some() && value.as_f64() == supported.as_f64());
            if !same {
                self.problem(format!("{key} is {value}; only {supported} is supported"));
            }
        }
    }

    /// The window of `sliding_window`. `default` holds where the key is absent; null turns the window off.
    pub(crate) fn window(&mut self, default: AttentionMask) -> AttentionMask {
        match self.json.get("sliding_window") {
            None => default,
            Some(Value::Null) => AttentionMask::Full,
            Some(_) => AttentionMask::Sliding(self.size("sliding_window", None)),
        }
    }

    /// The mask of every layer: from `layer_types` or, without them, windows from layer `max_window_layers` on if
    /// `use_sliding_window` is true.
    pub(crate) fn masks(&mut self, layers: usize) -> Vec<AttentionMask> {
        let uses_window = self.flag("use_sliding_window", false);
        let window = if uses_window { self.window(AttentionMask::Full) } else { AttentionMask::Full };
        if uses_window && window == AttentionMask::Full {
            self.problem("use_sliding_window is true, and sliding_window is missing".to_owned());
        }
        let Some(types) = self.get("layer_types").and_then(Value::as_array) else {
            let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
            return (0..layers).map(|layer| if layer < first { AttentionMask::Full } else { window }).collect();
        };
        if types.len() != layers {
            self.problem(format!("layer_types has {} entries for {layers} layers", types.len()));
        }
        let known = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Some(AttentionMask::Full),
            Some("sliding_attention") if uses_window => Some(window),
            _ => None,
        };
        if let Some(other) = types.iter().find(|kind| known(kind).is_none()) {
            self.problem(format!("layer_types has {other}; only \"full_attention\" is supported"));
        }
        (0..layers).map(|layer| types.get(layer).and_then(known).unwrap_or(AttentionMask::Full)).collect()
    }

    /// The rotary position embedding, with a class default for a missing `rope_theta`; none with a problem noted if it is
    /// wrong.
    pub(crate) fn ropes(&mut self, head_dim: usize, default_theta: Option<f64>) -> Vec<RopeConfig> {
        self.default_theta = default_theta;
        let json = self.with_theta();
        match RopeConfig::from_config(&json, head_dim.max(2)) {
            Ok(rope) => vec![rope],
            Err(error) => {
                self.problem(error.to_string());
                Vec::new()
            }
        }
    }

    /// Adds a problem about the value under `key`, and returns `instead`.
    pub(crate) fn wrong<T>(&mut self, key: &str, value: &Value, expected: &str, instead: T) -> T {
        self.problem(format!("{key} is {value}; expected {expected}"));
        instead
    }
}

//! Values of a `config.json`, with every problem collected.

use rekindle_rope::{QueryGrowth, RopeConfig};
use serde_json::Value;

use crate::spec::AttentionMask;

/// Far beyond any model; a damaged file must not fill the memory with layers.
const MOST_LAYERS: usize = 10_000;

/// Reads values from a `config.json` and collects what is wrong with them.
pub(crate) struct ConfigReader<'a> {
    json: &'a Value,
    problems: Vec<String>,
    /// Class defaults that matter to readers of the file itself.
    rope_defaults: Vec<(&'static str, f64)>,
    /// The class default of `max_position_embeddings`.
    default_positions: usize,
    /// True if the file's rotary embedding is not one that `rope_scaling` can extend.
    has_fixed_context: bool,
}

impl<'a> ConfigReader<'a> {
    pub(crate) fn new(json: &'a Value) -> Self {
        Self {
            json,
            problems: Vec::new(),
            rope_defaults: Vec::new(),
            default_positions: 2048,
            has_fixed_context: false,
        }
    }

    /// The file with the class defaults of rotary embeddings written out, or one sentence for each problem.
    pub(crate) fn finish(self) -> Result<Value, Vec<String>> {
        if self.problems.is_empty() { Ok(self.with_rope_defaults()) } else { Err(self.problems) }
    }

    fn with_rope_defaults(&self) -> Value {
        let mut json = self.json.clone();
        for (key, value) in &self.rope_defaults {
            RopeConfig::set_default(&mut json, key, *value);
        }
        json
    }

    /// Sets the class default of `max_position_embeddings`.
    pub(crate) fn set_default_positions(&mut self, positions: usize) {
        self.default_positions = positions;
    }

    /// Notes that `rope_scaling` cannot extend the rotary embedding.
    pub(crate) fn fix_context(&mut self) {
        self.has_fixed_context = true;
    }

    /// Returns true if `rope_scaling` cannot extend the rotary embedding.
    pub(crate) fn has_fixed_context(&self) -> bool {
        self.has_fixed_context
    }

    /// The longest sequence that the checkpoint was made for.
    pub(crate) fn positions(&mut self) -> usize {
        self.size("max_position_embeddings", Some(self.default_positions))
    }

    /// The value under `key`, unless it is null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Returns true if the file has `key`, null included.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some()
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
    pub(crate) fn layers(&mut self, default: Option<usize>) -> usize {
        let layers = self.size("num_hidden_layers", default);
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

    /// A number above 0, or none: null turns it off, and `default` holds where the key is absent.
    pub(crate) fn optional_number(&mut self, key: &str, default: Option<f64>) -> Option<f64> {
        match self.json.get(key) {
            None => default,
            Some(Value::Null) => None,
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 => Some(number),
                _ => self.wrong(key, value, "a number above 0 or null", default),
            },
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
        let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        let sliding = self.sliding_layers(layers, |layer| uses_window && layer >= first);
        if !uses_window && sliding.contains(&true) {
            self.problem("layer_types has \"sliding_attention\", and use_sliding_window is false".to_owned());
        }
        sliding.into_iter().map(|sliding| if sliding { window } else { AttentionMask::Full }).collect()
    }

    /// Returns for each layer if it has a window: from `layer_types` or, without them, by its index.
    pub(crate) fn sliding_layers(&mut self, layers: usize, default: impl Fn(usize) -> bool) -> Vec<bool> {
        let Some(value) = self.get("layer_types") else { return (0..layers).map(default).collect() };
        let Some(types) = value.as_array() else {
            return self.wrong("layer_types", value, "a list with an entry for each layer", vec![false; layers]);
        };
        if types.len() != layers {
            self.problem(format!("layer_types has {} entries for {layers} layers", types.len()));
        }
        let known = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Some(false),
            Some("sliding_attention") => Some(true),
            _ => None,
        };
        if let Some(other) = types.iter().find(|kind| known(kind).is_none()) {
            self.problem(format!(
                "layer_types has {other}; only \"full_attention\" and \"sliding_attention\" are supported"
            ));
        }
        (0..layers).map(|layer| types.get(layer).and_then(known).unwrap_or(false)).collect()
    }

    /// The rotary position embedding, with class defaults for what the file leaves out; none with a problem noted if it is
    /// wrong.
    pub(crate) fn ropes(&mut self, head_dim: usize, theta: Option<f64>, partial: Option<f64>) -> Vec<RopeConfig> {
        let defaults = [("rope_theta", theta), ("partial_rotary_factor", partial)];
        self.rope_defaults = defaults.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        let json = self.with_rope_defaults();
        match RopeConfig::from_config(&json, head_dim.max(2)) {
            Ok(rope) => vec![rope],
            Err(error) => {
                self.problem(error.to_string());
                Vec::new()
            }
        }
    }

    /// The rotary position embeddings of full and of sliding layers, in this order; none with a problem noted if one is
    /// wrong. `local_theta_key` is where older files have the theta of sliding layers.
    pub(crate) fn ropes_by_layer_type(
        &mut self,
        head_dims: [usize; 2],
        full_theta: f64,
        local_theta_key: &str,
        local_theta: f64,
    ) -> Vec<RopeConfig> {
        self.fix_context();
        let local_theta = self.number(local_theta_key, local_theta);
        let [full_dim, local_dim] = head_dims;
        let kinds = [("full_attention", full_dim, full_theta), ("sliding_attention", local_dim, local_theta)];
        let read = |(kind, dim, theta): (_, usize, _)| RopeConfig::of_layer_type(self.json, dim.max(2), kind, theta);
        let read: Result<Vec<RopeConfig>, rekindle_rope::Error> = kinds.into_iter().map(read).collect();
        read.unwrap_or_else(|error| {
            self.problem(error.to_string());
            Vec::new()
        })
    }

    /// Adds a problem if the file leaves the rotary embedding to the class, whose scaling is not the plain one.
    pub(crate) fn require_rope(&mut self) {
        if let Some(problem) = RopeConfig::missing(self.json) {
            self.problem(problem);
        }
    }

    /// The rotary position embedding with an `alpha`, if the file has one; `rope_scaling` cannot extend it.
    pub(crate) fn rope_with_alpha(&mut self, head_dim: usize) -> Option<RopeConfig> {
        let rope = RopeConfig::with_alpha(self.json, head_dim)?;
        self.fix_context();
        rope.map_err(|error| self.problem(error.to_string())).ok()
    }

    /// The growth of queries with the position, if the file has one.
    pub(crate) fn query_growth(&mut self) -> Option<QueryGrowth> {
        let growth = QueryGrowth::from_config(self.json);
        growth.unwrap_or_else(|error| {
            self.problem(error.to_string());
            None
        })
    }

    /// Adds a problem about the value under `key`, and returns `instead`.
    pub(crate) fn wrong<T>(&mut self, key: &str, value: &Value, expected: &str, instead: T) -> T {
        self.problem(format!("{key} is {value}; expected {expected}"));
        instead
    }
}

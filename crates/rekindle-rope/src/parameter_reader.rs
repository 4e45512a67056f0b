use serde_json::{Map, Value};

/// Reads typed parameters from one JSON object and collects all problems, so that a single error can list them.
///
/// `null` counts as absent, as in transformers.
pub(crate) struct ParameterReader<'a> {
    section: &'static str,
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> ParameterReader<'a> {
    /// `section` prefixes keys in messages, as in `rope_scaling.factor`; it is empty at the top level.
    pub(crate) fn new(section: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { section, map, problems: Vec::new() }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(crate) fn problem(&mut self, key: &str, what: &str) {
        let separator = if self.section.is_empty() { "" } else { "." };
        self.problems.push(format!("{}{separator}{key} {what}", self.section));
    }

    pub(crate) fn into_problems(self) -> Vec<String> {
        self.problems
    }

    pub(crate) fn string(&mut self, key: &str) -> Option<&'a str> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn bool(&mut self, key: &str) -> Option<bool> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&mut self, key: &str) -> Option<f64> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(crate) fn positive(&mut self, key: &str) -> Option<f64> {
        self.typed(key, "a number above 0", positive)
    }

    pub(crate) fn count(&mut self, key: &str) -> Option<usize> {
        self.typed(key, "a whole number above 0", |value| {
            let number = value.as_f64().filter(|n| *n >= 1.0 && n.fract() == 0.0 && *n < 2f64.powi(53))?;
            Some(number as usize)
        })
    }

    pub(crate) fn positives(&mut self, key: &str, len: usize) -> Option<Vec<f64>> {
        let what = format!("a list of {len} numbers above 0 (half of the rotary dimensions)");
        self.typed(key, &what, |value| {
            let list: Option<Vec<f64>> = value.as_array()?.iter().map(positive).collect();
            list.filter(|list| list.len() == len)
        })
    }

    /// Reports a missing parameter that has no default, unless its value was already reported as invalid.
    pub(crate) fn require<T>(&mut self, key: &str, value: Option<T>) -> Option<T> {
        if value.is_none() && !self.has(key) {
            self.problem(key, "is missing");
        }
        value
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&mut self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.get(key)?;
        let typed = read(value);
        if typed.is_none() {
            self.problem(key, &format!("is {}; expected {expected}", short(value)));
        }
        typed
    }
}

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|n| *n > 0.0)
}

/// Formats the value for a message, abbreviating long lists.
fn short(value: &Value) -> String {
    match value {
        Value::Array(list) if list.len() > 4 => format!("a list of {}", list.len()),
        other => other.to_string(),
    }
}

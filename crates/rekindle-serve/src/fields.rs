//! Reading of JSON objects field by field, so that no field is ignored by accident.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// The fields of an object that were not read yet. Null is the same as absent.
#[derive(Debug)]
pub(crate) struct Fields {
    left: Map<String, Value>,
    /// The path of the object, with a dot at its end; empty for the body.
    path: String,
}

impl Fields {
    /// Returns the fields of `value`; `path` names it in errors and is empty for the body.
    pub(crate) fn new(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(left) => {
                Ok(Self { left, path: if path.is_empty() { String::new() } else { format!("{path}.") } })
            }
            other if path.is_empty() => {
                Err(ApiError::invalid(format!("the body is {}, not a JSON object", type_name(&other))))
            }
            other => Err(ApiError::field(path, format!("{path} is {}, not an object", type_name(&other)))),
        }
    }

    /// Returns the full name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// Returns an error about a field.
    pub(crate) fn error(&self, field: &str, problem: impl std::fmt::Display) -> ApiError {
        let name = self.name(field);
        ApiError::field(name.clone(), format!("{name} {problem}"))
    }

    fn wrong_type(&self, field: &str, found: &Value, expected: &str) -> ApiError {
        self.error(field, format_args!("is {}; it must be {expected}", type_name(found)))
    }

    /// Takes a field of any type.
    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.left.shift_remove(field).filter(|value| !value.is_null())
    }

    /// Takes a string.
    pub(crate) fn string(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(field, &other, "a string")),
        }
    }

    /// Takes a string that must be there.
    pub(crate) fn required_string(&mut self, field: &str) -> Result<String, ApiError> {
        self.string(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// Takes a boolean.
    pub(crate) fn boolean(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(field, &other, "true or false")),
        }
    }

    /// Takes a number from `least` to `most`.
    pub(crate) fn number(&mut self, field: &str, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(self.wrong_type(field, &value, "a number")) };
        if !(least..=most).contains(&number) {
            let range = if most == f64::INFINITY { format!("at least {least}") } else { format!("{least} to {most}") };
            return Err(self.error(field, format_args!("is {value}; it must be {range}")));
        }
        Ok(Some(number))
    }

    /// Takes an integer from `least` to `most`.
    pub(crate) fn integer(&mut self, field: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
        match value.as_i64().or_else(|| value.as_f64().and_then(whole)) {
            None => Err(self.wrong_type(field, &value, "an integer")),
            Some(number) if !(least..=most).contains(&number) => {
                let range = if most == i64::MAX { format!("at least {least}") } else { format!("{least} to {most}") };
                Err(self.error(field, format_args!("is {number}; it must be {range}")))
            }
            Some(number) => Ok(Some(number)),
        }
    }

    /// Takes a count from `least` to `most`.
    pub(crate) fn count(&mut self, field: &str, least: usize, most: usize) -> Result<Option<usize>, ApiError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        Ok(self.integer(field, least as i64, most)?.map(|number| number as usize))
    }

    /// Takes an object.
    pub(crate) fn object(&mut self, field: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(other) => Err(self.wrong_type(field, &other, "an object")),
        }
    }

    /// Takes an object to read field by field.
    pub(crate) fn fields(&mut self, field: &str) -> Result<Option<Fields>, ApiError> {
        let name = self.name(field);
        self.take(field).map(|value| Fields::new(value, &name)).transpose()
    }

    /// Takes a list.
    pub(crate) fn list(&mut self, field: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(self.wrong_type(field, &other, "a list")),
        }
    }

    /// Takes a list of token ids below `vocab_size`.
    pub(crate) fn ids(&mut self, field: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(values) = self.list(field)? else { return Ok(None) };
        let ids = values.iter().map(|value| token_id(value, vocab_size));
        ids.collect::<Result<_, _>>().map(Some).map_err(|problem| self.error(field, problem))
    }

    /// Checks that no field is left other than `ignored` ones.
    pub(crate) fn finish(self, ignored: &[&str]) -> Result<(), ApiError> {
        let left = self.left.iter().filter(|(name, value)| !value.is_null() && !ignored.contains(&name.as_str()));
        let names: Vec<String> = left.map(|(name, _)| self.name(name)).collect();
        let Some(first) = names.first() else { return Ok(()) };
        let plural = if names.len() == 1 { "" } else { "s" };
        Err(ApiError::field(first.clone(), format!("unknown or unsupported field{plural}: {}", names.join(", "))))
    }
}

/// Reads a token id below `vocab_size`.
pub(crate) fn token_id(value: &Value, vocab_size: usize) -> Result<u32, String> {
    match value.as_u64() {
        Some(id) if (id as usize) < vocab_size => Ok(id as u32),
        Some(id) => Err(format!("has the token id {id}; ids are below {vocab_size}")),
        None => Err(format!("has {}, not a token id", type_name(value))),
    }
}

/// Returns the type of a JSON value with its article.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::new(value, "").unwrap()
    }

    #[test]
    fn numbers_and_their_ranges() {
        let mut body = fields(json!({"a": 0.5, "b": 3, "c": 3.0, "d": 3.5, "e": "3", "f": null, "g": -1}));
        assert_eq!(body.number("a", 0.0, 2.0).unwrap(), Some(0.5));
        assert_eq!(body.integer("b", 1, 3).unwrap(), Some(3));
        assert_eq!(body.count("c", 0, 9).unwrap(), Some(3));
        assert_eq!(body.integer("d", 0, 9).unwrap_err().message, "d is a number; it must be an integer");
        assert_eq!(body.number("e", 0.0, 1.0).unwrap_err().message, "e is a string; it must be a number");
        assert_eq!(body.number("f", 0.0, 1.0).unwrap(), None);
        assert_eq!(body.count("g", 0, usize::MAX).unwrap_err().message, "g is -1; it must be at least 0");
        assert_eq!(fields(json!({"t": 2.5})).number("t", 0.0, 2.0).unwrap_err().message, "t is 2.5; it must be 0 to 2");
    }

    #[test]
    fn what_is_left_is_named() {
        let mut body =
            fields(json!({"stream_options": {"include_usage": true, "x": 1}, "user": "u", "a": 1, "b": null}));
        let mut options = body.fields("stream_options").unwrap().unwrap();
        assert_eq!(options.boolean("include_usage").unwrap(), Some(true));
        let error = options.finish(&[]).unwrap_err();
        assert_eq!(error.message, "unknown or unsupported field: stream_options.x");
        assert_eq!(error.param.as_deref(), Some("stream_options.x"));
        assert_eq!(body.finish(&["user"]).unwrap_err().message, "unknown or unsupported field: a");
        assert_eq!(Fields::new(json!([1]), "").unwrap_err().message, "the body is a list, not a JSON object");
    }

    #[test]
    fn ids_are_in_the_vocabulary() {
        assert_eq!(fields(json!({"p": [1, 2]})).ids("p", 3).unwrap(), Some(vec![1, 2]));
        let error = fields(json!({"p": [1, 3]})).ids("p", 3).unwrap_err();
        assert_eq!(error.message, "p has the token id 3; ids are below 3");
        assert_eq!(fields(json!({"p": [-1]})).ids("p", 3).unwrap_err().message, "p has a number, not a token id");
    }
}

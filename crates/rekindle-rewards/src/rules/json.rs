//! JSON, checked against a schema.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Rule, column_value, pass};
use crate::Sample;
use crate::schema::Schema;

/// 1 if the completion is JSON that satisfies a schema, else 0. Without a schema, any JSON passes.
///
/// The schema is one of `schema`, `schema_file` and the column `schema_column` (an object, or its text), of JSON Schema draft
/// 2020-12. A keyword that is not supported and a reference to another document are errors; docs/rewards.md lists the
/// keywords.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Json {
    /// The schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// A file with the schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema_file: Option<PathBuf>,
    /// A column with the schema of each row. A null gives null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema_column: Option<String>,
    /// The part of the completion that is JSON. Default `fenced_or_whole`.
    #[serde(default)]
    pub extract: JsonFrom,
}

/// The part of a completion that is JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JsonFrom {
    /// The last block between ``` fences, or the whole completion if it has none.
    #[default]
    FencedOrWhole,
    /// The whole completion.
    Whole,
}

/// A [`Json`] with its compiled schema.
#[derive(Debug)]
struct CompiledJson {
    options: Json,
    schema: Option<Schema>,
}

impl Json {
    pub(crate) fn compile(&self) -> Result<Box<dyn Rule>, String> {
        let given = [self.schema.is_some(), self.schema_file.is_some(), self.schema_column.is_some()];
        if given.iter().filter(|given| **given).count() > 1 {
            return Err("set one of schema, schema_file and schema_column".to_owned());
        }
        let schema = match (&self.schema, &self.schema_file) {
            (Some(schema), _) => Some(schema.clone()),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| format!("cannot read schema_file {}: {error}", path.display()))?;
                let parsed = serde_json::from_str(&text);
                Some(parsed.map_err(|error| format!("schema_file {} is not JSON: {error}", path.display()))?)
            }
            (None, None) => None,
        };
        let schema = schema.as_ref().map(validator).transpose()?;
        Ok(Box::new(CompiledJson { options: self.clone(), schema }))
    }
}

fn validator(schema: &Value) -> Result<Schema, String> {
    Schema::new(schema).map_err(|problem| format!("the JSON schema cannot be used: {problem}"))
}

/// Returns the content of the last block between ``` fences, or all of the text.
fn fenced(text: &str) -> &str {
    let Some((before, _)) = text.rsplit_once("```") else { return text };
    let Some((_, block)) = before.rsplit_once("```") else { return text };
    // The rest of the opening line is the language.
    block.split_once('\n').map_or(block, |(_, content)| content)
}

impl Rule for CompiledJson {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let text = match self.options.extract {
            JsonFrom::FencedOrWhole => fenced(sample.completion),
            JsonFrom::Whole => sample.completion,
        };
        let value = serde_json::from_str::<Value>(text.trim()).ok();
        let Some(column) = &self.options.schema_column else {
            let valid = |value| self.schema.as_ref().is_none_or(|schema| schema.is_valid(&value));
            return Ok(pass(value.is_some_and(valid)));
        };
        let schema = match column_value(sample, column)? {
            Value::Null => return Ok(None),
            Value::String(text) => serde_json::from_str(text)
                .map_err(|error| format!("column {column:?} is not the text of a JSON schema: {error}"))?,
            schema => schema.clone(),
        };
        let schema = validator(&schema).map_err(|problem| format!("column {column:?}: {problem}"))?;
        Ok(pass(value.is_some_and(|value| schema.is_valid(&value))))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn completions_are_validated() {
        let schema = json!({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}});
        let given = json!({"type": "json", "schema": schema});
        assert_eq!(score(given.clone(), " {\"n\": 3} ", json!({})), Ok(Some(1.0)));
        assert_eq!(score(given.clone(), "{\"n\": \"3\"}", json!({})), Ok(Some(0.0)));
        assert_eq!(score(given.clone(), "{\"n\": 3", json!({})), Ok(Some(0.0)));
        assert_eq!(score(given, "Here:\n```json\n{\"n\": 3}\n```\nDone", json!({})), Ok(Some(1.0)));
        let whole = json!({"type": "json", "extract": "whole"});
        assert_eq!(score(whole.clone(), "[1]", json!({})), Ok(Some(1.0)));
        assert_eq!(score(whole, "```\n[1]\n```", json!({})), Ok(Some(0.0)));
        let column = json!({"type": "json", "schema_column": "schema"});
        assert_eq!(score(column.clone(), "{\"n\": 3}", json!({"schema": schema.to_string()})), Ok(Some(1.0)));
        assert_eq!(score(column.clone(), "{}", json!({"schema": schema})), Ok(Some(0.0)));
        assert_eq!(score(column, "{}", json!({"schema": null})), Ok(None));
    }

    #[test]
    fn bad_schemas_are_refused() {
        let error = score(json!({"type": "json", "schema": {"type": 3}}), "1", json!({})).unwrap_err();
        assert!(error.starts_with("reward \"json\": the JSON schema cannot be used: #/type is 3"), "{error}");
        let remote = json!({"type": "json", "schema": {"$ref": "https://example.com/schema.json"}});
        assert!(score(remote, "1", json!({})).is_err());
        let file = json!({"type": "json", "schema_file": "/nonexistent/schema.json"});
        assert!(score(file, "1", json!({})).unwrap_err().contains("cannot read schema_file"));
        let two = json!({"type": "json", "schema": {}, "schema_column": "c"});
        assert!(score(two, "1", json!({})).unwrap_err().contains("set one of"));
    }
}

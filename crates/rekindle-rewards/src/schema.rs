//! JSON Schema: validation of a value.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Map, Value};

/// A JSON schema (draft 2020-12) that is ready to validate.
///
/// Supported are `true` and `false`, and the keywords `type`, `enum`, `const`, `allOf`, `anyOf`, `oneOf`, `not`, `$ref` into
/// the same document, `properties`, `required`, `additionalProperties`, `patternProperties`, `minProperties`,
/// `maxProperties`, `items`, `prefixItems`, `minItems`, `maxItems`, `uniqueItems`, `minimum`, `maximum`,
/// `exclusiveMinimum`, `exclusiveMaximum`, `multipleOf`, `minLength`, `maxLength` and `pattern`. Annotations (`title`,
/// `description`, `format`, …) do not validate, as in the specification. Any other keyword is an error.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    document: Value,
    /// The compiled regular expressions of the document.
    patterns: BTreeMap<String, Regex>,
}

/// Keywords that do not validate.
const ANNOTATIONS: [&str; 17] = [
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "$anchor",
    "title",
    "description",
    "default",
    "examples",
    "format",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
];

/// Keywords with a schema.
const WITH_SCHEMA: [&str; 3] = ["not", "items", "additionalProperties"];
/// Keywords with a list of schemas.
const WITH_LIST: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
/// Keywords with schemas by name.
const WITH_MAP: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords with a count.
const COUNTS: [&str; 6] = ["minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"];
/// Keywords with a number.
const NUMBERS: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
/// The names of types.
const TYPES: [&str; 7] = ["null", "boolean", "object", "array", "number", "integer", "string"];

/// The number of references that are followed for one value: more is a cycle.
const MOST_REFERENCES: usize = 64;

impl Schema {
    /// Reads a schema. The error names the place of the first keyword that cannot be used.
    pub(crate) fn new(document: &Value) -> Result<Self, String> {
        let mut schema = Self { document: document.clone(), patterns: BTreeMap::new() };
        schema.check(document, "#")?;
        Ok(schema)
    }

    /// Returns true if the value satisfies the schema.
    pub(crate) fn is_valid(&self, value: &Value) -> bool {
        self.holds(&self.document, value, 0)
    }

    fn check(&mut self, schema: &Value, place: &str) -> Result<(), String> {
        let Value::Object(keywords) = schema else {
            return match schema {
                Value::Bool(_) => Ok(()),
                _ => Err(format!("{place} is neither an object nor true or false")),
            };
        };
        for (name, argument) in keywords {
            let at = format!("{place}/{name}");
            let wrong = |expected: &str| Err(format!("{at} is {argument}; expected {expected}"));
            match name.as_str() {
                "type" => {
                    let names = argument.as_array().map_or_else(|| vec![argument], |list| list.iter().collect());
                    if names.iter().any(|name| !name.as_str().is_some_and(|name| TYPES.contains(&name))) {
                        return wrong(&format!("one of {}, or a list of them", TYPES.join(", ")));
                    }
                }
                "enum" if !argument.is_array() => return wrong("a list"),
                "enum" | "const" => {}
                "$ref" => {
                    let found = argument.as_str().and_then(|reference| self.target(reference));
                    if found.is_none() {
                        return wrong("a place in this document, such as \"#/$defs/name\"");
                    }
                }
                "required" => {
                    let names = argument.as_array().is_some_and(|list| list.iter().all(Value::is_string));
                    if !names {
                        return wrong("a list of names");
                    }
                }
                "uniqueItems" if !argument.is_boolean() => return wrong("true or false"),
                "uniqueItems" => {}
                "pattern" => match argument.as_str() {
                    Some(pattern) => self.compile(pattern, &at)?,
                    None => return wrong("a regular expression"),
                },
                name if COUNTS.contains(&name) => {
                    if argument.as_u64().is_none() {
                        return wrong("a whole number, 0 or above");
                    }
                }
                name if NUMBERS.contains(&name) => {
                    let number = argument.as_f64();
                    if number.is_none_or(|number| name == "multipleOf" && number <= 0.0) {
                        return wrong(if name == "multipleOf" { "a number above 0" } else { "a number" });
                    }
                }
                name if WITH_SCHEMA.contains(&name) => self.check(argument, &at)?,
                name if WITH_LIST.contains(&name) => {
                    let Some(list) = argument.as_array() else { return wrong("a list of schemas") };
                    for (index, schema) in list.iter().enumerate() {
                        self.check(schema, &format!("{at}/{index}"))?;
                    }
                }
                name if WITH_MAP.contains(&name) => {
                    let Some(map) = argument.as_object() else { return wrong("schemas by name") };
                    for (key, schema) in map {
                        if name == "patternProperties" {
                            self.compile(key, &at)?;
                        }
                        self.check(schema, &format!("{at}/{key}"))?;
                    }
                }
                name if ANNOTATIONS.contains(&name) => {}
                _ => return Err(format!("{at}: this keyword is not supported; use a command to validate with it")),
            }
        }
        Ok(())
    }

    fn compile(&mut self, pattern: &str, place: &str) -> Result<(), String> {
        let regex = Regex::new(pattern).map_err(|error| format!("{place}: pattern {pattern:?}: {error}"))?;
        self.patterns.insert(pattern.to_owned(), regex);
        Ok(())
    }

    /// Returns the part of the document that a reference names.
    fn target(&self, reference: &str) -> Option<&Value> {
        let pointer = reference.strip_prefix('#')?;
        self.document.pointer(&pointer.replace("%25", "%"))
    }

    fn matches(&self, pattern: &str, text: &str) -> bool {
        self.patterns.get(pattern).is_some_and(|regex| regex.is_match(text))
    }

    fn holds(&self, schema: &Value, value: &Value, references: usize) -> bool {
        let keywords = match schema {
            Value::Object(keywords) => keywords,
            other => return other == &Value::Bool(true),
        };
        keywords.iter().all(|(name, argument)| {
            let same = |schema: &Value| self.holds(schema, value, references);
            let all = || argument.as_array().into_iter().flatten();
            match name.as_str() {
                "type" => match argument {
                    Value::Array(names) => names.iter().any(|name| is_type(name, value)),
                    name => is_type(name, value),
                },
                "enum" => all().any(|allowed| equal(allowed, value)),
                "const" => equal(argument, value),
                "allOf" => all().all(same),
                "anyOf" => all().any(same),
                "oneOf" => all().filter(|schema| same(schema)).count() == 1,
                "not" => !same(argument),
                "$ref" => {
                    let target = argument.as_str().and_then(|reference| self.target(reference));
                    references < MOST_REFERENCES
                        && target.is_some_and(|target| self.holds(target, value, references + 1))
                }
                _ => match value {
                    Value::Object(fields) => self.object_holds(keywords, name, argument, fields),
                    Value::Array(items) => self.array_holds(keywords, name, argument, items),
                    Value::Number(number) => number.as_f64().is_none_or(|number| number_holds(name, argument, number)),
                    Value::String(text) => self.text_holds(name, argument, text),
                    Value::Null | Value::Bool(_) => true,
                },
            }
        })
    }

    fn object_holds(
        &self,
        keywords: &Map<String, Value>,
        name: &str,
        argument: &Value,
        fields: &Map<String, Value>,
    ) -> bool {
        let schemas = |keyword: &str| keywords.get(keyword).and_then(Value::as_object).into_iter().flatten();
        match name {
            "required" => {
                let mut names = argument.as_array().into_iter().flatten().filter_map(Value::as_str);
                names.all(|name| fields.contains_key(name))
            }
            "properties" => {
                schemas(name).all(|(key, schema)| fields.get(key).is_none_or(|value| self.holds(schema, value, 0)))
            }
            "patternProperties" => schemas(name).all(|(pattern, schema)| {
                let mut named = fields.iter().filter(|(key, _)| self.matches(pattern, key));
                named.all(|(_, value)| self.holds(schema, value, 0))
            }),
            "additionalProperties" => fields.iter().all(|(key, value)| {
                schemas("properties").any(|(known, _)| known == key)
                    || schemas("patternProperties").any(|(pattern, _)| self.matches(pattern, key))
                    || self.holds(argument, value, 0)
            }),
            "minProperties" => count_of(argument) <= fields.len(),
            "maxProperties" => count_of(argument) >= fields.len(),
            _ => true,
        }
    }

    fn array_holds(&self, keywords: &Map<String, Value>, name: &str, argument: &Value, items: &[Value]) -> bool {
        let first = keywords.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        match name {
            "prefixItems" => first.iter().zip(items).all(|(schema, item)| self.holds(schema, item, 0)),
            "items" => items.iter().skip(first.len()).all(|item| self.holds(argument, item, 0)),
            "minItems" => count_of(argument) <= items.len(),
            "maxItems" => count_of(argument) >= items.len(),
            "uniqueItems" => {
                argument != &Value::Bool(true)
                    || items.iter().enumerate().all(|(i, item)| !items[..i].iter().any(|other| equal(other, item)))
            }
            _ => true,
        }
    }

    fn text_holds(&self, name: &str, argument: &Value, text: &str) -> bool {
        match name {
            "minLength" => count_of(argument) <= text.chars().count(),
            "maxLength" => count_of(argument) >= text.chars().count(),
            "pattern" => argument.as_str().is_some_and(|pattern| self.matches(pattern, text)),
            _ => true,
        }
    }
}

fn number_holds(name: &str, argument: &Value, number: f64) -> bool {
    let Some(limit) = argument.as_f64() else { return true };
    match name {
        "minimum" => number >= limit,
        "maximum" => number <= limit,
        "exclusiveMinimum" => number > limit,
        "exclusiveMaximum" => number < limit,
        "multipleOf" => {
            let times = number / limit;
            (times - times.round()).abs() <= 1e-9 * times.abs().max(1.0)
        }
        _ => true,
    }
}

fn count_of(argument: &Value) -> usize {
    argument.as_u64().map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX))
}

fn is_type(name: &Value, value: &Value) -> bool {
    match (name.as_str().unwrap_or_default(), value) {
        ("null", Value::Null)
        | ("boolean", Value::Bool(_))
        | ("object", Value::Object(_))
        | ("array", Value::Array(_))
        | ("number", Value::Number(_))
        | ("string", Value::String(_)) => true,
        // 1.0 is an integer, too.
        ("integer", Value::Number(number)) => number.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    }
}

/// Returns true for equal values; numbers are equal by value, 1 and 1.0 too.
fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            let same = |(key, value): (&String, &Value)| other.get(key).is_some_and(|other| equal(value, other));
            one.len() == other.len() && one.iter().all(same)
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_validated() {
        let tree = json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": false});
        for (schema, valid, invalid) in [
            (json!(true), vec![json!(null), json!(3)], vec![]),
            (json!(false), vec![], vec![json!(null)]),
            (json!({"type": "integer"}), vec![json!(3), json!(3.0)], vec![json!(3.5), json!("3")]),
            (json!({"type": ["string", "null"]}), vec![json!("a"), json!(null)], vec![json!(false)]),
            (json!({"enum": [1, "a", [1]]}), vec![json!(1.0), json!([1])], vec![json!(2), json!([1, 1])]),
            (json!({"const": {"a": 1}}), vec![json!({"a": 1})], vec![json!({"a": 1, "b": 2})]),
            (json!({"required": ["a"]}), vec![json!({"a": null}), json!(3)], vec![json!({})]),
            (
                json!({"properties": {"a": {"minimum": 1}}, "patternProperties": {"^x": true}, "additionalProperties": false}),
                vec![json!({"a": 1, "x1": 0}), json!({})],
                vec![json!({"a": 0}), json!({"b": 0})],
            ),
            (json!({"minProperties": 1, "maxProperties": 2}), vec![json!({"a": 1})], vec![json!({})]),
            (
                json!({"prefixItems": [{"type": "string"}], "items": {"type": "number"}, "maxItems": 3}),
                vec![json!(["a", 1, 2]), json!([])],
                vec![json!([1]), json!(["a", "b"]), json!(["a", 1, 2, 3])],
            ),
            (json!({"minItems": 1, "uniqueItems": true}), vec![json!([1, 2])], vec![json!([]), json!([1, 1.0])]),
            (json!({"exclusiveMinimum": 0, "maximum": 1}), vec![json!(1)], vec![json!(0), json!(1.5)]),
            (json!({"multipleOf": 0.1}), vec![json!(0.3), json!(7)], vec![json!(0.25)]),
            (json!({"minLength": 2, "pattern": "^[a-zä]+$"}), vec![json!("ää")], vec![json!("ä"), json!("A1")]),
            (json!({"anyOf": [{"type": "null"}, {"const": 1}]}), vec![json!(1)], vec![json!(2)]),
            (json!({"oneOf": [{"minimum": 1}, {"maximum": 5}]}), vec![json!(0), json!(9)], vec![json!(3)]),
            (json!({"allOf": [{"minimum": 1}], "not": {"const": 2}}), vec![json!(1)], vec![json!(2), json!(0)]),
            (
                json!({"$defs": {"id": {"type": "integer"}}, "properties": {"id": {"$ref": "#/$defs/id"}}}),
                vec![json!({"id": 3})],
                vec![json!({"id": "3"})],
            ),
            (tree, vec![json!({"next": {"next": {}}})], vec![json!({"next": {"last": 1}}), json!({"next": 3})]),
            // A cycle of references holds for nothing.
            (json!({"$ref": "#"}), vec![], vec![json!(1)]),
        ] {
            let compiled = Schema::new(&schema).unwrap();
            for value in valid {
                assert!(compiled.is_valid(&value), "{schema} {value}");
            }
            for value in invalid {
                assert!(!compiled.is_valid(&value), "{schema} {value}");
            }
        }
    }

    #[test]
    fn unusable_schemas_are_refused_by_place() {
        for (schema, expected) in [
            (json!(3), "# is neither an object nor true or false"),
            (json!({"type": "text"}), "#/type is \"text\"; expected one of null, boolean"),
            (json!({"properties": {"a": {"minimum": "1"}}}), "#/properties/a/minimum is \"1\"; expected a number"),
            (json!({"anyOf": [true, {"minItems": -1}]}), "#/anyOf/1/minItems is -1; expected a whole number"),
            (json!({"$ref": "https://example.com/a.json"}), "expected a place in this document"),
            (json!({"$ref": "#/$defs/a"}), "expected a place in this document"),
            (json!({"pattern": "("}), "#/pattern: pattern \"(\""),
            (json!({"unevaluatedProperties": false}), "#/unevaluatedProperties: this keyword is not supported"),
            (json!({"required": "a"}), "expected a list of names"),
            (json!({"multipleOf": 0}), "expected a number above 0"),
        ] {
            let error = Schema::new(&schema).unwrap_err();
            assert!(error.contains(expected), "{schema}: {error}");
        }
    }
}

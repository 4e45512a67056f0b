use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{DEEPEST, Writer, float, float_repr};

/// Implements `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii`, `indent`, `separators`
/// and `sort_keys`, without HTML escapes.
pub(super) fn tojson(state: &State<'_, '_>, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(other) => return Err(invalid(&format!("separators has {} elements, not 2", other.len()))),
    };
    let style = Style {
        item,
        key,
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = Writer::new(state);
    style.write(value, 0, &mut out)?;
    Ok(out.finish())
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {message}"))
}

struct Style<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut Writer<'_>) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(invalid(&format!("a value is nested more than {DEEPEST} levels deep")));
        }
        out.visit()?;
        match value.kind() {
            ValueKind::None => out.push("null"),
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push(&number(value)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut list = List::new(self, '[', depth);
                for item in value.try_iter()? {
                    list.separate(out)?;
                    self.write(&item, depth + 1, out)?;
                }
                list.close(']', out)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let mut list = List::new(self, '{', depth);
                for key in keys {
                    list.separate(out)?;
                    match key.as_str() {
                        Some(text) => self.write_string(text, out)?,
                        None => self.write_string(&key_text(&key)?, out)?,
                    }
                    out.push(self.key)?;
                    self.write(&value.get_item(&key)?, depth + 1, out)?;
                }
                list.close('}', out)
            }
            ValueKind::Undefined => Err(invalid("the value is undefined")),
            // An integer of any size, which is an object of this crate.
            ValueKind::Plain if super::values::is_integer(value) => out.push(&value.to_string()),
            other => Err(invalid(&format!("{other} has no JSON"))),
        }
    }

    fn new_line(&self, depth: usize, out: &mut Writer<'_>) -> Result<(), Error> {
        let Some(indent) = self.indent else { return Ok(()) };
        out.push("\n")?;
        (0..indent.saturating_mul(depth)).try_for_each(|_| out.push(" "))
    }

    fn write_string(&self, text: &str, out: &mut Writer<'_>) -> Result<(), Error> {
        // Without `ensure_ascii`, serde_json and json.dumps escape the same characters in the same way.
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return out.push(&quoted);
        }
        let mut ascii = String::with_capacity(quoted.len());
        for unit in quoted.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte @ b' '..=b'~') => ascii.push(char::from(byte)),
                _ => ascii.push_str(&format!("\\u{unit:04x}")),
            }
        }
        out.push(&ascii)
    }
}

/// The brackets, separators and lines around the elements of a list or dict.
struct List<'a> {
    style: &'a Style<'a>,
    open: char,
    depth: usize,
    count: usize,
}

impl<'a> List<'a> {
    fn new(style: &'a Style<'a>, open: char, depth: usize) -> Self {
        List { style, open, depth, count: 0 }
    }

    /// Writes the separator before the next element.
    fn separate(&mut self, out: &mut Writer<'_>) -> Result<(), Error> {
        match self.count {
            0 => out.push(self.open.encode_utf8(&mut [0; 4]))?,
            _ => out.push(self.style.item)?,
        }
        self.count += 1;
        self.style.new_line(self.depth + 1, out)
    }

    fn close(self, close: char, out: &mut Writer<'_>) -> Result<(), Error> {
        match self.count {
            0 => out.push(self.open.encode_utf8(&mut [0; 4]))?,
            _ => self.style.new_line(self.depth, out)?,
        }
        out.push(close.encode_utf8(&mut [0; 4]))
    }
}

fn number(value: &Value) -> String {
    match float(value) {
        None => value.to_string(),
        Some(number) if number.is_nan() => "NaN".to_owned(),
        Some(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        Some(number) => float_repr(number),
    }
}

/// Returns a key that is not a string as `json.dumps` writes it.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        other => Err(invalid(&format!("a key is of the type {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts are from Python 3.11's `json.dumps` on the same value.
    #[test]
    fn text_is_that_of_json_dumps() {
        let value = Value::from(minijinja::value::Serde(serde_json::json!({
            "name": "<ä> & 'b' \"c\"\n\u{1}\u{7f}🦀",
            "list": [1, 2.0, 1e-5, 1.5e16, 0.0001, 123456789.125, -0.0, null, true],
            "empty": [{}, []],
        })));
        let render = |filter: &str| {
            let mut environment = minijinja::Environment::new();
            environment.add_filter("tojson", tojson);
            let context = Value::from_pairs([("value", value.clone())]);
            environment.render_str(&format!("{{{{ value|tojson{filter} }}}}"), context).expect("valid")
        };
        assert_eq!(render(""), DEFAULT);
        assert_eq!(render("(indent=2)"), INDENTED);
        assert_eq!(render("(separators=(',', ':'), ensure_ascii=True, sort_keys=True)"), COMPACT_ASCII_SORTED);
    }
    const DEFAULT: &str = "{\"name\": \"<ä> & 'b' \\\"c\\\"\\n\\u0001\u{7f}🦀\", \
        \"list\": [1, 2.0, 1e-05, 1.5e+16, 0.0001, 123456789.125, -0.0, null, true], \"empty\": [{}, []]}";
    const INDENTED: &str = "{\n  \"name\": \"<ä> & 'b' \\\"c\\\"\\n\\u0001\u{7f}🦀\",\n  \"list\": [\n    1,\n    2.0,\n    \
        1e-05,\n    1.5e+16,\n    0.0001,\n    123456789.125,\n    -0.0,\n    null,\n    true\n  ],\n  \"empty\": [\n    \
        {},\n    []\n  ]\n}";
    const COMPACT_ASCII_SORTED: &str = "{\"empty\":[{},[]],\
        \"list\":[1,2.0,1e-05,1.5e+16,0.0001,123456789.125,-0.0,null,true],\
        \"name\":\"<\\u00e4> & 'b' \\\"c\\\"\\n\\u0001\\u007f\\ud83e\\udd80\"}";

    #[test]
    fn undefined_and_unknown_options_are_errors() {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        assert!(environment.render_str("{{ missing|tojson }}", ()).is_err());
        assert!(environment.render_str("{{ 1|tojson(ident=2) }}", ()).is_err());
    }
}

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde_json::{Number, Value as Json};

/// `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii`, `indent`, `separators` and `sort_keys`,
/// not escaping what HTML would.
pub(super) fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined".to_owned()));
    }
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(other) => return Err(invalid(format!("tojson: separators has {} elements, not 2", other.len()))),
    };
    let style = Style {
        item,
        key,
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| invalid(format!("tojson: {error}")))?;
    let mut out = String::new();
    style.write(&json, 0, &mut out);
    Ok(out)
}

struct Style<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style<'_> {
    fn write(&self, value: &Json, depth: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Json::Number(number) => out.push_str(&python_number(number)),
            Json::String(text) => self.write_string(text, out),
            Json::Array(values) => {
                self.write_list('[', ']', values, depth, out, |value, out| self.write(value, depth + 1, out));
            }
            Json::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|(name, _)| *name);
                }
                self.write_list('{', '}', &fields, depth, out, |(name, value), out| {
                    self.write_string(name, out);
                    out.push_str(self.key);
                    self.write(value, depth + 1, out);
                });
            }
        }
    }

    fn write_list<T>(
        &self,
        open: char,
        close: char,
        items: &[T],
        depth: usize,
        out: &mut String,
        write: impl Fn(&T, &mut String),
    ) {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(self.item);
            }
            self.new_line(depth + 1, out);
            write(item, out);
        }
        if !items.is_empty() {
            self.new_line(depth, out);
        }
        out.push(close);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        // Without `ensure_ascii`, serde_json and json.dumps escape the same characters in the same way.
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for unit in quoted.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte @ b' '..=b'~') => out.push(char::from(byte)),
                _ => out.push_str(&format!("\\u{unit:04x}")),
            }
        }
    }
}

/// A number as Python's `repr` writes it: the shortest digits, with an exponent below 10⁻⁴ and from 10¹⁶ on.
fn python_number(number: &Number) -> String {
    let Some(value) = number.as_f64().filter(|_| number.is_f64()) else {
        return number.to_string();
    };
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts are those of Python 3.11's `json.dumps` on the same value.
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

//! Python's text of values: `str`, `repr` and the digits of floats.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Output, State, Value};

/// The maximum nesting of lists and dicts; JSON of rows has at most 128 levels.
pub(super) const DEEPEST: usize = 200;

/// Writes a value to the output of a template, `{{ value }}`.
pub(super) fn write_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&str(state, value)?),
    };
    written.map_err(|_| Error::new(ErrorKind::WriteFailure, "the output is too long"))
}

/// Returns `str(value)`, as in `|string` and `~`. Undefined is empty.
pub(super) fn text(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => str(state, value).map(Value::from),
    }
}

fn str(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut out = Writer::new(state);
    match value.as_str() {
        Some(text) => out.push(text)?,
        None if value.is_undefined() => {}
        None => write_repr(value, 0, &mut out)?,
    }
    Ok(out.text)
}

/// A text that consumes the fuel of a rendering while it grows, so that a small value that contains itself many times
/// cannot exceed the memory.
pub(super) struct Writer<'a> {
    state: &'a State<'a, 'a>,
    text: String,
    paid: usize,
}

/// The number of bytes per unit of fuel, as in the engine.
const BYTES: usize = 64;

impl<'a> Writer<'a> {
    pub(super) fn new(state: &'a State<'_, '_>) -> Self {
        Writer { state, text: String::new(), paid: 0 }
    }

    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        let owed = (self.text.len() + text.len() - self.paid) / BYTES;
        if owed > 0 {
            self.state.consume_fuel(owed as u64)?;
            self.paid += owed * BYTES;
        }
        self.text.push_str(text);
        Ok(())
    }

    /// Consumes fuel for visiting one element.
    pub(super) fn visit(&self) -> Result<(), Error> {
        self.state.consume_fuel(1)
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}

fn write_repr(value: &Value, depth: usize, out: &mut Writer<'_>) -> Result<(), Error> {
    if depth > DEEPEST {
        let message = format!("a value is nested more than {DEEPEST} levels deep");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    out.visit()?;
    match value.kind() {
        ValueKind::Number => match float(value) {
            Some(number) => out.push(&float_repr(number)),
            None => out.push(&value.to_string()),
        },
        ValueKind::String => out.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { "(" } else { "[" })?;
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    out.push(", ")?;
                }
                count += 1;
                write_repr(&item, depth + 1, out)?;
            }
            out.push(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            })
        }
        ValueKind::Map => {
            out.push("{")?;
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push(", ")?;
                }
                write_repr(&key, depth + 1, out)?;
                out.push(": ")?;
                write_repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push("}")
        }
        ValueKind::Undefined => out.push("Undefined"),
        // An error inside of a value is the error.
        ValueKind::Invalid => value.try_iter().map(|_| ()),
        _ => out.push(&value.to_string()),
    }
}

/// Returns the number, if it is a float.
pub(super) fn float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// Formats a float as Python's `repr` does: the shortest digits that round-trip, with an exponent below 10⁻⁴ and from
/// 10¹⁶ on.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

/// Formats a string as Python's `repr` does.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
    out
}

/// Returns true if Python's `repr` does not escape the character. Rust escapes the same classes of characters, except
/// for combining ones after another character.
fn is_printable(c: char) -> bool {
    let mut buffer = [b'a'; 5];
    let len = 1 + c.encode_utf8(&mut buffer[1..]).len();
    let pair = std::str::from_utf8(&buffer[..len]).expect("a letter and a character");
    pair.escape_debug().count() == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_quoted_as_in_python() {
        for (text, expected) in [
            ("it's", "\"it's\""),
            ("'\"", "'\\'\"'"),
            ("a\\b\n\r\t", "'a\\\\b\\n\\r\\t'"),
            ("\u{1}\u{7f}\u{a0}\u{ad}", "'\\x01\\x7f\\xa0\\xad'"),
            ("\u{200b}\u{feff}\u{e000}\u{f0000}", "'\\u200b\\ufeff\\ue000\\U000f0000'"),
            ("äé日本🦀e\u{301}", "'äé日本🦀e\u{301}'"),
        ] {
            assert_eq!(quoted(text), expected);
        }
    }
}

//! Integers of JSON beyond 64 bits, which `serde_json::Value` would round to floats.
//!
//! Python keeps every digit of an integer. [`parse`] represents integers beyond 64 bits as objects with one private
//! key; a template receives the integer.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use serde_json::{Map, Value};

/// The key of such an object: private-use characters.
const KEY: &str = "\u{f5a3}\u{f1ca}";

/// The number of digits that always fit into 64 bits.
const SAFE_DIGITS: usize = 18;

/// Parses JSON, keeping integers of any size. `-0` is the integer 0, as in Python.
pub(crate) fn parse(text: &str) -> serde_json::Result<Value> {
    match guarded(text) {
        Cow::Borrowed(text) => serde_json::from_str(text),
        // Errors name columns of the text as it is.
        Cow::Owned(guarded) => serde_json::from_str(&guarded).or_else(|_| serde_json::from_str(text)),
    }
}

/// Returns the digits, with a sign if negative, of an integer beyond 64 bits.
pub(crate) fn integer(value: &Value) -> Option<&str> {
    value.as_object().and_then(integer_of)
}

/// Returns the integer like [`integer`], from the fields of an object.
pub(crate) fn integer_of(fields: &Map<String, Value>) -> Option<&str> {
    match fields.len() {
        1 => fields.get(KEY)?.as_str(),
        _ => None,
    }
}

/// Returns a value as JSON for an error message.
pub(crate) fn shown(value: &Value) -> String {
    integer(value).map_or_else(|| value.to_string(), str::to_owned)
}

/// Replaces every integer that serde_json would make a float by an object.
fn guarded(text: &str) -> Cow<'_, str> {
    if !may_have_large_integers(text.as_bytes()) {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len() + 64);
    let (mut at, mut copied) = (0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = string_end(bytes, at),
            b'-' | b'0'..=b'9' => {
                let end = at + bytes[at..].iter().take_while(|byte| is_part_of_number(byte)).count();
                if let Some(replacement) = replacement(&text[at..end]) {
                    out.push_str(&text[copied..at]);
                    out.push_str(&replacement);
                    copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[copied..]);
    Cow::Owned(out)
}

/// A reader that replaces large integers by objects as in [`parse`], for documents that are parsed while they are read.
pub(crate) struct Guarded<R> {
    reader: R,
    place: Place,
    /// The current number.
    number: String,
    /// The bytes to read next, and the number of those already read.
    ready: Vec<u8>,
    given: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    InString,
    AfterBackslash,
}

impl<R: BufRead> Guarded<R> {
    pub(crate) fn new(reader: R) -> Self {
        Guarded { reader, place: Place::Outside, number: String::new(), ready: Vec::new(), given: 0 }
    }

    fn take(&mut self, byte: u8) {
        if self.place == Place::Outside {
            let begins = matches!(byte, b'-' | b'0'..=b'9');
            if begins || (!self.number.is_empty() && is_part_of_number(&byte)) {
                return self.number.push(char::from(byte));
            }
            self.end_number();
        }
        self.place = match (self.place, byte) {
            (Place::Outside, b'"') | (Place::AfterBackslash, _) => Place::InString,
            (Place::InString, b'"') => Place::Outside,
            (Place::InString, b'\\') => Place::AfterBackslash,
            (place, _) => place,
        };
        self.ready.push(byte);
    }

    fn end_number(&mut self) {
        match replacement(&self.number) {
            Some(replacement) => self.ready.extend_from_slice(replacement.as_bytes()),
            None => self.ready.extend_from_slice(self.number.as_bytes()),
        }
        self.number.clear();
    }
}

impl<R: BufRead> Read for Guarded<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.given == self.ready.len() {
            self.ready.clear();
            self.given = 0;
            let read = self.reader.fill_buf()?.to_vec();
            self.reader.consume(read.len());
            read.iter().for_each(|&byte| self.take(byte));
            if read.is_empty() {
                self.end_number();
                if self.ready.is_empty() {
                    return Ok(0);
                }
            }
        }
        let count = bytes.len().min(self.ready.len() - self.given);
        bytes[..count].copy_from_slice(&self.ready[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

fn is_part_of_number(byte: &u8) -> bool {
    matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')
}

/// Returns false for text that certainly has no large integers, which is nearly all rows.
fn may_have_large_integers(bytes: &[u8]) -> bool {
    let mut digits = 0;
    let mut negative = false;
    for &byte in bytes {
        if byte.is_ascii_digit() {
            digits += 1;
            if digits > SAFE_DIGITS || (negative && digits == 1 && byte == b'0') {
                return true;
            }
        } else {
            (digits, negative) = (0, byte == b'-');
        }
    }
    false
}

/// Returns the end of the string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Returns the replacement of a number, if it needs one.
fn replacement(number: &str) -> Option<String> {
    let digits = number.strip_prefix('-').unwrap_or(number);
    let is_integer = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    // JSON has no leading zeros; the parser refuses them.
    if !is_integer || (digits.starts_with('0') && digits.len() > 1) {
        return None;
    }
    if number == "-0" {
        return Some("0".to_owned());
    }
    let fits = number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok();
    (!fits).then(|| format!("{{\"{KEY}\":\"{number}\"}}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn integers_keep_their_digits() {
        let parsed =
            parse(r#"{"a": [25000000000000000000, -9223372036854775809], "b": 18446744073709551615}"#).expect("valid");
        assert_eq!(integer(&parsed["a"][0]), Some("25000000000000000000"));
        assert_eq!(integer(&parsed["a"][1]), Some("-9223372036854775809"));
        assert_eq!(parsed["b"], json!(u64::MAX));
        assert_eq!(shown(&parsed["a"][0]), "25000000000000000000");
        assert_eq!(shown(&json!([1, "a"])), "[1,\"a\"]");
    }

    #[test]
    fn nothing_else_changes() {
        for text in [
            r#"{"a": "25000000000000000000 \" 25000000000000000000", "b\\": 1.5e300}"#,
            r#"[1234567890123456789.5, 12345678901234567890e2, -1, 0, -9223372036854775808]"#,
            r#"["\\", 1234567890123456789012, "\\\""]"#,
        ] {
            let expected: Value = serde_json::from_str(text).expect("valid");
            let mut parsed = parse(text).expect("valid");
            if let Some(large) = parsed.get_mut(1).filter(|value| integer(value).is_some()) {
                *large = json!(integer(large).expect("valid").parse::<f64>().expect("valid"));
            }
            assert_eq!(parsed, expected);
        }
        assert_eq!(parse("[-0, -0.0, 0]").expect("valid").to_string(), "[0,-0.0,0]");
    }

    /// The same as [`parse`], for any division of the document into reads.
    #[test]
    fn documents_keep_their_digits() {
        let text = r#"{"a": "25000000000000000000 \" 25000000000000000000\\", "b": [25000000000000000000, -0, true, 1e5],
            "c": -9223372036854775809, "d": [0025, 18446744073709551615, 1234567890123456789012.5]}"#;
        let text = text.replace("0025", "25");
        for size in [1, 2, 7, 1000] {
            let reader = std::io::BufReader::with_capacity(size, text.as_bytes());
            let value: Value = serde_json::from_reader(Guarded::new(reader)).expect("valid");
            assert_eq!(value, parse(&text).expect("valid"));
            assert_eq!(integer(&value["b"][0]), Some("25000000000000000000"));
        }
        let number: Value =
            serde_json::from_reader(Guarded::new(&b"340282366920938463463374607431768211456"[..])).expect("valid");
        assert_eq!(integer(&number), Some("340282366920938463463374607431768211456"));
    }

    #[test]
    fn errors_name_columns_of_the_text() {
        for text in ["[25000000000000000000, x]", "[0025000000000000000000]", "[25000000000000000000", "[\"\\"] {
            let expected = serde_json::from_str::<Value>(text).expect_err("invalid");
            assert_eq!(parse(text).expect_err("invalid").to_string(), expected.to_string());
        }
    }
}

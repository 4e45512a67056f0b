//! JSON lines: one object per line.

use std::io::BufRead;
use std::path::Path;

use serde_json::Value;

use super::{RawRow, Sink};
use crate::error::{Error, Result};
use crate::numbers;

/// Reads the lines; blank lines are skipped but counted.
pub(super) fn read(path: &Path, mut lines: impl BufRead, sink: Sink<'_>) -> Result<()> {
    for number in 1.. {
        let mut line = Vec::new();
        let read = lines.read_until(b'\n', &mut line);
        if read.map_err(|source| Error::Read { path: path.to_owned(), source })? == 0 {
            return Ok(());
        }
        // Without its line end, JSON that stops short is reported at its last column rather than at column 0 of a next
        // line.
        line.truncate(line.trim_ascii_end().len());
        if !line.is_empty() {
            sink(RawRow::line(number, line))?;
        }
    }
    Ok(())
}

pub(super) fn parse(line: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(line).map_err(|error| {
        format!("not UTF-8 at byte {} of the line; save the file as UTF-8", error.valid_up_to() + 1)
    })?;
    numbers::parse(text).map_err(|error| {
        let rest = text.as_bytes().get(error.column().saturating_sub(1)..).unwrap_or_default();
        let hint = hint(rest).map(|hint| format!("; {hint}")).unwrap_or_default();
        format!("invalid JSON at column {}: {}{hint}", error.column(), without_place(&error))
    })
}

/// Returns the message without serde_json's own position.
pub(super) fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

/// Returns a hint about text that other programs accept as JSON; `rest` begins where the text is no longer JSON.
pub(super) fn hint(rest: &[u8]) -> Option<&'static str> {
    match rest.first()? {
        b'N' if rest.starts_with(b"None") => Some(PYTHON),
        b'N' if rest.starts_with(b"NaN") => Some("NaN is not JSON; write null, or omit the key"),
        b'N' => Some("NaN and None are not JSON; write null, or omit the key"),
        b'I' => Some("Infinity is not JSON; write null, or omit the key"),
        b'T' | b'F' => Some(PYTHON),
        b'\'' => Some("JSON puts text in double quotes; write the rows with json.dumps, not with str"),
        _ => None,
    }
}

const PYTHON: &str = "None, True and False are Python; write the rows with json.dumps, as null, true and false";

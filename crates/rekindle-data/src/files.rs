//! The formats of row files: JSON lines, JSON, Parquet, CSV, Arrow.

mod arrow;
mod csv;
mod find;
mod foreign;
mod json;
mod jsonl;
mod open;
mod parquet;
mod saved;
mod split;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::row::{RowNumber, object};

pub use find::is_file_name;
use open::{Opened, open};

/// A row before encoding.
#[derive(Debug)]
pub(crate) struct RawRow {
    pub(crate) number: RowNumber,
    text: RawText,
    /// The approximate size in bytes.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
enum RawText {
    /// A line, not yet parsed.
    Line(Vec<u8>),
    Parsed(Value),
}

/// A receiver of the rows of a file, in order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(RawRow) -> Result<()>;

/// Finds the files of `paths`, and returns notices about omitted files. In directories, finds the files of `split`,
/// else of the first existing one of `defaults`.
pub(crate) fn find(paths: &[PathBuf], split: Option<&str>, defaults: &[&str]) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let find::Found { files, notices } = find::find(paths, &find::Choice::new(split, defaults))?;
    Ok((files, notices))
}

/// Reads all rows of a file.
///
/// # Errors
/// [`Error::Read`] if it cannot be read; [`Error::Row`] for a row of a JSON list that does not parse;
/// [`Error::Dataset`] for a file that is damaged, does not match its name, or has no rows; and the errors of `sink`.
pub(crate) fn read(path: &Path, columns: &Columns, sink: Sink<'_>) -> Result<()> {
    let mut rows = 0_usize;
    let mut counted = |row| {
        rows += 1;
        sink(row)
    };
    match open(path)? {
        Opened::Lines(reader) => jsonl::read(path, reader, &mut counted)?,
        Opened::Json(reader) => json::read(path, reader, &mut counted)?,
        Opened::Parquet(file) => parquet::read(path, file, columns, &mut counted)?,
        Opened::Delimited { reader, delimiter } => csv::read(path, reader, delimiter, columns, &mut counted)?,
        Opened::Arrow { reader, is_file } => arrow::read(path, reader, is_file, columns, &mut counted)?,
    }
    if rows == 0 {
        return Err(Error::dataset(path, "the dataset is empty; expected rows, such as one JSON object per line"));
    }
    Ok(())
}

impl RawRow {
    /// Returns a row of a JSON list or of a table.
    fn parsed(number: usize, value: Value) -> Self {
        let bytes = weight(&value);
        RawRow { number: RowNumber::Row(number), text: RawText::Parsed(value), bytes }
    }

    fn line(number: usize, line: Vec<u8>) -> Self {
        RawRow { number: RowNumber::Line(number), bytes: line.len(), text: RawText::Line(line) }
    }

    /// Returns the fields.
    pub(crate) fn fields(self) -> Result<Map<String, Value>, String> {
        match self.text {
            RawText::Parsed(value) => object(value),
            RawText::Line(line) => jsonl::parse(&line).and_then(object),
        }
    }
}

/// Estimates the bytes of a value in memory.
fn weight(value: &Value) -> usize {
    let inside = match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(weight).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + weight(value)).sum(),
        _ => 0,
    };
    size_of::<Value>() + inside
}

#[cfg(test)]
mod tests;

//! The files that rows stand in: JSON lines, JSON, Parquet, CSV, Arrow.

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

/// A row as it stands in its file.
#[derive(Debug)]
pub(crate) struct RawRow {
    pub(crate) number: RowNumber,
    text: RawText,
    /// About how many bytes it takes.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
enum RawText {
    /// A line, still to be parsed.
    Line(Vec<u8>),
    Parsed(Value),
}

/// Takes the rows of a file, in order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(RawRow) -> Result<()>;

/// Finds the files of `paths`, with sentences about what was left out. Of directories, the files come of the split named
/// `split`, else of the first of `defaults` that is there.
pub(crate) fn find(paths: &[PathBuf], split: Option<&str>, defaults: &[&str]) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let find::Found { files, notices } = find::find(paths, &find::Choice::new(split, defaults))?;
    Ok((files, notices))
}

/// Reads all rows of a file.
///
/// # Errors
/// [`Error::Read`] when it cannot be read; [`Error::Row`] for a row of a JSON list that does not parse; [`Error::Dataset`]
/// for a file that is damaged, not what its name says, or holds no row; and what `sink` fails with.
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
    /// A row of a JSON list or of a table.
    fn parsed(number: usize, value: Value) -> Self {
        let bytes = weight(&value);
        RawRow { number: RowNumber::Row(number), text: RawText::Parsed(value), bytes }
    }

    fn line(number: usize, line: Vec<u8>) -> Self {
        RawRow { number: RowNumber::Line(number), bytes: line.len(), text: RawText::Line(line) }
    }

    /// Its fields.
    pub(crate) fn fields(self) -> Result<Map<String, Value>, String> {
        match self.text {
            RawText::Parsed(value) => object(value),
            RawText::Line(line) => jsonl::parse(&line).and_then(object),
        }
    }
}

/// About how many bytes a value takes in memory.
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

//! Rows as they are, without encoding.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::data_files::DataFiles;
use crate::error::{Error, Result};
use crate::files;
use crate::row::RowNumber;

/// A row of a file: its fields under the keys that [`DataFiles::columns`] gives them.
#[derive(Debug, Clone, PartialEq)]
pub struct RawRow {
    /// The fields, in the order of the file.
    pub fields: Map<String, Value>,
    /// The line or row in its file.
    pub row: RowNumber,
    /// The file.
    pub path: PathBuf,
}

impl DataFiles {
    /// Reads rows without encoding them, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Dataset`] for a damaged or empty file, and [`Error::Row`] for a row that is no object or
    /// lacks a mapped column.
    pub fn raw_rows(&self, limit: Option<usize>) -> Result<Vec<RawRow>> {
        let limit = limit.unwrap_or(usize::MAX);
        let columns = self.mapped_columns().keeping_all();
        let mut rows = Vec::new();
        for path in self.files() {
            if rows.len() >= limit {
                break;
            }
            // Reading of a file ends with an error, which is not reported, once there are enough rows.
            let mut enough = false;
            let read = files::read(path, &columns, &mut |raw| {
                let row = raw.number;
                let wrong = |message| Error::row(path, row, message);
                let mut fields = raw.fields().map_err(wrong)?;
                columns.apply(&mut fields).map_err(wrong)?;
                rows.push(RawRow { fields, row, path: path.clone() });
                enough = rows.len() >= limit;
                if enough { Err(wrong(String::new())) } else { Ok(()) }
            });
            if !enough {
                read?;
            }
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_as_they_are() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("rows.jsonl");
        let text = "{\"question\": \"q\", \"answer\": 4}\n{\"question\": \"r\", \"answer\": null}\n";
        std::fs::write(&path, text).expect("written");
        let files = DataFiles::find([&path]).expect("found");
        let files = files.columns([("prompt".to_owned(), "question".to_owned())].into()).expect("a key of rows");
        let rows = files.raw_rows(None).expect("read");
        assert_eq!(rows.len(), 2);
        assert_eq!(Value::Object(rows[0].fields.clone()), serde_json::json!({"prompt": "q", "answer": 4}));
        assert_eq!((rows[1].row, &rows[1].path), (RowNumber::Line(2), &path));
        assert_eq!(files.raw_rows(Some(1)).expect("read").len(), 1);
        std::fs::write(&path, "{\"question\": \"q\"}\n[3]\n").expect("written");
        assert_eq!(files.raw_rows(Some(1)).expect("the first row").len(), 1);
        let error = files.raw_rows(None).expect_err("a list").to_string();
        assert!(error.ends_with("rows.jsonl:2: expected a JSON object, found a list"), "{error}");
    }
}

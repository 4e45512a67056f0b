use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::row::{Row, RowContent};

/// Reads the rows of a JSONL file one by one; blank lines are skipped.
///
/// # Errors
/// [`Error::Read`] when the file cannot be read; [`Error::Row`] with the line for text that is not UTF-8, not JSON (with
/// the column) or of no known shape.
#[derive(Debug)]
pub struct RowReader {
    path: PathBuf,
    lines: BufReader<File>,
    line: usize,
    buffer: Vec<u8>,
}

/// All rows of a JSONL file.
///
/// # Errors
/// As [`RowReader`], and [`Error::Dataset`] when there is no row.
pub fn read_jsonl(path: &Path) -> Result<Vec<Row>> {
    let rows = RowReader::open(path)?.collect::<Result<Vec<_>>>()?;
    if rows.is_empty() { Err(no_rows(path)) } else { Ok(rows) }
}

impl RowReader {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self> {
        let open = |path| {
            // Opening a directory succeeds on Unix; its metadata tells before the first read fails obscurely.
            if std::fs::metadata(path)?.is_dir() {
                return Err(std::io::Error::other("it is a directory; expected a JSONL file"));
            }
            File::open(path)
        };
        let file = open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Ok(RowReader { path: path.to_owned(), lines: BufReader::new(file), line: 0, buffer: Vec::new() })
    }

    /// The next line that is not blank, or `None` at the end.
    fn read(&mut self) -> Result<Option<Row>> {
        loop {
            self.buffer.clear();
            let read = self.lines.read_until(b'\n', &mut self.buffer);
            if read.map_err(|source| Error::Read { path: self.path.clone(), source })? == 0 {
                return Ok(None);
            }
            self.line += 1;
            if let Some(content) =
                parse(&self.buffer, self.line).map_err(|message| Error::row(&self.path, self.line, message))?
            {
                return Ok(Some(Row { line: self.line, content }));
            }
        }
    }
}

impl Iterator for RowReader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The error for a file without rows.
pub(crate) fn no_rows(path: &Path) -> Error {
    Error::dataset(path, "the dataset is empty; expected one JSON object per line")
}

fn parse(bytes: &[u8], line: usize) -> Result<Option<RowContent>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        format!("not UTF-8 at byte {} of the line; save the file as UTF-8", error.valid_up_to() + 1)
    })?;
    // Some editors begin a file with a byte-order mark.
    let text = if line == 1 { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
    // Without its line end, JSON that stops short is reported at its last column rather than at column 0 of a next line.
    let text = text.trim_end();
    if text.is_empty() {
        return Ok(None);
    }
    let value = serde_json::from_str(text).map_err(|error| {
        let hint = if line == 1 && text.trim_start().starts_with('[') {
            "; the file looks like one JSON array, expected one object per line"
        } else {
            ""
        };
        format!("invalid JSON at column {}: {}{hint}", error.column(), without_place(&error))
    })?;
    RowContent::from_json(value).map(Some)
}

/// The message without serde_json's own line, which is always 1 here.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::test_support::write_rows;

    fn error(bytes: impl AsRef<[u8]>) -> String {
        let (_dir, path) = write_rows(bytes);
        let error = read_jsonl(&path).expect_err("a broken file");
        assert_eq!(error.kind(), ErrorKind::Data);
        error.to_string().replace(&path.display().to_string(), "rows.jsonl")
    }

    #[test]
    fn blank_lines_are_skipped_but_counted() {
        let (_dir, path) = write_rows("\u{feff}{\"text\": \"a\"}\r\n\n  \n{\"text\": \"b\"}");
        let lines: Vec<_> = read_jsonl(&path).expect("valid").iter().map(|row| row.line).collect();
        assert_eq!(lines, [1, 4]);
    }

    #[test]
    fn errors_name_file_line_and_column() {
        assert_eq!(
            error("{\"text\": \"a\"}\n{\"text\": \"b\""),
            "rows.jsonl:2: invalid JSON at column 12: EOF while parsing an object"
        );
        assert_eq!(
            error("{\"text\": \"a\"}\n\n{\"text\" \"b\"}\n"),
            "rows.jsonl:3: invalid JSON at column 9: expected `:`"
        );
        assert_eq!(
            error("[\n{\"text\": \"a\"}\n]"),
            "rows.jsonl:1: invalid JSON at column 1: EOF while parsing a list; the file looks like one JSON array, \
             expected one object per line"
        );
        assert_eq!(
            error(b"{\"text\": \"\xff\"}"),
            "rows.jsonl:1: not UTF-8 at byte 11 of the line; save the file as UTF-8"
        );
        assert_eq!(error("{\"text\": \"a\"}\n{\"text\": 1}\n"), "rows.jsonl:2: \"text\" is a number, not a string");
    }

    #[test]
    fn a_file_without_rows_is_an_error() {
        assert_eq!(error("\n \n"), "rows.jsonl: the dataset is empty; expected one JSON object per line");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_jsonl(Path::new("no/such.jsonl")).expect_err("missing");
        assert!(error.to_string().starts_with("cannot read no/such.jsonl: "), "{error}");
        let dir = tempfile::tempdir().expect("a directory");
        assert!(read_jsonl(dir.path()).expect_err("a directory").to_string().ends_with("expected a JSONL file"));
    }

    #[test]
    fn a_damaged_file_is_an_error_and_no_panic() {
        let whole = "{\"prompt\": [{\"role\": \"user\", \"content\": \"ä\"}], \"completion\": [{\"role\": \"assistant\", \
                     \"content\": \"b\"}]}\n{\"input_ids\": [1, 2], \"labels\": [-100, 2]}";
        let (_dir, path) = write_rows(whole);
        assert_eq!(read_jsonl(&path).expect("valid").len(), 2);
        let first = whole.find('\n').expect("two lines");
        for len in 0..whole.len() {
            std::fs::write(&path, &whole.as_bytes()[..len]).expect("written");
            // Cut between the lines, what is left is a file of one row.
            assert_eq!(read_jsonl(&path).is_ok(), len == first || len == first + 1, "{len}");
        }
        for at in 0..whole.len() {
            for byte in [b'\n', b'"', b'9', b'\\', 0, 0xff] {
                let mut damaged = whole.as_bytes().to_vec();
                damaged[at] = byte;
                std::fs::write(&path, &damaged).expect("written");
                if let Err(error) = read_jsonl(&path) {
                    assert_eq!(error.kind(), ErrorKind::Data);
                }
            }
        }
    }
}

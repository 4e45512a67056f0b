use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::ErrorKind;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/parquet").join(name)
}

/// Every row of a file, by its number.
fn rows_of(path: &Path, columns: &Columns) -> Result<Vec<(RowNumber, Value)>> {
    let mut rows = Vec::new();
    read(path, columns, &mut |row| {
        let number = row.number;
        let fields = row.fields().map_err(|message| Error::row(path, number, message))?;
        rows.push((number, fields.into()));
        Ok(())
    })?;
    Ok(rows)
}

/// The rows of a file that is called `name`.
fn rows(name: &str, bytes: impl AsRef<[u8]>) -> Result<Vec<(RowNumber, Value)>, String> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).expect("written");
    rows_of(&path, &Columns::default()).map_err(|error| {
        assert_eq!(error.kind(), ErrorKind::Data, "{error}");
        error.to_string().replace(&path.display().to_string(), name)
    })
}

fn error(name: &str, bytes: impl AsRef<[u8]>) -> String {
    rows(name, bytes).expect_err("a broken file")
}

fn texts(number: fn(usize) -> RowNumber, rows: &[(usize, &str)]) -> Vec<(RowNumber, Value)> {
    rows.iter().map(|&(at, text)| (number(at), json!({"text": text}))).collect()
}

const LINES: &str = "\u{feff}{\"text\": \"a\"}\r\n\n  \n{\"text\": \"ä\"}";

#[test]
fn blank_lines_are_skipped_but_counted() {
    let expected = texts(RowNumber::Line, &[(1, "a"), (4, "ä")]);
    for name in ["rows.jsonl", "rows.json", "rows.txt"] {
        assert_eq!(rows(name, LINES).expect("valid"), expected, "{name}");
    }
}

#[test]
fn a_list_is_a_document_whatever_it_is_called() {
    let expected = texts(RowNumber::Row, &[(1, "a"), (2, "b")]);
    for text in [
        "[{\"text\": \"a\"}, {\"text\": \"b\"}]",
        "\u{feff} \n[\n{\"text\": \"a\"},\n{\"text\": \"b\"}\n]\n",
        "{\"version\": {\"data\": 1}, \"data\": [{\"text\": \"a\"}, {\"text\": \"b\"}], \"rest\": null}",
        "\n{\n\"data\": [\n{\"text\": \"a\"}, {\"text\": \"b\"}]}",
    ] {
        assert_eq!(rows("rows.json", text).expect("valid"), expected, "{text}");
    }
    assert_eq!(rows("rows.jsonl", "[{\"text\": \"a\"}, {\"text\": \"b\"}]").expect("valid"), expected);
    // A row may have a key of that name.
    let row = "{\"data\": \"x\", \"text\": \"a\"}";
    assert_eq!(rows("rows.json", row).expect("valid"), [(RowNumber::Line(1), json!({"data": "x", "text": "a"}))]);
}

#[test]
fn compressed_files_are_read_as_they_are() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(LINES.as_bytes()).expect("compressed");
    let gzip = gzip.finish().expect("compressed");
    let zstd = zstd::encode_all(LINES.as_bytes(), 1).expect("compressed");
    for (name, bytes) in [("rows.jsonl.gz", &gzip), ("rows.json.zst", &zstd), ("rows.jsonl", &gzip)] {
        assert_eq!(rows(name, bytes).expect("valid"), texts(RowNumber::Line, &[(1, "a"), (4, "ä")]), "{name}");
        let error = error(name, &bytes[..bytes.len() - 9]);
        assert!(error.starts_with(&format!("cannot read {name}: ")), "{error}");
    }
}

#[test]
fn errors_name_file_line_and_column() {
    let line = |text: &str| error("rows.jsonl", text);
    assert_eq!(
        line("{\"text\": \"a\"}\n{\"text\": \"b\""),
        "rows.jsonl:2: invalid JSON at column 12: EOF while parsing an object"
    );
    assert_eq!(line("{\"text\": \"a\"}\n\n{\"text\" \"b\"}\n"), "rows.jsonl:3: invalid JSON at column 9: expected `:`");
    assert_eq!(
        error("rows.jsonl", b"{\"text\": \"\xff\"}"),
        "rows.jsonl:1: not UTF-8 at byte 11 of the line; save the file as UTF-8"
    );
    assert_eq!(line("{\"text\": \"a\"}\n3\n"), "rows.jsonl:2: expected a JSON object, found a number");
}

#[test]
fn errors_name_the_row_of_a_document() {
    let document = |text: &str| error("rows.json", text);
    assert_eq!(document("[{\"text\": \"a\"}, 3]"), "rows.json, row 2: expected a JSON object, found a number");
    assert_eq!(
        document("[{\"text\": \"a\"},\n {\"text\" 3}]"),
        "rows.json, row 2: invalid JSON at line 2, column 10: expected `:`"
    );
    assert_eq!(
        document("[{\"text\": \"a\"},"),
        "rows.json, row 2: invalid JSON at line 1, column 15: EOF while parsing a value"
    );
    assert_eq!(document("[{\"text\": \"a\"}] x"), "rows.json: invalid JSON at line 1, column 17: trailing characters");
    assert_eq!(
        document("{\n\"rows\": []\n}"),
        "rows.json: invalid JSON at line 3, column 1: is one JSON object without \"data\"; expected a list of rows, an \
         object with one as \"data\", or a row on each line"
    );
    assert!(
        document("{\n\"data\": {}}").contains("invalid type: map, expected a list of rows"),
        "{}",
        document("{\n\"data\": {}}")
    );
    let invalid = error("rows.json", b"[{\"text\": \"\xff\"}]");
    assert!(invalid.starts_with("rows.json, row 1: invalid JSON at line 1, column 1"), "{invalid}");
}

#[test]
fn a_file_without_rows_is_an_error() {
    for (name, text) in
        [("rows.jsonl", "\n \n"), ("rows.json", "[]"), ("rows.json", "{\"data\": []}"), ("rows.json", "")]
    {
        assert_eq!(
            error(name, text),
            format!("{name}: the dataset is empty; expected rows, such as one JSON object per line")
        );
    }
    let missing = rows_of(Path::new("no/such.jsonl"), &Columns::default()).expect_err("missing");
    assert!(missing.to_string().starts_with("cannot read no/such.jsonl: "), "{missing}");
}

/// Tables that pyarrow wrote, nested, in several row groups, and with every compression.
#[test]
fn parquet_gives_the_rows_that_it_was_made_from() {
    let expected: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(golden("expect.json")).expect("there")).expect("valid");
    assert_eq!(expected.len(), 6);
    for (name, expected) in &expected {
        let found = rows_of(&golden(&format!("{name}.parquet")), &Columns::default()).expect("valid");
        let expected = expected.as_array().expect("rows").iter().zip(1..);
        let expected: Vec<_> = expected.map(|(row, number)| (RowNumber::Row(number), row.clone())).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn columns_of_a_table_are_checked_before_its_rows() {
    let mapped = |key: &str, column: &str| {
        let columns = Columns::new([(key.to_owned(), column.to_owned())].into()).expect("a known key");
        let path = golden("none.parquet");
        rows_of(&path, &columns).map_err(|error| error.to_string().replace(&path.display().to_string(), "T"))
    };
    let rows = mapped("text", "prompt").expect("there");
    assert_eq!(rows[0].1, json!({"prompt": "question 0"}), "the other columns are of another shape");
    assert_eq!(
        mapped("text", "question").expect_err("missing"),
        "T: has no column \"question\" (for \"text\"); its columns: \"prompt\", \"completion\", \"blob\""
    );
    assert_eq!(
        mapped("text", "blob").expect_err("bytes"),
        "T, row 1: column \"blob\" holds bytes that are no UTF-8 text"
    );
}

#[test]
fn a_table_cut_short_is_an_error() {
    let whole = std::fs::read(golden("chat.parquet")).expect("there");
    for len in [0, 3, 4, 11, whole.len() / 2, whole.len() - 1] {
        let error = error("rows.parquet", &whole[..len]);
        let expected = if len < 4 { "is no Parquet file" } else { "is a damaged Parquet file" };
        assert!(error.starts_with(&format!("rows.parquet: {expected}")), "{len}: {error}");
    }
}

/// Cut anywhere, and with any byte replaced: an error or other rows, never a panic.
#[test]
fn damaged_files_do_not_panic() {
    let whole = "{\"prompt\": [{\"role\": \"user\", \"content\": \"ä\"}], \"completion\": [{\"role\": \"assistant\", \
                 \"content\": \"b\"}]}\n{\"input_ids\": [1, 2], \"labels\": [-100, 2]}";
    let list = format!("{{\"data\": [{}]}}", whole.replace('\n', ","));
    let first = whole.find('\n').expect("two lines");
    for len in 0..whole.len() {
        // Cut between the lines, what is left is a file of one row.
        assert_eq!(
            rows("rows.jsonl", &whole[..whole.floor_char_boundary(len)]).is_ok(),
            len == first || len == first + 1
        );
    }
    for text in [whole, &list] {
        for at in 0..text.len() {
            assert!(text.len() > at && (text == whole || rows("rows.json", &text.as_bytes()[..at]).is_err()), "{at}");
            for byte in [b'\n', b'"', b'9', b'\\', b'[', 0, 0xff] {
                let mut damaged = text.as_bytes().to_vec();
                damaged[at] = byte;
                let _ = rows("rows.json", &damaged);
            }
        }
    }
}

/// What the reader of Parquet asserts is caught; a row that comes out all the same is one that the file now holds.
#[test]
fn damaged_tables_do_not_panic() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("rows.parquet");
    for name in ["chat.parquet", "ids.parquet", "gzip.parquet", "brotli.parquet", "lz4.parquet", "none.parquet"] {
        let whole = std::fs::read(golden(name)).expect("there");
        for at in (4..whole.len()).step_by(13) {
            for flip in [0x01, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] ^= flip;
                std::fs::write(&path, &damaged).expect("written");
                if let Err(error) = rows_of(&path, &Columns::default()) {
                    assert_eq!(error.kind(), ErrorKind::Data, "{error}");
                }
            }
        }
    }
}

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::ErrorKind;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/parquet").join(name)
}

fn arrow(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/arrow").join(name)
}

/// Returns every row of a file, by its number.
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

/// Returns the rows of a file called `name`.
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
        "rows.json: invalid JSON at line 3, column 1: is one JSON object without \"data\"; expected a list of rows, \
         an object with such a list as \"data\", or one row per line"
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

/// Tables written by pyarrow: nested, in several row groups, and with every compression.
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
        "T, row 1: column \"blob\" contains bytes that are not UTF-8"
    );
}

#[test]
fn a_table_cut_short_is_an_error() {
    let whole = std::fs::read(golden("chat.parquet")).expect("there");
    for len in [0, 3, 4, 11, whole.len() / 2, whole.len() - 1] {
        let error = error("rows.parquet", &whole[..len]);
        let expected = if len < 4 { "is not a Parquet file" } else { "is a damaged Parquet file" };
        assert!(error.starts_with(&format!("rows.parquet: {expected}")), "{len}: {error}");
    }
}

#[test]
fn cells_are_text_and_empty_ones_null() {
    let csv = "\u{feff}prompt,completion,n\r\n12,\"a \"\"q\"\", b\",\r\n013,\"line\nbreak\",3\r\n\r\n1.50, x ,4";
    let expected = [
        json!({"prompt": "12", "completion": "a \"q\", b"}),
        json!({"prompt": "013", "completion": "line\nbreak"}),
        json!({"prompt": "1.50", "completion": " x "}),
    ];
    let numbered = |rows: &[Value]| -> Vec<(RowNumber, Value)> {
        rows.iter().zip(1..).map(|(row, number)| (RowNumber::Row(number), row.clone())).collect()
    };
    assert_eq!(rows("rows.csv", csv).expect("valid"), numbered(&expected));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(csv.as_bytes()).expect("compressed");
    assert_eq!(rows("rows.csv.gz", gzip.finish().expect("compressed")).expect("valid"), numbered(&expected));
    let cells = [json!({"instruction": "a,b", "input": null, "output": "c"})];
    assert_eq!(rows("ROWS.TSV", "instruction\tinput\toutput\na,b\t\tc\n").expect("valid"), numbered(&cells));
    assert_eq!(rows("rows.csv", "instruction;input;output\na,b;;c\n").expect("valid"), numbered(&cells));
    assert_eq!(rows("rows.csv", "instruction;input;output\n\"a,b\";\"\";c").expect("valid"), numbered(&cells));
    // JSON under the name of CSV.
    assert_eq!(rows("rows.csv", LINES).expect("valid"), texts(RowNumber::Line, &[(1, "a"), (4, "ä")]));
}

#[test]
fn cells_of_lists_are_json() {
    let csv = "messages,id\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"q\"\"}]\",1\n";
    let row = json!({"messages": [{"role": "user", "content": "q"}]});
    assert_eq!(rows("rows.csv", csv).expect("valid"), [(RowNumber::Row(1), row)]);
    let ids = rows("rows.csv", "input_ids\n\"[1, 2]\"\n").expect("valid");
    assert_eq!(ids, [(RowNumber::Row(1), json!({"input_ids": [1, 2]}))]);
    let printed = error("rows.csv", "messages\n\"[{'role': 'user'}]\"\n");
    assert!(
        printed.starts_with("rows.csv, row 1: column \"messages\" holds no JSON: ")
            && printed.contains("write its cells as JSON, not the text that Python prints"),
        "{printed}"
    );
}

#[test]
fn damaged_csv_is_an_error_with_its_row() {
    assert_eq!(
        error("rows.csv", "prompt,completion\na,b\nc\n"),
        "rows.csv, row 2: has 1 cell and the header has 2; put cells that contain the delimiter, a quote or a line end in quotes"
    );
    assert!(
        error("rows.csv", "prompt,completion\na,b,c\n")
            .starts_with("rows.csv, row 1: has 3 cells and the header has 2")
    );
    assert_eq!(
        error("rows.csv", "prompt,completion\na,b\nc,\"d\ne,f\n"),
        "rows.csv, row 2: has a cell that begins with a quote, which is never closed"
    );
    assert_eq!(
        error("rows.csv", b"prompt,completion\na,gr\xfcn\n"),
        "rows.csv, row 1: column \"completion\" is not UTF-8; save the file as UTF-8"
    );
    assert_eq!(
        error("rows.csv", "text,text\na,b\n"),
        "rows.csv: the header has \"text\" twice; rename one of the columns"
    );
    assert_eq!(
        error("rows.csv", "question,answer\na,b\n"),
        "rows.csv: has no column that Rekindle reads; its columns: \"question\", \"answer\""
    );
    for text in ["prompt,completion\n", "", "\n\n"] {
        assert!(error("rows.csv", text).starts_with("rows.csv: the dataset is empty"), "{text:?}");
    }
    let whole = "prompt,completion\n\"a, \"\"b\"\"\",c\nd,\"e\nf\"\n";
    for at in 0..whole.len() {
        for byte in [b'\n', b'"', b',', 0, 0xff] {
            let mut damaged = whole.as_bytes().to_vec();
            damaged[at] = byte;
            let _ = rows("rows.csv", &damaged);
            let _ = rows("rows.csv", &damaged[..at]);
        }
    }
}

/// Files written by pyarrow: as streams and with footers, compressed, and with dictionaries.
#[test]
fn arrow_gives_the_rows_that_it_was_made_from() {
    let expected: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(arrow("expect.json")).expect("there")).expect("valid");
    assert_eq!(expected.len(), 6);
    for (name, expected) in &expected {
        let found = rows_of(&arrow(name), &Columns::default()).expect("valid");
        let expected = expected.as_array().expect("rows").iter().zip(1..);
        let expected: Vec<_> = expected.map(|(row, number)| (RowNumber::Row(number), row.clone())).collect();
        assert_eq!(found, expected, "{name}");
        // Whatever it is called.
        let bytes = std::fs::read(arrow(name)).expect("there");
        assert_eq!(rows("rows.jsonl", bytes).expect("valid"), expected, "{name}");
    }
    let columns = Columns::new([("text".to_owned(), "question".to_owned())].into()).expect("a known key");
    let missing = rows_of(&arrow("text.feather"), &columns).expect_err("missing").to_string();
    assert!(
        missing
            .ends_with("has no column \"question\" (for \"text\"); its columns: \"prompt\", \"completion\", \"blob\"")
    );
    let columns = Columns::new([("text".to_owned(), "blob".to_owned())].into()).expect("a known key");
    let bytes = rows_of(&arrow("text.feather"), &columns).expect_err("bytes").to_string();
    assert!(bytes.ends_with("text.feather, row 1: column \"blob\" contains bytes that are not UTF-8"), "{bytes}");
}

#[test]
fn folders_of_save_to_disk_are_read() {
    let prompts = |name: &str, split: Option<&str>, defaults: &[&str]| {
        let (files, notices) = find(&[arrow(name)], split, defaults).map_err(|error| error.to_string())?;
        let mut prompts = Vec::new();
        for file in &files {
            for (_, row) in rows_of(file, &Columns::default()).expect("valid") {
                prompts.push(row["prompt"].as_str().expect("text").trim_start_matches("question ").to_owned());
            }
        }
        Ok::<_, String>((prompts.concat(), notices))
    };
    assert_eq!(prompts("saved", None, &["train"]), Ok(("01234".to_owned(), vec![])));
    let (train, notices) = prompts("saved_dict", None, &["train"]).expect("valid");
    assert_eq!((train.as_str(), notices.len()), ("012", 1));
    assert!(
        notices[0].starts_with("split \"train\" of ") && notices[0].ends_with("; left out: \"test\""),
        "{notices:?}"
    );
    assert_eq!(prompts("saved_dict", None, &["test", "validation"]).expect("valid").0, "34");
    let error = prompts("saved_dict", Some("dev"), &["train"]).expect_err("none");
    assert!(error.contains("has no split \"validation\"; it has \"train\", \"test\""), "{error}");

    let dir = tempfile::tempdir().expect("a directory");
    let error = |state: &str| {
        std::fs::write(dir.path().join("state.json"), state).expect("written");
        find(&[dir.path().to_owned()], None, &["train"]).expect_err("refused").to_string()
    };
    assert!(error("{}").contains("state.json: is not what Dataset.save_to_disk writes: missing field"));
    assert!(error("{\"_data_files\": []}").ends_with("state.json: names no file"));
    let indices =
        "{\"_data_files\": [{\"filename\": \"a.arrow\"}], \"_indices_data_files\": [{\"filename\": \"i.arrow\"}]}";
    assert!(error(indices).contains("flatten_indices"));
    // A file that is not there is missed when it is read.
    let state = "{\"_data_files\": [{\"filename\": \"a.arrow\"}], \"_split\": \"train\"}";
    std::fs::write(dir.path().join("state.json"), state).expect("written");
    let (files, _) = find(&[dir.path().to_owned()], None, &["train"]).expect("named");
    assert!(
        rows_of(&files[0], &Columns::default()).expect_err("missing").to_string().contains("a.arrow: No such file")
    );
    assert!(
        find(&[dir.path().to_owned()], Some("test"), &[])
            .expect_err("no test")
            .to_string()
            .contains("has no split \"test\"")
    );
}

/// Truncated anywhere, and with bytes replaced: an error or other rows, never a panic or excessive memory.
#[test]
fn damaged_arrow_files_do_not_panic() {
    for name in
        ["chat_stream.arrow", "chat_file.arrow", "ids_zstd.arrow", "dictionary.arrow", "text.feather", "types.arrow"]
    {
        let whole = std::fs::read(arrow(name)).expect("there");
        for len in (0..whole.len()).step_by(7) {
            // A stream may end between two messages.
            if let Err(error) = rows("rows.arrow", &whole[..len]) {
                assert!(error.starts_with("rows.arrow: "), "{name} {len}: {error}");
            } else {
                assert!(!whole.starts_with(b"ARROW1"), "{name} {len}");
            }
        }
        for at in (4..whole.len()).step_by(3) {
            for byte in [whole[at] ^ 0x01, whole[at] ^ 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                let _ = rows("rows.arrow", &damaged);
            }
        }
    }
}

#[test]
fn other_files_are_named_for_what_they_are() {
    let mut tar = vec![b'a'; 600];
    tar[257..262].copy_from_slice(b"ustar");
    for (name, bytes, part) in [
        ("rows.zip", &b"PK\x03\x04rest"[..], "is a ZIP archive or an Excel workbook"),
        ("rows.pkl", b"\x80\x04\x95", "is a pickle, which can run code"),
        ("rows.jsonl", b"\xff\xfe{\0\"\0", "is UTF-16 text; save the file as UTF-8"),
        ("rows.csv", b"\xff\xfep\0,\0", "is UTF-16 text; save the file as UTF-8"),
        ("rows.jsonl.xz", b"\xfd7zXZ\0\0", "is compressed by xz"),
        ("rows.db", b"SQLite format 3\0", "is an SQLite database"),
        ("rows.jsonl", b"<!DOCTYPE html>\n<html>", "is an HTML page"),
        ("rows.parquet.x", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        ("rows.tar", &tar, "is a tar archive"),
        ("rows.arrow", b"ARROW2", "is not an Arrow file"),
        ("rows.txt", b"plain text", "does not begin as JSON, Parquet or Arrow does"),
    ] {
        let error = error(name, bytes);
        assert!(error.starts_with(&format!("{name}: {part}")), "{error}");
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"PAR1").expect("compressed");
    let packed = error("rows.jsonl.gz", gzip.finish().expect("compressed"));
    assert!(packed.contains("is Parquet under gzip or zstd; unpack it"), "{packed}");
}

#[test]
fn what_other_programs_take_for_json_is_named() {
    for (value, hint) in [
        ("NaN", "NaN is not JSON; write null, or omit the key"),
        ("-Infinity", "Infinity is not JSON; write null, or omit the key"),
        ("[1, NaN]", "NaN is not JSON; write null, or omit the key"),
        ("None", "None, True and False are Python; write the rows with json.dumps, as null, true and false"),
        ("True", "None, True and False are Python; write the rows with json.dumps, as null, true and false"),
        ("'b'", "JSON puts text in double quotes; write the rows with json.dumps, not with str"),
    ] {
        let line = error("rows.jsonl", format!("{{\"text\": \"a\", \"score\": {value}}}\n"));
        assert!(line.starts_with("rows.jsonl:1: invalid JSON at column ") && line.ends_with(hint), "{line}");
        let document = error("rows.json", format!("[{{\"text\": \"a\"}},\n {{\"score\": {value}}}]"));
        // Of a document only the byte at which it stops being JSON is known.
        let is_nan = ["NaN", "[1, NaN]", "None"].contains(&value);
        let hint = if is_nan { "NaN and None are not JSON; write null, or omit the key" } else { hint };
        assert!(
            document.starts_with("rows.json, row 2: invalid JSON at line 2, ") && document.ends_with(hint),
            "{document}"
        );
    }
    assert!(error("rows.jsonl", "{'text': 'a'}\n").ends_with("write the rows with json.dumps, not with str"));
}

/// Truncated anywhere, and with any byte replaced: an error or other rows, never a panic.
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

/// Assertions of the `parquet` crate are caught; rows that are still read are in the file.
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

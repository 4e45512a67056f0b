//! CSV and TSV: a header, and a row of text cells for each record.

use std::io::{BufRead, Read};
use std::path::Path;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::{RawRow, Sink};
use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::row::RowNumber;

/// Delimiters that the header of `*.csv` can have, the default first.
const DELIMITERS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// The maximum number of header bytes to search for the delimiter.
const LONGEST_HEADER: usize = 1 << 16;

/// A record after the last one. The `csv` crate accepts a quoted cell without an end; such a cell swallows this record.
const END: &[u8] = b"\n\0end of rows\0\n";

/// Keys whose values are lists or objects, stored in a cell as JSON text.
const STRUCTURED: [&str; 6] =
    ["messages", "conversations", "input_ids", "labels", "attention_mask", "chat_template_kwargs"];

/// Reads the rows below the header. Rows are counted from 1, without the header; blank lines are not rows.
///
/// Cells stay text, even numbers; an empty cell is null. Without a `delimiter`, it is detected from the header.
pub(super) fn read(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    delimiter: Option<u8>,
    columns: &Columns,
    sink: Sink<'_>,
) -> Result<()> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut head = Vec::new();
    reader.by_ref().take(LONGEST_HEADER as u64).read_to_end(&mut head).map_err(failed)?;
    let delimiter = delimiter.unwrap_or_else(|| delimiter_of(&head));
    let whole = head.as_slice().chain(reader).chain(END);
    let mut records = Records::new(whole, delimiter);
    let mut next = || records.next().map_err(|source| Error::Read { path: path.to_owned(), source });

    let Some(record) = next()?.filter(|record| !is_end(record)) else { return Ok(()) };
    if is_open(&record) {
        return Err(Error::dataset(path, "the header has a quote that is never closed"));
    }
    let names = header(&record).map_err(|message| Error::dataset(path, message))?;
    columns.check_table(&names.iter().map(String::as_str).collect::<Vec<_>>()).map_err(|message| {
        let hint = if names.len() == 1 { "; is this the header, and its delimiter one of , ; | or a tab?" } else { "" };
        Error::dataset(path, message + hint)
    })?;
    for number in 1.. {
        let Some(record) = next()?.filter(|record| !is_end(record)) else { break };
        let wrong = |message| Error::row(path, RowNumber::Row(number), message);
        if is_open(&record) {
            return Err(wrong("has a cell that begins with a quote, which is never closed".to_owned()));
        }
        if record.len() != names.len() {
            return Err(wrong(format!(
                "has {} and the header has {}; put cells that contain the delimiter, a quote or a line end in quotes",
                crate::counted(record.len(), "cell"),
                names.len()
            )));
        }
        let cells = names.iter().zip(record).filter(|(name, _)| columns.is_read(name));
        let fields = cells.map(|(name, cell)| Ok((name.clone(), value(name, &cell, columns)?)));
        let fields: Map<String, Value> = fields.collect::<Result<_, String>>().map_err(wrong)?;
        sink(RawRow::parsed(number, Value::Object(fields)))?;
    }
    Ok(())
}

/// The records of a file, each a list of cells.
struct Records<R> {
    reader: R,
    parser: Reader,
    /// The concatenated cells of a record, and the end of each.
    cells: Vec<u8>,
    ends: Vec<usize>,
}

impl<R: BufRead> Records<R> {
    fn new(reader: R, delimiter: u8) -> Self {
        let parser = ReaderBuilder::new().delimiter(delimiter).build();
        Self { reader, parser, cells: vec![0; 1 << 10], ends: vec![0; 1 << 4] }
    }

    fn next(&mut self) -> std::io::Result<Option<Vec<Vec<u8>>>> {
        let (mut written, mut count) = (0, 0);
        loop {
            // Empty at the end of the file, which ends the record.
            let input = self.reader.fill_buf()?;
            let (result, read, more, ended) =
                self.parser.read_record(input, &mut self.cells[written..], &mut self.ends[count..]);
            self.reader.consume(read);
            written += more;
            count += ended;
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => self.cells.resize(2 * self.cells.len(), 0),
                ReadRecordResult::OutputEndsFull => self.ends.resize(2 * self.ends.len(), 0),
                ReadRecordResult::End => return Ok(None),
                ReadRecordResult::Record => break,
            }
        }
        let begins = std::iter::once(&0).chain(&self.ends);
        let cell = |(&begin, &end): (&usize, &usize)| self.cells[begin..end].to_vec();
        Ok(Some(begins.zip(&self.ends[..count]).map(cell).collect()))
    }
}

fn is_end(record: &[Vec<u8>]) -> bool {
    matches!(record, [cell] if cell == END.trim_ascii())
}

/// Returns true if a quoted cell has no end and swallowed the record after the last one.
fn is_open(record: &[Vec<u8>]) -> bool {
    record.last().is_some_and(|cell| cell.ends_with(END))
}

fn header(record: &[Vec<u8>]) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for cell in record {
        let name = std::str::from_utf8(cell)
            .map_err(|_| "the header is not UTF-8; save the file as UTF-8".to_owned())?
            .trim()
            .to_owned();
        if !name.is_empty() && names.contains(&name) {
            return Err(format!("the header has {name:?} twice; rename one of the columns"));
        }
        names.push(name);
    }
    Ok(names)
}

/// Returns the delimiter that occurs most often in the first line, outside of quotes.
fn delimiter_of(head: &[u8]) -> u8 {
    let mut counts = [0; DELIMITERS.len()];
    let mut quoted = false;
    let begin = head.len() - head.trim_ascii_start().len();
    for &byte in &head[begin..] {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' | b'\r' if !quoted => break,
            _ if quoted => {}
            _ => {
                if let Some(index) = DELIMITERS.iter().position(|&delimiter| delimiter == byte) {
                    counts[index] += 1;
                }
            }
        }
    }
    let most = counts.iter().max().copied().unwrap_or_default();
    DELIMITERS[counts.iter().position(|&count| count == most).unwrap_or_default()]
}

fn value(column: &str, cell: &[u8], columns: &Columns) -> Result<Value, String> {
    if cell.is_empty() {
        return Ok(Value::Null);
    }
    let text =
        std::str::from_utf8(cell).map_err(|_| format!("column {column:?} is not UTF-8; save the file as UTF-8"))?;
    if !STRUCTURED.contains(&columns.key_of(column)) {
        return Ok(Value::String(text.to_owned()));
    }
    serde_json::from_str(text).map_err(|error| {
        let hint = if text.contains('\'') { ", not the text that Python prints" } else { "" };
        format!("column {column:?} holds no JSON: {error}; write its cells as JSON{hint}, or the file as JSON lines or Parquet")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_tells_the_delimiter() {
        for (head, delimiter) in [
            ("prompt,completion\na;b;c,d", b','),
            ("prompt;completion\r\na,b,c;d", b';'),
            ("prompt\tcompletion", b'\t'),
            ("prompt|completion", b'|'),
            ("\"a;b;c\",text\n", b','),
            ("\n\ntext\n1;2", b','),
            ("", b','),
        ] {
            assert_eq!(delimiter_of(head.as_bytes()), delimiter, "{head:?}");
        }
    }
}

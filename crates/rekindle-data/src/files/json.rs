//! A JSON document: a list of rows, or an object with such a list as `data`.

use std::cell::Cell;
use std::fmt;
use std::io::{BufRead, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::jsonl::{hint, without_place};
use super::{RawRow, Sink};
use crate::error::{Error, Result};
use crate::numbers::Guarded;
use crate::row::RowNumber;

/// Reads the document row by row, with one row in memory at a time.
pub(super) fn read(path: &Path, reader: impl BufRead, sink: Sink<'_>) -> Result<()> {
    let mut refused = None;
    let mut begun = 0;
    let last = Cell::new([0; 2]);
    let mut document = serde_json::Deserializer::from_reader(Watched { reader: Guarded::new(reader), last: &last });
    let rows = Rows { sink, refused: &mut refused, begun: &mut begun };
    let end = document.deserialize_any(Document(rows)).and_then(|()| document.end());
    match (refused, end) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) if error.is_io() => Err(Error::Read { path: path.to_owned(), source: error.into() }),
        (None, Err(error)) => {
            let message = match error.line() {
                // Not of the document's syntax.
                0 => error.to_string(),
                line => {
                    let [before, last] = last.get();
                    // A number is found wrong one byte late.
                    let at = if error.to_string().starts_with("invalid number") { before } else { last };
                    let hint = hint(&[at]).map(|hint| format!("; {hint}")).unwrap_or_default();
                    format!("invalid JSON at line {line}, column {}: {}{hint}", error.column(), without_place(&error))
                }
            };
            Err(match begun {
                0 => Error::dataset(path, message),
                row => Error::row(path, RowNumber::Row(row), message),
            })
        }
    }
}

/// A reader that remembers the last bytes, among them the one at which the parser fails.
struct Watched<'a, R> {
    reader: R,
    /// The last two bytes; the newest is the second.
    last: &'a Cell<[u8; 2]>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(bytes)?;
        if let Some(last) = read.checked_sub(1) {
            let [_, before] = self.last.get();
            self.last.set([last.checked_sub(1).map_or(before, |before| bytes[before]), bytes[last]]);
        }
        Ok(read)
    }
}

/// The receiver of the rows.
struct Rows<'a, 'b> {
    sink: Sink<'a>,
    /// The error of the sink, because the parser has its own error type.
    refused: &'b mut Option<Error>,
    /// The number of the current row; 0 outside of the list.
    begun: &'b mut usize,
}

struct Document<'a, 'b>(Rows<'a, 'b>);

const EXPECTED: &str = "a list of rows, an object with such a list as \"data\", or one row per line";

impl<'de> Visitor<'de> for Document<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        self.0.visit_seq(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        let mut rows = Some(self.0);
        while let Some(key) = object.next_key::<String>()? {
            match rows.take_if(|_| key == "data") {
                Some(rows) => object.next_value_seed(rows)?,
                None => object.next_value::<IgnoredAny>().map(|_| ())?,
            }
        }
        match rows {
            None => Ok(()),
            Some(_) => Err(A::Error::custom(format!("is one JSON object without \"data\"; expected {EXPECTED}"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Rows<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, data: D) -> Result<(), D::Error> {
        data.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Rows { sink, refused, begun } = self;
        loop {
            *begun += 1;
            let Some(value) = list.next_element::<Value>()? else {
                *begun = 0;
                return Ok(());
            };
            if let Err(error) = sink(RawRow::parsed(*begun, value)) {
                *refused = Some(error);
                return Err(A::Error::custom("the row was refused"));
            }
        }
    }
}

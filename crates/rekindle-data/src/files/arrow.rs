//! Arrow IPC files, as a stream or with a footer, as written by `Dataset.save_to_disk` and pandas' `to_feather`.
//!
//! A file is a sequence of messages: the schema, the values of dictionaries, batches of rows. The footer, an index of
//! the messages, is not needed. Every number in a file is checked against the available bytes.

use std::io::{BufRead, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::{RawRow, Sink};
use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::row::RowNumber;

mod array;
mod flat;
mod schema;

use array::{Body, CONTRADICTS, Dictionaries};
use flat::Table;
use schema::{Field, schema};

/// The first bytes of a file with a footer; after padding to 8 bytes, a stream follows.
pub(super) const FILE_MAGIC: &[u8] = b"ARROW1";
/// The first bytes of each message of a stream.
pub(super) const CONTINUATION: [u8; 4] = [0xff; 4];

const CUT: &str = "it is cut short";

/// Reads the columns that rows use, batch by batch.
pub(super) fn read(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    is_file: bool,
    columns: &Columns,
    sink: Sink<'_>,
) -> Result<()> {
    let broken = |reason: String| Error::dataset(path, format!("is a damaged Arrow file: {reason}"));
    if is_file {
        exactly(&mut reader, 8).map_err(broken)?;
    }
    let mut fields = None;
    let mut dictionaries = Dictionaries::new();
    let mut number = 0;
    loop {
        let Message { header, body } = match next(&mut reader).map_err(broken)? {
            Next::Message(message) => message,
            Next::End => break,
            // A stream may end where a message would begin; a file has its footer there.
            Next::Nothing if !is_file => break,
            Next::Nothing => return Err(broken(CUT.to_owned())),
        };
        let message = Table::root(&header).ok_or_else(|| broken(CONTRADICTS.to_owned()))?;
        let content = message.table(2).ok_or_else(|| broken(CONTRADICTS.to_owned()))?;
        match (message.u8(1), &fields) {
            (Some(1), None) => {
                let read = schema(content).ok_or_else(|| broken(CONTRADICTS.to_owned()))?.map_err(broken)?;
                let names: Vec<&str> = read.iter().map(|field| field.name.as_str()).collect();
                columns.check_table(&names).map_err(|message| Error::dataset(path, message))?;
                fields = Some(read);
            }
            (Some(2), Some(fields)) => dictionary(content, &body, fields, &mut dictionaries).map_err(broken)?,
            (Some(3), Some(fields)) => {
                let batch = Batch { path, fields, dictionaries: &dictionaries, columns };
                batch.read(content, &body, &mut number, sink)?;
            }
            _ => return Err(broken("a message is not what is expected at its place".to_owned())),
        }
    }
    if fields.is_none() {
        return Err(broken("it has no schema".to_owned()));
    }
    if is_file {
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        if !rest.ends_with(FILE_MAGIC) {
            return Err(broken(CUT.to_owned()));
        }
    }
    Ok(())
}

/// The inputs for reading the rows of a batch.
struct Batch<'a> {
    path: &'a Path,
    fields: &'a [Field],
    dictionaries: &'a Dictionaries,
    columns: &'a Columns,
}

impl Batch<'_> {
    fn read(&self, header: Table<'_>, bytes: &[u8], number: &mut usize, sink: Sink<'_>) -> Result<()> {
        let broken = |reason: String| Error::dataset(self.path, format!("is a damaged Arrow file: {reason}"));
        let mut body = Body::new(header, bytes).map_err(broken)?;
        let mut arrays = Vec::new();
        for field in self.fields {
            let wanted = self.columns.is_read(&field.name);
            let array = body.array(field, self.dictionaries, wanted).map_err(broken)?;
            if wanted {
                arrays.push((field.name.as_str(), array));
            }
        }
        let rows = usize::try_from(header.i64(0).unwrap_or(0)).map_err(|_| broken(CONTRADICTS.to_owned()))?;
        if arrays.iter().any(|(_, array)| array.len() != rows) {
            return Err(broken(CONTRADICTS.to_owned()));
        }
        for index in 0..rows {
            *number += 1;
            let mut fields = Map::new();
            for (name, array) in &arrays {
                // At the top a null stays: a row without a value is not a table without the column.
                let value = array.json(index).map_err(|reason| match reason.as_str() {
                    CONTRADICTS => broken(reason),
                    _ => Error::row(self.path, RowNumber::Row(*number), format!("column {name:?} {reason}")),
                })?;
                fields.insert((*name).to_owned(), value);
            }
            sink(RawRow::parsed(*number, Value::Object(fields)))?;
        }
        Ok(())
    }
}

/// Reads the values of a dictionary, or additional ones.
fn dictionary(header: Table<'_>, bytes: &[u8], fields: &[Field], all: &mut Dictionaries) -> Result<(), String> {
    let number = header.i64(0).unwrap_or(0);
    let field = coded(fields, number).ok_or(CONTRADICTS)?;
    // Its values are an array of their own, of the type of the field.
    let plain = Field { dictionary: None, ..field.clone() };
    let mut body = Body::new(header.table(1).ok_or(CONTRADICTS)?, bytes)?;
    let array = body.array(&plain, all, true)?;
    let values: Vec<Value> = (0..array.len()).map(|index| array.json(index)).collect::<Result<_, _>>()?;
    if header.u8(2).unwrap_or(0) != 0 {
        all.entry(number).or_default().extend(values);
    } else {
        all.insert(number, values);
    }
    Ok(())
}

/// Returns the field with this dictionary.
fn coded(fields: &[Field], number: i64) -> Option<&Field> {
    fields.iter().find_map(|field| match field.dictionary {
        Some((of, _)) if of == number => Some(field),
        _ => coded(&field.children, number),
    })
}

struct Message {
    header: Vec<u8>,
    body: Vec<u8>,
}

enum Next {
    Message(Message),
    /// The marker of the stream's end.
    End,
    /// The end of the file.
    Nothing,
}

fn next(reader: &mut impl BufRead) -> Result<Next, String> {
    if reader.fill_buf().map_err(|error| error.to_string())?.is_empty() {
        return Ok(Next::Nothing);
    }
    let prefix = exactly(reader, 8)?;
    let (marker, length) = prefix.split_at(4);
    if marker != CONTINUATION {
        return Err("a message does not begin where it should".to_owned());
    }
    let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
    if length == 0 {
        return Ok(Next::End);
    }
    let header = exactly(reader, length.into())?;
    let body = Table::root(&header).map(|message| message.i64(3).unwrap_or(0));
    let body = body.and_then(|length| u64::try_from(length).ok()).ok_or(CONTRADICTS)?;
    let body = exactly(reader, body)?;
    Ok(Next::Message(Message { header, body }))
}

/// Reads an exact number of bytes. Memory grows with the available bytes, not with the length that the file claims.
fn exactly(reader: &mut impl Read, length: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    reader.take(length).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(CUT.to_owned()) }
}

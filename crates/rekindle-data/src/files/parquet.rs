//! Parquet: tables with nested columns, read as JSON.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::{RawRow, Sink};
use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::row::RowNumber;

/// Reads the columns that rows use, one row group at a time; other columns are not decoded.
pub(super) fn read(path: &Path, file: File, columns: &Columns, sink: Sink<'_>) -> Result<()> {
    let broken = |error: ParquetError| Error::dataset(path, format!("is a damaged Parquet file: {error}"));
    let table = guarded(|| SerializedFileReader::new(file)).map_err(broken)?;
    let schema = table.metadata().file_metadata().schema();
    let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
    columns.check_table(&names).map_err(|message| Error::dataset(path, message))?;
    let read = schema.get_fields().iter().filter(|field| columns.is_read(field.name())).cloned().collect();
    let projection = guarded(|| Type::group_type_builder(schema.name()).with_fields(read).build()).map_err(broken)?;

    let mut number = 0;
    for index in 0..table.num_row_groups() {
        let group = guarded(|| table.get_row_group(index)).map_err(broken)?;
        let mut rows = guarded(|| RowIter::from_row_group(Some(projection.clone()), &*group)).map_err(broken)?;
        while let Some(row) = guarded(|| rows.next().transpose()).map_err(broken)? {
            number += 1;
            let place = RowNumber::Row(number);
            let fields = row.into_columns().into_iter();
            // At the top a null stays: a row without a value is not a table without the column.
            let fields = fields.map(|(name, field)| {
                let value =
                    json(&field).map_err(|reason| Error::row(path, place, format!("column {name:?} {reason}")))?;
                Ok((name, value))
            });
            sink(RawRow::parsed(number, Value::Object(fields.collect::<Result<_>>()?)))?;
        }
    }
    Ok(())
}

/// Catches panics: the `parquet` crate asserts properties that a damaged file can violate.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(ParquetError::General(text.unwrap_or("it is inconsistent").to_owned()))
    })
}

/// Returns a field as JSON. Null fields of a struct are omitted, because a table gives every struct of a column all of
/// its fields.
fn json(field: &Field) -> Result<Value, &'static str> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => float(f64::from(value.to_f32()))?,
        Field::Float(value) => float(f64::from(*value))?,
        Field::Double(value) => float(*value)?,
        Field::Str(text) => Value::String(text.clone()),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => return Err("contains bytes that are not UTF-8"),
        },
        Field::Group(row) => {
            let mut fields = Map::new();
            for (name, field) in row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null)) {
                fields.insert(name.clone(), json(field)?);
            }
            Value::Object(fields)
        }
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(json).collect::<Result<_, _>>()?),
        Field::MapInternal(map) => {
            let mut fields = Map::new();
            for (key, field) in map.entries() {
                let Value::String(key) = json(key)? else { return Err("has a map whose keys are not text") };
                fields.insert(key, json(field)?);
            }
            Value::Object(fields)
        }
        // Decimals, dates and times, as they are written.
        other => Value::String(other.to_string()),
    })
}

fn float(value: f64) -> Result<Value, &'static str> {
    Number::from_f64(value).map(Value::Number).ok_or("contains a number that is not finite")
}

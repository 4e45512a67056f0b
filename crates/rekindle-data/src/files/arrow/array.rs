//! Arrays of a record batch, and their values as JSON.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Read;

use half::f16;
use serde_json::{Map, Number, Value};

use super::flat::{Table, Vector};
use super::schema::{Field, Kind};

/// Values of dictionaries, by their number.
pub(super) type Dictionaries = HashMap<i64, Vec<Value>>;

/// The error for a file with contradictory values.
pub(super) const CONTRADICTS: &str = "it is inconsistent";

/// The maximum length of a list. The elements of some types take no bytes in a file, so a damaged file could claim any
/// length.
const LONGEST_LIST: usize = 1 << 24;

/// A column of a batch, or a part of one.
pub(super) struct Array<'a> {
    field: &'a Field,
    len: usize,
    /// The validity bitmap, and the buffers of the kind: offsets, bytes.
    buffers: Vec<Cow<'a, [u8]>>,
    children: Vec<Array<'a>>,
    dictionary: Option<&'a [Value]>,
}

/// The body of a batch while its arrays are read, in the order of the schema's fields.
pub(super) struct Body<'a> {
    bytes: &'a [u8],
    nodes: Vector<'a>,
    buffers: Vector<'a>,
    /// The number of text buffers of each view.
    views: Option<Vector<'a>>,
    codec: Option<u8>,
    next_node: usize,
    next_buffer: usize,
    next_view: usize,
}

impl<'a> Body<'a> {
    /// Returns the body of the batch with this header.
    pub(super) fn new(header: Table<'a>, bytes: &'a [u8]) -> Result<Self, String> {
        let (nodes, buffers) = header.vector(1).zip(header.vector(2)).ok_or(CONTRADICTS)?;
        let codec = header.table(3).map(|compression| compression.u8(0).unwrap_or(0));
        let views = header.vector(4);
        Ok(Self { bytes, nodes, buffers, views, codec, next_node: 0, next_buffer: 0, next_view: 0 })
    }

    /// Returns the next array; skips the buffers of one that is not `wanted`.
    pub(super) fn array(
        &mut self,
        field: &'a Field,
        dictionaries: &'a Dictionaries,
        wanted: bool,
    ) -> Result<Array<'a>, String> {
        let (len, _) =
            (self.next_node < self.nodes.len).then(|| self.nodes.pair(self.next_node)).flatten().ok_or(CONTRADICTS)?;
        self.next_node += 1;
        let kind = field.dictionary.map_or(field.kind, |(_, index)| index);
        let mut count = kind.buffers();
        if kind == Kind::TextView {
            let texts = self.views.and_then(|views| views.i64(self.next_view)).ok_or(CONTRADICTS)?;
            self.next_view += 1;
            count += usize::try_from(texts).ok().filter(|&texts| texts <= self.buffers.len).ok_or(CONTRADICTS)?;
        }
        let mut buffers = Vec::new();
        for _ in 0..count {
            if wanted {
                buffers.push(self.buffer()?);
            }
            self.next_buffer += 1;
        }
        let children = match field.dictionary {
            Some(_) => Vec::new(),
            None => {
                field.children.iter().map(|child| self.array(child, dictionaries, wanted)).collect::<Result<_, _>>()?
            }
        };
        let dictionary = match field.dictionary.filter(|_| wanted) {
            None => None,
            Some((number, _)) => Some(dictionaries.get(&number).ok_or(CONTRADICTS)?.as_slice()),
        };
        let len = usize::try_from(len).map_err(|_| CONTRADICTS)?;
        Ok(Array { field, len, buffers, children, dictionary })
    }

    fn buffer(&self) -> Result<Cow<'a, [u8]>, String> {
        let place = (self.next_buffer < self.buffers.len)
            .then(|| self.buffers.pair(self.next_buffer))
            .flatten()
            .ok_or(CONTRADICTS)?;
        let (Ok(begin), Ok(len)) = (usize::try_from(place.0), usize::try_from(place.1)) else {
            return Err(CONTRADICTS.to_owned());
        };
        let bytes =
            self.bytes.get(begin..).and_then(|bytes| bytes.get(..len)).ok_or("a buffer lies outside of its batch")?;
        let Some(codec) = self.codec.filter(|_| len > 0) else { return Ok(Cow::Borrowed(bytes)) };
        let (size, packed) = bytes.split_first_chunk::<8>().ok_or(CONTRADICTS)?;
        let size = match i64::from_le_bytes(*size) {
            // Written so where compression would make it longer.
            -1 => return Ok(Cow::Borrowed(packed)),
            size => u64::try_from(size).map_err(|_| CONTRADICTS)?,
        };
        let unpacked = match codec {
            0 => unpack(lz4_flex::frame::FrameDecoder::new(packed), size),
            1 => zstd::Decoder::new(packed).and_then(|reader| unpack(reader, size)),
            other => return Err(format!("its compression {other} is not known")),
        };
        let unpacked = unpacked.map_err(|error| error.to_string())?;
        if unpacked.len() as u64 == size { Ok(Cow::Owned(unpacked)) } else { Err(CONTRADICTS.to_owned()) }
    }
}

/// Decompresses a buffer. Memory grows with the available bytes, not with the size that the file claims.
fn unpack(reader: impl Read, size: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Array<'_> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the value at `index`. Null fields of a struct are omitted, because a table gives every struct of a
    /// column all of its fields.
    pub(super) fn json(&self, index: usize) -> Result<Value, String> {
        if index >= self.len {
            return Err(CONTRADICTS.to_owned());
        }
        if self.is_null(index)? {
            return Ok(Value::Null);
        }
        let value = self.value(index)?;
        match value {
            Value::String(text) if self.field.is_json => {
                serde_json::from_str(&text).map_err(|error| format!("contains text that is not JSON: {error}"))
            }
            value => Ok(value),
        }
    }

    fn is_null(&self, index: usize) -> Result<bool, String> {
        if matches!(self.field.kind, Kind::Other { .. }) {
            return Ok(false);
        }
        // The bitmap may be omitted if no value is null.
        match self.buffers.first().filter(|bits| !bits.is_empty()) {
            None => Ok(false),
            Some(bits) => bit(bits, index).map(|valid| !valid),
        }
    }

    fn value(&self, index: usize) -> Result<Value, String> {
        if let (Some(values), Some((_, kind))) = (self.dictionary, self.field.dictionary) {
            let key = self.integer(kind, index)?;
            return usize::try_from(key).ok().and_then(|key| values.get(key)).cloned().ok_or(CONTRADICTS.to_owned());
        }
        Ok(match self.field.kind {
            Kind::Null => Value::Null,
            Kind::Bool => Value::Bool(bit(self.bytes(1)?, index)?),
            kind @ Kind::Int { .. } => {
                let number = self.integer(kind, index)?;
                i64::try_from(number).map_or_else(|_| Value::from(number as u64), Value::from)
            }
            Kind::Float { bytes: 2 } => float(f64::from(f16::from_le_bytes(self.number(index)?)))?,
            Kind::Float { bytes: 4 } => float(f64::from(f32::from_le_bytes(self.number(index)?)))?,
            Kind::Float { .. } => float(f64::from_le_bytes(self.number(index)?))?,
            Kind::Text { large } => {
                let (begin, end) = self.range(large, index)?;
                text(self.bytes(2)?.get(begin..end).ok_or(CONTRADICTS)?)?
            }
            Kind::TextView => text(self.view(index)?)?,
            Kind::FixedBytes { bytes } => {
                let begin = index.checked_mul(bytes).ok_or(CONTRADICTS)?;
                text(self.bytes(1)?.get(begin..).and_then(|rest| rest.get(..bytes)).ok_or(CONTRADICTS)?)?
            }
            Kind::List { large } => {
                let (begin, end) = self.range(large, index)?;
                self.child(0)?.list(begin, end)?
            }
            Kind::ListView { large } => {
                let (begin, len) = (self.offset(1, large, index)?, self.offset(2, large, index)?);
                self.child(0)?.list(begin, begin.checked_add(len).ok_or(CONTRADICTS)?)?
            }
            Kind::FixedList { len } => {
                let begin = index.checked_mul(len).ok_or(CONTRADICTS)?;
                self.child(0)?.list(begin, begin.checked_add(len).ok_or(CONTRADICTS)?)?
            }
            Kind::Struct => {
                let mut object = Map::new();
                for child in &self.children {
                    match child.json(index)? {
                        Value::Null => {}
                        value => _ = object.insert(child.field.name.clone(), value),
                    }
                }
                Value::Object(object)
            }
            Kind::Map => self.map(index)?,
            Kind::Decimal { scale } => decimal(i128::from_le_bytes(self.number(index)?), scale).into(),
            Kind::Date => date(i64::from(i32::from_le_bytes(self.number(index)?))).into(),
            Kind::Time { per_second } => time(i64::from_le_bytes(self.number(index)?), per_second).into(),
            Kind::Other { name, .. } => {
                return Err(format!("has the Arrow type {name}, which is not read; write it as text"));
            }
        })
    }

    fn map(&self, index: usize) -> Result<Value, String> {
        let (begin, end) = self.range(false, index)?;
        let entries = self.child(0)?;
        let (keys, values) = (entries.child(0)?, entries.child(1)?);
        let mut object = Map::new();
        for at in begin..end {
            let Value::String(key) = keys.json(at)? else { return Err("has a map whose keys are not text".to_owned()) };
            object.insert(key, values.json(at)?);
        }
        Ok(Value::Object(object))
    }

    fn list(&self, begin: usize, end: usize) -> Result<Value, String> {
        if end > self.len || end.saturating_sub(begin) > LONGEST_LIST {
            return Err(CONTRADICTS.to_owned());
        }
        (begin..end).map(|index| self.json(index)).collect::<Result<_, _>>().map(Value::Array)
    }

    fn child(&self, index: usize) -> Result<&Self, String> {
        self.children.get(index).ok_or(CONTRADICTS.to_owned())
    }

    fn bytes(&self, buffer: usize) -> Result<&[u8], String> {
        self.buffers.get(buffer).map(|bytes| &**bytes).ok_or(CONTRADICTS.to_owned())
    }

    fn number<const N: usize>(&self, index: usize) -> Result<[u8; N], String> {
        element(self.bytes(1)?, index)
    }

    fn integer(&self, kind: Kind, index: usize) -> Result<i128, String> {
        let Kind::Int { bytes, signed } = kind else { return Err(CONTRADICTS.to_owned()) };
        Ok(match (bytes, signed) {
            (1, true) => i8::from_le_bytes(self.number(index)?).into(),
            (1, false) => u8::from_le_bytes(self.number(index)?).into(),
            (2, true) => i16::from_le_bytes(self.number(index)?).into(),
            (2, false) => u16::from_le_bytes(self.number(index)?).into(),
            (4, true) => i32::from_le_bytes(self.number(index)?).into(),
            (4, false) => u32::from_le_bytes(self.number(index)?).into(),
            (_, true) => i64::from_le_bytes(self.number(index)?).into(),
            (_, false) => u64::from_le_bytes(self.number(index)?).into(),
        })
    }

    fn offset(&self, buffer: usize, large: bool, index: usize) -> Result<usize, String> {
        let bytes = self.bytes(buffer)?;
        let offset = match large {
            true => i64::from_le_bytes(element(bytes, index)?),
            false => i32::from_le_bytes(element(bytes, index)?).into(),
        };
        usize::try_from(offset).map_err(|_| CONTRADICTS.to_owned())
    }

    /// Returns the start and end of the value at `index`.
    fn range(&self, large: bool, index: usize) -> Result<(usize, usize), String> {
        Ok((self.offset(1, large, index)?, self.offset(1, large, index + 1)?))
    }

    /// Returns the bytes of a view: inline up to twelve bytes, else in one of the buffers after the views.
    fn view(&self, index: usize) -> Result<&[u8], String> {
        let begin = index.checked_mul(16).ok_or(CONTRADICTS)?;
        let view = self.bytes(1)?.get(begin..).and_then(|rest| rest.get(..16)).ok_or(CONTRADICTS)?;
        let number =
            |at: usize| usize::try_from(i32::from_le_bytes(element(view, at)?)).map_err(|_| CONTRADICTS.to_owned());
        let len = number(0)?;
        if len <= 12 {
            return Ok(&view[4..4 + len]);
        }
        let (buffer, begin) = (number(2)?, number(3)?);
        self.bytes(2 + buffer)?.get(begin..).and_then(|rest| rest.get(..len)).ok_or(CONTRADICTS.to_owned())
    }
}

fn element<const N: usize>(bytes: &[u8], index: usize) -> Result<[u8; N], String> {
    let element = index.checked_mul(N).and_then(|at| bytes.get(at..)?.first_chunk().copied());
    element.ok_or(CONTRADICTS.to_owned())
}

fn bit(bits: &[u8], index: usize) -> Result<bool, String> {
    bits.get(index / 8).map(|byte| byte >> (index % 8) & 1 == 1).ok_or(CONTRADICTS.to_owned())
}

fn text(bytes: &[u8]) -> Result<Value, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Value::String(text.to_owned())),
        Err(_) => Err("contains bytes that are not UTF-8".to_owned()),
    }
}

fn float(value: f64) -> Result<Value, String> {
    Number::from_f64(value).map(Value::Number).ok_or_else(|| "contains a number that is not finite".to_owned())
}

fn decimal(value: i128, scale: u32) -> String {
    let digits = format!("{:0width$}", value.unsigned_abs(), width = scale as usize + 1);
    let (whole, part) = digits.split_at(digits.len() - scale as usize);
    let (sign, point) = (if value < 0 { "-" } else { "" }, if part.is_empty() { "" } else { "." });
    format!("{sign}{whole}{point}{part}")
}

/// Formats a day of the proleptic Gregorian calendar, counted from 1970-01-01.
fn date(days: i64) -> String {
    // Eras of 400 years that begin in March, so that leap days come last.
    let days = days.saturating_add(719_468);
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + 400 * era + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

fn time(value: i64, per_second: i64) -> String {
    let (seconds, part) = (value.div_euclid(per_second), value.rem_euclid(per_second));
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let mut text = format!("{} {:02}:{:02}:{:02}", date(day), second / 3_600, second / 60 % 60, second % 60);
    if part > 0 {
        let width = per_second.ilog10() as usize;
        text += format!(".{part:0width$}").trim_end_matches('0');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_times_are_written() {
        let days = [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (19_782, "2024-02-29"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ];
        for (day, text) in days {
            assert_eq!(date(day), text);
        }
        assert_eq!(time(1_715_949_000_000_000, 1_000_000), "2024-05-17 12:30:00");
        assert_eq!(time(-1, 1_000), "1969-12-31 23:59:59.999");
        assert_eq!(time(1_500, 1_000), "1970-01-01 00:00:01.5");
    }

    #[test]
    fn decimals_are_written() {
        for (value, scale, text) in [(150, 2, "1.50"), (-5, 2, "-0.05"), (7, 0, "7"), (0, 3, "0.000")] {
            assert_eq!(decimal(value, scale), text);
        }
    }
}

//! The columns of an Arrow file.

use super::flat::Table;

/// A column, or a part of one.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) children: Vec<Field>,
    /// The dictionary of its values, and the kind of the dictionary's indices.
    pub(super) dictionary: Option<(i64, Kind)>,
    /// True if it is text with JSON, the feature `Json` of `datasets`.
    pub(super) is_json: bool,
}

/// The type of a column's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Null,
    Bool,
    Int {
        bytes: usize,
        signed: bool,
    },
    Float {
        bytes: usize,
    },
    /// Text or bytes; large ones have 64-bit offsets.
    Text {
        large: bool,
    },
    TextView,
    FixedBytes {
        bytes: usize,
    },
    List {
        large: bool,
    },
    ListView {
        large: bool,
    },
    FixedList {
        len: usize,
    },
    Struct,
    Map,
    Decimal {
        scale: u32,
    },
    /// Days since 1970.
    Date,
    /// Units since 1970, with this many per second.
    Time {
        per_second: i64,
    },
    /// An unsupported type, with the number of its buffers.
    Other {
        name: &'static str,
        buffers: usize,
    },
}

/// The maximum nesting of structs; more is damage.
const DEEPEST: usize = 64;

/// Reads the header of a schema message.
pub(super) fn schema(header: Table<'_>) -> Option<Result<Vec<Field>, String>> {
    if header.i16(0).unwrap_or(0) != 0 {
        return Some(Err("its numbers are big-endian, which is not read".to_owned()));
    }
    fields(header, 1, DEEPEST).map(Ok)
}

fn fields(table: Table<'_>, number: usize, deepest: usize) -> Option<Vec<Field>> {
    match table.vector(number) {
        None => Some(Vec::new()),
        // The names alone take more bytes than there are elsewhere.
        Some(vector) => (0..vector.len).map(|index| field(vector.table(index)?, deepest.checked_sub(1)?)).collect(),
    }
}

fn field(table: Table<'_>, deepest: usize) -> Option<Field> {
    let dictionary = match table.table(4) {
        None => None,
        // The default of the format: signed, of 32 bits.
        Some(coded) => Some((coded.i64(0).unwrap_or(0), coded.table(1).map_or(Some(INDEX), int)?)),
    };
    let is_json = table.vector(6).is_some_and(|metadata| {
        let mut pairs = (0..metadata.len).map_while(|index| metadata.table(index));
        pairs.any(|pair| pair.string(0) == Some("ARROW:extension:name") && pair.string(1) == Some("arrow.json"))
    });
    Some(Field {
        name: table.string(0).unwrap_or_default().to_owned(),
        kind: kind(table.u8(2).unwrap_or(0), table.table(3)?)?,
        children: fields(table, 5, deepest)?,
        dictionary,
        is_json,
    })
}

const INDEX: Kind = Kind::Int { bytes: 4, signed: true };

fn int(table: Table<'_>) -> Option<Kind> {
    let bytes = match table.i32(0)? {
        8 => 1,
        16 => 2,
        32 => 4,
        64 => 8,
        _ => return None,
    };
    Some(Kind::Int { bytes, signed: table.u8(1).unwrap_or(0) != 0 })
}

/// Returns the kind of a type, by its number in the format's `union Type`.
fn kind(number: u8, table: Table<'_>) -> Option<Kind> {
    let size = |number| usize::try_from(table.i32(number).unwrap_or(0)).ok();
    let other = |name, buffers| Kind::Other { name, buffers };
    Some(match number {
        1 => Kind::Null,
        2 => int(table)?,
        3 => Kind::Float { bytes: *[2, 4, 8].get(usize::try_from(table.i16(0).unwrap_or(0)).ok()?)? },
        4 | 5 => Kind::Text { large: false },
        6 => Kind::Bool,
        7 if table.i32(2).unwrap_or(128) == 128 => {
            Kind::Decimal { scale: u32::try_from(table.i32(1).unwrap_or(0)).ok().filter(|&scale| scale <= 38)? }
        }
        7 => other("decimal", 2),
        8 if table.i16(0) == Some(0) => Kind::Date,
        8 => Kind::Time { per_second: 1_000 },
        9 => other("time", 2),
        10 => Kind::Time {
            per_second: *[1, 1_000, 1_000_000, 1_000_000_000].get(usize::try_from(table.i16(0).unwrap_or(0)).ok()?)?,
        },
        11 => other("interval", 2),
        12 => Kind::List { large: false },
        13 => Kind::Struct,
        // Numbers of types, and where it is dense, offsets.
        14 => other("union", if table.i16(0).unwrap_or(0) == 0 { 1 } else { 2 }),
        15 => Kind::FixedBytes { bytes: size(0)? },
        16 => Kind::FixedList { len: size(0)? },
        17 => Kind::Map,
        18 => other("duration", 2),
        19 | 20 => Kind::Text { large: true },
        21 => Kind::List { large: true },
        22 => other("run-end encoded", 0),
        23 | 24 => Kind::TextView,
        25 => Kind::ListView { large: false },
        26 => Kind::ListView { large: true },
        _ => return None,
    })
}

impl Kind {
    /// Returns the number of buffers of an array before those of its children, excluding the text buffers of views.
    pub(super) fn buffers(self) -> usize {
        match self {
            Kind::Null => 0,
            Kind::Struct | Kind::FixedList { .. } => 1,
            Kind::Bool
            | Kind::Int { .. }
            | Kind::Float { .. }
            | Kind::FixedBytes { .. }
            | Kind::List { .. }
            | Kind::Map
            | Kind::TextView
            | Kind::Decimal { .. }
            | Kind::Date
            | Kind::Time { .. } => 2,
            Kind::Text { .. } | Kind::ListView { .. } => 3,
            Kind::Other { buffers, .. } => buffers,
        }
    }
}

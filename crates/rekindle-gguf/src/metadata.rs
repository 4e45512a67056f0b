//! Metadata: typed values by key.

use std::fmt;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MetadataValue {
    /// Unsigned 8-bit integer.
    U8(u8),
    /// Signed 8-bit integer.
    I8(i8),
    /// Unsigned 16-bit integer.
    U16(u16),
    /// Signed 16-bit integer.
    I16(i16),
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Several values of one type.
    Array(MetadataArray),
}

/// An array of metadata values.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MetadataArray {
    /// Unsigned 8-bit integers.
    U8(Vec<u8>),
    /// Signed 8-bit integers.
    I8(Vec<i8>),
    /// Unsigned 16-bit integers.
    U16(Vec<u16>),
    /// Signed 16-bit integers.
    I16(Vec<i16>),
    /// Unsigned 32-bit integers.
    U32(Vec<u32>),
    /// Signed 32-bit integers.
    I32(Vec<i32>),
    /// Unsigned 64-bit integers.
    U64(Vec<u64>),
    /// Signed 64-bit integers.
    I64(Vec<i64>),
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// UTF-8 texts.
    String(Vec<String>),
    /// Arrays, each with its own type and length.
    Array(Vec<MetadataArray>),
}

/// Applies a macro to the scalar types that are stored as their little-endian bytes: number in a file, variant, type.
macro_rules! for_numbers {
    ($apply:ident) => {
        $apply! {
            0 U8 u8, 1 I8 i8, 2 U16 u16, 3 I16 i16, 4 U32 u32, 5 I32 i32, 6 F32 f32, 10 U64 u64, 11 I64 i64, 12 F64 f64
        }
    };
}
pub(crate) use for_numbers;

/// Number of booleans in a file.
pub(crate) const BOOL: u32 = 7;
/// Number of strings in a file.
pub(crate) const STRING: u32 = 8;
/// Number of arrays in a file.
pub(crate) const ARRAY: u32 = 9;

macro_rules! type_numbers {
    ($($id:literal $variant:ident $type:ty),*) => {
        impl MetadataValue {
            /// Returns the number of the type in a file.
            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(Self::$variant(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::String(_) => STRING,
                    Self::Array(_) => ARRAY,
                }
            }
        }

        impl MetadataArray {
            /// Returns the number of the elements' type in a file.
            pub(crate) fn element_type_id(&self) -> u32 {
                match self {
                    $(Self::$variant(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::String(_) => STRING,
                    Self::Array(_) => ARRAY,
                }
            }

            /// Returns the number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(values) => values.len(),)*
                    Self::Bool(values) => values.len(),
                    Self::String(values) => values.len(),
                    Self::Array(values) => values.len(),
                }
            }
        }

        $(impl From<$type> for MetadataValue {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        })*

        $(impl From<Vec<$type>> for MetadataValue {
            fn from(values: Vec<$type>) -> Self {
                Self::Array(MetadataArray::$variant(values))
            }
        })*
    };
}
for_numbers!(type_numbers);

impl From<bool> for MetadataValue {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for MetadataValue {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<String> for MetadataValue {
    fn from(value: String) -> Self {
        Self::String(value)
    }
}

impl From<Vec<String>> for MetadataValue {
    fn from(values: Vec<String>) -> Self {
        Self::Array(MetadataArray::String(values))
    }
}

impl From<Vec<bool>> for MetadataValue {
    fn from(values: Vec<bool>) -> Self {
        Self::Array(MetadataArray::Bool(values))
    }
}

impl MetadataArray {
    /// Returns true for an array without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl MetadataValue {
    /// Returns an integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// Returns a float of any width, or an integer that is not negative.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => self.as_u64().map(|value| value as f64),
        }
    }

    /// Returns a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// Returns a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    /// Returns an array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(MetadataArray::String(values)) => Some(values),
            _ => None,
        }
    }

    /// Returns an array of integers of any width that are not negative.
    pub fn as_integers(&self) -> Option<Vec<u64>> {
        let Self::Array(values) = self else { return None };
        match values {
            MetadataArray::U8(values) => Some(values.iter().map(|&value| value.into()).collect()),
            MetadataArray::U16(values) => Some(values.iter().map(|&value| value.into()).collect()),
            MetadataArray::U32(values) => Some(values.iter().map(|&value| value.into()).collect()),
            MetadataArray::U64(values) => Some(values.clone()),
            MetadataArray::I8(values) => values.iter().map(|&value| value.try_into().ok()).collect(),
            MetadataArray::I16(values) => values.iter().map(|&value| value.try_into().ok()).collect(),
            MetadataArray::I32(values) => values.iter().map(|&value| value.try_into().ok()).collect(),
            MetadataArray::I64(values) => values.iter().map(|&value| value.try_into().ok()).collect(),
            _ => None,
        }
    }
}

impl fmt::Display for MetadataValue {
    /// Shortens strings and arrays.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String(text) if text.chars().count() > 60 => {
                let start: String = text.chars().take(57).collect();
                write!(formatter, "{start:?}... ({} bytes)", text.len())
            }
            Self::String(text) => write!(formatter, "{text:?}"),
            Self::Bool(value) => write!(formatter, "{value}"),
            Self::F32(value) => write!(formatter, "{value}"),
            Self::F64(value) => write!(formatter, "{value}"),
            Self::I8(value) => write!(formatter, "{value}"),
            Self::I16(value) => write!(formatter, "{value}"),
            Self::I32(value) => write!(formatter, "{value}"),
            Self::I64(value) => write!(formatter, "{value}"),
            Self::U8(value) => write!(formatter, "{value}"),
            Self::U16(value) => write!(formatter, "{value}"),
            Self::U32(value) => write!(formatter, "{value}"),
            Self::U64(value) => write!(formatter, "{value}"),
            Self::Array(values) => write!(formatter, "[{} values]", values.len()),
        }
    }
}

use std::borrow::Cow;

use crate::Error;

/// A tensor as stored in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor<'a> {
    /// The type of the elements.
    pub dtype: RawDtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// The elements' bytes, little-endian and row-major.
    pub bytes: Cow<'a, [u8]>,
}

/// The element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are self-explanatory")]
pub enum RawDtype {
    U8,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    F64,
}

impl RawDtype {
    /// All variants.
    pub const ALL: [Self; 9] =
        [Self::U8, Self::I8, Self::I16, Self::I32, Self::I64, Self::F16, Self::Bf16, Self::F32, Self::F64];

    /// Returns the name used in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::I16 => "I16",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
        }
    }

    /// Returns the type with that name, if bitsandbytes stores tensors of it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Returns the size of an element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }
}

impl<'a> RawTensor<'a> {
    pub(super) fn u8(shape: Vec<usize>, bytes: &'a [u8]) -> Self {
        Self { dtype: RawDtype::U8, shape, bytes: Cow::Borrowed(bytes) }
    }

    pub(super) fn f32(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: RawDtype::F32, shape: vec![values.len()], bytes: Cow::Owned(bytes) }
    }

    /// Returns the values of an f32 tensor of any shape; `key` names it in errors.
    pub(super) fn to_f32(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.expect(RawDtype::F32, key)?;
        let (values, rest) = self.bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(stored(key, format!("has {} bytes, which is not a multiple of 4", self.bytes.len())));
        }
        Ok(values.iter().map(|&v| f32::from_le_bytes(v)).collect())
    }

    pub(super) fn expect(&self, dtype: RawDtype, key: &str) -> Result<(), Error> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(stored(key, format!("is stored as {}, expected {}", self.dtype.name(), dtype.name())))
    }
}

pub(super) fn stored(key: &str, reason: impl Into<String>) -> Error {
    Error::Stored { key: key.to_owned(), reason: reason.into() }
}

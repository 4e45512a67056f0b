use std::borrow::Cow;

use crate::{Dtype, Error};

/// A tensor as stored in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor<'a> {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// The elements' bytes, little-endian and row-major.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> RawTensor<'a> {
    pub(super) fn u8(shape: Vec<usize>, bytes: &'a [u8]) -> Self {
        Self { dtype: Dtype::U8, shape, bytes: Cow::Borrowed(bytes) }
    }

    pub(super) fn f32(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: vec![values.len()], bytes: Cow::Owned(bytes) }
    }

    /// Returns the values of an f32 tensor of any shape; `key` names it in errors.
    pub(super) fn to_f32(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.expect(Dtype::F32, key)?;
        let (values, rest) = self.bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(stored(key, format!("has {} bytes, which is not a multiple of 4", self.bytes.len())));
        }
        Ok(values.iter().map(|&v| f32::from_le_bytes(v)).collect())
    }

    pub(crate) fn expect(&self, dtype: Dtype, key: &str) -> Result<(), Error> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(stored(key, format!("is stored as {}, expected {}", self.dtype.name(), dtype.name())))
    }
}

pub(super) fn stored(key: &str, reason: impl Into<String>) -> Error {
    Error::Stored { key: key.to_owned(), reason: reason.into() }
}

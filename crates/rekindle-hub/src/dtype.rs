use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

/// Decodes whole blocks into as many elements.
pub type DecodeBlocks = fn(&[u8], &mut [f32]);

/// A format of blocks, in which several elements share scales. It is defined outside of this crate, for instance by GGUF.
#[derive(Clone, Copy)]
pub struct BlockFormat {
    /// The unique name.
    pub name: &'static str,
    /// The elements of a block.
    pub elements: usize,
    /// The bytes of a block.
    pub bytes: usize,
    /// The decoder, if there is one.
    pub decode: Option<DecodeBlocks>,
}

impl BlockFormat {
    /// Returns the elements of whole blocks; `None` without a decoder.
    pub fn to_f32(&self, blocks: &[u8]) -> Option<Vec<f32>> {
        let mut values = vec![0.0; blocks.len() / self.bytes * self.elements];
        self.decode?(blocks, &mut values);
        Some(values)
    }
}

impl fmt::Debug for BlockFormat {
    /// Writes the name, which is the same in every process; the address of a function is not.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name)
    }
}

impl PartialEq for BlockFormat {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for BlockFormat {}

impl PartialOrd for BlockFormat {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for BlockFormat {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name.cmp(other.name)
    }
}

impl Hash for BlockFormat {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// The element type of a stored tensor, with the names of the safetensors format.
///
/// The variants are in the order of the reference implementation (by alignment, then by its own list), because that
/// order determines the position of tensors in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned 8-bit integer; packed 4-bit weights are stored as these.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// 8-bit float with 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// 8-bit float with 4 exponent and 3 mantissa bits.
    F8E4M3,
    /// 8-bit power of two, 2^(byte − 127); scales are stored as these.
    F8E8M0,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// Blocks of several elements. No safetensors file has them.
    Blocks(BlockFormat),
}

impl Dtype {
    /// All of the safetensors format, in order.
    pub const ALL: [Self; 16] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E5M2,
        Self::F8E4M3,
        Self::F8E8M0,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// Returns the size of an element in bytes; of a block in [`Dtype::Blocks`].
    pub fn size(self) -> usize {
        match self {
            Dtype::Blocks(format) => format.bytes,
            Dtype::Bool | Dtype::U8 | Dtype::I8 | Dtype::F8E5M2 | Dtype::F8E4M3 | Dtype::F8E8M0 => 1,
            Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::BF16 => 2,
            Dtype::I32 | Dtype::U32 | Dtype::F32 => 4,
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
        }
    }

    /// Returns the number of elements of a block, 1 in all dtypes but [`Dtype::Blocks`].
    pub fn block_elements(self) -> usize {
        match self {
            Dtype::Blocks(format) => format.elements,
            _ => 1,
        }
    }

    /// Returns the dtype that a header calls `name`, or `None` if it is not supported.
    pub(crate) fn from_name(name: &str) -> Option<Dtype> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Returns the name in a safetensors header, or that of the format of blocks.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Blocks(format) => format.name,
            Dtype::Bool => "BOOL",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E8M0 => "F8_E8M0",
            Dtype::I16 => "I16",
            Dtype::U16 => "U16",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I32 => "I32",
            Dtype::U32 => "U32",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
        }
    }

    /// Returns PyTorch's name, which JSON files use: `bfloat16`, `float32`, …; for blocks, that of their format.
    pub fn torch_name(self) -> &'static str {
        match self {
            Dtype::Blocks(format) => format.name,
            Dtype::Bool => "bool",
            Dtype::U8 => "uint8",
            Dtype::I8 => "int8",
            Dtype::F8E5M2 => "float8_e5m2",
            Dtype::F8E4M3 => "float8_e4m3fn",
            Dtype::F8E8M0 => "float8_e8m0fnu",
            Dtype::I16 => "int16",
            Dtype::U16 => "uint16",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::I32 => "int32",
            Dtype::U32 => "uint32",
            Dtype::F32 => "float32",
            Dtype::F64 => "float64",
            Dtype::I64 => "int64",
            Dtype::U64 => "uint64",
        }
    }

    /// Returns the dtype that PyTorch calls `name`, or `None` if it is not supported.
    pub fn from_torch_name(name: &str) -> Option<Dtype> {
        Self::ALL.into_iter().find(|dtype| dtype.torch_name() == name)
    }

    /// Returns the bytes of a tensor of this `shape`, or `None` if the count overflows a `usize`, or the elements are not
    /// whole blocks.
    pub(crate) fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent))?;
        let block = self.block_elements();
        elements.is_multiple_of(block).then(|| (elements / block).checked_mul(self.size())).flatten()
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares names, sizes and order with the reference implementation.
    #[test]
    fn dtypes_agree_with_the_reference() {
        use safetensors::Dtype as Reference;
        let reference = [
            Reference::BOOL,
            Reference::U8,
            Reference::I8,
            Reference::F8_E5M2,
            Reference::F8_E4M3,
            Reference::F8_E8M0,
            Reference::I16,
            Reference::U16,
            Reference::F16,
            Reference::BF16,
            Reference::I32,
            Reference::U32,
            Reference::F32,
            Reference::F64,
            Reference::I64,
            Reference::U64,
        ];
        assert!(reference.is_sorted() && Dtype::ALL.is_sorted());
        for (ours, theirs) in Dtype::ALL.into_iter().zip(reference) {
            assert_eq!(ours.to_string(), theirs.to_string());
            assert_eq!(ours.size() * 8, theirs.bitsize());
            assert_eq!(Dtype::from_name(ours.name()), Some(ours));
            assert_eq!(Dtype::from_torch_name(ours.torch_name()), Some(ours));
        }
        assert_eq!(Dtype::from_name("F4"), None);
    }

    #[test]
    fn byte_counts_do_not_overflow() {
        assert_eq!(Dtype::F32.bytes_of(&[2, 3]), Some(24));
        assert_eq!(Dtype::F64.bytes_of(&[]), Some(8));
        assert_eq!(Dtype::BF16.bytes_of(&[5, 0]), Some(0));
        assert_eq!(Dtype::F32.bytes_of(&[usize::MAX, 2]), None);
        assert_eq!(Dtype::F32.bytes_of(&[usize::MAX / 2]), None);
    }
}

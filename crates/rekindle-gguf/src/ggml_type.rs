//! The element types of tensors.

use std::fmt;

use rekindle_hub::{BlockFormat, Dtype};

/// The element type of a tensor in a GGUF file. Quantized types store blocks of several elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
#[non_exhaustive]
pub enum GgmlType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// IEEE 754 double precision.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// 4 bits and a scale for 32 elements.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 elements.
    Q4_1,
    /// 5 bits and a scale for 32 elements.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 elements.
    Q5_1,
    /// 8 bits and a scale for 32 elements.
    Q8_0,
    /// 8 bits, a scale and a sum for 32 elements; for activations only.
    Q8_1,
    /// 2 bits; 4-bit scales and minima for 16 elements, two f16 factors for 256.
    Q2_K,
    /// 3 bits; 6-bit scales for 16 elements, an f16 factor for 256.
    Q3_K,
    /// 4 bits; 6-bit scales and minima for 32 elements, two f16 factors for 256.
    Q4_K,
    /// 5 bits; 6-bit scales and minima for 32 elements, two f16 factors for 256.
    Q5_K,
    /// 6 bits; 8-bit scales for 16 elements, an f16 factor for 256.
    Q6_K,
    /// 8 bits, an f32 scale and sums for 256 elements; for activations only.
    Q8_K,
    /// 4-bit indices into a table of 16 unevenly spaced values, and a scale for 32 elements.
    IQ4_NL,
    /// As `IQ4_NL`, with 6-bit scales for 32 elements and an f16 factor for 256.
    IQ4_XS,
    /// 1.56 bits, from a codebook.
    IQ1_S,
    /// 1.75 bits, from a codebook.
    IQ1_M,
    /// 2.06 bits, from a codebook.
    IQ2_XXS,
    /// 2.31 bits, from a codebook.
    IQ2_XS,
    /// 2.56 bits, from a codebook.
    IQ2_S,
    /// 3.06 bits, from a codebook.
    IQ3_XXS,
    /// 3.44 bits, from a codebook.
    IQ3_S,
    /// Ternary, 1.69 bits.
    TQ1_0,
    /// Ternary, 2.06 bits.
    TQ2_0,
    /// The OCP microscaling format: 4-bit floats (E2M1) and a power of two for 32 elements.
    MXFP4,
    /// 4-bit floats (E2M1) and an 8-bit float scale for 16 elements.
    NVFP4,
    /// One bit and a scale for 128 elements.
    Q1_0,
}

/// Number, name, elements of a block, and bytes of a block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 34] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q8_1, 9, "Q8_1", 32, 36),
    (GgmlType::Q2_K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3_K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::Q8_K, 15, "Q8_K", 256, 292),
    (GgmlType::IQ2_XXS, 16, "IQ2_XXS", 256, 66),
    (GgmlType::IQ2_XS, 17, "IQ2_XS", 256, 74),
    (GgmlType::IQ3_XXS, 18, "IQ3_XXS", 256, 98),
    (GgmlType::IQ1_S, 19, "IQ1_S", 256, 50),
    (GgmlType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (GgmlType::IQ3_S, 21, "IQ3_S", 256, 110),
    (GgmlType::IQ2_S, 22, "IQ2_S", 256, 82),
    (GgmlType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (GgmlType::I8, 24, "I8", 1, 1),
    (GgmlType::I16, 25, "I16", 1, 2),
    (GgmlType::I32, 26, "I32", 1, 4),
    (GgmlType::I64, 27, "I64", 1, 8),
    (GgmlType::F64, 28, "F64", 1, 8),
    (GgmlType::IQ1_M, 29, "IQ1_M", 256, 56),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::TQ1_0, 34, "TQ1_0", 256, 54),
    (GgmlType::TQ2_0, 35, "TQ2_0", 256, 66),
    (GgmlType::MXFP4, 39, "MXFP4", 32, 17),
    (GgmlType::NVFP4, 40, "NVFP4", 64, 36),
    (GgmlType::Q1_0, 41, "Q1_0", 128, 18),
];

impl GgmlType {
    /// Returns all types in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// Returns the type with this number in a file, or `None` if there is none.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// Returns the type with this name, in upper or lower case.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.2.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    fn row(self) -> &'static (Self, u32, &'static str, usize, usize) {
        TABLE.iter().find(|row| row.0 == self).expect("the table lists every type")
    }

    /// Returns the number in a file.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// Returns the name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Returns the number of elements in a block; 1 for types that are not quantized.
    pub fn block_size(self) -> usize {
        self.row().3
    }

    /// Returns the number of bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Returns true for types that store blocks.
    pub fn is_quantized(self) -> bool {
        self.block_size() > 1
    }

    /// Returns the dtype of a tensor in a checkpoint: blocks of a type with a decoder decode there too.
    pub fn dtype(self) -> Dtype {
        let (name, elements, bytes) = (self.name(), self.block_size(), self.block_bytes());
        fn decode<const ID: u32>(bytes: &[u8], out: &mut [f32]) {
            GgmlType::from_id(ID).expect("the id of a type").decode_blocks(bytes, out);
        }
        let decode: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => return Dtype::F32,
            Self::F16 => return Dtype::F16,
            Self::BF16 => return Dtype::BF16,
            Self::F64 => return Dtype::F64,
            Self::I8 => return Dtype::I8,
            Self::I16 => return Dtype::I16,
            Self::I32 => return Dtype::I32,
            Self::I64 => return Dtype::I64,
            Self::Q4_0 => decode::<2>,
            Self::Q4_1 => decode::<3>,
            Self::Q5_0 => decode::<6>,
            Self::Q5_1 => decode::<7>,
            Self::Q8_0 => decode::<8>,
            Self::Q2_K => decode::<10>,
            Self::Q3_K => decode::<11>,
            Self::Q4_K => decode::<12>,
            Self::Q5_K => decode::<13>,
            Self::Q6_K => decode::<14>,
            Self::IQ4_NL => decode::<20>,
            Self::MXFP4 => decode::<39>,
            _ => return Dtype::Blocks(BlockFormat { name, elements, bytes, decode: None }),
        };
        Dtype::Blocks(BlockFormat { name, elements, bytes, decode: Some(decode) })
    }

    /// Returns the bytes of a tensor of this `shape`, outermost dimension first. `None` if the count overflows a `u64`
    /// or the last dimension is not a multiple of the block.
    pub fn bytes_of(self, shape: &[u64]) -> Option<u64> {
        let (block, bytes) = (self.block_size() as u64, self.block_bytes() as u64);
        if !shape.last().copied().unwrap_or(1).is_multiple_of(block) {
            return None;
        }
        let elements = shape.iter().try_fold(1_u64, |product, &extent| product.checked_mul(extent))?;
        (elements / block).checked_mul(bytes)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_in_the_table_once() {
        let mut ids: Vec<u32> = GgmlType::all().map(GgmlType::id).collect();
        assert!(ids.is_sorted());
        ids.dedup();
        assert_eq!(ids.len(), TABLE.len());
        for kind in GgmlType::all() {
            assert_eq!(GgmlType::from_id(kind.id()), Some(kind));
            assert_eq!(GgmlType::from_name(&kind.name().to_lowercase()), Some(kind));
        }
        assert_eq!(GgmlType::from_id(4), None, "Q4_2 was removed");
    }

    #[test]
    fn every_block_decodes_as_its_own_type() {
        for kind in GgmlType::all().filter(|kind| kind.is_quantized()) {
            let Dtype::Blocks(format) = kind.dtype() else { panic!("{kind} has blocks") };
            assert_eq!(GgmlType::from_name(format.name), Some(kind));
            let bytes: Vec<u8> = (0..kind.block_bytes()).map(|at| (at * 37 % 120) as u8).collect();
            assert_eq!(format.to_f32(&bytes), kind.decode(&bytes).ok(), "{kind}");
        }
    }

    #[test]
    fn sizes_are_those_of_blocks_and_do_not_overflow() {
        assert_eq!(GgmlType::Q4_K.bytes_of(&[3, 512]), Some(3 * 2 * 144));
        assert_eq!(GgmlType::Q8_0.bytes_of(&[33]), None);
        assert_eq!(GgmlType::F32.bytes_of(&[]), Some(4));
        assert_eq!(GgmlType::F32.bytes_of(&[u64::MAX, 2]), None);
        assert_eq!(GgmlType::F32.bytes_of(&[u64::MAX / 2]), None);
        assert_eq!(GgmlType::Q6_K.bytes_of(&[0, 256]), Some(0));
    }
}

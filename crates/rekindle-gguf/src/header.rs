//! The header of a file: metadata and the table of tensors.
//!
//! All of it is untrusted. Every count and length is compared with the bytes that are left before anything is
//! allocated for it, and every offset is checked before a tensor is handed out.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::GgmlType;
use crate::metadata::{ARRAY, BOOL, MetadataArray, MetadataValue, STRING, for_numbers};

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
pub(crate) const VERSION: u32 = 3;
/// The key of the alignment of tensors.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// The alignment of a file without [`ALIGNMENT_KEY`].
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// Dimensions of a tensor at most.
pub(crate) const MAX_DIMENSIONS: usize = 4;
/// Bytes of a tensor's name at most.
pub(crate) const MAX_NAME_BYTES: usize = 63;
/// Bytes of a key at most.
pub(crate) const MAX_KEY_BYTES: usize = 65_535;
/// Arrays in arrays at most.
const MAX_DEPTH: usize = 4;

/// A tensor in the table of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) kind: GgmlType,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    /// The bytes in the file.
    pub(crate) range: Range<usize>,
}

/// A parsed and validated header.
#[derive(Clone, Debug, Default)]
pub(crate) struct GgufHeader {
    pub(crate) metadata: BTreeMap<String, MetadataValue>,
    /// In the order of the file.
    pub(crate) tensors: Vec<TensorEntry>,
    /// Index in `tensors` by name.
    pub(crate) by_name: BTreeMap<String, usize>,
}

impl GgufHeader {
    /// Parses the header of the file with these bytes. The error is the reason for a message.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut cursor = Cursor { bytes, at: 0 };
        check_magic(bytes)?;
        cursor.take(MAGIC.len(), "the magic number")?;
        let version: u32 = cursor.number("the version")?;
        check_version(version)?;
        let tensors: u64 = cursor.number("the number of tensors")?;
        let keys: u64 = cursor.number("the number of metadata keys")?;
        // A key has at least its length, a type and one byte.
        let keys = cursor.count(keys, 13, "metadata keys")?;
        let mut metadata = BTreeMap::new();
        for index in 0..keys {
            let key = cursor.string(&format!("key {index}"))?;
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                return Err(format!("key {index} has {} bytes; 1 to {MAX_KEY_BYTES} are allowed", key.len()));
            }
            let kind: u32 = cursor.number(&format!("the type of {key:?}"))?;
            let value = cursor.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("the key {key:?} occurs twice"));
            }
        }
        let alignment = alignment(&metadata)?;
        let tensors = cursor.tensors(tensors)?;
        let start = (cursor.at as u64).next_multiple_of(alignment);
        let mut header = Self { metadata, ..Self::default() };
        for StoredTensor { name, kind, shape, offset } in tensors {
            let range = place(&name, kind, &shape, offset, start, alignment, bytes.len() as u64)?;
            if header.by_name.insert(name.clone(), header.tensors.len()).is_some() {
                return Err(format!("two tensors are named {name:?}"));
            }
            header.tensors.push(TensorEntry { name, kind, shape, range });
        }
        check_overlaps(&header.tensors)?;
        Ok(header)
    }
}

/// Refuses files of other formats, by name where they are known.
fn check_magic(bytes: &[u8]) -> Result<(), String> {
    let Some(magic) = bytes.first_chunk::<4>() else {
        return Err(format!("the file has {} bytes; a GGUF file begins with \"GGUF\"", bytes.len()));
    };
    let known = match magic {
        b"GGUF" => return Ok(()),
        b"FUGG" | b"fugg" => "the bytes of \"GGUF\" in reverse order",
        b"lmgg" | b"fmgg" | b"tjgg" | b"algg" | b"ggml" | b"ggmf" | b"ggjt" | b"ggla" => {
            "a GGML file from before GGUF; convert the original model again"
        }
        [b'P', b'K', 3, 4] => "a zip archive, such as a PyTorch checkpoint",
        b"vers" => "a Git LFS pointer; download the file itself",
        b"<!DO" | b"<htm" | b"<HTM" => "an HTML page; the download failed",
        _ if bytes.get(8) == Some(&b'{') => "a safetensors file",
        _ => return Err(format!("it begins with {magic:02x?} instead of \"GGUF\"")),
    };
    Err(format!("it is {known}"))
}

fn check_version(version: u32) -> Result<(), String> {
    match version {
        2 | 3 => Ok(()),
        1 => Err("version 1 is not supported; versions 2 and 3 are".to_owned()),
        other if matches!(other.swap_bytes(), 1..=3) => {
            Err("it is big-endian; only little-endian is supported".to_owned())
        }
        other => Err(format!("version {other} is unknown; versions 2 and 3 are supported")),
    }
}

fn alignment(metadata: &BTreeMap<String, MetadataValue>) -> Result<u64, String> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(MetadataValue::U32(value)) if value.is_power_of_two() => Ok(u64::from(*value)),
        Some(value) => Err(format!("{ALIGNMENT_KEY} is {value}; a power of two of type u32 is required")),
    }
}

/// Returns the bytes of a tensor in the file.
fn place(
    name: &str,
    kind: GgmlType,
    shape: &[u64],
    offset: u64,
    start: u64,
    alignment: u64,
    length: u64,
) -> Result<Range<usize>, String> {
    let size = kind.bytes_of(shape).ok_or_else(|| {
        let (block, columns) = (kind.block_size() as u64, shape.last().copied().unwrap_or(1));
        if columns.is_multiple_of(block) {
            format!("tensor {name:?} of shape {shape:?} has too many bytes")
        } else {
            format!("tensor {name:?} is {kind} with {columns} columns, which is not a multiple of its block of {block}")
        }
    })?;
    if !offset.is_multiple_of(alignment) {
        return Err(format!("the offset {offset} of tensor {name:?} is not a multiple of the alignment {alignment}"));
    }
    let begin = start.checked_add(offset);
    let end = begin.and_then(|begin| begin.checked_add(size)).filter(|end| *end <= length || size == 0);
    let (Some(begin), Some(end)) = (begin, end) else {
        return Err(format!(
            "tensor {name:?} has {size} bytes at {offset} behind {start}, and the file has {length}: it is truncated"
        ));
    };
    if size == 0 {
        return Ok(0..0);
    }
    // Both are at most the length of a slice.
    Ok(begin as usize..end as usize)
}

fn check_overlaps(tensors: &[TensorEntry]) -> Result<(), String> {
    let mut sorted: Vec<&TensorEntry> = tensors.iter().filter(|tensor| !tensor.range.is_empty()).collect();
    sorted.sort_by_key(|tensor| tensor.range.start);
    match sorted.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        Some(pair) => Err(format!("tensors {:?} and {:?} overlap", pair[0].name, pair[1].name)),
        None => Ok(()),
    }
}

/// A tensor as it is described in the table.
struct StoredTensor {
    name: String,
    kind: GgmlType,
    shape: Vec<u64>,
    offset: u64,
}

/// A position in the bytes of a file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A scalar that is stored as its little-endian bytes.
trait Number: Sized {
    const BYTES: usize;
    fn read(bytes: &[u8]) -> Option<Self>;
}

macro_rules! numbers {
    ($($id:literal $variant:ident $type:ident),*) => {
        $(impl Number for $type {
            const BYTES: usize = size_of::<$type>();
            fn read(bytes: &[u8]) -> Option<Self> {
                Some($type::from_le_bytes(bytes.try_into().ok()?))
            }
        })*

        impl Cursor<'_> {
            fn value(&mut self, kind: u32, key: &str) -> Result<MetadataValue, String> {
                let what = format!("the value of {key:?}");
                Ok(match kind {
                    $($id => MetadataValue::$variant(self.number(&what)?),)*
                    BOOL => MetadataValue::Bool(self.boolean(&what)?),
                    STRING => MetadataValue::String(self.string(&what)?),
                    ARRAY => MetadataValue::Array(self.array(&what, 0)?),
                    other => return Err(format!("{key:?} has the unknown type {other}")),
                })
            }

            fn array(&mut self, what: &str, depth: usize) -> Result<MetadataArray, String> {
                let kind: u32 = self.number(what)?;
                let count: u64 = self.number(what)?;
                Ok(match kind {
                    $($id => MetadataArray::$variant(self.several(count, $type::BYTES, what, Self::number::<$type>)?),)*
                    BOOL => MetadataArray::Bool(self.several(count, 1, what, Self::boolean)?),
                    STRING => MetadataArray::String(self.several(count, 8, what, Self::string)?),
                    ARRAY if depth == MAX_DEPTH => return Err(format!("{what} has more than {MAX_DEPTH} nested arrays")),
                    ARRAY => MetadataArray::Array(self.several(count, 12, what, |cursor, what| cursor.array(what, depth + 1))?),
                    other => return Err(format!("{what} has elements of the unknown type {other}")),
                })
            }
        }
    };
}
for_numbers!(numbers);

impl<'a> Cursor<'a> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], String> {
        let Some(taken) = self.bytes.get(self.at..).and_then(|rest| rest.get(..count)) else {
            let left = self.remaining();
            return Err(format!(
                "{what} needs {count} bytes at {} and {left} are left: the file is truncated",
                self.at
            ));
        };
        self.at += count;
        Ok(taken)
    }

    fn number<T: Number>(&mut self, what: &str) -> Result<T, String> {
        T::read(self.take(T::BYTES, what)?).ok_or_else(|| format!("{what} is invalid"))
    }

    fn boolean(&mut self, what: &str) -> Result<bool, String> {
        match self.take(1, what)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{what} is a boolean with the byte {other}; 0 or 1 are allowed")),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let length: u64 = self.number(what)?;
        let length = self.count(length, 1, &format!("bytes of {what}"))?;
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes).map_err(|error| format!("{what} is not UTF-8: {error}"))?;
        Ok(text.to_owned())
    }

    /// Returns a count of elements of at least `bytes` each, if as many can be left.
    fn count(&self, count: u64, bytes: usize, what: &str) -> Result<usize, String> {
        let possible = (self.remaining() / bytes) as u64;
        if count > possible {
            return Err(format!("{count} {what} are announced and {} bytes are left", self.remaining()));
        }
        Ok(count as usize)
    }

    fn several<T>(
        &mut self,
        count: u64,
        bytes: usize,
        what: &str,
        mut read: impl FnMut(&mut Self, &str) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let count = self.count(count, bytes, &format!("elements in {what}"))?;
        (0..count).map(|_| read(self, what)).collect()
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<StoredTensor>, String> {
        // Lengths of the name and of the shape, type and offset.
        let count = self.count(count, 24, "tensors")?;
        (0..count).map(|index| self.tensor(index)).collect()
    }

    fn tensor(&mut self, index: usize) -> Result<StoredTensor, String> {
        let name = self.string(&format!("the name of tensor {index}"))?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            let length = name.len();
            return Err(format!("the name of tensor {index} has {length} bytes; 1 to {MAX_NAME_BYTES} are allowed"));
        }
        let dimensions: u32 = self.number(&format!("the dimensions of {name:?}"))?;
        if dimensions as usize > MAX_DIMENSIONS {
            return Err(format!("tensor {name:?} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed"));
        }
        let what = format!("the shape of {name:?}");
        let mut shape: Vec<u64> = self.several(dimensions.into(), 8, &what, Self::number)?;
        // The file begins with the contiguous dimension.
        shape.reverse();
        let kind: u32 = self.number(&format!("the type of {name:?}"))?;
        let kind = GgmlType::from_id(kind).ok_or_else(|| format!("tensor {name:?} has the unknown type {kind}"))?;
        let offset = self.number(&format!("the offset of {name:?}"))?;
        Ok(StoredTensor { name, kind, shape, offset })
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Random changes of a valid header: no panic, and every tensor that is handed out lies in the file and has the
    /// bytes of its shape.
    #[test]
    fn tensors_of_a_changed_header_lie_in_the_file() {
        let valid = include_bytes!("../goldens/python.gguf");
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let (mut opened, mut refused) = (0, 0);
        for _ in 0..100_000 {
            let mut bytes = valid.to_vec();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..4) {
                    0 => bytes[at] = random.random(),
                    1 => bytes[at] ^= 1 << random.random_range(0..8_u32),
                    2 => bytes.truncate(at.max(1)),
                    _ => {
                        let wide = (random.random::<u64>() >> random.random_range(0..64_u32)).to_le_bytes();
                        let end = (at + 8).min(bytes.len());
                        bytes[at..end].copy_from_slice(&wide[..end - at]);
                    }
                }
            }
            let Ok(header) = GgufHeader::parse(&bytes) else {
                refused += 1;
                continue;
            };
            opened += 1;
            for TensorEntry { kind, shape, range, .. } in &header.tensors {
                assert_eq!(bytes[range.clone()].len() as u64, kind.bytes_of(shape).unwrap());
            }
        }
        assert!(opened > 1_000 && refused > 10_000, "{opened} and {refused}");
    }
}

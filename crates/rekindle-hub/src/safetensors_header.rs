//! The header of a safetensors file: 8 bytes of length, that many bytes of JSON, then the tensors.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::{Dtype, Error};

/// The size of the length before the JSON, a little-endian u64.
pub(crate) const LENGTH_BYTES: usize = 8;

/// The longest JSON that the reference implementation reads or writes.
pub(crate) const MAX_JSON_BYTES: usize = 100_000_000;

/// The key of a file's metadata; no tensor can have this name.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// A header whose ranges were all validated against its file.
#[derive(Debug)]
pub(crate) struct SafetensorsHeader {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, TensorEntry>,
}

/// The location, dtype and shape of a tensor.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// The byte range in the file, within its bounds.
    pub(crate) range: Range<usize>,
}

impl SafetensorsHeader {
    /// Parses and validates the header of `file`, the whole content of `path`, without touching the tensor data.
    ///
    /// The tensors must cover the rest of the file without gaps or overlaps, each with exactly the bytes of its shape
    /// and dtype.
    pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<SafetensorsHeader, Error> {
        SafetensorsHeader::read(path, file, file.len())
    }

    /// Parses the header of a file of `size` bytes from its first bytes `head`, which contain the whole header.
    pub(crate) fn read(path: &Path, head: &[u8], size: usize) -> Result<SafetensorsHeader, Error> {
        let malformed = |reason: String| Error::malformed(path, reason);
        let json = split(head).map_err(malformed)?;
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|error| malformed(format!("the header is not valid: {error}")))?;

        let mut listed = raw.tensors;
        listed.sort_by_key(|(_, info)| info.data_offsets);
        let data_start = LENGTH_BYTES + json.len();
        let length = size.saturating_sub(data_start);
        let mut tensors = BTreeMap::new();
        let mut end_of_last = 0;
        for (name, info) in listed {
            let dtype = Dtype::from_name(&info.dtype).ok_or_else(|| Error::Unsupported {
                path: path.to_path_buf(),
                reason: format!("tensor {name:?} has the unsupported dtype {:?}", info.dtype),
            })?;
            let (start, end) = info.data_offsets;
            if start != end_of_last || end < start {
                return Err(malformed(format!(
                    "tensor {name:?} is at bytes {start}..{end}, but the previous tensor ends at {end_of_last}"
                )));
            }
            if dtype.bytes_of(&info.shape) != Some(end - start) {
                return Err(malformed(format!(
                    "tensor {name:?} has {} bytes, which do not fit shape {:?} of {dtype}",
                    end - start,
                    info.shape
                )));
            }
            if end > length {
                return Err(malformed(format!(
                    "truncated: tensor {name:?} ends at byte {end} of the data, the file has only {}; \
                     copy or download it again",
                    length
                )));
            }
            end_of_last = end;
            let entry = TensorEntry { dtype, shape: info.shape, range: data_start + start..data_start + end };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(malformed(format!("two tensors are named {name:?}")));
            }
        }
        if end_of_last != length {
            return Err(malformed(format!("{} bytes after the last tensor belong to no tensor", length - end_of_last)));
        }
        Ok(SafetensorsHeader { metadata: raw.metadata, tensors })
    }
}

/// Returns the number of header bytes of a file that begins with `head`.
#[cfg(feature = "network")]
pub(crate) fn header_length(head: &[u8]) -> Option<u64> {
    let (length, _) = head.split_first_chunk::<LENGTH_BYTES>()?;
    Some(u64::from_le_bytes(*length))
        .filter(|length| *length <= MAX_JSON_BYTES as u64)
        .map(|json| json + LENGTH_BYTES as u64)
}

/// Returns the header's JSON from the beginning of a file.
fn split(file: &[u8]) -> Result<&[u8], String> {
    // Git leaves this text in place of a large file; its first 8 bytes would be read as a huge length.
    if file.starts_with(b"version https://git-lfs") {
        return Err("a Git LFS pointer, not the weights; run \"git lfs pull\" in its directory".to_owned());
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("truncated: {} bytes are too few for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_JSON_BYTES as u64 {
        return Err(format!("not a safetensors file: its first 8 bytes declare a header of {length} bytes"));
    }
    rest.get(..length as usize).ok_or_else(|| {
        format!(
            "truncated: the header should have {length} bytes, only {} follow; \
             copy or download it again",
            rest.len()
        )
    })
}

/// The unvalidated JSON; a list of tensors, so that duplicate names are detected.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawEntry)>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut metadata: Option<Option<BTreeMap<String, String>>> = None;
                let mut tensors = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key != METADATA_KEY {
                        tensors.push((key, map.next_value()?));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(A::Error::duplicate_field(METADATA_KEY));
                    }
                }
                Ok(RawHeader { metadata: metadata.flatten().unwrap_or_default(), tensors })
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a file with this JSON followed by `data` zero bytes.
    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse(file: &[u8]) -> Result<SafetensorsHeader, Error> {
        SafetensorsHeader::parse(Path::new("m.safetensors"), file)
    }

    const TWO: &str = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]},"#,
        r#""a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#
    );

    #[test]
    fn every_tensor_is_found() {
        let header = parse(&file(TWO, 14)).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        let start = LENGTH_BYTES + TWO.len();
        let a = &header.tensors["a"];
        assert_eq!((a.dtype, &a.shape[..]), (Dtype::F32, &[1, 2][..]));
        assert_eq!(a.range, start..start + 8);
        assert_eq!(header.tensors["b"].range, start + 8..start + 14);
    }

    #[test]
    fn malformed_headers_are_described() {
        let one = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let entry = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
        let huge = usize::MAX;
        let cases = [
            (vec![1, 2, 3], "3 bytes are too few"),
            (file(&one("[2]", "[0,8]"), 7), "truncated: tensor \"a\" ends at byte 8"),
            (file(&one("[2]", "[0,8]"), 9), "1 bytes after the last tensor"),
            (file(&one("[3]", "[0,8]"), 8), "do not fit shape [3] of F32"),
            (file(&one("[2]", "[4,12]"), 12), "the previous tensor ends at 0"),
            (file(&one("[2]", "[8,0]"), 8), "is at bytes 8..0"),
            (file(&one("[2]", &format!("[0,{huge}]")), 8), "do not fit"),
            (file(&one(&format!("[{huge},{huge}]"), "[0,8]"), 8), "do not fit"),
            (file(&one("[-1]", "[0,8]"), 8), "the header is not valid"),
            (file(&one("[2]", "[0]"), 8), "the header is not valid"),
            (file("[]", 0), "an object of tensors by name"),
            (file("{", 0), "the header is not valid"),
            (file(&format!(r#"{{"a":{entry},"a":{entry}}}"#), 0), "two tensors are named \"a\""),
            (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "duplicate field"),
            (b"\x05\0\0\0\0\0\0\0{\"\xFF\":".to_vec(), "the header is not valid"),
            (b"\x05\0\0\0\0\0\0\0{}".to_vec(), "the header should have 5 bytes"),
            (vec![0xFF; 64], "not a safetensors file"),
            (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git lfs pull"),
        ];
        for (bytes, expected) in cases {
            let error = parse(&bytes).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn an_unsupported_dtype_is_named() {
        let json = r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#;
        let error = parse(&file(json, 1)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("\"a\" has the unsupported dtype \"F4\""), "{error}");
    }

    /// Tries every truncation and every value of every header byte: the reader must never panic, and must accept
    /// exactly what the reference implementation accepts.
    #[test]
    fn mutations_are_judged_like_the_reference_does() {
        let agree = |bytes: &[u8], what: &dyn fmt::Display| {
            let ours = parse(bytes);
            if let Err(Error::Unsupported { .. }) = ours {
                return;
            }
            let theirs = safetensors::SafeTensors::deserialize(bytes);
            assert_eq!(ours.is_ok(), theirs.is_ok(), "{what}: {ours:?} / {theirs:?}");
            for entry in ours.iter().flat_map(|header| header.tensors.values()) {
                assert!(bytes.get(entry.range.clone()).is_some(), "{what}: {entry:?}");
            }
        };
        let valid = file(TWO, 14);
        for length in 0..=valid.len() {
            agree(&valid[..length], &format_args!("first {length} bytes"));
        }
        for position in 0..valid.len() - 14 {
            let mut mutated = valid.clone();
            for value in 0..=u8::MAX {
                mutated[position] = value;
                agree(&mutated, &format_args!("byte {position} = {value}"));
            }
        }
    }
}

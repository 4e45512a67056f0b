//! The header of a safetensors file: 8 bytes of length, that many bytes of JSON, then the tensors.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::{Dtype, Error};

/// Bytes before the JSON: its length as a little-endian u64.
pub(crate) const LENGTH_BYTES: usize = 8;

/// The longest JSON that the reference implementation reads or writes.
pub(crate) const MAX_JSON_BYTES: usize = 100_000_000;

/// The key under which a file keeps its own notes; no tensor can have this name.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// A header whose every range was checked against the file that it came from.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies and what it holds.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Position in the whole file, inside its bounds.
    pub(crate) range: Range<usize>,
}

impl Header {
    /// Parses and checks the header of `file`, the whole content of `path`, touching nothing behind
    /// the header.
    ///
    /// The tensors must cover the rest of the file without gap or overlap, each with exactly the
    /// bytes of its shape and dtype.
    pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header, Error> {
        Header::read(path, file, file.len())
    }

    /// The same of a file of `size` bytes that begins with `head`, which holds all of the header.
    pub(crate) fn read(path: &Path, head: &[u8], size: usize) -> Result<Header, Error> {
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
                reason: format!("tensor {name:?} has dtype {:?}, which is not read", info.dtype),
            })?;
            let (start, end) = info.data_offsets;
            if start != end_of_last || end < start {
                return Err(malformed(format!(
                    "tensor {name:?} lies at bytes {start}..{end}, but the one before it ends at {end_of_last}"
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
            let entry = Entry { dtype, shape: info.shape, range: data_start + start..data_start + end };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(malformed(format!("two tensors are named {name:?}")));
            }
        }
        if end_of_last != length {
            return Err(malformed(format!("{} bytes after the last tensor belong to none", length - end_of_last)));
        }
        Ok(Header { metadata: raw.metadata, tensors })
    }
}

/// How many bytes of a file that begins with these are its header.
#[cfg(feature = "network")]
pub(crate) fn length(head: &[u8]) -> Option<u64> {
    let (length, _) = head.split_first_chunk::<LENGTH_BYTES>()?;
    Some(u64::from_le_bytes(*length))
        .filter(|length| *length <= MAX_JSON_BYTES as u64)
        .map(|json| json + LENGTH_BYTES as u64)
}

/// The JSON of the header of a file that begins with `file`.
fn split(file: &[u8]) -> Result<&[u8], String> {
    // What git leaves in place of a large file; its first 8 bytes would read as a huge length.
    if file.starts_with(b"version https://git-lfs") {
        return Err("a Git LFS pointer, not the weights; run \"git lfs pull\" there".to_owned());
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("truncated: {} bytes are too few for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_JSON_BYTES as u64 {
        return Err(format!("not a safetensors file: its first 8 bytes announce a header of {length} bytes"));
    }
    rest.get(..length as usize).ok_or_else(|| {
        format!(
            "truncated: the header should have {length} bytes, only {} follow; \
             copy or download it again",
            rest.len()
        )
    })
}

/// The JSON as it stands, before any check; a list of tensors, so that a name used twice is seen.
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

    /// A file of this JSON followed by `data` zero bytes.
    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse(file: &[u8]) -> Result<Header, Error> {
        Header::parse(Path::new("m.safetensors"), file)
    }

    const TWO: &str = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]},"#,
        r#""a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#
    );

    #[test]
    fn finds_every_tensor() {
        let header = parse(&file(TWO, 14)).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        let start = LENGTH_BYTES + TWO.len();
        let a = &header.tensors["a"];
        assert_eq!((a.dtype, &a.shape[..]), (Dtype::F32, &[1, 2][..]));
        assert_eq!(a.range, start..start + 8);
        assert_eq!(header.tensors["b"].range, start + 8..start + 14);
    }

    #[test]
    fn says_what_is_malformed() {
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
            (file(&one("[2]", "[4,12]"), 12), "the one before it ends at 0"),
            (file(&one("[2]", "[8,0]"), 8), "lies at bytes 8..0"),
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
    fn names_a_dtype_that_is_not_read() {
        let json = r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#;
        let error = parse(&file(json, 1)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("\"a\" has dtype \"F4\""), "{error}");
    }

    /// Every truncation and every value of every header byte: never a panic, and accepted exactly
    /// when the reference implementation accepts it.
    #[test]
    fn judges_mutations_as_the_reference_does() {
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

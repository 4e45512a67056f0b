//! Writing, one tensor at a time.

use std::collections::BTreeSet;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rekindle_hub::{AtomicFile, TensorWriter};

use crate::file::{SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, SplitName};
use crate::header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS, MAX_KEY_BYTES, MAX_NAME_BYTES, VERSION};
use crate::metadata::{MetadataArray, MetadataValue, for_numbers};
use crate::{Error, GgmlType};

/// The description of a tensor to write, without its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensorSpec {
    /// The name, at most 63 bytes.
    pub name: String,
    /// The element type.
    pub kind: GgmlType,
    /// The dimensions, outermost first as in PyTorch; 1 to 4.
    pub shape: Vec<u64>,
}

impl GgufTensorSpec {
    /// Creates the description of a tensor.
    pub fn new(name: impl Into<String>, kind: GgmlType, shape: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), kind, shape: shape.into() }
    }

    /// Returns the number of bytes, or `None` if it overflows or rows are not whole blocks.
    pub fn bytes(&self) -> Option<u64> {
        self.kind.bytes_of(&self.shape)
    }
}

/// Writes a file with these keys and tensors to `out`, in their order.
///
/// `fill(index, out)` writes the elements of `tensors[index]`, row-major and little-endian ([`GgmlType::quantize`]).
/// Tensors are aligned to `general.alignment`, or 32 bytes.
///
/// # Errors
/// [`Error::Unwritable`] with `path` in its message for names, shapes or keys that a file cannot have, and if `fill`
/// writes more or fewer bytes than a tensor has; errors of `fill` and of `out`.
pub fn write_gguf(
    path: &Path,
    out: &mut dyn Write,
    metadata: &[(String, MetadataValue)],
    tensors: &[GgufTensorSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let refuse = |reason: String| Error::unwritable(path, reason);
    let failed = |error: io::Error| match error.downcast::<Error>() {
        Ok(own) => own,
        Err(error) => match error.downcast::<rekindle_hub::Error>() {
            Ok(own) => Error::File(own),
            Err(source) => Error::File(rekindle_hub::Error::Io { path: path.to_path_buf(), source }),
        },
    };
    let alignment = alignment(metadata).map_err(refuse)?;
    let header = encode_header(metadata, tensors, alignment).map_err(refuse)?;
    out.write_all(&header).map_err(failed)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let size = tensor.bytes().expect("encode_header checked it");
        let mut elements = TensorWriter::new(out, size);
        let filled = fill(index, &mut elements);
        let (missing, overrun) = (elements.missing(), elements.overrun());
        let GgufTensorSpec { name, kind, shape } = tensor;
        // Checked first, because a `fill` that wrote too much fails for that reason.
        if overrun > 0 {
            let reason =
                format!("{overrun} bytes too many were written for tensor {name:?}, {kind} of shape {shape:?}");
            return Err(Error::unwritable(path, reason));
        }
        filled.map_err(failed)?;
        if missing > 0 {
            let reason = format!("{missing} bytes too few were written for tensor {name:?}, {kind} of shape {shape:?}");
            return Err(Error::unwritable(path, reason));
        }
        let padding = size.next_multiple_of(alignment) - size;
        io::copy(&mut io::Read::take(io::repeat(0), padding), out).map_err(failed)?;
    }
    Ok(())
}

/// Writes a model to `path` atomically, or to several files of at most `max_file_bytes` of tensors each if they do not
/// fit into one. Several files are named `stem-00001-of-00003.gguf`, and appear once all are complete.
///
/// A tensor that is larger than the limit has a file of its own. Returns the paths of the files.
///
/// # Errors
/// Those of [`write_gguf`]; [`Error::File`], for instance on a full disk. No file appears before all are written.
pub fn write_gguf_files(
    path: &Path,
    max_file_bytes: Option<u64>,
    metadata: &[(String, MetadataValue)],
    tensors: &[GgufTensorSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<Vec<PathBuf>, Error> {
    check_names(tensors).map_err(|reason| Error::unwritable(path, reason))?;
    let parts = split(tensors, max_file_bytes.unwrap_or(u64::MAX));
    let mut pending = Vec::new();
    let mut first = 0;
    for (number, count) in parts.iter().enumerate() {
        let tensors_here = &tensors[first..first + count];
        let mut here = metadata.to_vec();
        let path = if parts.len() == 1 {
            path.to_path_buf()
        } else {
            if number > 0 {
                here.retain(|(key, _)| key == ALIGNMENT_KEY);
            }
            let of = u16::try_from(parts.len()).map_err(|_| {
                Error::unwritable(path, format!("it would have {} files; 65535 are possible", parts.len()))
            })?;
            here.push((SPLIT_NO.to_owned(), MetadataValue::U16(number as u16)));
            here.push((SPLIT_COUNT.to_owned(), MetadataValue::U16(of)));
            here.push((SPLIT_TENSORS.to_owned(), MetadataValue::I32(tensors.len() as i32)));
            SplitName::of(path, parts.len() as u64).file(number as u64 + 1)
        };
        let mut out = BufWriter::with_capacity(1 << 20, AtomicFile::create(&path)?);
        write_gguf(&path, &mut out, &here, tensors_here, |index, out| fill(first + index, out))?;
        let file = out
            .into_inner()
            .map_err(|error| Error::File(rekindle_hub::Error::Io { path: path.clone(), source: error.into_error() }))?;
        pending.push((path, file));
        first += count;
    }
    let mut paths = Vec::new();
    for (path, file) in pending {
        file.commit()?;
        paths.push(path);
    }
    Ok(paths)
}

/// Returns the number of tensors of each file, in order; one file at least.
fn split(tensors: &[GgufTensorSpec], max_file_bytes: u64) -> Vec<usize> {
    let (mut parts, mut count, mut bytes) = (Vec::new(), 0, 0_u64);
    for tensor in tensors {
        let size = tensor.bytes().unwrap_or(0);
        if count > 0 && bytes.saturating_add(size) > max_file_bytes {
            parts.push(count);
            (count, bytes) = (0, 0);
        }
        count += 1;
        bytes = bytes.saturating_add(size);
    }
    parts.push(count);
    parts
}

fn alignment(metadata: &[(String, MetadataValue)]) -> Result<u64, String> {
    match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some((_, MetadataValue::U32(value))) if value.is_power_of_two() => Ok(u64::from(*value)),
        Some((_, value)) => Err(format!("{ALIGNMENT_KEY} is {value}; a power of two of type u32 is required")),
    }
}

fn check_names(tensors: &[GgufTensorSpec]) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for GgufTensorSpec { name, shape, .. } in tensors {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "the tensor name {name:?} has {} bytes; 1 to {MAX_NAME_BYTES} are allowed",
                name.len()
            ));
        }
        if !seen.insert(name) {
            return Err(format!("two tensors are named {name:?}"));
        }
        if shape.is_empty() || shape.len() > MAX_DIMENSIONS {
            return Err(format!("tensor {name:?} has {} dimensions; 1 to {MAX_DIMENSIONS} are allowed", shape.len()));
        }
    }
    Ok(())
}

/// Encodes everything before the tensors' data, padded to the alignment.
fn encode_header(
    metadata: &[(String, MetadataValue)],
    tensors: &[GgufTensorSpec],
    alignment: u64,
) -> Result<Vec<u8>, String> {
    check_names(tensors)?;
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut seen = BTreeSet::new();
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(format!("a key has {} bytes; 1 to {MAX_KEY_BYTES} are allowed", key.len()));
        }
        if !seen.insert(key) {
            return Err(format!("the key {key:?} occurs twice"));
        }
        put_string(&mut out, key);
        out.extend(value.type_id().to_le_bytes());
        put_value(&mut out, value);
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        let GgufTensorSpec { name, kind, shape } = tensor;
        let size = tensor.bytes().ok_or_else(|| {
            format!(
                "tensor {name:?} of shape {shape:?} cannot be {kind}: rows are not whole blocks, or it is too large"
            )
        })?;
        put_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        // The contiguous dimension is first.
        shape.iter().rev().for_each(|extent| out.extend(extent.to_le_bytes()));
        out.extend(kind.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = size
            .checked_next_multiple_of(alignment)
            .and_then(|size| offset.checked_add(size))
            .ok_or_else(|| "the tensors have too many bytes".to_owned())?;
    }
    out.resize((out.len() as u64).next_multiple_of(alignment) as usize, 0);
    Ok(out)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

macro_rules! put_values {
    ($($id:literal $variant:ident $type:ty),*) => {
        fn put_value(out: &mut Vec<u8>, value: &MetadataValue) {
            match value {
                $(MetadataValue::$variant(value) => out.extend(value.to_le_bytes()),)*
                MetadataValue::Bool(value) => out.push(u8::from(*value)),
                MetadataValue::String(text) => put_string(out, text),
                MetadataValue::Array(values) => put_array(out, values),
            }
        }

        fn put_array(out: &mut Vec<u8>, values: &MetadataArray) {
            out.extend(values.element_type_id().to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            match values {
                $(MetadataArray::$variant(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),)*
                MetadataArray::Bool(values) => out.extend(values.iter().map(|value| u8::from(*value))),
                MetadataArray::String(values) => values.iter().for_each(|text| put_string(out, text)),
                MetadataArray::Array(values) => values.iter().for_each(|values| put_array(out, values)),
            }
        }
    };
}
for_numbers!(put_values);

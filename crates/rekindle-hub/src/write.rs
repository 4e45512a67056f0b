use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::atomic::AtomicFile;
use crate::safetensors_header::{LENGTH_BYTES, MAX_JSON_BYTES, METADATA_KEY};
use crate::{Dtype, Error, TensorWriter};

/// The description of a tensor to write, without its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the file.
    pub name: String,
    /// The dtype to store.
    pub dtype: Dtype,
    /// The dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Creates the description of a tensor.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }
}

/// Writes a safetensors file atomically, one tensor at a time.
///
/// `fill(index, out)` writes the elements of `tensors[index]`, row-major and little-endian (see
/// [`write_f32`](crate::write_f32)). It is called once per tensor in file order, which is that of the reference
/// implementation: dtypes with the largest alignment first, then by name. The same input gives the same bytes.
/// transformers expects `format = pt` in `metadata`.
///
/// # Errors
/// [`Error::Unwritable`] if two tensors share a name, a size overflows, or `fill` writes more or fewer bytes than shape
/// and dtype require; errors of `fill`; [`Error::Io`]. On error `path` is unchanged.
pub fn write_safetensors(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[TensorSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let all = (0..tensors.len()).collect();
    write_selected(path, metadata, tensors, all, &mut fill)
}

/// Implements [`write_safetensors`] for the tensors at the given indices.
pub(crate) fn write_selected(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[TensorSpec],
    mut selected: Vec<usize>,
    fill: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    selected.sort_by_key(|&index| {
        let tensor = &tensors[index];
        (std::cmp::Reverse(tensor.dtype), &tensor.name)
    });
    let header = LayoutHeader { metadata, entries: layout(path, tensors, &selected)? };
    let mut out = BufWriter::new(AtomicFile::create(path)?);
    out.write_all(&header.encode(path)?).map_err(Error::io(path))?;
    for (index, entry) in selected.into_iter().zip(&header.entries) {
        let [start, end] = entry.data_offsets;
        let mut elements = TensorWriter::new(&mut out, end - start);
        let filled = fill(index, &mut elements);
        let (missing, overrun) = (elements.missing(), elements.overrun());
        // Checked first, because a `fill` that wrote too much fails for that reason.
        if overrun > 0 {
            let reason = format!("{overrun} bytes too many were written for {entry}");
            return Err(Error::unwritable(path, reason));
        }
        filled.map_err(|source| own_error(path, source))?;
        if missing > 0 {
            let reason = format!("{missing} bytes too few were written for {entry}");
            return Err(Error::unwritable(path, reason));
        }
    }
    let file = out.into_inner().map_err(|error| Error::io(path)(error.into_error()))?;
    file.commit()
}

/// Returns the bytes of the tensor's elements.
pub(crate) fn bytes_of(path: &Path, tensor: &TensorSpec) -> Result<u64, Error> {
    let TensorSpec { name, dtype, shape } = tensor;
    if let Dtype::Blocks(format) = dtype {
        let format = format.name;
        return Err(Error::unwritable(
            path,
            format!("tensor {name:?} is {format}, which safetensors files do not have"),
        ));
    }
    let bytes = dtype
        .bytes_of(shape)
        .ok_or_else(|| Error::unwritable(path, format!("tensor {name:?} of shape {shape:?} has too many bytes")))?;
    Ok(bytes as u64)
}

/// Refuses duplicate names and the reserved name.
pub(crate) fn check_names<'a>(path: &Path, tensors: impl IntoIterator<Item = &'a TensorSpec>) -> Result<(), Error> {
    let mut seen = BTreeSet::from([METADATA_KEY]);
    for TensorSpec { name, .. } in tensors {
        if name == METADATA_KEY {
            return Err(Error::unwritable(path, format!("{name:?} is reserved and cannot name a tensor")));
        }
        if !seen.insert(name) {
            return Err(Error::unwritable(path, format!("two tensors are named {name:?}")));
        }
    }
    Ok(())
}

/// Lays out the selected tensors one after the other.
fn layout<'a>(path: &Path, tensors: &'a [TensorSpec], selected: &[usize]) -> Result<Vec<LayoutEntry<'a>>, Error> {
    check_names(path, selected.iter().map(|&index| &tensors[index]))?;
    let mut end = 0_u64;
    let mut entries = Vec::with_capacity(selected.len());
    for &index in selected {
        let tensor = &tensors[index];
        let start = end;
        end = start
            .checked_add(bytes_of(path, tensor)?)
            .ok_or_else(|| Error::unwritable(path, "the tensors have too many bytes"))?;
        entries.push(LayoutEntry {
            name: &tensor.name,
            dtype: tensor.dtype.name(),
            shape: &tensor.shape,
            data_offsets: [start, end],
        });
    }
    Ok(entries)
}

/// Restores an error of this crate that was passed through `fill`, with its own file and kind.
fn own_error(path: &Path, source: io::Error) -> Error {
    source.downcast().unwrap_or_else(Error::io(path))
}

struct LayoutHeader<'a> {
    metadata: &'a BTreeMap<String, String>,
    entries: Vec<LayoutEntry<'a>>,
}

/// Serialized field by field in this order, without the name.
#[derive(Serialize)]
struct LayoutEntry<'a> {
    #[serde(skip)]
    name: &'a str,
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: [u64; 2],
}

impl LayoutHeader<'_> {
    /// Encodes length and JSON, padded with spaces so that the data begins at a multiple of 8 bytes.
    fn encode(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let mut json = serde_json::to_vec(self).map_err(|error| Error::unwritable(path, error.to_string()))?;
        json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
        if json.len() > MAX_JSON_BYTES {
            return Err(Error::unwritable(
                path,
                format!("its header would have {} bytes; readers accept {MAX_JSON_BYTES}", json.len()),
            ));
        }
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut json);
        Ok(bytes)
    }
}

impl Serialize for LayoutHeader<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        for entry in &self.entries {
            map.serialize_entry(entry.name, entry)?;
        }
        map.end()
    }
}

impl std::fmt::Display for LayoutEntry<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LayoutEntry { name, dtype, shape, .. } = self;
        write!(formatter, "tensor {name:?}, {dtype} of shape {shape:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype as Reference, TensorView};
    use std::collections::HashMap;
    use std::fs;

    fn pt() -> BTreeMap<String, String> {
        [("format".to_owned(), "pt".to_owned())].into()
    }

    fn ones(tensors: &[TensorSpec]) -> impl FnMut(usize, &mut dyn Write) -> io::Result<()> {
        let lengths: Vec<_> = tensors.iter().map(|tensor| tensor.dtype.bytes_of(&tensor.shape).unwrap()).collect();
        move |index, out| out.write_all(&vec![index as u8; lengths[index]])
    }

    #[test]
    fn the_bytes_equal_the_reference() {
        let reference = |dtype| match dtype {
            Dtype::F32 => Reference::F32,
            Dtype::BF16 => Reference::BF16,
            Dtype::F16 => Reference::F16,
            Dtype::I64 => Reference::I64,
            _ => Reference::U8,
        };
        let tensors = [
            TensorSpec::new("z \"quoted\" ü", Dtype::U8, [3]),
            TensorSpec::new("b", Dtype::F32, [2, 2]),
            TensorSpec::new("a", Dtype::BF16, [1, 2, 3]),
            TensorSpec::new("c", Dtype::F16, []),
            TensorSpec::new("a.b", Dtype::F32, [0, 4]),
            TensorSpec::new("step", Dtype::I64, [1]),
            TensorSpec::new("a.a", Dtype::BF16, [1]),
        ];
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("m.safetensors");
        for metadata in [BTreeMap::new(), pt()] {
            write_safetensors(&path, &metadata, &tensors, ones(&tensors)).unwrap();

            let data: Vec<Vec<u8>> =
                tensors.iter().enumerate().map(|(i, t)| vec![i as u8; t.dtype.bytes_of(&t.shape).unwrap()]).collect();
            let views = tensors.iter().zip(&data).map(|(tensor, data)| {
                let dtype = reference(tensor.dtype);
                let view = TensorView::new(dtype, tensor.shape.clone(), data).unwrap();
                (tensor.name.as_str(), view)
            });
            let notes: HashMap<_, _> = metadata.clone().into_iter().collect();
            let notes = (!notes.is_empty()).then_some(notes);
            let expected = safetensors::serialize(views, notes).unwrap();
            assert_eq!(fs::read(&path).unwrap(), expected);
        }
    }

    #[test]
    fn a_failure_midway_leaves_the_old_file() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("m.safetensors");
        let tensors = [TensorSpec::new("a", Dtype::F32, [65_536]), TensorSpec::new("b", Dtype::F32, [65_536])];
        let mut full_at_second = |index, out: &mut dyn Write| match index {
            0 => out.write_all(&[1; 4 * 65_536]),
            _ => Err(io::ErrorKind::StorageFull.into()),
        };
        let error = write_safetensors(&path, &pt(), &tensors, &mut full_at_second).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path: named, source }
                if *named == path && source.kind() == io::ErrorKind::StorageFull),
            "{error}"
        );
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);

        fs::write(&path, b"old").unwrap();
        write_safetensors(&path, &pt(), &tensors, &mut full_at_second).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }

    #[test]
    fn inconsistent_input_is_refused_and_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("m.safetensors");
        let spec = |name: &str, shape: &[usize]| TensorSpec::new(name, Dtype::F32, shape);
        let cases = [
            (vec![spec("a", &[2])], 7, "1 bytes too few were written for tensor \"a\""),
            (vec![spec("a", &[2])], 9, "1 bytes too many were written for tensor \"a\""),
            (vec![spec("a", &[2]), spec("a", &[2])], 8, "two tensors are named \"a\""),
            (vec![spec("__metadata__", &[2])], 8, "cannot name a tensor"),
            (vec![spec("a", &[usize::MAX])], 0, "too many bytes"),
            (vec![spec("a", &[1 << 61]), spec("b", &[1 << 61])], 0, "too many bytes"),
        ];
        for (tensors, given, expected) in cases {
            let error = write_safetensors(&path, &pt(), &tensors, |_, out| out.write_all(&vec![0; given])).unwrap_err();
            assert!(matches!(error, Error::Unwritable { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
        }
    }

    /// An overrun is an error even if `fill` does not report it.
    #[test]
    fn an_unreported_overrun_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let tensors = [TensorSpec::new("a", Dtype::U8, [2])];
        let path = scratch.path().join("m.safetensors");
        let error = write_safetensors(&path, &pt(), &tensors, |_, out| {
            out.write_all(&[0; 2])?;
            let _ = out.write_all(&[0; 5]);
            Ok(())
        })
        .unwrap_err();
        assert!(error.to_string().contains("5 bytes too many"), "{error}");
    }

    #[test]
    fn errors_of_this_crate_pass_through() {
        let scratch = tempfile::tempdir().unwrap();
        let tensors = [TensorSpec::new("a", Dtype::F32, [1])];
        let path = scratch.path().join("m.safetensors");
        let error = write_safetensors(&path, &pt(), &tensors, |_, _| {
            Err(Error::NotFloat { name: "a".to_owned(), dtype: Dtype::I64 })?
        })
        .unwrap_err();
        assert!(matches!(error, Error::NotFloat { .. }), "{error}");
    }
}

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::safetensors_header::{SafetensorsHeader, TensorEntry};
use crate::{Error, MappedFile, TensorView};

/// A memory-mapped safetensors file with a validated header.
///
/// Tensors are read from disk when their bytes are accessed; [`MappedFile`] says what that requires of the file.
pub struct SafetensorsFile {
    file: MappedFile,
    header: SafetensorsHeader,
}

impl SafetensorsFile {
    /// Maps the file at `path` and validates its header; nothing else is read.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the file is truncated or inconsistent, [`Error::Unsupported`] for an unsupported dtype,
    /// [`Error::Io`] if it cannot be opened.
    pub fn open(path: &Path) -> Result<SafetensorsFile, Error> {
        let file = MappedFile::open(path)?;
        let header = SafetensorsHeader::parse(path, file.bytes())?;
        Ok(SafetensorsFile { file, header })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns the file's metadata (`__metadata__`), such as `format = pt`; empty if there is none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Returns the tensor named `name`, if it exists.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.header.tensors.get_key_value(name)?;
        let TensorEntry { dtype, shape, range } = entry;
        Some(TensorView {
            name,
            dtype: *dtype,
            shape,
            data: &self.file.bytes()[range.clone()],
            transposed: false,
            odd_rows: None,
        })
    }

    /// Returns the size of all tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        let bytes = self.header.tensors.values().map(|entry| entry.range.len());
        bytes.sum::<usize>() as u64
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SafetensorsFile")
            .field("path", &self.path())
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{Dtype, TensorSpec, write_f32, write_safetensors};

    fn write_sample(path: &Path) {
        let tensors = [
            TensorSpec::new("lora_A.weight", Dtype::F32, [1, 3]),
            TensorSpec::new("lora_B.weight", Dtype::BF16, [3, 1]),
        ];
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        write_safetensors(path, &metadata, &tensors, |index, out| {
            write_f32(out, tensors[index].dtype, &[1.0, -2.0, index as f32])
        })
        .unwrap();
    }

    #[test]
    fn tensors_and_metadata_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("adapter_model.safetensors");
        write_sample(&path);
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(file.metadata()["format"], "pt");
        assert_eq!(file.names().collect::<Vec<_>>(), ["lora_A.weight", "lora_B.weight"]);
        assert_eq!(file.total_bytes(), 12 + 6);
        let b = file.get("lora_B.weight").unwrap();
        assert_eq!((b.dtype, b.shape), (Dtype::BF16, &[3, 1][..]));
        assert_eq!(b.to_f32().unwrap(), [1.0, -2.0, 1.0]);
        assert!(file.get("lora_C.weight").is_none());
    }

    #[test]
    fn every_truncation_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.safetensors");
        write_sample(&path);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{length}: {error}");
            assert!(error.to_string().contains("truncated"), "{length}: {error}");
        }
    }

    #[test]
    fn anything_but_a_regular_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = SafetensorsFile::open(directory.path()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        let error = SafetensorsFile::open(&directory.path().join("none")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}

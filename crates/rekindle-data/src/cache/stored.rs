//! A dataset in a safetensors file: concatenated `input_ids` and `labels`, the end of each example, and its origin.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use bytemuck::Pod;
use rayon::prelude::*;
use rekindle_hub::{Dtype, SafetensorsFile, TensorSpec, TensorView, write_safetensors};
use sha2::{Digest, Sha256};

use crate::dataset::Examples;
use crate::hash::hex;
use crate::report::LoadReport;

/// A dataset file that is memory-mapped and checked.
#[derive(Debug)]
pub(crate) struct Stored(SafetensorsFile);

const INPUT_IDS: &str = "input_ids";
const LABELS: &str = "labels";
const ENDS: &str = "ends";
const FILES: &str = "files";
const ROWS: &str = "rows";
/// Only in files of preferences.
const PREFERRED: &str = "preferred";
/// Only in files of pairs with margins.
const MARGINS: &str = "margins";
const TENSORS: [(&str, Dtype); 5] =
    [(INPUT_IDS, Dtype::U32), (LABELS, Dtype::I32), (ENDS, Dtype::U64), (FILES, Dtype::U32), (ROWS, Dtype::U64)];

/// Bytes that are hashed as one chunk.
const PIECE: usize = 1 << 20;

impl Stored {
    /// Opens the file at `path` and the report in it. Returns `None` if it is missing, damaged, or of another dataset.
    pub(crate) fn open(path: &Path, fingerprint: &str, files: usize) -> Option<(Stored, LoadReport)> {
        let file = SafetensorsFile::open(path).ok()?;
        let note = |name: &str| file.metadata().get(name).map(String::as_str);
        if note("fingerprint") != Some(fingerprint) {
            return None;
        }
        let report: LoadReport = serde_json::from_str(note("report")?).ok()?;
        let tensors = TENSORS.map(|(name, dtype)| file.get(name).filter(|tensor| tensor.dtype == dtype));
        let bytes: Vec<&[u8]> = tensors.iter().map(|tensor| tensor.map(|tensor| tensor.data)).collect::<Option<_>>()?;
        let preferred = file.get(PREFERRED).filter(|tensor| tensor.dtype == Dtype::U8).map(|tensor| tensor.data);
        let margins = file.get(MARGINS).filter(|tensor| tensor.dtype == Dtype::F32).map(|tensor| tensor.data);
        let bytes = [bytes, preferred.into_iter().chain(margins).collect()].concat();
        if note("sha256") != Some(checksum(note("report")?, &bytes).as_str()) {
            return None;
        }
        let stored = Stored(file);
        stored.is_consistent(files).then_some((stored, report))
    }

    /// Writes examples for [`open`](Self::open).
    pub(crate) fn write(
        path: &Path,
        examples: &dyn Examples,
        fingerprint: &str,
        report: &LoadReport,
    ) -> Result<(), rekindle_hub::Error> {
        let mut bytes: Vec<&[u8]> = vec![
            bytemuck::cast_slice(examples.input_ids()),
            bytemuck::cast_slice(examples.labels()),
            bytemuck::cast_slice(examples.ends()),
            bytemuck::cast_slice(examples.files()),
            bytemuck::cast_slice(examples.rows()),
        ];
        let preferred = (!examples.preferred().is_empty()).then_some((PREFERRED, Dtype::U8));
        bytes.extend(preferred.map(|_| examples.preferred()));
        let margins = (!examples.margins().is_empty()).then_some((MARGINS, Dtype::F32));
        bytes.extend(margins.map(|_| bytemuck::cast_slice::<f32, u8>(examples.margins())));
        let report = serde_json::to_string(report).expect("counts and names");
        let sha256 = checksum(&report, &bytes);
        let metadata: BTreeMap<String, String> =
            [("fingerprint", fingerprint.to_owned()), ("report", report), ("sha256", sha256)]
                .map(|(name, value)| (name.to_owned(), value))
                .into();
        let specs: Vec<TensorSpec> = TENSORS
            .into_iter()
            .chain(preferred)
            .chain(margins)
            .zip(&bytes)
            .map(|((name, dtype), bytes)| TensorSpec::new(name, dtype, [bytes.len() / dtype.size()]))
            .collect();
        write_safetensors(path, &metadata, &specs, |index, out: &mut dyn Write| out.write_all(bytes[index]))
    }

    fn is_consistent(&self, files: usize) -> bool {
        let (ids, labels, ends) =
            (self.try_get::<u32>(INPUT_IDS), self.try_get::<i32>(LABELS), self.try_get::<u64>(ENDS));
        let (of_files, rows) = (self.try_get::<u32>(FILES), self.try_get::<u64>(ROWS));
        let (Some(ids), Some(labels), Some(ends), Some(of_files), Some(rows)) = (ids, labels, ends, of_files, rows)
        else {
            return false;
        };
        ids.len() == labels.len()
            && ends.len() == of_files.len()
            && ends.len() == rows.len()
            && ends.is_sorted()
            && ends.last() == Some(&(ids.len() as u64))
            && of_files.iter().all(|&file| (file as usize) < files)
            && self.0.get(PREFERRED).is_none_or(|tensor| tensor.data.len() == ends.len())
            && self
                .0
                .get(MARGINS)
                .is_none_or(|_| self.try_get::<f32>(MARGINS).is_some_and(|margins| margins.len() == ends.len()))
    }

    /// Returns a tensor as numbers. Returns `None` if it is missing, or cannot be mapped on this machine because of its
    /// byte order or alignment.
    fn try_get<T: Pod>(&self, name: &str) -> Option<&[T]> {
        let TensorView { data, .. } = self.0.get(name)?;
        if cfg!(target_endian = "big") { None } else { bytemuck::try_cast_slice(data).ok() }
    }

    fn get<T: Pod>(&self, name: &str) -> &[T] {
        self.try_get(name).expect("checked when the file was opened")
    }
}

impl Examples for Stored {
    fn input_ids(&self) -> &[u32] {
        self.get(INPUT_IDS)
    }

    fn labels(&self) -> &[i32] {
        self.get(LABELS)
    }

    fn ends(&self) -> &[u64] {
        self.get(ENDS)
    }

    fn files(&self) -> &[u32] {
        self.get(FILES)
    }

    fn rows(&self) -> &[u64] {
        self.get(ROWS)
    }

    fn preferred(&self) -> &[u8] {
        self.0.get(PREFERRED).map_or(&[], |tensor| tensor.data)
    }

    fn margins(&self) -> &[f32] {
        self.try_get(MARGINS).unwrap_or(&[])
    }
}

/// Returns the SHA-256 of the report and of the hashes of all chunks, which are hashed on all cores.
fn checksum(report: &str, tensors: &[&[u8]]) -> String {
    let mut whole = Sha256::new_with_prefix(report);
    for bytes in tensors {
        whole.update((bytes.len() as u64).to_le_bytes());
        let pieces: Vec<_> = bytes.par_chunks(PIECE).map(Sha256::digest).collect();
        pieces.iter().for_each(|piece| whole.update(piece));
    }
    hex(&whole.finalize())
}

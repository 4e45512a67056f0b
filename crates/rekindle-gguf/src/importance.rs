//! Importance matrices of llama.cpp: the mean square of the activations that each column of a weight is multiplied with.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::MappedFile;

use crate::{Error, GgufModel};

/// Weights of columns by the name of the tensor.
pub type Importance = BTreeMap<String, Vec<f32>>;

/// Reads a file of `llama-imatrix`: a GGUF file, or the older binary format (`.dat`). Tensors with experts are left out.
///
/// # Errors
/// [`Error::Malformed`] for any other file, or a damaged one; [`Error::File`] if it cannot be opened.
pub fn read_importance(path: &Path) -> Result<Importance, Error> {
    let file = MappedFile::open(path)?;
    let found = if file.bytes().starts_with(b"GGUF") { of_gguf(path)? } else { of_binary(path, file.bytes())? };
    let wrong = found.iter().find(|(_, values)| values.iter().any(|value| !(value.is_finite() && *value >= 0.0)));
    if let Some((name, _)) = wrong {
        return Err(Error::malformed(path, format!("an importance of {name:?} is negative or not finite")));
    }
    if found.is_empty() {
        return Err(Error::malformed(path, "it has no importances"));
    }
    Ok(found)
}

/// Reads sums of squares and counts, which are tensors.
fn of_gguf(path: &Path) -> Result<Importance, Error> {
    let model = GgufModel::open(path)?;
    let mut found = Importance::new();
    for sums in model.tensors() {
        let Some(name) = sums.name.strip_suffix(".in_sum2") else { continue };
        let counts = model.tensor(&format!("{name}.counts"));
        let counts = counts.ok_or_else(|| Error::malformed(path, format!("{name:?} has sums and no counts")))?;
        if let [count] = counts.to_f32()?[..] {
            let divisor = if count > 0.0 { count } else { 1.0 };
            found.insert(name.to_owned(), sums.to_f32()?.into_iter().map(|sum| sum / divisor).collect());
        }
    }
    Ok(found)
}

/// Reads the number of entries; of each: the length of its name, the name, calls, values, and sums as f32.
fn of_binary(path: &Path, bytes: &[u8]) -> Result<Importance, Error> {
    let damaged = |at: usize| {
        Error::malformed(
            path,
            format!("it is neither a GGUF file nor an importance matrix: it is damaged at byte {at}"),
        )
    };
    let mut at = 0;
    let mut take = |count: usize| -> Result<&[u8], Error> {
        let taken = bytes.get(at..).and_then(|rest| rest.get(..count)).ok_or_else(|| damaged(at))?;
        at += count;
        Ok(taken)
    };
    let mut found = Importance::new();
    let number = |bytes: &[u8]| {
        let number = bytes.try_into().map(i32::from_le_bytes).unwrap_or(-1);
        usize::try_from(number).map_err(|_| damaged(0))
    };
    let entries = number(take(4)?)?;
    for _ in 0..entries {
        let length = number(take(4)?)?;
        let name = String::from_utf8_lossy(take(length)?).into_owned();
        let (calls, values) = (number(take(4)?)?, number(take(4)?)?);
        let bytes = take(values.checked_mul(4).ok_or_else(|| damaged(0))?)?;
        let divisor = calls.max(1) as f32;
        let sums = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes) / divisor);
        found.insert(name, sums.collect());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GgmlType, GgufTensorSpec, write_gguf_files};

    #[test]
    fn both_formats_are_read() {
        let scratch = tempfile::tempdir().unwrap();
        let old = scratch.path().join("imatrix.dat");
        let mut bytes = 1_i32.to_le_bytes().to_vec();
        bytes.extend(3_i32.to_le_bytes());
        bytes.extend(b"a.b");
        bytes.extend(2_i32.to_le_bytes());
        bytes.extend(2_i32.to_le_bytes());
        bytes.extend([1.0_f32, 4.0].iter().flat_map(|value| value.to_le_bytes()));
        std::fs::write(&old, &bytes).unwrap();
        let expected = Importance::from([("a.b".to_owned(), vec![0.5, 2.0])]);
        assert_eq!(read_importance(&old).unwrap(), expected);
        for length in 0..bytes.len() {
            std::fs::write(&old, &bytes[..length]).unwrap();
            assert!(read_importance(&old).is_err(), "{length}");
        }

        let new = scratch.path().join("imatrix.gguf");
        let tensors = [
            GgufTensorSpec::new("a.b.in_sum2", GgmlType::F32, [1, 2]),
            GgufTensorSpec::new("a.b.counts", GgmlType::F32, [1, 1]),
        ];
        let values = [vec![1.0_f32, 4.0], vec![2.0]];
        write_gguf_files(&new, None, &[], &tensors, |index, out| {
            values[index].iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
        })
        .unwrap();
        assert_eq!(read_importance(&new).unwrap(), expected);
    }
}

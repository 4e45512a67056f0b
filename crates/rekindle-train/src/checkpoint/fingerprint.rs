//! What tells data and weights apart.

use rekindle_data::Dataset;
use rekindle_hub::Checkpoint;
use sha2::{Digest, Sha256};

use crate::Error;

/// Bytes of each tensor that count. Other weights of the same shapes differ there, and a model of any size is read in no
/// time.
const SAMPLE: usize = 4096;

/// SHA-256 of the ids and labels of all examples: of what is trained on, however it was made. [`Dataset::fingerprint`]
/// is of what it was made from, and a template may write the date.
pub(crate) fn dataset_fingerprint(dataset: &Dataset) -> String {
    let (mut hash, mut bytes) = (Sha256::new(), Vec::new());
    for example in dataset.examples() {
        bytes.clear();
        bytes.extend((example.input_ids.len() as u64).to_le_bytes());
        bytes.extend(example.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(example.labels.iter().flat_map(|label| label.to_le_bytes()));
        hash.update(&bytes);
    }
    hex(&hash.finalize())
}

/// SHA-256 of the names, shapes, dtypes and first bytes of all tensors that a model was read from.
pub(crate) fn weights_fingerprint(checkpoint: &Checkpoint) -> Result<String, Error> {
    let mut names: Vec<&str> = checkpoint.names().collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        let Some(view) = checkpoint.get(name) else { continue };
        hash.update(format!("{name} {:?} {:?}\n", view.dtype, view.shape));
        hash.update(&view.data[..view.data.len().min(SAMPLE)]);
    }
    Ok(hex(&hash.finalize()))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

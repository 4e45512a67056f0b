//! Hashes that identify data and weights.

use rekindle_data::Dataset;
use rekindle_hub::Checkpoint;
use sha2::{Digest, Sha256};

use crate::Error;

/// Bytes of each tensor that are hashed. Different weights of the same shapes differ there, and hashing is fast for
/// models of any size.
const SAMPLE: usize = 4096;

/// Returns the SHA-256 of the ids, labels and preferences of all examples. In contrast, [`Dataset::fingerprint`] covers the files
/// they were made from, and a chat template may insert the date.
pub(crate) fn dataset_fingerprint(dataset: &Dataset) -> String {
    let (mut hash, mut bytes) = (Sha256::new(), Vec::new());
    for example in dataset.examples() {
        bytes.clear();
        bytes.extend((example.input_ids.len() as u64).to_le_bytes());
        bytes.extend(example.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(example.labels.iter().flat_map(|label| label.to_le_bytes()));
        bytes.extend(example.preferred.map(u8::from));
        hash.update(&bytes);
    }
    hex(&hash.finalize())
}

/// Returns the SHA-256 of the names, shapes, dtypes and first bytes of all tensors of a checkpoint.
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

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

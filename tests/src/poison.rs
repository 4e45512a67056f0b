//! Checkpoints with a number that is not finite.

use serde_json::Value;

use crate::Golden;

/// A copy of a golden checkpoint with NaN as the element `index` of `tensor`.
pub fn poisoned(golden: &str, tensor: &str, index: usize) -> (tempfile::TempDir, Golden) {
    let golden = Golden::open(golden);
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(&golden.dir).expect("it is there").map(|entry| entry.expect("it can be read")) {
        if entry.path().is_dir() {
            continue;
        }
        let mut bytes = std::fs::read(entry.path()).expect("it can be read");
        if entry.file_name().to_string_lossy().ends_with(".safetensors") {
            poison(&mut bytes, tensor, index);
        }
        std::fs::write(copy.path().join(entry.file_name()), bytes).expect("the disk has room");
    }
    let dir = copy.path().to_owned();
    (copy, Golden { dir, ..golden })
}

/// Writes NaN as the element `index` of `tensor` into the bytes of a safetensors file, where it has that tensor.
pub fn poison(file: &mut [u8], tensor: &str, index: usize) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).expect("a header is JSON");
    let Some(entry) = header.get(tensor) else { return };
    let start = 8 + length + entry["data_offsets"][0].as_u64().expect("an offset") as usize;
    let nan: &[u8] = match entry["dtype"].as_str() {
        Some("F32") => &[0, 0, 0xc0, 0x7f],
        Some("BF16") => &[0xc0, 0x7f],
        dtype => panic!("{dtype:?}"),
    };
    file[start + index * nan.len()..][..nan.len()].copy_from_slice(nan);
}

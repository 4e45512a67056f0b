//! Quantizers and decoders against llama.cpp, to the bit.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use rekindle_gguf::GgmlType;
use rekindle_hub::SafetensorsFile;

const COLUMNS: usize = 512;

fn goldens() -> SafetensorsFile {
    SafetensorsFile::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/codec.safetensors")).unwrap()
}

fn floats(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.get(name).unwrap().to_f32().unwrap()
}

/// Compares bytes and names the first block that differs.
fn same_blocks(kind: GgmlType, what: &str, got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "{kind} {what}");
    let size = kind.block_bytes();
    for (block, (got, expected)) in got.chunks(size).zip(expected.chunks(size)).enumerate() {
        let row = block * kind.block_size() / COLUMNS;
        assert_eq!(got, expected, "{kind} {what}: block {block}, row {row}");
    }
}

fn same_bits(kind: GgmlType, what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{kind} {what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.to_bits(), expected.to_bits(), "{kind} {what}: element {at}, {got} instead of {expected}");
    }
}

#[test]
fn quantized_blocks_are_those_of_llama_cpp() {
    let file = goldens();
    let (values, importance) = (floats(&file, "input"), floats(&file, "importance"));
    let mut weighted = 0;
    for kind in GgmlType::SUPPORTED.into_iter().filter(|kind| *kind != GgmlType::F32) {
        let expected = file.get(kind.name()).unwrap().data;
        same_blocks(kind, "", &kind.quantize(&values, COLUMNS, None).unwrap(), expected);
        let with = kind.quantize(&values, COLUMNS, Some(&importance)).unwrap();
        if let Some(expected) = file.get(&format!("{kind}.importance")) {
            same_blocks(kind, "with importances", &with, expected.data);
            weighted += 1;
        } else {
            same_blocks(kind, "ignores importances", &with, expected);
        }
    }
    assert_eq!(weighted, 10);
}

#[test]
fn decoded_values_are_those_of_llama_cpp() {
    let file = goldens();
    for kind in GgmlType::SUPPORTED.into_iter().filter(|kind| *kind != GgmlType::F32) {
        let row = COLUMNS / kind.block_size() * kind.block_bytes();
        let bytes = &file.get(kind.name()).unwrap().data[..2 * row];
        same_bits(kind, "", &kind.decode(bytes).unwrap(), &floats(&file, &format!("{kind}.decoded")));
        let random = file.get(&format!("{kind}.random")).unwrap().data;
        let decoded = kind.decode(random).unwrap();
        same_bits(kind, "random", &decoded, &floats(&file, &format!("{kind}.random_decoded")));
    }
}

/// The pieces that threads work on are joined in order.
#[test]
fn many_rows_are_quantized_as_each_alone() {
    let row = &floats(&goldens(), "input")[..COLUMNS];
    let rows: Vec<f32> = (0..400_u16).flat_map(|i| row.iter().map(move |x| x * f32::from(i + 1))).collect();
    for kind in [GgmlType::Q4_K, GgmlType::Q8_0, GgmlType::F16] {
        let together = kind.quantize(&rows, COLUMNS, None).unwrap();
        let size = together.len() / 400;
        for at in [0, 127, 128, 399] {
            let alone = kind.quantize(&rows[at * COLUMNS..][..COLUMNS], COLUMNS, None).unwrap();
            assert_eq!(together[at * size..][..size], alone, "{kind} row {at}");
        }
        let decoded = kind.decode(&together).unwrap();
        assert_eq!(decoded[399 * COLUMNS..], kind.decode(&together[399 * size..]).unwrap()[..], "{kind}");
    }
}

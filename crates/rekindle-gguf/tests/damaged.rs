//! Damaged files: each has a clear error, and no bytes make the reader panic or allocate without bound.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rekindle_gguf::{Error, GgufModel};

/// The parts of a file, each of which a case may replace.
#[derive(Clone)]
struct Parts {
    magic: Vec<u8>,
    version: u32,
    tensor_count: u64,
    key_count: u64,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(name.as_bytes())[..], &kind.to_le_bytes(), value].concat()
}

fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

fn tensor(name: &[u8], dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

impl Parts {
    /// A valid file with a key of several types and two tensors.
    fn valid() -> Self {
        Self {
            magic: b"GGUF".to_vec(),
            version: 3,
            tensor_count: 2,
            key_count: 4,
            keys: vec![
                key("general.architecture", 8, &string(b"llama")),
                key("a.flag", 7, &[1]),
                key("a.list", 9, &array(8, 2, &[string(b"x"), string(b"yz")].concat())),
                key("a.number", 6, &1.5_f32.to_le_bytes()),
            ],
            tensors: vec![tensor(b"norm", &[4], 0, 0), tensor(b"up", &[32, 2], 8, 32)],
            data: vec![1; 32 + 68],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.clone();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(self.keys.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    fn with(change: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut parts = Self::valid();
        change(&mut parts);
        parts.bytes()
    }

    fn key(bytes: Vec<u8>) -> Vec<u8> {
        Self::with(|parts| parts.keys[1] = bytes)
    }

    fn tensor(bytes: Vec<u8>) -> Vec<u8> {
        Self::with(|parts| parts.tensors[1] = bytes)
    }
}

fn open(directory: &Path, bytes: &[u8]) -> Result<GgufModel, Error> {
    let path = directory.join("m.gguf");
    fs::write(&path, bytes).unwrap();
    GgufModel::open(&path)
}

fn nested(depth: usize) -> Vec<u8> {
    (0..depth).fold(array(0, 1, &[7]), |inner, _| array(9, 1, &inner))
}

/// Damaged files, each with a part of the message that it must get.
#[rustfmt::skip]
fn cases() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let valid = Parts::valid().bytes();
    let cut = |length: usize| valid[..length].to_vec();
    let end = u64::MAX;
    vec![
        // Other formats.
        ("empty", vec![], "the file has 0 bytes"),
        ("three bytes", b"GGU".to_vec(), "the file has 3 bytes"),
        ("other magic", Parts::with(|p| p.magic = b"ABCD".to_vec()), "instead of \"GGUF\""),
        ("lower case magic", Parts::with(|p| p.magic = b"gguf".to_vec()), "instead of \"GGUF\""),
        ("reversed magic", Parts::with(|p| p.magic = b"FUGG".to_vec()), "reverse order"),
        ("ggml", Parts::with(|p| p.magic = b"lmgg".to_vec()), "from before GGUF"),
        ("ggjt", Parts::with(|p| p.magic = b"tjgg".to_vec()), "from before GGUF"),
        ("zip", b"PK\x03\x04rest of an archive".to_vec(), "a zip archive"),
        ("safetensors", b"\x10\0\0\0\0\0\0\0{\"a\":{}}".to_vec(), "a safetensors file"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "a Git LFS pointer"),
        ("html", b"<!DOCTYPE html><html></html>".to_vec(), "an HTML page"),
        // Versions.
        ("version 0", Parts::with(|p| p.version = 0), "version 0 is unknown"),
        ("version 1", Parts::with(|p| p.version = 1), "version 1 is not supported"),
        ("version 4", Parts::with(|p| p.version = 4), "version 4 is unknown"),
        ("big-endian", Parts::with(|p| p.version = 3_u32.swap_bytes()), "it is big-endian"),
        // Truncations.
        ("only the magic", cut(4), "the version needs 4 bytes"),
        ("half a version", cut(6), "the version needs 4 bytes"),
        ("no tensor count", cut(8), "the number of tensors needs 8 bytes"),
        ("no key count", cut(16), "the number of metadata keys needs 8 bytes"),
        ("no keys", cut(24), "4 metadata keys are announced"),
        ("cut in the keys", cut(72), "4 metadata keys are announced and 48 bytes are left"),
        ("half of the tensors", cut(valid.len() - 160), "2 tensors are announced and 35 bytes are left"),
        ("one byte of data is missing", cut(valid.len() - 1), "has 68 bytes at 32"),
        ("no data", cut(valid.len() - 100), "it is truncated"),
        // Counts.
        ("keys: huge", Parts::with(|p| p.key_count = end), "metadata keys are announced"),
        ("keys: more than there are", Parts::with(|p| p.key_count = 5), "the name of tensor 0 has 0 bytes"),
        ("keys: fewer than there are", Parts::with(|p| p.key_count = 3), "tensor \"a.number\" has 6 dimensions"),
        ("tensors: huge", Parts::with(|p| p.tensor_count = end), "tensors are announced"),
        ("tensors: one too many", Parts::with(|p| { p.tensor_count = 3; p.data.fill(255); }), "tensor 2"),
        // Keys.
        ("key: empty", Parts::key(key("", 7, &[1])), "key 1 has 0 bytes"),
        ("key: huge length", Parts::key(end.to_le_bytes().to_vec()), "bytes of key 1 are announced"),
        ("key: too long", Parts::key(key(&"k".repeat(65_536), 7, &[1])), "65536 bytes; 1 to 65535"),
        ("key: not UTF-8", Parts::key([&string(b"\xff\xfe")[..], &7_u32.to_le_bytes(), &[1]].concat()), "key 1 is not UTF-8"),
        ("key: twice", Parts::key(key("general.architecture", 7, &[1])), "\"general.architecture\" occurs twice"),
        ("key: unknown type", Parts::key(key("a.flag", 13, &[1])), "\"a.flag\" has the unknown type 13"),
        ("key: huge type", Parts::key(key("a.flag", u32::MAX, &[1])), "unknown type 4294967295"),
        ("boolean of 2", Parts::key(key("a.flag", 7, &[2])), "a boolean with the byte 2"),
        ("string: huge", Parts::key(key("a.flag", 8, &end.to_le_bytes())), "bytes of the value of \"a.flag\" are announced"),
        ("string: longer than the file", Parts::key(key("a.flag", 8, &1000_u64.to_le_bytes())), "1000 bytes of the value"),
        ("string: not UTF-8", Parts::key(key("a.flag", 8, &string(b"\xc3\x28"))), "the value of \"a.flag\" is not UTF-8"),
        ("array: huge", Parts::key(key("a.flag", 9, &array(0, end, &[]))), "elements in the value of \"a.flag\" are announced"),
        ("array: overflows", Parts::key(key("a.flag", 9, &array(12, 1 << 61, &[]))), "elements in the value of \"a.flag\""),
        ("array: huge strings", Parts::key(key("a.flag", 9, &array(8, 1 << 40, &[]))), "elements in the value"),
        ("array: string too long", Parts::key(key("a.flag", 9, &array(8, 1, &end.to_le_bytes()))), "are announced"),
        ("array: unknown type", Parts::key(key("a.flag", 9, &array(13, 1, &[0]))), "elements of the unknown type 13"),
        ("array: boolean of 3", Parts::key(key("a.flag", 9, &array(7, 2, &[1, 3]))), "the byte 3"),
        ("array: nested too deep", Parts::key(key("a.flag", 9, &nested(6))), "more than 4 nested arrays"),
        ("array: nested huge", Parts::key(key("a.flag", 9, &array(9, end, &[]))), "are announced"),
        // Alignment.
        ("alignment: 0", Parts::key(key("general.alignment", 4, &0_u32.to_le_bytes())), "general.alignment is 0"),
        ("alignment: 24", Parts::key(key("general.alignment", 4, &24_u32.to_le_bytes())), "a power of two"),
        ("alignment: a string", Parts::key(key("general.alignment", 8, &string(b"32"))), "general.alignment is \"32\""),
        ("alignment: u64", Parts::key(key("general.alignment", 10, &32_u64.to_le_bytes())), "of type u32"),
        ("alignment: larger than the file", Parts::key(key("general.alignment", 4, &(1_u32 << 31).to_le_bytes())), "at 0 behind 2147483648, and the file has"),
        // Tensors.
        ("tensor: no name", Parts::tensor(tensor(b"", &[32, 2], 8, 32)), "the name of tensor 1 has 0 bytes"),
        ("tensor: long name", Parts::tensor(tensor(&[b'n'; 64], &[32, 2], 8, 32)), "64 bytes; 1 to 63"),
        ("tensor: name is not UTF-8", Parts::tensor(tensor(b"\x80", &[32, 2], 8, 32)), "the name of tensor 1 is not UTF-8"),
        ("tensor: huge name", Parts::tensor(end.to_le_bytes().repeat(4)), "bytes of the name of tensor 1"),
        ("tensor: twice", Parts::tensor(tensor(b"norm", &[32, 2], 8, 32)), "two tensors are named \"norm\""),
        ("tensor: 5 dimensions", Parts::tensor(tensor(b"up", &[32, 2, 1, 1, 1], 8, 32)), "5 dimensions; at most 4"),
        ("tensor: huge dimensions", Parts::tensor([&string(b"up")[..], &[255; 60]].concat()), "4294967295 dimensions"),
        ("tensor: unknown type", Parts::tensor(tensor(b"up", &[32, 2], 4, 32)), "\"up\" has the unknown type 4"),
        ("tensor: huge type", Parts::tensor(tensor(b"up", &[32, 2], u32::MAX, 32)), "unknown type 4294967295"),
        ("tensor: half a block", Parts::tensor(tensor(b"up", &[48, 2], 8, 32)), "48 columns, which is not a multiple of its block of 32"),
        ("tensor: K-quant of 128", Parts::tensor(tensor(b"up", &[128], 12, 32)), "not a multiple of its block of 256"),
        ("tensor: shape overflows", Parts::tensor(tensor(b"up", &[1 << 32, 1 << 32], 8, 32)), "too many bytes"),
        ("tensor: bytes overflow", Parts::tensor(tensor(b"up", &[1 << 62, 2], 0, 32)), "too many bytes"),
        ("tensor: larger than the file", Parts::tensor(tensor(b"up", &[32, 3], 8, 32)), "has 102 bytes at 32"),
        ("tensor: odd offset", Parts::tensor(tensor(b"up", &[32, 2], 8, 33)), "offset 33 of tensor \"up\""),
        ("tensor: offset behind the end", Parts::tensor(tensor(b"up", &[32, 2], 8, 1 << 20)), "it is truncated"),
        ("tensor: offset overflows", Parts::tensor(tensor(b"up", &[32, 2], 8, end - 31)), "it is truncated"),
        ("tensor: overlap", Parts::tensor(tensor(b"up", &[32, 2], 8, 0)), "\"norm\" and \"up\" overlap"),
        ("tensor: truncated table", Parts::with(|p| { p.tensors[1].truncate(20); p.data.clear(); }), "2 elements in the shape of \"up\" are announced"),
        // Split files.
        ("split: a string", Parts::key(key("split.count", 8, &string(b"2"))), "split.count is \"2\""),
        ("split: negative", Parts::key(key("split.count", 5, &(-1_i32).to_le_bytes())), "split.count is -1"),
        ("split: huge", Parts::key(key("split.count", 10, &end.to_le_bytes())), "a number up to 65535"),
        ("split: name", Parts::key(key("split.count", 2, &2_u16.to_le_bytes())), "one of 2 files"),
    ]
}

#[test]
fn damaged_files_have_clear_errors() {
    let scratch = tempfile::tempdir().unwrap();
    assert_eq!(open(scratch.path(), &Parts::valid().bytes()).unwrap().tensors().count(), 2);
    let cases = cases();
    assert!(cases.len() >= 60, "{}", cases.len());
    let mut wrong = Vec::new();
    for (name, bytes, expected) in cases {
        match open(scratch.path(), &bytes) {
            Err(error @ Error::Malformed { .. })
                if error.to_string().contains(expected) && error.to_string().contains("m.gguf") => {}
            Err(error) => wrong.push(format!("{name}: {error}")),
            Ok(_) => wrong.push(format!("{name}: opened")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_truncation_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let valid = Parts::valid().bytes();
    for length in 0..valid.len() {
        assert!(open(scratch.path(), &valid[..length]).is_err(), "{length} bytes");
    }
}

/// Reads everything that a file that opens has.
fn read_all(model: &GgufModel) {
    for (_, value) in model.all_metadata() {
        let _ = (value.to_string(), value.as_u64(), value.as_integers());
    }
    for tensor in model.tensors() {
        let _ = tensor.to_f32();
    }
}

/// Random changes of valid files: bytes, numbers at their edges, cuts and insertions.
#[test]
fn no_bytes_panic() {
    let scratch = tempfile::tempdir().unwrap();
    let python = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/python.gguf")).unwrap();
    let valid = [Parts::valid().bytes(), python];
    let mut random = ChaCha8Rng::seed_from_u64(20);
    let edges = [0_u64, 1, 7, 8, 9, 31, 63, 64, 1 << 31, (1 << 32) - 1, 1 << 61, u64::MAX - 7, u64::MAX];
    let mut opened = 0;
    for round in 0..2_000 {
        let mut bytes = valid[round % 2].clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..5) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8_u32),
                2 => {
                    let edge = edges[random.random_range(0..edges.len())].to_le_bytes();
                    let width = if random.random() { 4 } else { 8 };
                    let end = (at + width).min(bytes.len());
                    bytes[at..end].copy_from_slice(&edge[..end - at]);
                }
                3 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.random()),
            }
        }
        if let Ok(model) = open(scratch.path(), &bytes) {
            read_all(&model);
            opened += 1;
        }
    }
    assert!(opened > 100, "changes of names and data leave a valid file; {opened} opened");
}

//! Reading and writing of files.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use rekindle_gguf::{Error, GgmlType, GgufModel, GgufTensorSpec, MetadataArray, MetadataValue, write_gguf_files};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name)
}

fn key(name: &str, value: impl Into<MetadataValue>) -> (String, MetadataValue) {
    (name.to_owned(), value.into())
}

/// Every type of value, as goldens/make_file.py writes them.
fn every_value() -> Vec<(String, MetadataValue)> {
    vec![
        key("general.architecture", "llama"),
        key("a.u8", 200_u8),
        key("a.i8", -100_i8),
        key("a.u16", 60_000_u16),
        key("a.i16", -30_000_i16),
        key("a.u32", 4_000_000_000_u32),
        key("a.i32", -2_000_000_000_i32),
        key("a.u64", 1_u64 << 63),
        key("a.i64", -(1_i64 << 62)),
        key("a.f32", 0.1_f32),
        key("a.f64", 0.1_f64),
        key("a.bool", true),
        key("a.string", "Grüße, 世界"),
        key("a.ints", vec![1_i32, 2, 3]),
        key("a.floats", vec![0.5_f32, -1.5]),
        key("a.bools", vec![true, false]),
        key("a.strings", ["a", "", "ü"].map(str::to_owned).to_vec()),
        (
            "a.nested".to_owned(),
            MetadataValue::Array(MetadataArray::Array(vec![
                MetadataArray::I32(vec![1, 2]),
                MetadataArray::I32(vec![3]),
            ])),
        ),
    ]
}

#[test]
fn a_file_of_the_python_package_is_read() {
    let model = GgufModel::open(&golden("python.gguf")).unwrap();
    for (key, value) in every_value() {
        assert_eq!(model.metadata(&key), Some(&value), "{key}");
    }
    assert_eq!(model.all_metadata().count(), every_value().len());
    let names: Vec<_> = model.tensors().map(|tensor| (tensor.name, tensor.kind, tensor.shape.to_vec())).collect();
    let expected =
        [("f32", GgmlType::F32, [2, 32]), ("f16.weight", GgmlType::F16, [2, 3]), ("q8", GgmlType::Q8_0, [2, 32])];
    assert_eq!(names, expected.map(|(name, kind, shape)| (name, kind, shape.to_vec())));
    let ramp: Vec<f32> = (0..64_i8).map(|i| f32::from(i) - 20.0).collect();
    assert_eq!(model.tensor("f32").unwrap().to_f32().unwrap(), ramp);
    assert_eq!(model.tensor("f16.weight").unwrap().to_f32().unwrap(), [-20.0, -19.0, -18.0, 12.0, 13.0, 14.0]);
    let q8 = model.tensor("q8").unwrap().to_f32().unwrap();
    assert_eq!((q8[1], q8[63]), (0.5, 126.0));
    assert!(model.tensor("none").is_none());
}

#[test]
fn what_is_written_is_read() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("m.gguf");
    let tensors = [
        GgufTensorSpec::new("odd", GgmlType::F32, [3]),
        GgufTensorSpec::new("q", GgmlType::Q6_K, [2, 256]),
        GgufTensorSpec::new("experts", GgmlType::F16, [2, 3, 5]),
    ];
    for alignment in [None, Some(64_u32), Some(1)] {
        let mut metadata = every_value();
        metadata.extend(alignment.map(|alignment| key("general.alignment", alignment)));
        let written = write_gguf_files(&path, None, &metadata, &tensors, |index, out| {
            out.write_all(&vec![index as u8 + 1; tensors[index].bytes().unwrap() as usize])
        });
        assert_eq!(written.unwrap(), std::slice::from_ref(&path));
        let model = GgufModel::open(&path).unwrap();
        for (key, value) in &metadata {
            assert_eq!(model.metadata(key), Some(value));
        }
        for (index, (spec, tensor)) in tensors.iter().zip(model.tensors()).enumerate() {
            assert_eq!((tensor.name, tensor.kind, tensor.shape), (spec.name.as_str(), spec.kind, &spec.shape[..]));
            assert_eq!(tensor.data.len() as u64, spec.bytes().unwrap());
            assert!(tensor.data.iter().all(|byte| *byte == index as u8 + 1), "{alignment:?}");
        }
    }
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
}

fn write_split(path: &Path, limit: u64) -> Vec<PathBuf> {
    let tensors: Vec<_> = (0..5).map(|i| GgufTensorSpec::new(format!("t{i}"), GgmlType::F32, [10 * (i + 1)])).collect();
    let metadata = [key("general.architecture", "llama")];
    write_gguf_files(path, Some(limit), &metadata, &tensors, |index, out| {
        out.write_all(&vec![index as u8; tensors[index].bytes().unwrap() as usize])
    })
    .unwrap()
}

#[test]
fn a_split_model_is_written_and_read_from_any_of_its_files() {
    let scratch = tempfile::tempdir().unwrap();
    // 40, 80, 120, 160 and 200 bytes.
    let paths = write_split(&scratch.path().join("m.gguf"), 200);
    let names: Vec<_> = paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(
        names,
        ["m-00001-of-00004.gguf", "m-00002-of-00004.gguf", "m-00003-of-00004.gguf", "m-00004-of-00004.gguf"]
    );
    for path in &paths {
        let model = GgufModel::open(path).unwrap();
        assert_eq!(model.path(), paths[0]);
        assert_eq!(model.metadata("general.architecture").unwrap().as_str(), Some("llama"));
        assert_eq!(model.tensors().count(), 5);
        assert_eq!(model.tensor("t4").unwrap().data, [4; 200]);
    }
    assert_eq!(write_split(&scratch.path().join("n.gguf"), 600).len(), 1, "all fit into one");
    assert_eq!(write_split(&scratch.path().join("o.gguf"), 1).len(), 5, "each is larger than the limit");
}

#[test]
fn split_models_that_do_not_fit_together_are_refused() {
    let broken = |damage: &dyn Fn(&[PathBuf])| {
        let scratch = tempfile::tempdir().unwrap();
        let paths = write_split(&scratch.path().join("m.gguf"), 200);
        damage(&paths);
        GgufModel::open(&paths[0]).unwrap_err().to_string()
    };
    let missing = broken(&|paths| fs::remove_file(&paths[2]).unwrap());
    assert!(missing.contains("m-00003-of-00004.gguf"), "{missing}");
    let swapped = broken(&|paths| {
        fs::copy(&paths[1], &paths[2]).unwrap();
    });
    assert!(swapped.contains("its header says that it is file 2 of 4"), "{swapped}");
    let scratch = tempfile::tempdir().unwrap();
    let paths = write_split(&scratch.path().join("m.gguf"), 200);
    let renamed = scratch.path().join("model.gguf");
    fs::rename(&paths[0], &renamed).unwrap();
    let error = GgufModel::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("one of 4 files") && error.contains("-00001-of-00004.gguf"), "{error}");
}

#[test]
fn what_a_file_cannot_hold_is_not_written() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("m.gguf");
    let spec = |name: &str, kind, shape: &[u64]| GgufTensorSpec::new(name, kind, shape);
    let long = "n".repeat(64);
    type Case = (Vec<GgufTensorSpec>, Vec<(String, MetadataValue)>, usize, &'static str);
    let cases: Vec<Case> = vec![
        (vec![spec("a", GgmlType::F32, &[2])], vec![], 7, "1 bytes too few were written for tensor \"a\""),
        (vec![spec("a", GgmlType::F32, &[2])], vec![], 9, "1 bytes too many were written for tensor \"a\""),
        (vec![spec("a", GgmlType::F32, &[2]); 2], vec![], 8, "two tensors are named \"a\""),
        (vec![spec(&long, GgmlType::F32, &[2])], vec![], 8, "64 bytes; 1 to 63 are allowed"),
        (vec![spec("", GgmlType::F32, &[2])], vec![], 8, "0 bytes; 1 to 63 are allowed"),
        (vec![spec("a", GgmlType::F32, &[])], vec![], 4, "0 dimensions"),
        (vec![spec("a", GgmlType::F32, &[1; 5])], vec![], 4, "5 dimensions"),
        (vec![spec("a", GgmlType::Q4_K, &[128])], vec![], 72, "rows are not whole blocks"),
        (vec![spec("a", GgmlType::F32, &[u64::MAX])], vec![], 0, "too large"),
        (vec![], vec![key("k", 1_u8), key("k", 2_u8)], 0, "the key \"k\" occurs twice"),
        (vec![], vec![key("", 1_u8)], 0, "a key has 0 bytes"),
        (vec![], vec![key("general.alignment", 48_u32)], 0, "general.alignment is 48"),
    ];
    for (tensors, metadata, given, expected) in cases {
        let error = write_gguf_files(&path, None, &metadata, &tensors, |_, out| out.write_all(&vec![0; given]));
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "{expected}");
    }
    let tensors = [spec("a", GgmlType::Q4_K, &[256])];
    let error = write_gguf_files(&path, None, &[], &tensors, |_, out| {
        let bytes = GgmlType::Q4_K.quantize(&[f32::NAN; 256], 256, None)?;
        out.write_all(&bytes)
    });
    assert!(matches!(error.unwrap_err(), Error::Codec { .. }), "errors of this crate pass through");
}

//! Tests of merging with the library: dtypes, verification, and refused merges.

use std::path::PathBuf;

use rekindle::{Combination, Dtype, Merge};
use rekindle_kernels::DeviceKind;
use rekindle_tests::goldens;

fn adapter(name: &str) -> PathBuf {
    goldens().join("lora-options/qwen3-tied/adapters").join(name)
}

fn merge_of(name: &str) -> Merge {
    Merge::new(adapter(name)).base(goldens().join("qwen3-tied"))
}

#[test]
fn merging_in_every_dtype_is_within_its_bound() {
    for adapter in ["plain", "dora", "save-both"] {
        let mut means = Vec::new();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let out = tempfile::tempdir().expect("a temporary directory");
            let merge = merge_of(adapter).dtype(dtype);
            let mut seen = (0, 0);
            merge
                .write(out.path().join("merged"), &mut |done, total| seen = (done, total))
                .expect("the disk has space");
            assert_eq!(seen.0, seen.1, "progress reaches the total");
            let found = merge.verify(out.path().join("merged"), DeviceKind::Cpu).expect("within the bound");
            println!("{adapter} {dtype:?}: {found:?}");
            means.push(found.mean);
        }
        assert!(means[0] < means[1] && means[1] < means[2], "coarser dtypes have larger errors: {means:?}");
    }
}

#[test]
fn verification_fails_for_a_different_adapter() {
    let out = tempfile::tempdir().expect("a temporary directory");
    merge_of("plain").write(out.path().join("merged"), &mut |_, _| ()).expect("the disk has space");
    let error = merge_of("rslora")
        .verify(out.path().join("merged"), DeviceKind::Cpu)
        .expect_err("merged with a different adapter");
    assert!(error.to_string().contains("more than rounding explains (1e-4)"), "{error}");
}

#[test]
fn several_adapters_are_merged_as_one() {
    let out = tempfile::tempdir().expect("a temporary directory");
    for (number, combination) in [Combination::Cat, Combination::Linear, Combination::Svd(Some(2))].iter().enumerate() {
        let merge = Merge::weighted([(adapter("plain"), 0.7), (adapter("rslora"), -0.4)], *combination);
        let (merge, merged) = (merge.base(goldens().join("qwen3-tied")), out.path().join(number.to_string()));
        merge.write(&merged, &mut |_, _| ()).expect("the disk has space");
        let found = merge.verify(&merged, DeviceKind::Cpu).expect("within the bound");
        println!("{combination}: {found:?}");
        let error = merge_of("plain").verify(&merged, DeviceKind::Cpu).expect_err("merged with a different adapter");
        assert!(error.to_string().contains("than rounding explains"), "{error}");
    }
    let merge = Merge::weighted([(adapter("plain"), 1.0), (adapter("dora"), 1.0)], Combination::Cat);
    let error = merge.base(goldens().join("qwen3-tied")).write(out.path().join("dora"), &mut |_, _| ());
    assert!(error.expect_err("DoRA adapters cannot be summed").to_string().contains("(use_dora)"));
    let none: [(&str, f64); 0] = [];
    let error = Merge::weighted(none, Combination::Cat).write(out.path().join("none"), &mut |_, _| ());
    assert!(error.expect_err("there is no adapter").to_string().contains("no adapter to merge"));
}

#[test]
fn the_base_is_never_overwritten() {
    let error = merge_of("plain").write(goldens().join("qwen3-tied"), &mut |_, _| ()).expect_err("it is the base");
    assert!(error.to_string().contains("is the base model's own directory; choose another"), "{error}");
    let error = Merge::new(goldens().join("qwen2")).write("/nowhere", &mut |_, _| ()).expect_err("no adapter");
    assert!(error.to_string().contains("adapter_config.json"), "{error}");
}

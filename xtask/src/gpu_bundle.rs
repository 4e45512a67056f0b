//! `cargo xtask gpu-bundle`: collects the files that a GPU machine without Rust needs to run the GPU tests and the
//! command.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{build, root};

/// The maximum total size of the files.
const LIMIT: u64 = 40 << 20;

/// The program names in the bundle, and their root sources.
const PROGRAMS: [(&str, &str); 4] = [
    ("test-kernels", "kernels/tests/cuda.rs"),
    ("test-models", "tests/tests/cuda.rs"),
    ("rekindle", "crates/rekindle-cli/src/main.rs"),
    ("xtask", "xtask/src/main.rs"),
];

/// The script that runs the tests and the benchmarks.
const RUN: &str = r#"#!/bin/sh
# Runs the GPU tests on this machine, then the benchmarks, whose numbers it leaves in gpu.json. Arguments go to the
# benchmarks: `--python python3` measures PyTorch and Unsloth in the same run, `--weights DIR` keeps the random weights.
# Needs an NVIDIA driver, and cuBLASLt and NVRTC of CUDA 13 where the loader, CUDA_PATH or a Python environment has them.
set -eu
cd "$(dirname "$0")"
for file in *.xz; do
  if [ -e "$file" ]; then xz --decompress --force "$file"; fi
done
chmod +x test-kernels test-models rekindle xtask
export REKINDLE_REQUIRE_CUDA=1 REKINDLE_GOLDENS="$PWD/goldens"
failed=0
./test-kernels || failed=1
./test-models || failed=1
./xtask bench gpu "$@" || failed=1
exit $failed
"#;

pub(crate) fn make() -> Result<(), Box<dyn Error>> {
    let programs = build::programs(&["--release", "--test", "cuda", "--bin", "rekindle", "--bin", "xtask"])?;
    let out = root().join("target/gpu");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&out)?;
    for (name, source) in PROGRAMS {
        let to = out.join(name);
        fs::copy(build::of(&programs, source)?, &to)?;
        crate::run(Command::new("strip").arg(&to))?;
        compress(&to)?;
    }
    copy_goldens(&root().join("tests/goldens"), &out.join("goldens"))?;
    fs::write(out.join("run.sh"), RUN)?;
    executable(&out.join("run.sh"))?;
    report(&out)
}

/// Replaces the file by a compressed one if xz is available.
fn compress(file: &Path) -> Result<(), Box<dyn Error>> {
    let there = Command::new("xz").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    if !there {
        eprintln!("xz is not installed: {} is not compressed", file.display());
        return Ok(());
    }
    crate::run(Command::new("xz").args(["--threads=0", "-6"]).arg(file))
}

/// Copies checkpoints, rows and expected values, but not the scripts that made them.
fn copy_goldens(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() {
            copy_goldens(&path, &to.join(name))?;
        } else if path.extension().is_none_or(|extension| extension != "py") {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

#[cfg(unix)]
fn executable(file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn executable(_: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Prints the sizes and fails if the total exceeds the limit.
fn report(out: &Path) -> Result<(), Box<dyn Error>> {
    let mut total = 0;
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        let bytes = size(&path)?;
        total += bytes;
        println!("{:>9.2} MiB  {}", mib(bytes), path.strip_prefix(root())?.display());
    }
    println!("{:>9.2} MiB", mib(total));
    if total > LIMIT {
        return Err(format!("the bundle has {:.1} MiB; the limit is {:.0} MiB", mib(total), mib(LIMIT)).into());
    }
    Ok(())
}

fn size(path: &Path) -> std::io::Result<u64> {
    if !path.is_dir() {
        return Ok(path.metadata()?.len());
    }
    fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

//! `cargo xtask ci`: everything that CI checks after the README's test command.

use std::error::Error;
use std::process::Command;

use crate::{build, root, tidy};

pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    cargo(&["fmt", "--all", "--check"])?;
    tidy::run()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])?;
    crate::run(
        Command::new("cargo")
            .args(["doc", "--workspace", "--no-deps", "--locked"])
            .env("RUSTDOCFLAGS", "-D warnings")
            .current_dir(root()),
    )?;
    kernels()?;
    // Feature sets not covered by the tests: wgpu, and no hub access.
    cargo(&["check", "-p", "rekindle-cli", "--no-default-features", "--features", "wgpu", "--locked"])?;
    cargo(&["test", "-p", "rekindle-kernels", "--features", "wgpu", "--test", "wgpu", "--profile", "wgpu", "--locked"])
}

/// Checks the CUDA kernels with this program's other features, built with the same settings as the tests.
fn kernels() -> Result<(), Box<dyn Error>> {
    let programs = build::programs(&["--test", "cuda", "--bin", "xtask"])?;
    let xtask = build::of(&programs, "xtask/src/main.rs")?;
    crate::run(Command::new(xtask).args(["kernels", "--require"]).current_dir(root()))
}

fn cargo(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    crate::run(Command::new("cargo").args(arguments).current_dir(root()))
}

//! `cargo xtask ci`: everything that CI checks after the README's own test command.

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
    // The features that the tests were not built with: wgpu, and no names on the hub.
    cargo(&["check", "-p", "rekindle-cli", "--no-default-features", "--features", "wgpu", "--locked"])?;
    cargo(&["test", "-p", "rekindle-kernels", "--features", "wgpu", "--test", "wgpu", "--profile", "wgpu", "--locked"])
}

/// The CUDA kernels, by this program with its other features, which is built as the tests were.
fn kernels() -> Result<(), Box<dyn Error>> {
    let programs = build::programs(&["--test", "cuda", "--bin", "xtask"])?;
    let xtask = build::of(&programs, "xtask/src/main.rs")?;
    crate::run(Command::new(xtask).args(["kernels", "--require"]).current_dir(root()))
}

fn cargo(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    crate::run(Command::new("cargo").args(arguments).current_dir(root()))
}

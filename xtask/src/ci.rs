//! `cargo xtask ci`: everything that CI checks after the README's own test command.

use std::error::Error;
use std::process::Command;

use crate::{root, tidy};

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
    cargo(&["check", "-p", "rekindle-cli", "--features", "cuda,wgpu", "--locked"])?;
    cargo(&["test", "-p", "rekindle-kernels", "--features", "wgpu", "--test", "wgpu", "--profile", "wgpu", "--locked"])
}

fn cargo(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    crate::run(Command::new("cargo").args(arguments).current_dir(root()))
}

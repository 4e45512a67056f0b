//! `cargo xtask goldens`: regenerates the goldens of all crates with their scripts.

use std::error::Error;
use std::path::Path;
use std::process::Command;

use crate::{root, run};

/// Scripts that write their data beside themselves and run without a GPU.
const SCRIPTS: &[&str] = &[
    "tests/goldens/make.py",
    "tests/goldens/bf16.py",
    "tests/goldens/dpo/make.py",
    "tests/goldens/fp8-products/make.py",
    "tests/goldens/preferences/make.py",
    "tests/goldens/grpo/make.py",
    "tests/goldens/reward/make.py",
    "tests/goldens/rope/make.py",
    "crates/rekindle-quant/goldens/fp8.py",
    "crates/rekindle-rope/goldens/make.py",
    "crates/rekindle-train/goldens/tensorboard/make.py",
    "crates/rekindle-data/goldens/chats/make.py",
    "crates/rekindle-data/goldens/chats/harmony.py",
    "crates/rekindle-data/goldens/parquet/make.py",
    "crates/rekindle-data/goldens/arrow/make.py",
];

pub(crate) fn make(python: &Path) -> Result<(), Box<dyn Error>> {
    for script in SCRIPTS {
        run(Command::new(python).arg("-B").arg(root().join(script)))?;
    }
    written_here(python)
}

/// Writes an adapter with Rekindle and computes its losses with PEFT.
fn written_here(python: &Path) -> Result<(), Box<dyn Error>> {
    let model = root().join("tests/goldens/qwen3-tied");
    run(Command::new("cargo")
        .args(["run", "-p", "rekindle-tests", "--example", "write_adapter", "--"])
        .arg(model.join("written-here"))
        .current_dir(root()))?;
    run(Command::new(python)
        .args(["-B", "../check_adapter.py", "written-here", ".", "rows.jsonl", "written-here/peft.json"])
        .current_dir(&model))
}

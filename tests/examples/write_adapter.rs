//! Writes the adapter of `goldens/qwen3-tied/written-here`, which `goldens/check_adapter.py` reads.
//!
//! `cargo run -p rekindle-tests --example write_adapter -- DIR`

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: write_adapter DIR")?;
    let dir = std::path::PathBuf::from(dir);
    std::fs::create_dir_all(&dir)?;
    rekindle_tests::train_written_adapter().save(&dir)?;
    Ok(())
}

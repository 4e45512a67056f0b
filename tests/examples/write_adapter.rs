//! Writes the adapter of `goldens/qwen3-tied/written-here`, which `goldens/check_adapter.py` reads, or with `experts` that of
//! `goldens/families/mixtral/written-here`, which `goldens/families/moe.py` reads.
//!
//! `cargo run -p rekindle-tests --example write_adapter -- DIR [experts]`

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: write_adapter DIR [experts]")?;
    let dir = std::path::PathBuf::from(dir);
    std::fs::create_dir_all(&dir)?;
    let adapter = match std::env::args().nth(2).as_deref() {
        Some("experts") => rekindle_tests::random_expert_adapter(),
        _ => rekindle_tests::train_written_adapter(),
    };
    adapter.save(&dir)?;
    Ok(())
}

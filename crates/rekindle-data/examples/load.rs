//! Loads rows twice, the second time from a cache, and says how long each took.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release -p rekindle-data --example load -- CHECKPOINT FILE...`

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use rekindle_data::{DataFiles, EncodeOptions, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).map(PathBuf::from);
    let checkpoint = args.next().ok_or("give the directory of a checkpoint, and files of rows")?;
    let tokenizer = Tokenizer::from_dir(&checkpoint)?;
    let cache = tempfile::tempdir()?;
    let files = DataFiles::find(args)?.cache_dir(cache.path());
    let options = EncodeOptions { max_seq_length: 1 << 20, ..EncodeOptions::default() };
    for what in ["encoded", "mapped"] {
        let began = Instant::now();
        let (dataset, report) = files.load(Some(&tokenizer), &options)?;
        let seconds = began.elapsed().as_secs_f64();
        let rate = report.tokens as f64 / seconds;
        println!("{what}: {} examples, {} tokens in {seconds:.3} s, {rate:.0} tokens/s", dataset.len(), report.tokens);
    }
    Ok(())
}

//! Measures the quantizers on all cores: normal values in memory to blocks.
//!
//! ```sh
//! cargo run --release --example quantizers -p rekindle-gguf
//! ```

use std::time::Instant;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rekindle_gguf::{Error, GgmlType};

const COLUMNS: usize = 2560;
const VALUES: usize = COLUMNS * 4096;

fn main() -> Result<(), Error> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    // The sum of four uniform numbers is nearly normal.
    let values: Vec<f32> =
        (0..VALUES).map(|_| (0..4).map(|_| random.random::<f32>() - 0.5).sum::<f32>() * 0.035).collect();
    for kind in GgmlType::SUPPORTED {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            kind.quantize(&values, COLUMNS, None)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{:8} {:8.1} million weights/s", kind.name(), VALUES as f64 / best / 1e6);
    }
    Ok(())
}

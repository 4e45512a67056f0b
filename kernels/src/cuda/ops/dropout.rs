//! Dropout and noise from a counter-based generator: those of the CPU path, bit for bit.

use super::{int, kernel, like, piece_grid};
use crate::cuda::{Array, Ints, args};

/// x ∘ keep / (1 − p) for the mask of (seed, step, site); `rows` and `positions` are the tokens' coordinates.
pub(crate) fn apply(x: &Array, p: f32, seed: u64, step: u32, rows: &Ints, positions: &Ints, site: u32) -> Array {
    assert_eq!([rows.len(), positions.len()], [x.rows(); 2], "coordinates of every token");
    if p == 0.0 {
        return x.clone();
    }
    let (x, y) = (x.aligned(), like(x));
    let key = seed ^ u64::from(site).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let threshold = (f64::from(p) * 2f64.powi(32)) as u32;
    let keep = 1.0 / (1.0 - p);
    kernel(x.cuda(), "dropout.cu", "dropout", x.dtype()).launch(
        piece_grid(&x),
        [256, 1, 1],
        0,
        args![
            x.ptr(),
            rows.ptr(),
            positions.ptr(),
            y.ptr(),
            key,
            step,
            threshold,
            keep,
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(y.ld())
        ],
    );
    y
}

/// x + noise of at most `largest` of each token, f32 as bits; `rows` and `positions` are the tokens' coordinates.
pub(crate) fn neftune(x: &Array, key: u64, step: u32, rows: &Ints, positions: &Ints, largest: &Ints) -> Array {
    assert_eq!([rows.len(), positions.len(), largest.len()], [x.rows(); 3], "coordinates of every token");
    let (x, y) = (x.aligned(), like(x));
    kernel(x.cuda(), "dropout.cu", "neftune", x.dtype()).launch(
        piece_grid(&x),
        [256, 1, 1],
        0,
        args![
            x.ptr(),
            rows.ptr(),
            positions.ptr(),
            largest.ptr(),
            y.ptr(),
            key,
            step,
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(y.ld())
        ],
    );
    y
}

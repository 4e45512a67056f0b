//! The noise of the CPU path, bit for bit.

use crate::runtime::op::{int, kernel, like, piece_grid};
use crate::runtime::{Array, Ints, args, entry};

/// x + noise of at most `largest` of each token, f32 as bits; `rows` and `positions` are the tokens' coordinates.
pub(crate) fn apply(x: &Array, key: u64, step: u32, rows: &Ints, positions: &Ints, largest: &Ints) -> Array {
    assert_eq!([rows.len(), positions.len(), largest.len()], [x.rows(); 3], "coordinates of every token");
    let (x, y) = (x.aligned(), like(x));
    kernel(x.cuda(), entry!("dropout.cu", "neftune"), x.dtype()).launch(
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

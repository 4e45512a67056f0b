//! The masks of the CPU path, bit for bit.

use super::Dropout;
use crate::runtime::op::{int, kernel, like, piece_grid};
use crate::runtime::{Array, args, entry};

/// x ∘ keep / (1 − p) for the mask of `layer_id`.
pub(crate) fn apply(x: &Array, dropout: Dropout<'_>, layer_id: u32) -> Array {
    let [rows, positions] = dropout.tokens.cuda();
    assert_eq!([rows.len(), positions.len()], [x.rows(); 2], "coordinates of every token");
    let (x, y) = (x.aligned(), like(x));
    kernel(x.cuda(), entry!("dropout.cu", "dropout"), x.dtype()).launch(
        piece_grid(&x),
        [256, 1, 1],
        0,
        args![
            x.ptr(),
            rows.ptr(),
            positions.ptr(),
            y.ptr(),
            dropout.key.for_layer(layer_id),
            dropout.key.step,
            dropout.threshold(),
            dropout.keep(),
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(y.ld())
        ],
    );
    y
}

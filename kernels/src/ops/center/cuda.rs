//! Launches of `center.cu`.

use crate::runtime::op::{blocks, int, kernel, like};
use crate::runtime::{Array, args, entry};

pub(super) fn forward(x: &Array) -> Array {
    let (x, y) = (x.aligned(), like(x));
    kernel(x.cuda(), entry!("center.cu", "center"), x.dtype()).launch(
        [blocks(x.rows()), 1, 1],
        [256, 1, 1],
        0,
        args![x.ptr(), y.ptr(), int(x.cols()), int(x.ld()), int(y.ld())],
    );
    y
}

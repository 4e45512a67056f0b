//! Launches of `gated_norm.cu`.

use crate::runtime::op::{blocks, check_dims, int, kernel, lanes, like, padded};
use crate::runtime::{Array, DType, MemoryUse, args, entry, reduce};

/// The widest head: what the lanes of a warp hold in f32.
pub(super) const MAX_WIDTH: usize = 128;

/// Rows of a token and head that a group of lanes computes.
const RUN: usize = 16;

pub(super) fn forward(x: &Array, z: &Array, weight: &Array, eps: f32, pad_cols: usize) -> Array {
    let heads = Heads::of(x, weight);
    let (x, z, weight, y) = (x.aligned(), z.aligned(), weight.aligned(), padded(x, pad_cols));
    kernel(x.cuda(), entry!("gated_norm.cu", "gated_norm_fwd"), x.dtype()).launch(
        [blocks(heads.blocks), 1, 1],
        [256, 1, 1],
        0,
        args![
            x.ptr(),
            z.ptr(),
            weight.ptr(),
            y.ptr(),
            int(x.rows()),
            int(heads.heads),
            int(heads.width),
            int(heads.lanes),
            int(x.ld()),
            int(z.ld()),
            int(y.ld()),
            eps
        ],
    );
    y
}

pub(super) fn backward(dy: &Array, x: &Array, z: &Array, weight: &Array, eps: f32) -> (Array, Array) {
    let (dx, dz) = (like(x), like(z));
    run([dy, x, z, weight], eps, [&dx, &dz], None);
    (dx, dz)
}

pub(super) fn weight_grad(dy: &Array, x: &Array, z: &Array, weight: &Array, eps: f32) -> Array {
    let heads = Heads::of(x, weight);
    let partial = Array::dense(x.cuda(), [heads.blocks, heads.width], DType::F32, MemoryUse::Scratch);
    // The kernel makes all gradients; those to x and z go where nothing reads them.
    let (dx, dz) = (like(x), like(z));
    run([dy, x, z, weight], eps, [&dx, &dz], Some(&partial));
    let grad = Array::zeros(x.cuda(), [1, heads.width], DType::F32, MemoryUse::Activations);
    reduce::sum_partials(&partial, &grad);
    grad
}

fn run([dy, x, z, weight]: [&Array; 4], eps: f32, [dx, dz]: [&Array; 2], partial: Option<&Array>) {
    check_dims("dy", dy, x.dims());
    let heads = Heads::of(x, weight);
    let (dy, x, z, weight) = (dy.aligned(), x.aligned(), z.aligned(), weight.aligned());
    kernel(x.cuda(), entry!("gated_norm.cu", "gated_norm_bwd"), x.dtype()).launch(
        [blocks(heads.blocks), 1, 1],
        [256, 1, 1],
        0,
        args![
            dy.ptr(),
            x.ptr(),
            z.ptr(),
            weight.ptr(),
            dx.ptr(),
            dz.ptr(),
            partial.map_or(0, Array::ptr),
            int(x.rows()),
            int(heads.heads),
            int(heads.width),
            int(heads.lanes),
            int(dy.ld()),
            int(x.ld()),
            int(z.ld()),
            int(dx.ld()),
            int(dz.ld()),
            eps
        ],
    );
}

/// The split of a matrix's heads over lanes.
struct Heads {
    heads: usize,
    width: usize,
    lanes: usize,
    blocks: usize,
}

impl Heads {
    fn of(x: &Array, weight: &Array) -> Self {
        let width = weight.cols();
        assert_eq!(weight.dtype(), x.dtype(), "dtype of the norm's weight");
        assert!(width.is_multiple_of(8) && width <= MAX_WIDTH, "heads of {width} channels; the kernel takes 8 to 128");
        let heads = x.cols() / width;
        let lanes = width.div_ceil(lanes(x.dtype())).next_power_of_two();
        let blocks = (x.rows() * heads * lanes).div_ceil(256 * RUN);
        Self { heads, width, lanes, blocks }
    }
}

//! Launches of `causal_conv.cu`.

use crate::ops::gated_delta::CudaChunks;
use crate::runtime::op::{blocks, check_dims, int, lanes, like};
use crate::runtime::{Array, DType, Entry, Kernel, MemoryUse, args, entry, reduce};

/// Tokens of a block.
const TOKENS: usize = 256;

/// y; of documents, or of the next tokens of one that begins with `past`.
pub(super) fn forward(x: &Array, weight: &Array, chunks: Option<&CudaChunks>, past: Option<&Array>) -> Array {
    let (x, weight, y) = (x.aligned(), weight.contiguous(), like(x));
    let past = past.map(Array::aligned);
    let (past_at, past_ld) = past.as_ref().map_or((0, 0), |past| (past.ptr(), past.ld()));
    kernel(&x, &weight, entry!("causal_conv.cu", "causal_conv_fwd")).launch(
        grid(&x),
        [32, 8, 1],
        0,
        args![
            x.ptr(),
            weight.ptr(),
            chunks.map_or(0, CudaChunks::positions),
            past_at,
            y.ptr(),
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(past_ld),
            int(y.ld())
        ],
    );
    y
}

/// `(dx, dw)`, dw f32 `[channels, width]`.
pub(super) fn backward(
    dy: &Array,
    x: &Array,
    weight: &Array,
    chunks: &CudaChunks,
    weight_grad: bool,
) -> (Array, Option<Array>) {
    check_dims("dy", dy, x.dims());
    let (dy, x, weight, dx) = (dy.aligned(), x.aligned(), weight.contiguous(), like(x));
    let sums = [x.rows().div_ceil(TOKENS), weight.rows() * weight.cols()];
    let partial = weight_grad.then(|| Array::dense(x.cuda(), sums, DType::F32, MemoryUse::Scratch));
    kernel(&x, &weight, entry!("causal_conv.cu", "causal_conv_bwd")).launch(
        grid(&x),
        [32, 8, 1],
        0,
        args![
            dy.ptr(),
            x.ptr(),
            weight.ptr(),
            chunks.positions(),
            dx.ptr(),
            partial.as_ref().map_or(0, Array::ptr),
            int(x.rows()),
            int(x.cols()),
            int(dy.ld()),
            int(x.ld()),
            int(dx.ld())
        ],
    );
    let dw = partial.map(|partial| {
        let sum = Array::zeros(x.cuda(), [1, sums[1]], DType::F32, MemoryUse::Activations);
        reduce::sum_partials(&partial, &sum);
        sum.part(0, weight.dims())
    });
    (dx, dw)
}

fn kernel(x: &Array, weight: &Array, entry: Entry) -> Kernel {
    assert_eq!(weight.dtype(), x.dtype(), "dtype of the convolution's weight");
    x.cuda().kernel(entry, &[("T", x.dtype().name()), ("W", &weight.cols().to_string())])
}

fn grid(x: &Array) -> [u32; 3] {
    [blocks(x.cols().div_ceil(32 * lanes(x.dtype()))), blocks(x.rows().div_ceil(TOKENS)), 1]
}

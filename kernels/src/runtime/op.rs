//! Helpers for operations on [`Array`]s: one dtype's kernel, grids, result arrays.
//!
//! An operation never waits for the device: it returns arrays whose values are computed later, in stream order. An array
//! passed by value is overwritten if nothing else refers to its memory. Wrong shapes are bugs of the caller and panic;
//! device errors stick (see [`super`]). The mathematics is in the `mod.rs` beside each `cuda.rs`, layouts and launch
//! rules are in the head of the kernel's file.
//!
//! Sums are f32. `T` in the kernels is the dtype of activations and frozen weights: bf16, f16 or f32.

use super::{Array, Cuda, DType, Entry, Kernel, MemoryUse};

/// A kernel of a file that knows one dtype.
pub(crate) fn kernel(cuda: &Cuda, entry: Entry, dtype: DType) -> Kernel {
    cuda.kernel(entry, &[("T", dtype.name())])
}

/// A number of rows, columns or elements, as kernels take them.
pub(crate) fn int(n: usize) -> i32 {
    i32::try_from(n).expect("sizes that kernels are given fit 31 bits")
}

/// The extent of a grid.
pub(crate) fn blocks(n: usize) -> u32 {
    u32::try_from(n).expect("grids have fewer than 2³² blocks")
}

/// Values in 16 bytes.
pub(crate) fn lanes(dtype: DType) -> usize {
    16 / dtype.bytes()
}

/// The grid of kernels whose threads take one 16-byte piece of a row each, 256 threads a block.
pub(crate) fn piece_grid(x: &Array) -> [u32; 3] {
    [blocks((x.rows() * x.cols().div_ceil(lanes(x.dtype()))).div_ceil(256)), 1, 1]
}

/// An uninitialized matrix beside another one: its shape, dtype and device.
pub(crate) fn like(x: &Array) -> Array {
    padded(x, 0)
}

/// [`like`], with `pad_cols` spare columns behind each row.
pub(crate) fn padded(x: &Array, pad_cols: usize) -> Array {
    Array::padded(x.cuda(), x.dims(), pad_cols, x.dtype(), MemoryUse::Activations)
}

/// `x` itself where it may be written over, and an uninitialized matrix of its shape where not.
pub(crate) fn target(x: &Array) -> Array {
    if x.is_unique() && x.is_aligned() { x.clone() } else { like(x) }
}

pub(crate) fn check_dims(name: &str, x: &Array, dims: [usize; 2]) {
    assert_eq!(x.dims(), dims, "shape of {name}");
}

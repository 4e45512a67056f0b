//! The operations of a training step on [`Array`]s, each a launch or a few.
//!
//! Nothing waits for the device: results are arrays whose values are on their way. Where an operation takes an array by
//! value, the result lies in its memory if nothing else reaches it. Shapes that do not fit are the caller's mistake and
//! panic; what goes wrong on the device sticks (see [`super`]). The mathematics stands in the file of the same name two
//! levels up, layouts and launch rules in the head of the kernel's file.
//!
//! Sums are f32. `T` below is the dtype of activations and frozen weights: bf16, f16 or f32.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod matmul;
pub(crate) mod mirror;
pub(crate) mod optimizer;
pub(crate) mod optimizer_8bit;
pub(crate) mod packed;
pub(crate) mod reduce;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod stacked;
pub(crate) mod stochastic;
pub(crate) mod swiglu;

use super::{Array, Cuda, DType, Kernel};

/// The label of results in the account of memory.
const ACTIVATIONS: &str = "activations";

/// A kernel of a file that knows one dtype.
fn kernel(cuda: &Cuda, file: &str, entry: &str, dtype: DType) -> Kernel {
    cuda.kernel(file, entry, &[("T", dtype.name())])
}

/// A number of rows, columns or elements, as kernels take them.
fn int(n: usize) -> i32 {
    i32::try_from(n).expect("sizes that kernels are given fit 31 bits")
}

/// The extent of a grid.
fn blocks(n: usize) -> u32 {
    u32::try_from(n).expect("grids have fewer than 2³² blocks")
}

/// Values in 16 bytes.
fn lanes(dtype: DType) -> usize {
    16 / dtype.bytes()
}

/// The grid of kernels whose threads take one 16-byte piece of a row each, 256 threads a block.
fn piece_grid(x: &Array) -> [u32; 3] {
    [blocks((x.rows() * x.cols().div_ceil(lanes(x.dtype()))).div_ceil(256)), 1, 1]
}

/// An uninitialized matrix beside another one: its shape, dtype and device.
fn like(x: &Array) -> Array {
    roomy(x, 0)
}

/// [`like`], with room for `room` more columns.
fn roomy(x: &Array, room: usize) -> Array {
    Array::with_room(x.cuda(), x.dims(), room, x.dtype(), ACTIVATIONS)
}

/// `x` itself where it may be written over, and an uninitialized matrix of its shape where not.
fn target(x: &Array) -> Array {
    if x.is_unique() && x.is_aligned() { x.clone() } else { like(x) }
}

fn check_dims(name: &str, x: &Array, dims: [usize; 2]) {
    assert_eq!(x.dims(), dims, "shape of {name}");
}

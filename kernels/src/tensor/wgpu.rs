//! Tensors of Burn on wgpu as buffers of kernels written in CubeCL.
//!
//! A kernel of an operation (`ops/<op>/wgpu.rs`) takes packed `f32` tensors. [`buffer`] returns `None` for all others, and the
//! operation is then computed by its portable path.

use burn::tensor::{DType, Int, Tensor as BurnTensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{Cube, CubeDevice};
use cubecl::prelude::*;

use super::{Backend, Tensor};

/// The most workgroups along an axis that WebGPU guarantees.
const MAX_CUBES: u32 = 65_535;

/// Returns the packed values of an f32 tensor on wgpu that is neither empty nor tracked by autodiff, outside of
/// [`Backend::portable_only`].
pub(crate) fn buffer<const D: usize>(tensor: &Tensor<D>) -> Option<CubeTensor> {
    match tensor {
        Tensor::Burn(tensor) => of_burn(tensor),
        Tensor::Cuda(_) | Tensor::Meta(_) => None,
    }
}

/// [`buffer`] of a tensor of Burn.
pub(crate) fn of_burn<const D: usize>(tensor: &BurnTensor<D>) -> Option<CubeTensor> {
    let is_empty = tensor.dims().contains(&0);
    if tensor.dtype() != DType::F32 || is_empty || tensor.is_autodiff() || Backend::is_portable_only() {
        return None;
    }
    packed(tensor.clone().try_into_primitive::<Cube>().ok()?)
}

/// Returns the packed values of 32-bit integers on wgpu.
pub(crate) fn ints<const D: usize>(tensor: &BurnTensor<D, Int>) -> Option<CubeTensor> {
    if tensor.dtype() != DType::I32 || tensor.dims().contains(&0) || Backend::is_portable_only() {
        return None;
    }
    packed(tensor.clone().try_into_primitive::<Cube>().ok()?)
}

fn packed(tensor: CubeTensor) -> Option<CubeTensor> {
    matches!(tensor.device, CubeDevice::Wgpu(_)).then(|| into_contiguous(tensor))
}

/// Returns an `f32` tensor without defined values beside another.
pub(crate) fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D]) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), DType::F32)
}

/// Returns the argument of a kernel.
pub(crate) fn arg(tensor: &CubeTensor) -> BufferArg {
    tensor.clone().into_buffer_arg()
}

/// Copies integers to the device of a tensor, as the argument of a kernel.
pub(crate) fn words(like: &CubeTensor, values: &[u32]) -> BufferArg {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let handle = like.client.create_from_slice(&bytes);
    // SAFETY: the buffer holds this many values.
    #[allow(unsafe_code)]
    unsafe {
        BufferArg::from_raw_parts(handle, values.len())
    }
}

/// Copies floats to the device of a tensor, as the argument of a kernel.
pub(crate) fn floats(like: &CubeTensor, values: &[f32]) -> BufferArg {
    let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    words(like, &bits)
}

/// Returns a grid of at least `count` workgroups; those past it have nothing to do.
pub(crate) fn cubes(count: usize) -> CubeCount {
    let count = u32::try_from(count).expect("fewer than 2³² workgroups");
    CubeCount::Static(count.min(MAX_CUBES), count.div_ceil(MAX_CUBES), 1)
}

/// Returns the result of a kernel.
pub(crate) fn result<const D: usize>(tensor: CubeTensor) -> Tensor<D> {
    BurnTensor::from_primitive::<Cube>(tensor).into()
}

/// The sum over the units of a workgroup, in each of them; `units` is a power of two.
#[cube]
pub(crate) fn total(value: f32, #[comptime] units: usize) -> f32 {
    let mut sums = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    sums[unit] = value;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            sums[unit] += sums[unit + half];
        }
        sync_cube();
        half /= 2;
    }
    sums[0]
}

//! Tensors of Burn as those of the operations, and back.
//!
//! On the CPU and on wgpu they are the same. On Burn's CUDA device an operation reads the memory of Burn's tensors, and its
//! results are copied into new ones.

#[cfg(feature = "burn-cuda")]
mod cuda;

use burn::backend::DispatchTensor;
use burn::tensor::{Device as BurnDevice, Tensor as BurnTensor};
use rekindle_kernels::{Device, Tensor};

/// Returns the device of the operations on tensors of `device`.
pub(crate) fn operations_on(device: &BurnDevice) -> Device {
    let device = device.clone().without_autodiff();
    #[cfg(feature = "burn-cuda")]
    if let Some(cuda) = cuda::of_device(&device) {
        return Device::Cuda(cuda);
    }
    Device::Burn(device)
}

/// Reads the inputs of a node at once, so that [`rows`] and [`vector`] need not wait for Burn's device thread for each of
/// them. The result keeps them ready until it is dropped.
#[cfg(feature = "burn-cuda")]
pub(crate) fn prepare<'a>(inputs: impl Iterator<Item = &'a DispatchTensor>) -> cuda::Prepared {
    cuda::prepare(inputs)
}

/// Returns the rows of a plain tensor with `D` axes, `[tokens, features]`.
pub(crate) fn rows<const D: usize>(tensor: DispatchTensor) -> Tensor<2> {
    let tensor = BurnTensor::<D>::from_dispatch(tensor);
    #[cfg(feature = "burn-cuda")]
    if let Some(array) = cuda::matrix(&tensor) {
        return array.into();
    }
    let shape = tensor.dims();
    let features = shape[D - 1];
    let tokens = shape[..D - 1].iter().product::<usize>();
    tensor.reshape([tokens, features]).into()
}

/// Puts rows back into `shape`.
pub(crate) fn unrows<const D: usize>(rows: Tensor<2>, shape: [usize; D]) -> DispatchTensor {
    #[cfg(feature = "burn-cuda")]
    if let Tensor::Cuda(array) = &rows {
        return cuda::tensor(array, shape).into_dispatch();
    }
    BurnTensor::from(rows).reshape(shape).into_dispatch()
}

/// Returns a plain vector.
pub(crate) fn vector(tensor: DispatchTensor) -> Tensor<1> {
    let tensor = BurnTensor::<1>::from_dispatch(tensor);
    #[cfg(feature = "burn-cuda")]
    if let Some(array) = cuda::matrix(&tensor) {
        return array.into();
    }
    tensor.into()
}

/// Returns a result as a tensor of Burn.
pub(crate) fn burn<const D: usize>(tensor: Tensor<D>) -> BurnTensor<D> {
    #[cfg(feature = "burn-cuda")]
    if let Tensor::Cuda(array) = &tensor {
        return cuda::tensor(array, tensor.dims());
    }
    tensor.into()
}

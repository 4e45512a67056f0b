//! Routing on CUDA, which this version does not compute: every call ends in an error of the device.

use super::{Dispatch, HostDispatch, RoutingForm};
use crate::Tensor;
use crate::runtime::op::padded;
use crate::runtime::{Array, Cuda, CudaError, DType, MemoryUse};

/// A dispatch in the memory of a device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceDispatch;

impl DeviceDispatch {
    pub(super) fn upload(cuda: &Cuda, _: &HostDispatch) -> Self {
        cuda.fail(missing("routing"));
        Self
    }

    pub(super) fn download(&self) -> Result<HostDispatch, CudaError> {
        Err(missing("routing"))
    }
}

pub(super) fn forward(logits: &Array, top_k: usize, _: RoutingForm) -> (Tensor<2>, Dispatch) {
    let cuda = logits.cuda();
    cuda.fail(missing("routing"));
    let [tokens, experts] = logits.dims();
    let weights = Array::empty(cuda, [tokens, top_k], DType::F32, MemoryUse::Activations);
    let place = super::dispatch::DispatchPlace::Cuda(DeviceDispatch);
    (weights.into(), Dispatch::new(tokens, experts, top_k, place))
}

pub(super) fn backward(
    _: Option<&Array>,
    weights: &Array,
    dispatch: &Dispatch,
    _: RoutingForm,
    _: &Array,
    dtype: DType,
) -> Array {
    weights.cuda().fail(missing("the backward of routing"));
    Array::empty(weights.cuda(), [dispatch.tokens(), dispatch.experts()], dtype, MemoryUse::Activations)
}

pub(super) fn sum_slots(y: &Array, dispatch: &Dispatch, _: Option<&Array>) -> Array {
    y.cuda().fail(missing("the sum over the experts of a token"));
    padded(&y.row_range(0, dispatch.tokens()), 0)
}

/// The error of an operation that has no kernel.
pub(crate) fn missing(operation: &str) -> CudaError {
    CudaError::Usage {
        operation: operation.to_owned(),
        reason: "mixtures of experts have no CUDA kernels in this version; use device \"cpu\"".to_owned(),
    }
}

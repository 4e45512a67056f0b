//! Refuses attention over pages on CUDA.

use crate::runtime::{Array, CudaError, MemoryUse};

/// Returns the error of a device that has no kernel for this operation.
pub(super) fn unsupported() -> CudaError {
    CudaError::Usage {
        operation: "paged attention".to_owned(),
        reason: "there is no CUDA kernel for it; generate without the engine, or use device \"cpu\"".to_owned(),
    }
}

/// Records the error on the device, which then computes nothing more. Returns an array without meaningful values.
pub(super) fn forward(q: &Array) -> Array {
    q.cuda().fail(unsupported());
    Array::empty(q.cuda(), q.dims(), q.dtype(), MemoryUse::Activations)
}

//! Matrices that wait in host memory while the device computes.
//!
//! On CUDA the copies go over a stream of their own, between page-locked memory and the arena, and the host waits for
//! none of them. On other devices a matrix stays where it is.

use crate::Tensor;
use crate::runtime::{Array, ArrayShape, MemoryUse, PinnedBuffer, Ticket};

/// A matrix on its way to host memory and back.
#[derive(Debug)]
pub struct Offloaded(State);

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a block")]
enum State {
    /// The tensor on its device.
    Here(Tensor<2>),
    /// A tensor that is being copied to the host; its memory is not free yet.
    Going(Ticket, Away),
    /// The values on the host.
    There(Away),
    /// A tensor that is being copied back.
    Coming(Ticket, ArrayShape),
}

#[derive(Debug)]
struct Away {
    host: PinnedBuffer,
    shape: ArrayShape,
    bytes: usize,
}

impl Offloaded {
    /// Returns whether offloading `tensor` to the host frees device memory.
    pub fn frees(tensor: &Tensor<2>) -> bool {
        matches!(tensor, Tensor::Cuda(_))
    }

    /// A matrix that stays on its device.
    pub fn here(tensor: Tensor<2>) -> Self {
        Self(State::Here(tensor))
    }

    /// Begins to copy a matrix to the host, once what is queued so far is done with it.
    pub fn begin(tensor: Tensor<2>) -> Self {
        // In memory of its own, which goes back when the copy is done.
        match tensor.detached() {
            Tensor::Cuda(array) => match array.into_buffer() {
                // There is no memory of no bytes.
                Ok((buffer, shape)) if buffer.bytes() == 0 => Self::here(Array::from_buffer(buffer, shape).into()),
                Ok((buffer, shape)) => {
                    let (cuda, bytes) = (buffer.cuda().clone(), buffer.bytes());
                    let host = cuda.pinned(bytes);
                    Self(State::Going(cuda.copy_out(buffer, &host), Away { host, shape, bytes }))
                }
                Err(array) => Self::here(array.into()),
            },
            tensor @ (Tensor::Burn(_) | Tensor::Meta(_)) => Self::here(tensor),
        }
    }

    /// Gives the device's memory back; what is queued from here on waits for the copy to the host.
    #[must_use]
    pub fn settled(self) -> Self {
        match self.0 {
            State::Going(ticket, away) => {
                drop(ticket.finish());
                Self(State::There(away))
            }
            other => Self(other),
        }
    }

    /// Begins to copy the matrix back, beside whatever is queued from here on.
    #[must_use]
    pub fn coming(self) -> Self {
        match self.settled().0 {
            State::There(Away { host, shape, bytes }) => {
                let cuda = host.cuda();
                Self(State::Coming(cuda.copy_in(&host, cuda.alloc(bytes, MemoryUse::Activations)), shape))
            }
            other => Self(other),
        }
    }

    /// The matrix; what is queued from here on waits for the copy.
    pub fn take(self) -> Tensor<2> {
        match self.coming().0 {
            State::Here(tensor) => tensor,
            State::Coming(ticket, shape) => Array::from_buffer(ticket.finish(), shape).into(),
            State::Going(..) | State::There(_) => unreachable!("what is away comes"),
        }
    }
}

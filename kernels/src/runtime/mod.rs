//! The CUDA runtime that the fused operations run on: device, memory, kernels, matrix products.
//!
//! Nothing here knows a tensor library. [`Cuda`] is one device; [`Cuda::alloc`] gives a [`Buffer`] out of an arena with
//! fixed addresses, [`Cuda::kernel`] a [`Kernel`] compiled for the card at hand, [`Cuda::gemm`] a product by cuBLASLt.
//! All of it is queued on one stream, in the order of the calls.
//!
//! **Errors stick.** Operations return nothing: the first failure is kept, with the name of what failed, every later
//! operation does nothing, and [`Cuda::check`], [`Cuda::synchronize`] and downloads return it. A step of training is a
//! few hundred calls, and a caller can do nothing about the middle of it.
//!
//! **`unsafe`.** Handles (streams, events, modules) live in types that own them and are private to this module. Kernels
//! are given device addresses and cannot reach host memory but pinned buffers; what a launch is given is checked against
//! the kernel's parameters by number and size. A wrong address is a fault of the device, which comes back as an error.

#![allow(unsafe_code)]

mod arena;
mod array;
mod attention_tiles;
mod blaslt;
mod blocks;
mod cache;
mod compile_check;
mod context;
mod doctor;
mod driver;
pub(crate) mod elementwise;
mod error;
mod event;
mod find;
mod foreign;
mod gemm;
mod graph;
mod kernels;
mod launch;
mod ledger;
pub(crate) mod limits;
mod memory_use;
mod nccl;
mod nvrtc;
pub(crate) mod op;
mod pinned;
mod planned;
mod profile;
mod read_back;
pub(crate) mod reduce;
mod sources;
mod tensor_map;
mod transfer;

pub use arena::Buffer;
pub(crate) use array::Fp8Rows;
pub use array::{Array, ArrayShape, Ints, Word};
pub use attention_tiles::{AttentionKernel, PagedTiles, Tiles};
pub use compile_check::{Checked, compile_check};
pub use context::{CUDA_CONTEXT_BYTES, Cuda, DeviceProps, count, device_props, first};
pub use doctor::{Finding, Report, report};
pub use error::{CudaError, Library};
pub use event::Event;
pub use gemm::{DType, Form, Gemm, Operand};
pub use graph::{Graph, Workspace};
pub use kernels::KernelSpec;
pub(crate) use launch::args;
pub use launch::{Arg, Kernel, KernelArg};
pub(crate) use ledger::MemoryLedger;
pub use ledger::MemoryStats;
pub use memory_use::MemoryUse;
pub use nccl::{NCCL_BYTES, NcclComm, NcclId, nccl_version};
pub use nvrtc::{Arch, Usage};
pub use pinned::{PinnedBuffer, Ticket};
pub use profile::ProfileEntry;
pub use read_back::ReadBack;
pub(crate) use sources::entry;
pub use sources::{BLOCK_FORMATS, Defines, Entry, SOURCES, Source};
pub use tensor_map::TensorMap;

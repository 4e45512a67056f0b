//! Burn's CUDA device and Rekindle's CUDA runtime on one memory.
//!
//! Both use the primary context of the card, so addresses of one are valid in the other. Burn's work is queued by one
//! thread for each device, in the order of its calls; what is submitted to that thread here is ordered with it. There, the
//! address of a buffer is read, and the streams of both wait for each other:
//!
//! - before the addresses of inputs are used, our stream waits for everything that Burn has queued;
//! - after a result is copied, Burn's streams wait for ours. Then the buffers that were read before go back to Burn.

use core::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::{DispatchDevice, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Device, StreamId, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::__private::Runtime;
use cubecl::cuda::CudaRuntime;
use cubecl::server::{Handle, ServerStorage};
use cubecl_common::device::Device as _;
use cubecl_common::device_handle::DeviceHandle;
use rekindle_kernels::runtime::{Array, Cuda, DType as CudaDType};

type CudaServer = <CudaRuntime as Runtime>::Server;

/// The opened devices by their index.
static OPEN: Mutex<Vec<(usize, Cuda)>> = Mutex::new(Vec::new());

/// Returns the runtime of a CUDA device of Burn, and `None` for other devices.
///
/// # Panics
/// If Rekindle's runtime cannot use the device.
pub(super) fn of_device(device: &Device) -> Option<Cuda> {
    match device.as_dispatch() {
        DispatchDevice::Cube(device) => of_cube(device),
        _ => None,
    }
}

fn of_cube(device: &CubeDevice) -> Option<Cuda> {
    let CubeDevice::Cuda(device) = device else { return None };
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, cuda)) = open.iter().find(|(index, _)| *index == device.index) {
        return Some(cuda.clone());
    }
    let cuda = Cuda::open(device.index)
        .unwrap_or_else(|error| panic!("Burn's CUDA device {} is not usable here: {error}", device.index));
    open.push((device.index, cuda.clone()));
    Some(cuda)
}

/// The device of Burn that an array came from.
fn device_of(cuda: &Cuda) -> Device {
    let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let found = open.iter().find(|(_, other)| other.stream() == cuda.stream());
    Device::cuda(found.expect("arrays here are on devices of Burn").0)
}

/// A buffer of Burn whose address stays the same while this lives.
struct Held {
    /// The stream of ours that reads it.
    stream: u64,
    address: u64,
    /// The handle and what pins it. The mutex shares what threads may only move.
    memory: Option<(Handle, Box<dyn Send + Sync>)>,
}

/// Buffers that nothing reads any more but work on our stream, by that stream. They go back to Burn with the next result.
static RELEASED: Mutex<Vec<(u64, Handle, Box<dyn Send + Sync>)>> = Mutex::new(Vec::new());

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((handle, pin)) = self.memory.take() {
            released().push((self.stream, handle, pin));
        }
    }
}

fn released() -> MutexGuard<'static, Vec<(u64, Handle, Box<dyn Send + Sync>)>> {
    RELEASED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn on_thread_of(device: &CubeDevice) -> DeviceHandle<CudaServer> {
    let CubeDevice::Cuda(device) = device else { unreachable!("only CUDA tensors are held") };
    DeviceHandle::new(device.to_id())
}

/// Holds the buffers of tensors of one device, after our stream was made to wait for what fills them.
fn hold(cuda: &Cuda, device: &CubeDevice, handles: Vec<Handle>) -> Vec<Held> {
    let (stream, bindings) = (StreamId::current(), handles.iter().map(|handle| handle.clone().binding()));
    let bindings: Vec<_> = bindings.collect();
    let waiting = cuda.clone();
    let pinned = on_thread_of(device).submit_blocking(move |server: &mut CudaServer| {
        let pinned: Result<Vec<_>, _> =
            bindings.into_iter().map(|binding| server.get_resource(binding, stream)).collect();
        waiting.wait_for_context();
        pinned
    });
    let pinned = match pinned {
        Ok(Ok(pinned)) => pinned,
        Ok(Err(error)) => panic!("a tensor of Burn's CUDA device cannot be read: {error:?}"),
        Err(error) => panic!("Burn's CUDA device does not answer: {error:?}"),
    };
    let held = pinned.into_iter().zip(handles).map(|(pinned, handle)| Held {
        stream: cuda.stream(),
        address: pinned.resource().ptr,
        memory: Some((handle, Box::new(Mutex::new(pinned)))),
    });
    held.collect()
}

thread_local! {
    /// Buffers of [`Prepared`], by their handles.
    static PREPARED: RefCell<Vec<Held>> = const { RefCell::new(Vec::new()) };
}

/// Keeps the inputs of a node ready.
pub(crate) struct Prepared;

impl Drop for Prepared {
    fn drop(&mut self) {
        PREPARED.take();
    }
}

pub(super) fn prepare<'a>(inputs: impl Iterator<Item = &'a DispatchTensor>) -> Prepared {
    let inputs: Vec<CubeTensor> = inputs.filter_map(primitive).collect();
    if let Some(first) = inputs.first()
        && let Some(cuda) = of_cube(&first.device)
    {
        let device = first.device.clone();
        let held = hold(&cuda, &device, inputs.into_iter().map(|input| input.handle).collect());
        PREPARED.set(held);
    }
    Prepared
}

/// The tensor of the backend, if it is one of floats on CUDA.
fn primitive(tensor: &DispatchTensor) -> Option<CubeTensor> {
    let DispatchTensorKind::Cube(burn::backend::BackendTensor::Float(tensor)) = &tensor.kind else { return None };
    matches!(tensor.device, CubeDevice::Cuda(_)).then(|| tensor.clone())
}

/// Returns a plain tensor as a matrix of its rows in the same memory, and `None` on other devices. A tensor without a
/// constant row stride, such as a transposed one, is copied first.
pub(super) fn matrix<const D: usize>(tensor: &Tensor<D>) -> Option<Array> {
    let tensor = primitive(&tensor.clone().into_dispatch())?;
    let cuda = of_cube(&tensor.device)?;
    // A tiled tensor has more axes than its shape.
    let distance = row_stride(&tensor).filter(|_| tensor.meta.shape().as_slice().len() == D);
    let (tensor, ld) = match distance {
        Some(ld) => (tensor, ld),
        None => {
            let tensor = into_contiguous(tensor);
            let ld = row_stride(&tensor).expect("contiguous rows have one stride");
            (tensor, ld)
        }
    };
    let shape = tensor.meta.shape().as_slice().to_vec();
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().rev().skip(1).product();
    let held =
        take_prepared(&tensor.handle).unwrap_or_else(|| hold(&cuda, &tensor.device, vec![tensor.handle]).remove(0));
    let address = held.address;
    let array = Array::foreign(&cuda, address, [rows, cols], ld, cuda_dtype(tensor.dtype), Box::new(held));
    // Kernels read 16 bytes at a time; rows of an odd length are copied.
    Some(array.aligned())
}

fn take_prepared(handle: &Handle) -> Option<Held> {
    PREPARED.with_borrow_mut(|prepared| {
        let is_same = |held: &Held| {
            held.memory.as_ref().is_some_and(|(other, _)| {
                other.memory.descriptor().id == handle.memory.descriptor().id
                    && (other.offset_start, other.offset_end) == (handle.offset_start, handle.offset_end)
            })
        };
        let at = prepared.iter().position(is_same)?;
        Some(prepared.swap_remove(at))
    })
}

/// Returns the row stride in elements, if it is the same for all rows and the elements of a row are contiguous.
fn row_stride(tensor: &CubeTensor) -> Option<usize> {
    let (shape, strides) = (tensor.meta.shape().as_slice(), tensor.meta.strides());
    if shape.len() != strides.len() {
        return None;
    }
    let (&cols, outer) = shape.split_last()?;
    if cols > 1 && strides[outer.len()] != 1 {
        return None;
    }
    // Axes of one element have any stride.
    let mut axes = (0..outer.len()).rev().filter(|&axis| outer[axis] > 1);
    let Some(last) = axes.next() else { return Some(cols.max(1)) };
    let (ld, mut next) = (strides[last], strides[last] * outer[last]);
    for axis in axes {
        if strides[axis] != next {
            return None;
        }
        next *= outer[axis];
    }
    (ld >= cols).then_some(ld)
}

/// Returns the values of an array as a new tensor of Burn.
///
/// # Panics
/// With the first error of the device.
pub(super) fn tensor<const D: usize>(array: &Array, shape: [usize; D]) -> Tensor<D> {
    let (cuda, array) = (array.cuda().clone(), array.clone());
    if let Some(error) = cuda.check().err().and_then(|_| cuda.take_error()) {
        panic!("{error}");
    }
    let device = device_of(&cuda);
    let result = Tensor::<D>::empty(shape, (&device, burn_dtype(array.dtype())));
    let target = primitive(&result.clone().into_dispatch()).expect("made on Burn's CUDA device");
    let ld = row_stride(&target).expect("new tensors have their rows at one distance");
    let (binding, stream) = (target.handle.clone().binding(), StreamId::current());
    let ours = cuda.stream();
    let done: Vec<_> = released().extract_if(.., |(stream, ..)| *stream == ours).collect();
    on_thread_of(&target.device).submit(move |server: &mut CudaServer| {
        // If the allocation failed, nothing is copied, and Burn reports the error when the tensor is read.
        let Ok(pinned) = server.get_resource(binding, stream) else { return cuda.context_waits() };
        cuda.wait_for_context();
        let address = pinned.resource().ptr;
        let owner = Box::new(Mutex::new(pinned));
        array.write_to(&Array::foreign(&cuda, address, array.dims(), ld, array.dtype(), owner));
        cuda.context_waits();
        drop((array, done));
    });
    result
}

fn cuda_dtype(dtype: DType) -> CudaDType {
    match dtype {
        DType::F32 => CudaDType::F32,
        DType::F16 => CudaDType::F16,
        DType::BF16 => CudaDType::Bf16,
        other => panic!("layers of rekindle-burn compute in f32, f16 or bf16 on CUDA, not {other:?}"),
    }
}

fn burn_dtype(dtype: CudaDType) -> DType {
    match dtype {
        CudaDType::F32 => DType::F32,
        CudaDType::F16 => DType::F16,
        CudaDType::Bf16 => DType::BF16,
    }
}

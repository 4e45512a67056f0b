//! Launching a kernel.

use core::ffi::c_void;
use core::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use cudarc::driver::sys;

use super::driver::{Failed, Handle, driver};
use super::{Cuda, CudaError};

/// The most parameters that a kernel may have.
const MOST: usize = 48;

/// Dynamic shared memory that every kernel may use without asking, bytes.
const SHARED_UNASKED: u32 = 48 << 10;

/// A kernel of the device. Cloning gives another handle of the same one.
#[derive(Clone)]
pub struct Kernel {
    cuda: Cuda,
    /// `None` after an error and on a planned device: a launch then does nothing.
    function: Option<Arc<Function>>,
    /// True if it waits for the kernel before it by itself.
    early: bool,
    /// Blocks along x that form a cluster.
    cluster: u32,
}

pub(super) struct Function {
    name: String,
    function: Handle<sys::CUfunction>,
    /// The sizes of the parameters.
    parameters: Vec<usize>,
    shared: AtomicU32,
}

/// One argument of a launch, by reference.
#[derive(Clone, Copy)]
pub struct Arg<'a> {
    value: *const c_void,
    size: usize,
    borrowed: PhantomData<&'a ()>,
}

/// A value that a kernel takes.
pub trait KernelArg {
    /// The value's place and size.
    fn arg(&self) -> Arg<'_>;
}

/// The arguments of [`Kernel::launch`], in the kernel's order: `u64` addresses, `i32`, `u32`, `u64`, `f32`, tensor maps.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::runtime::KernelArg::arg(&$value)),*] };
}
#[allow(unused_imports)]
pub(crate) use args;

impl Kernel {
    /// Lets the kernel begin before the one before it has ended, within [`Cuda::overlapping`]. Its first statement must be
    /// `begin_early()` of prelude.cuh; or it calls `wait_for_previous()` before it reads what other kernels write, and before
    /// it writes anything.
    #[must_use]
    pub(crate) fn early(self) -> Self {
        Self { early: true, ..self }
    }

    /// Launches clusters of `blocks` blocks along x, which must divide the grid; for kernels that do not fix their clusters
    /// themselves, on compute capability 9.0 and newer.
    #[must_use]
    pub(crate) fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }

    /// Queues the kernel on the compute stream.
    ///
    /// `shared` bytes of dynamic shared memory may be up to [`super::DeviceProps::shared_per_block`]. An empty grid is no
    /// launch. What the device finds wrong while running comes back from [`Cuda::synchronize`].
    pub fn launch(&self, grid: [u32; 3], block: [u32; 3], shared: u32, arguments: &[Arg<'_>]) {
        let Some(function) = &self.function else { return };
        if self.cuda.has_failed() || grid.contains(&0) {
            return;
        }
        // The driver reads as many arguments as the kernel has parameters, each as long as the parameter is.
        if !arguments.iter().map(|argument| argument.size).eq(function.parameters.iter().copied()) {
            let given: Vec<_> = arguments.iter().map(|argument| argument.size).collect();
            let reason = format!("expects arguments of {:?} bytes, not {given:?}", function.parameters);
            self.cuda.fail(CudaError::Usage { operation: function.name.clone(), reason });
            return;
        }
        let mut values = [core::ptr::null_mut(); MOST];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = argument.value.cast_mut();
        }
        self.cuda.run(&function.name, || {
            function.allow_shared(shared)?;
            let [gx, gy, gz] = grid;
            let [bx, by, bz] = block;
            let (f, stream) = (function.function.0, self.cuda.compute());
            let extra = core::ptr::null_mut();
            let mut attributes: Vec<sys::CUlaunchAttribute> = Vec::new();
            attributes.extend((self.early && self.cuda.is_overlapping()).then(overlap));
            attributes.extend((self.cluster > 1).then(|| cluster(self.cluster)));
            if attributes.is_empty() {
                return driver!(cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, values.as_mut_ptr(), extra));
            }
            let config = sys::CUlaunchConfig {
                gridDimX: gx,
                gridDimY: gy,
                gridDimZ: gz,
                blockDimX: bx,
                blockDimY: by,
                blockDimZ: bz,
                sharedMemBytes: shared,
                hStream: stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: attributes.len() as u32,
            };
            driver!(cuLaunchKernelEx(&config, f, values.as_mut_ptr(), extra))
        });
    }

    pub(super) fn new(cuda: &Cuda, function: Option<Arc<Function>>) -> Self {
        Self { cuda: cuda.clone(), function, early: false, cluster: 1 }
    }
}

/// The attribute of a launch that may begin before the launch before it has ended.
fn overlap() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// The attribute of a launch in clusters of this many blocks along x.
fn cluster(blocks: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 },
        },
    }
}

impl Function {
    /// Reads what a launch must know. The module of the function must outlive it.
    pub(super) fn new(name: &str, function: sys::CUfunction) -> Result<Self, Failed> {
        let mut parameters = Vec::new();
        // The end shows as a refusal: only drivers for CUDA 13.2 can count. compute-sanitizer lists it as an error of the
        // API unless it is given `--report-api-errors no`.
        let (mut offset, mut size) = (0, 0);
        while parameters.len() < MOST
            && driver!(cuFuncGetParamInfo(function, parameters.len(), &mut offset, &mut size)).is_ok()
        {
            parameters.push(size);
        }
        Ok(Self {
            name: name.to_owned(),
            function: Handle(function),
            parameters,
            shared: AtomicU32::new(SHARED_UNASKED),
        })
    }

    fn allow_shared(&self, bytes: u32) -> Result<(), Failed> {
        if bytes > self.shared.load(Relaxed) {
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            driver!(cuFuncSetAttribute(self.function.0, limit, bytes as i32))?;
            self.shared.fetch_max(bytes, Relaxed);
        }
        Ok(())
    }
}

impl Arg<'_> {
    pub(super) fn of<T>(value: &T) -> Arg<'_> {
        Arg { value: (&raw const *value).cast(), size: size_of::<T>(), borrowed: PhantomData }
    }
}

macro_rules! scalars {
    ($($scalar:ty),*) => { $(impl KernelArg for $scalar {
        fn arg(&self) -> Arg<'_> {
            Arg::of(self)
        }
    })* };
}
scalars!(u64, i64, u32, i32, f32);

//! One device: its context, its two streams, and the error that sticks.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::sys;

use super::arena::Arena;
use super::blaslt::Blas;
use super::driver::{Failed, Handle, driver, lock};
use super::foreign::Crossings;
use super::kernels::Kernels;
use super::pinned::Spare;
use super::profile::Span;
use super::{CudaError, Library, find};

/// A CUDA device. Cloning gives another handle of the same one.
#[derive(Clone)]
pub struct Cuda(pub(super) Arc<Inner>);

/// Properties of a CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProps {
    /// The product's name.
    pub name: String,
    /// Major number of the compute capability.
    pub major: u32,
    /// Minor number of the compute capability.
    pub minor: u32,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// The most shared memory that one block can have, bytes.
    pub shared_per_block: usize,
    /// Device memory, bytes.
    pub total_memory: usize,
}

pub(super) struct Inner {
    pub(super) props: DeviceProps,
    /// `None` where there is only an account of a card's memory; see [`Cuda::planned`].
    pub(super) card: Option<Card>,
    pub(super) arena: Mutex<Arena>,
    pub(super) pinned: Mutex<Spare>,
    pub(super) crossings: Mutex<Crossings>,
    pub(super) kernels: Kernels,
    pub(super) blas: OnceLock<Option<Blas>>,
    /// The scratch memory of products, on a planned device.
    pub(super) workspace: OnceLock<()>,
    pub(super) deterministic: AtomicBool,
    synchronous: bool,
    /// True while work is recorded, which then cannot reach the host.
    pub(super) recording: AtomicBool,
    /// True if kernels may begin before the ones before them have ended, and the same for those of the moment.
    overlap_allowed: AtomicBool,
    overlapping: AtomicBool,
    /// Measurements so far, while [`Cuda::profile`] runs.
    pub(super) profile: Mutex<Vec<Span>>,
    pub(super) profiling: AtomicBool,
    failed: AtomicBool,
    error: Mutex<Option<CudaError>>,
}

/// The driver's handles of one device.
pub(super) struct Card {
    device: sys::CUdevice,
    context: Handle<sys::CUcontext>,
    compute: Handle<sys::CUstream>,
    copy: Handle<sys::CUstream>,
}

/// Returns the number of CUDA devices; 0 without a driver.
pub fn count() -> usize {
    let mut count = 0;
    let counted = start().is_ok_and(|()| driver!(cuDeviceGetCount(&mut count)).is_ok());
    if counted { usize::try_from(count).unwrap_or(0) } else { 0 }
}

/// The first device that is new enough for the kernels; `None` where there is no driver or no such device.
///
/// # Errors
/// For a driver that is too old or does not start.
pub fn first() -> Result<Option<usize>, CudaError> {
    const NO_DEVICE: i32 = sys::CUresult::CUDA_ERROR_NO_DEVICE as i32;
    if find::ensure(Library::Driver).is_err() {
        return Ok(None);
    }
    match start() {
        Err(CudaError::Call { code: NO_DEVICE, .. }) => return Ok(None),
        started => started?,
    }
    for index in 0..count() {
        if device_props(index)?.is_supported() {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Device memory of a process that the arena does not count: the context, the code of the kernels, and what cuBLASLt keeps.
///
/// `cargo xtask bench plan` measured 0.52 to 0.54 GiB on an H200 with driver 580 (docs/benchmarks.md).
pub const CUDA_CONTEXT_BYTES: usize = 512 << 20;

/// The oldest compute capability that the kernels are for.
const OLDEST: [u32; 2] = [7, 5];

/// The environment variable with the compute capability that a newer card stands for, as `7.5`.
const STANDS_FOR: &str = "REKINDLE_CUDA_STANDS_FOR";

/// Returns the older compute capability whose kernels are to run on this machine's cards, for tests: the driver compiles
/// their PTX for the card.
pub(super) fn stands_for() -> Option<[u32; 2]> {
    let value = std::env::var(STANDS_FOR).ok()?;
    let (major, minor) = value.split_once('.')?;
    Some([major.parse().ok()?, minor.parse().ok()?])
}

impl DeviceProps {
    /// Returns true if the kernels are for this device.
    fn is_supported(&self) -> bool {
        [self.major, self.minor] >= OLDEST || stands_for() == Some([self.major, self.minor])
    }
}

impl Cuda {
    /// Opens a device by its index.
    ///
    /// The context is the device's primary one, which every other library in the process uses too, so that they can
    /// pass addresses to each other.
    ///
    /// # Errors
    /// If the driver, NVRTC, cuBLASLt, the device, or the memory for a context is missing, or the card is too old.
    pub fn open(index: usize) -> Result<Self, CudaError> {
        let props = device_props(index)?;
        if !props.is_supported() {
            let capability = format!("{}.{}", props.major, props.minor);
            return Err(CudaError::CardTooOld { index, name: props.name, capability });
        }
        find::ensure(Library::Nvrtc)?;
        find::ensure(Library::CublasLt)?;
        let opened = || -> Result<Inner, Failed> {
            let device = device(index)?;
            let mut context = core::ptr::null_mut();
            driver!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            driver!(cuCtxSetCurrent(context))?;
            let stream = || {
                let mut stream = core::ptr::null_mut();
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                driver!(cuStreamCreate(&mut stream, flags)).map(|()| Handle(stream))
            };
            let arena = Arena::reserve(device, props.total_memory)?;
            let mut inner = Inner::new(props.clone(), arena);
            inner.synchronous = std::env::var_os("REKINDLE_CUDA_SYNC").is_some_and(|v| v == "1");
            inner.card = Some(Card { device, context: Handle(context), compute: stream()?, copy: stream()? });
            Ok(inner)
        };
        let inner = opened().map_err(|failed| failed.during(format!("opening cuda:{index}")))?;
        Ok(Self(Arc::new(inner)))
    }

    /// Returns the properties of the device.
    pub fn props(&self) -> &DeviceProps {
        &self.0.props
    }

    /// Returns the identifier of the device, which no other device of any machine has; `None` without a card.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        let device = self.0.card.as_ref()?.device;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        driver!(cuDeviceGetUuid_v2(&mut uuid, device)).ok()?;
        Some(uuid.bytes.map(|byte| byte as u8))
    }

    /// Sets whether equal calls must give equal bits from run to run: the algorithm of a product is then the first one that
    /// cuBLASLt proposes, not the fastest one measured.
    pub fn set_deterministic(&self, on: bool) {
        self.0.deterministic.store(on, Relaxed);
    }

    /// Returns whether [`Cuda::set_deterministic`] is on.
    pub fn is_deterministic(&self) -> bool {
        self.0.deterministic.load(Relaxed)
    }

    /// Sets whether the kernels of a recorded step may begin before the ones before them have ended, on devices of compute
    /// capability 9.0 and above. Default true.
    pub fn allow_overlap(&self, on: bool) {
        self.0.overlap_allowed.store(on && self.0.props.major >= 9, Relaxed);
    }

    /// Runs work whose kernels begin early, if that is allowed.
    pub(crate) fn overlapping<R>(&self, work: impl FnOnce() -> R) -> R {
        self.0.overlapping.store(self.0.overlap_allowed.load(Relaxed), Relaxed);
        let result = work();
        self.0.overlapping.store(false, Relaxed);
        result
    }

    pub(super) fn is_overlapping(&self) -> bool {
        self.0.overlapping.load(Relaxed)
    }

    /// The first error since the last [`Cuda::take_error`]. Does not wait for the device.
    ///
    /// # Errors
    /// That error.
    pub fn check(&self) -> Result<(), CudaError> {
        if !self.0.failed.load(Relaxed) {
            return Ok(());
        }
        lock(&self.0.error).clone().map_or(Ok(()), Err)
    }

    /// Removes the error, so that operations run again. After a fault of the device, as opposed to a refusal, they will
    /// fail again: the context is lost.
    pub fn take_error(&self) -> Option<CudaError> {
        let mut error = lock(&self.0.error);
        self.0.failed.store(false, Relaxed);
        error.take()
    }

    /// Waits for everything queued so far.
    ///
    /// # Errors
    /// The first error, including a fault of the device in what was queued. `REKINDLE_CUDA_SYNC=1` waits after every
    /// launch, so that the fault is found at the launch that caused it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.check()?;
        self.refuse_recording("waiting for the device");
        self.run("waiting for the device", || {
            driver!(cuStreamSynchronize(self.compute()))?;
            driver!(cuStreamSynchronize(self.copies()))
        });
        self.check()
    }

    /// Returns whether every launch is waited for.
    pub(super) fn is_synchronous(&self) -> bool {
        self.0.synchronous
    }

    /// The compute stream, for libraries that take one.
    pub fn stream(&self) -> u64 {
        self.compute() as u64
    }

    pub(super) fn context(&self) -> sys::CUcontext {
        self.0.card.as_ref().map_or(core::ptr::null_mut(), |card| card.context.0)
    }

    pub(super) fn compute(&self) -> sys::CUstream {
        self.0.card.as_ref().map_or(core::ptr::null_mut(), |card| card.compute.0)
    }

    /// The copy stream.
    pub(super) fn copies(&self) -> sys::CUstream {
        self.0.card.as_ref().map_or(core::ptr::null_mut(), |card| card.copy.0)
    }

    /// Does something with the driver unless an error sticks, and keeps the error of it. Answers whether it was done.
    pub(super) fn run(&self, operation: &str, work: impl FnOnce() -> Result<(), Failed>) -> bool {
        if self.0.failed.load(Relaxed) {
            return false;
        }
        if self.is_planned() {
            return true;
        }
        let mut done = self.bind().and_then(|()| match self.is_profiling() {
            true => self.between_marks(operation, work),
            false => work(),
        });
        if self.0.synchronous {
            done = done.and_then(|()| driver!(cuStreamSynchronize(self.compute())));
        }
        done.map_err(|failed| self.fail(failed.during(operation))).is_ok()
    }

    /// Fails while work is recorded: the operation would not be repeated with the rest.
    pub(super) fn refuse_recording(&self, operation: &str) {
        if self.0.recording.load(Relaxed) {
            let reason = "it cannot be recorded in a graph".to_owned();
            self.fail(CudaError::Usage { operation: operation.to_owned(), reason });
        }
    }

    /// Keeps an error, if it is the first.
    pub(crate) fn fail(&self, error: CudaError) {
        lock(&self.0.error).get_or_insert(error);
        self.0.failed.store(true, Relaxed);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.0.failed.load(Relaxed)
    }

    /// Makes the context current on this thread, which the driver's calls ask for.
    pub(super) fn bind(&self) -> Result<(), Failed> {
        if self.is_planned() { Ok(()) } else { driver!(cuCtxSetCurrent(self.context())) }
    }
}

impl Inner {
    /// A device on which nothing was done yet, without its card.
    pub(super) fn new(props: DeviceProps, arena: Arena) -> Self {
        let overlap_allowed = AtomicBool::new(props.major >= 9);
        Self {
            props,
            card: None,
            arena: Mutex::new(arena),
            pinned: Mutex::default(),
            crossings: Mutex::default(),
            kernels: Kernels::default(),
            blas: OnceLock::new(),
            workspace: OnceLock::new(),
            deterministic: AtomicBool::new(false),
            synchronous: false,
            recording: AtomicBool::new(false),
            overlap_allowed,
            overlapping: AtomicBool::new(false),
            profile: Mutex::default(),
            profiling: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }
}

impl core::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Cuda({})", self.0.props)
    }
}

impl core::fmt::Display for DeviceProps {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { name, major, minor, sm_count, total_memory, .. } = self;
        write!(f, "{name}, sm_{major}{minor}, {sm_count} SMs, {}", super::error::bytes(*total_memory))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(Card { device, context, compute, copy }) = self.card.take() else { return };
        // Nothing can be done about a failure here; the process that lost its device is about to say so elsewhere.
        let _ = driver!(cuCtxSetCurrent(context.0));
        for stream in [compute, copy] {
            let _ = driver!(cuStreamSynchronize(stream.0));
        }
        self.blas.take();
        self.kernels.unload();
        lock(&self.pinned).release();
        lock(&self.crossings).release();
        lock(&self.arena).release();
        for stream in [compute, copy] {
            let _ = driver!(cuStreamDestroy_v2(stream.0));
        }
        let _ = driver!(cuDevicePrimaryCtxRelease_v2(device));
    }
}

/// Reads the properties of a device without opening it.
///
/// # Errors
/// If there is no driver, an old one, or no such device.
pub fn device_props(index: usize) -> Result<DeviceProps, CudaError> {
    start()?;
    let found = count();
    if index >= found {
        return Err(CudaError::NoDevice { index, found });
    }
    let read = || -> Result<DeviceProps, Failed> {
        use sys::CUdevice_attribute as A;
        let device = device(index)?;
        let attribute = |attribute| {
            let mut value = 0;
            driver!(cuDeviceGetAttribute(&mut value, attribute, device)).map(|()| value.unsigned_abs())
        };
        let mut name = [0; 128];
        driver!(cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
        let own = [A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
        let own = [attribute(own[0])?, attribute(own[1])?];
        let [major, minor] = stands_for().filter(|older| *older < own).unwrap_or(own);
        let mut total_memory = 0;
        driver!(cuDeviceTotalMem_v2(&mut total_memory, device))?;
        Ok(DeviceProps {
            // SAFETY: the last byte is never written, so the text ends within the array.
            name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
            major,
            minor,
            sm_count: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_per_block: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            total_memory,
        })
    };
    read().map_err(|failed| failed.during(format!("reading the properties of cuda:{index}")))
}

/// The newest CUDA version that the driver supports, as 1000 × major + 10 × minor.
pub(super) fn driver_version() -> Result<i32, CudaError> {
    find::ensure(Library::Driver)?;
    let mut version = 0;
    driver!(cuDriverGetVersion(&mut version)).map_err(|failed| failed.during("asking the driver's version"))?;
    Ok(version)
}

/// Starts the driver. Older ones lack functions that would be called, which must be found before they are.
fn start() -> Result<(), CudaError> {
    let version = driver_version()?;
    if version < 12080 {
        let found = format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(CudaError::DriverTooOld { found, needed: "12.8" });
    }
    driver!(cuInit(0)).map_err(|failed| failed.during("starting the NVIDIA driver"))
}

fn device(index: usize) -> Result<sys::CUdevice, Failed> {
    let mut device = 0;
    driver!(cuDeviceGet(&mut device, i32::try_from(index).unwrap_or(i32::MAX)))?;
    Ok(device)
}

//! NCCL: sums and copies between the CUDA devices of several processes, in the order of the compute stream.
//!
//! The library is opened at run time and called through the functions of [`Functions`], whose signatures are those of
//! `nccl.h` since 2.14. It moves bytes over NVLink, PCIe or the network without the host. The processes exchange an
//! [`NcclId`] by other means first.
//!
//! **Failures.** A collective waits for all ranks, on the device and, the first time, on the host. If another rank has
//! ended, both wait forever; [`NcclComm::abort`], called from another thread, ends them. What the collective leaves is then
//! undefined.
//!
//! `unsafe`: signatures follow `nccl.h`; communicators are private to [`NcclComm`] and not used after their end; buffers are
//! arrays of the same device, whose memory is reused only in stream order.

use core::ffi::{CStr, c_char, c_int, c_void};
use core::ops::Range;
use core::time::Duration;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError, mpsc};
use std::thread;
use std::time::Instant;

use super::driver::Handle;
use super::{Array, Cuda, CudaError, DType, Library, find};

/// Device memory that NCCL takes on each of several devices.
///
/// 862 MiB were measured on each of two H200 with NCCL 2.28.3, for adapters and for all weights.
pub const NCCL_BYTES: usize = 864 << 20;

type Comm = *mut c_void;
type Stream = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
/// `ncclSum`.
const SUM: c_int = 0;
/// `ncclFloat32`.
const FLOAT32: c_int = 7;

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    internal: [c_char; 128],
}

/// The functions of `libnccl` that are called.
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> Status,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    get_error_string: unsafe extern "C" fn(Status) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> Status,
    comm_abort: unsafe extern "C" fn(Comm) -> Status,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut Status) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> Status,
    reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Comm, Stream) -> Status,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
}

impl Functions {
    /// Opens the library and finds its functions.
    fn get() -> Result<&'static Self, CudaError> {
        static FUNCTIONS: OnceLock<Result<Functions, CudaError>> = OnceLock::new();
        FUNCTIONS.get_or_init(Self::find).as_ref().map_err(Clone::clone)
    }

    #[allow(clippy::missing_transmute_annotations, reason = "the type is that of the field")]
    fn find() -> Result<Self, CudaError> {
        find::ensure(Library::Nccl)?;
        macro_rules! function {
            ($name:literal) => {{
                let address = find::nccl_function($name).ok_or_else(|| CudaError::Usage {
                    operation: "loading NCCL".to_owned(),
                    reason: format!(
                        "{} has no function {}; install NCCL 2.14 or newer",
                        find::loaded_from(Library::Nccl).unwrap_or_default().display(),
                        $name.to_string_lossy()
                    ),
                })?;
                // SAFETY: a function of that name, whose signature the field has.
                unsafe { core::mem::transmute::<*mut c_void, _>(address) }
            }};
        }
        Ok(Self {
            get_version: function!(c"ncclGetVersion"),
            get_unique_id: function!(c"ncclGetUniqueId"),
            get_error_string: function!(c"ncclGetErrorString"),
            get_last_error: function!(c"ncclGetLastError"),
            comm_init_rank: function!(c"ncclCommInitRank"),
            comm_abort: function!(c"ncclCommAbort"),
            comm_get_async_error: function!(c"ncclCommGetAsyncError"),
            group_start: function!(c"ncclGroupStart"),
            group_end: function!(c"ncclGroupEnd"),
            all_reduce: function!(c"ncclAllReduce"),
            reduce_scatter: function!(c"ncclReduceScatter"),
            all_gather: function!(c"ncclAllGather"),
            reduce: function!(c"ncclReduce"),
            broadcast: function!(c"ncclBroadcast"),
        })
    }

    fn check(&self, operation: &str, call: &'static str, status: Status) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: both return static or thread-local strings; the last error of a process needs no communicator.
        let [what, last] =
            unsafe { [(self.get_error_string)(status), (self.get_last_error)(core::ptr::null_mut())] }.map(text_at);
        let text = if last.trim().is_empty() { what } else { format!("{what}: {}", last.trim()) };
        Err(CudaError::Call { operation: operation.to_owned(), call, code: status, text })
    }
}

/// Returns a string of the library; empty for none.
fn text_at(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: a terminated string that the library owns.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Returns the version of NCCL, such as `2.27.3`.
///
/// # Errors
/// [`CudaError::LibraryMissing`] without NCCL.
pub fn nccl_version() -> Result<String, CudaError> {
    let functions = Functions::get()?;
    let mut version = 0;
    // SAFETY: a pointer to a local.
    let status = unsafe { (functions.get_version)(&mut version) };
    functions.check("asking NCCL's version", "ncclGetVersion", status)?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// An identifier that the ranks of a communicator share before they are connected: the address of rank 0.
#[derive(Clone, Copy)]
pub struct NcclId(UniqueId);

impl NcclId {
    /// Returns a new identifier, and listens for the other ranks.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`] without NCCL, and [`CudaError::Call`] if it finds no network interface.
    pub fn new() -> Result<Self, CudaError> {
        let functions = Functions::get()?;
        let mut id = UniqueId { internal: [0; 128] };
        // SAFETY: a pointer to a local.
        let status = unsafe { (functions.get_unique_id)(&mut id) };
        functions.check("making an identifier of NCCL", "ncclGetUniqueId", status)?;
        Ok(Self(id))
    }

    /// Returns the bytes to give to the other ranks.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0.internal.map(|byte| byte as u8)
    }

    /// Returns the identifier with the bytes of [`to_bytes`](Self::to_bytes); `None` for another number of bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 128] = bytes.try_into().ok()?;
        Some(Self(UniqueId { internal: bytes.map(|byte| byte as c_char) }))
    }
}

impl core::fmt::Debug for NcclId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("NcclId").finish_non_exhaustive()
    }
}

/// A rank that is connected with the others through NCCL.
///
/// Operations are queued on the compute stream; all ranks call the same ones in the same order. Their errors stick, as
/// those of all operations of a [`Cuda`].
pub struct NcclComm {
    cuda: Cuda,
    functions: &'static Functions,
    comm: Handle<Comm>,
    rank: usize,
    size: usize,
    /// Held while the library is called.
    calls: Mutex<()>,
    has_ended: AtomicBool,
}

impl NcclComm {
    /// Connects rank `rank` of `size` with the others, which have the same identifier. Stops waiting when `stop` returns
    /// true.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`] without NCCL, [`CudaError::Call`] if the ranks cannot be connected, and
    /// [`CudaError::Usage`] after a stop.
    pub fn connect(
        cuda: &Cuda,
        id: NcclId,
        rank: usize,
        size: usize,
        stop: impl Fn() -> bool,
    ) -> Result<Self, CudaError> {
        const OPERATION: &str = "connecting the ranks through NCCL";
        let functions = Functions::get()?;
        let int = |n: usize| c_int::try_from(n).unwrap_or(c_int::MAX);
        let (sender, receiver) = mpsc::channel();
        let context = cuda.clone();
        // The library cannot be interrupted while it waits for ranks that may have ended.
        let connecting = thread::Builder::new().name("NCCL".to_owned()).spawn(move || {
            if let Err(failed) = context.bind() {
                let _ = sender.send(Err(failed.during(OPERATION)));
                return;
            }
            let mut comm = core::ptr::null_mut();
            // SAFETY: a pointer to a local; the context of the device is current.
            let status = unsafe { (functions.comm_init_rank)(&mut comm, int(size), id.0, int(rank)) };
            let done = functions.check(OPERATION, "ncclCommInitRank", status);
            let _ = sender.send(done.map(|()| Handle(comm)));
        });
        let usage = |reason: String| CudaError::Usage { operation: OPERATION.to_owned(), reason };
        connecting.map_err(|error| usage(error.to_string()))?;
        loop {
            match receiver.recv_timeout(POLL) {
                Ok(comm) => {
                    let (calls, has_ended) = Default::default();
                    return Ok(Self { cuda: cuda.clone(), functions, comm: comm?, rank, size, calls, has_ended });
                }
                Err(mpsc::RecvTimeoutError::Timeout) if !stop() => {}
                Err(_) => return Err(usage("another rank has failed".to_owned())),
            }
        }
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Replaces f32 values by their sums over all ranks.
    ///
    /// # Panics
    /// If the values are not f32 without gaps.
    pub fn all_reduce_sum(&self, values: &Array) {
        let (at, count) = flat(values);
        self.queue("all-reduce", "ncclAllReduce", |functions, comm, stream| {
            // SAFETY: see the module.
            unsafe { (functions.all_reduce)(at as _, at as _, count, FLOAT32, SUM, comm, stream) }
        });
    }

    /// Replaces the f32 values of this rank's shard by their sums over all ranks; the others are undefined afterwards.
    ///
    /// # Panics
    /// If the values are not f32 without gaps, or the shards are not one for each rank, in order.
    pub fn reduce_scatter_sum(&self, values: &Array, shards: &[Range<usize>]) {
        let at = self.check_shards(values, shards);
        let (rank, count) = (self.rank, shards[0].len());
        if are_equal(shards) {
            self.queue("reduce-scatter", "ncclReduceScatter", |functions, comm, stream| {
                let own = at + 4 * (rank * count) as u64;
                // SAFETY: see the module; in place, as `nccl.h` defines it.
                unsafe { (functions.reduce_scatter)(at as _, own as _, count, FLOAT32, SUM, comm, stream) }
            });
            return;
        }
        self.queue_for_each("reduce-scatter", "ncclReduce", shards, at, |functions, at, count, root, comm, stream| {
            // SAFETY: see the module.
            unsafe { (functions.reduce)(at as _, at as _, count, FLOAT32, SUM, root, comm, stream) }
        });
    }

    /// Replaces the f32 values of every shard by those of its rank.
    ///
    /// # Panics
    /// As [`reduce_scatter_sum`](Self::reduce_scatter_sum).
    pub fn all_gather(&self, values: &Array, shards: &[Range<usize>]) {
        let at = self.check_shards(values, shards);
        let (rank, count) = (self.rank, shards[0].len());
        if are_equal(shards) {
            self.queue("all-gather", "ncclAllGather", |functions, comm, stream| {
                let own = at + 4 * (rank * count) as u64;
                // SAFETY: see the module; in place, as `nccl.h` defines it.
                unsafe { (functions.all_gather)(own as _, at as _, count, FLOAT32, comm, stream) }
            });
            return;
        }
        self.queue_for_each("all-gather", "ncclBroadcast", shards, at, |functions, at, count, root, comm, stream| {
            // SAFETY: see the module.
            unsafe { (functions.broadcast)(at as _, at as _, count, FLOAT32, root, comm, stream) }
        });
    }

    /// Writes the f32 at `own`, an address of this device, to element r of `all` on every rank, where r is this rank.
    pub(crate) fn gather_scalar(&self, own: u64, all: &Array) {
        let (at, count) = flat(all);
        assert_eq!(count, self.size, "a value for each rank");
        self.queue("all-gather", "ncclAllGather", |functions, comm, stream| {
            // SAFETY: see the module.
            unsafe { (functions.all_gather)(own as _, at as _, 1, FLOAT32, comm, stream) }
        });
    }

    /// Replaces f32 values by those of rank 0.
    ///
    /// # Panics
    /// If the values are not f32 without gaps.
    pub fn broadcast(&self, values: &Array) {
        let (at, count) = flat(values);
        self.queue("broadcast", "ncclBroadcast", |functions, comm, stream| {
            // SAFETY: see the module.
            unsafe { (functions.broadcast)(at as _, at as _, count, FLOAT32, 0, comm, stream) }
        });
    }

    /// Returns an error that NCCL found after the calls, such as a broken connection.
    pub fn async_error(&self) -> Option<CudaError> {
        // A call that waits has an answer of its own.
        let _guard = self.calls.try_lock().ok()?;
        if self.has_ended.load(Ordering::SeqCst) {
            return None;
        }
        let mut found = SUCCESS;
        // SAFETY: a living communicator, and a pointer to a local.
        let status = unsafe { (self.functions.comm_get_async_error)(self.comm.0, &mut found) };
        let status = if status == SUCCESS && found != IN_PROGRESS { found } else { status };
        self.functions.check("waiting for the other ranks in NCCL", "ncclCommGetAsyncError", status).err()
    }

    /// Ends all operations of this rank, which then return garbage, and the communicator. May be called from any thread.
    pub fn abort(&self) {
        let began = Instant::now();
        // A call that waits for a rank which has ended returns only after the abort.
        let _guard = loop {
            match self.calls.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(guard)) => break Some(guard.into_inner()),
                Err(TryLockError::WouldBlock) if began.elapsed() > CALL => break None,
                Err(TryLockError::WouldBlock) => thread::sleep(POLL / 10),
            }
        };
        if !self.has_ended.swap(true, Ordering::SeqCst) {
            let _ = self.cuda.bind();
            // SAFETY: a living communicator; `has_ended` keeps others from using it afterwards.
            let _ = unsafe { (self.functions.comm_abort)(self.comm.0) };
        }
    }

    /// Calls the library unless an error sticks, and keeps its error.
    fn queue(&self, operation: &str, call: &'static str, work: impl FnOnce(&Functions, Comm, Stream) -> Status) {
        let mut status = SUCCESS;
        self.cuda.refuse_recording(operation);
        self.cuda.run(operation, || {
            let _guard = self.calls.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !self.has_ended.load(Ordering::SeqCst) {
                status = work(self.functions, self.comm.0, self.cuda.compute().cast());
            }
            Ok(())
        });
        if let Err(error) = self.functions.check(operation, call, status) {
            self.cuda.fail(error);
        }
    }

    /// Queues a call for the shard of each rank, all as one operation.
    fn queue_for_each(
        &self,
        operation: &str,
        call: &'static str,
        shards: &[Range<usize>],
        at: u64,
        work: impl Fn(&Functions, u64, usize, c_int, Comm, Stream) -> Status,
    ) {
        self.queue(operation, call, |functions, comm, stream| {
            // SAFETY: no arguments.
            let mut status = unsafe { (functions.group_start)() };
            for (root, shard) in shards.iter().enumerate().filter(|(_, shard)| !shard.is_empty()) {
                if status == SUCCESS {
                    let first = at + 4 * shard.start as u64;
                    status = work(functions, first, shard.len(), root as c_int, comm, stream);
                }
            }
            // SAFETY: no arguments; ends the group that was begun above.
            let ended = unsafe { (functions.group_end)() };
            if status == SUCCESS { ended } else { status }
        });
    }

    fn check_shards(&self, values: &Array, shards: &[Range<usize>]) -> u64 {
        let (at, count) = flat(values);
        assert_eq!(shards.len(), self.size, "a shard for each rank");
        assert!(shards.iter().all(|shard| shard.start <= shard.end && shard.end <= count), "shards of {count} values");
        at
    }
}

/// The time between looks at something that has no notification.
const POLL: Duration = Duration::from_millis(50);

/// The time that a call takes at most if it does not wait for other ranks.
const CALL: Duration = Duration::from_secs(1);

/// Returns the address and the number of f32 values.
fn flat(values: &Array) -> (u64, usize) {
    assert!(values.is_contiguous() && values.dtype() == DType::F32, "f32 values without gaps");
    (values.ptr(), values.rows() * values.cols())
}

/// Returns true for adjacent shards of one length, from the first value on.
fn are_equal(shards: &[Range<usize>]) -> bool {
    let length = shards[0].len();
    shards.iter().enumerate().all(|(rank, shard)| *shard == (rank * length..(rank + 1) * length))
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        self.abort();
    }
}

impl core::fmt::Debug for NcclComm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "NcclComm(rank {} of {} on {:?})", self.rank, self.size, self.cuda)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_come_back() {
        let bytes: Vec<u8> = (0..128).map(|n| n * 2).collect();
        assert_eq!(NcclId::from_bytes(&bytes).map(|id| id.to_bytes().to_vec()), Some(bytes));
        assert!(NcclId::from_bytes(&[0; 127]).is_none());
    }

    #[test]
    fn shards_of_one_length_are_told_apart() {
        assert!(are_equal(&[0..4, 4..8]));
        assert!(!are_equal(&[0..4, 4..7]) && !are_equal(&[0..4, 5..9]) && !are_equal(&[1..5, 5..9]));
    }

    /// Without the library, the error names it, the places searched and the remedy; with it, statuses have texts.
    #[test]
    fn the_library_is_found_or_named() {
        match Functions::get() {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("NCCL (libnccl) was not found") && text.contains("nvidia-nccl-cu13"), "{text}");
            }
            Ok(functions) => {
                let version = nccl_version().expect("a version");
                assert!(version.starts_with("2."), "{version}");
                let error = functions.check("a test", "ncclAllReduce", 4).expect_err("a status").to_string();
                assert!(error.starts_with("a test: ncclAllReduce failed with 4 (invalid argument"), "{error}");
            }
        }
    }
}

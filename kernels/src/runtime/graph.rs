//! Recorded work of the compute stream, which one call queues again.
//!
//! A graph keeps the addresses that its work was recorded with, so what it reads and writes must stay where it is. Memory
//! that the work allocates and drops comes from a [`Workspace`] that graphs own together: they run one after another, and
//! nothing in it outlives one of them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use cudarc::driver::sys;

use super::driver::{Handle, driver, lock};
use super::{Buffer, Cuda, CudaError, MemoryUse};

/// Recorded work. Dropping it frees it once the device has finished.
pub struct Graph {
    cuda: Cuda,
    executable: Handle<sys::CUgraphExec>,
    _workspace: Arc<Buffer>,
}

/// Memory for what recorded work allocates.
#[derive(Debug, Default)]
pub struct Workspace(Option<Arc<Buffer>>);

impl Workspace {
    /// Returns memory of at least `bytes`; graphs that have shorter memory keep theirs.
    fn at_least(&mut self, cuda: &Cuda, bytes: usize) -> Arc<Buffer> {
        match &self.0 {
            Some(buffer) if buffer.bytes() >= bytes => Arc::clone(buffer),
            _ => {
                let buffer = Arc::new(cuda.alloc(bytes, MemoryUse::Scratch));
                Arc::clone(self.0.insert(buffer))
            }
        }
    }
}

impl Cuda {
    /// Runs work and returns the most memory that it held at a time beyond what it was given.
    pub fn measured<R>(&self, work: impl FnOnce() -> R) -> (R, usize) {
        lock(&self.0.arena).begin_measurement();
        let result = work();
        (result, lock(&self.0.arena).end_measurement())
    }

    /// Returns whether work can be recorded: not while every launch is waited for or measured.
    pub fn can_record(&self) -> bool {
        !self.is_planned() && !self.is_synchronous() && !self.is_profiling()
    }

    /// Records work instead of running it. `bytes`: the memory that it needs, as [`Cuda::measured`] says.
    ///
    /// The work must have run before, so that its kernels are loaded and its products are planned, and it must neither
    /// wait for the device nor upload anything. Everything that it allocates it must drop.
    ///
    /// # Errors
    /// If something in it cannot be recorded or it needs more memory. The device has then done nothing, and works.
    pub fn record(&self, workspace: &mut Workspace, bytes: usize, work: impl FnOnce()) -> Result<Graph, CudaError> {
        self.check()?;
        // First fit leaves gaps.
        let bytes = bytes + bytes / 2 + (1 << 20);
        let memory = workspace.at_least(self, bytes);
        self.check()?;
        let begun = self.bind().and_then(|()| {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            driver!(cuStreamBeginCapture_v2(self.compute(), mode))
        });
        begun.map_err(|failed| failed.during("recording a graph"))?;
        lock(&self.0.arena).begin_recording(memory.ptr(), memory.bytes());
        self.0.recording.store(true, Relaxed);
        work();
        self.0.recording.store(false, Relaxed);
        let within = lock(&self.0.arena).end_recording();
        let mut graph = core::ptr::null_mut();
        let ended = driver!(cuStreamEndCapture(self.compute(), &mut graph));
        // An error of the work comes first: the end of the recording only says that there was one.
        let mut result = self.take_error().map_or(Ok(()), Err);
        result = result.and(ended.map_err(|failed| failed.during("recording a graph")));
        if result.is_ok() && !within {
            let reason = "the work keeps memory, or needs more than it was measured to".to_owned();
            result = Err(CudaError::Usage { operation: "recording a graph".to_owned(), reason });
            // The work may still use this memory.
            core::mem::forget(Arc::clone(&memory));
        }
        let mut executable = core::ptr::null_mut();
        if result.is_ok() {
            result = driver!(cuGraphInstantiateWithFlags(&mut executable, graph, 0))
                .map_err(|failed| failed.during("preparing a graph"));
        }
        if !graph.is_null() {
            let _ = driver!(cuGraphDestroy(graph));
        }
        result.map(|()| Graph { cuda: self.clone(), executable: Handle(executable), _workspace: memory })
    }
}

impl Graph {
    /// Queues the work on the compute stream.
    pub fn launch(&self) {
        let cuda = &self.cuda;
        cuda.run("graph", || driver!(cuGraphLaunch(self.executable.0, cuda.compute())));
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.cuda.bind().and_then(|()| driver!(cuGraphExecDestroy(self.executable.0)));
    }
}

impl core::fmt::Debug for Graph {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Graph")
    }
}

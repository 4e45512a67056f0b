//! Work that is recorded once and replayed by one call.

use cudarc::driver::sys;

use super::driver::{Handle, driver, lock};
use super::{Cuda, CudaError};

const LABEL: &str = "captured graph";

/// Recorded work of the compute stream, with the arena's memory that it uses between its own launches.
pub struct Graph {
    cuda: Cuda,
    executable: Handle<sys::CUgraphExec>,
    memory: Vec<(u64, usize)>,
}

impl Cuda {
    /// Records what `body` queues on the compute stream, without running it.
    ///
    /// Every address and number given to a launch is recorded as it is. Buffers that `body` allocates and drops stay
    /// reserved for the graph; buffers that it uses from outside, or hands out, must live as long as it is launched.
    /// Kernels and products must have run once before, since compiling and timing cannot be recorded; a product that has
    /// not is an error. Copies on the copy stream, downloads and events do not belong into `body`, and no other thread
    /// may use this device meanwhile.
    ///
    /// # Errors
    /// What failed in `body`, or that the recording was refused.
    pub fn capture(&self, body: impl FnOnce()) -> Result<Graph, CudaError> {
        use std::sync::atomic::Ordering::Relaxed;
        assert!(!self.is_planned(), "there is nothing to record on a planned device");
        // Relaxed: mapping more memory while recording is not work of the stream.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.run("beginning a capture", || driver!(cuStreamBeginCapture_v2(self.compute(), mode)));
        self.check()?;
        self.0.capturing.store(true, Relaxed);
        lock(&self.0.arena).watch();
        body();
        let memory = lock(&self.0.arena).take_watched(LABEL);
        self.0.capturing.store(false, Relaxed);

        let mut graph = Graph { cuda: self.clone(), executable: Handle(core::ptr::null_mut()), memory };
        // Also after an error in `body`: the stream must not stay in capture.
        let mut recorded = core::ptr::null_mut();
        let ended = driver!(cuStreamEndCapture(self.compute(), &mut recorded));
        self.run("capturing a graph", || {
            ended?;
            driver!(cuGraphInstantiateWithFlags(&mut graph.executable.0, recorded, 0))
        });
        if !recorded.is_null() {
            let _ = driver!(cuGraphDestroy(recorded));
        }
        self.check().map(|()| graph)
    }
}

impl Graph {
    /// Queues the recorded work.
    pub fn launch(&self) {
        self.cuda.run("launching a graph", || driver!(cuGraphLaunch(self.executable.0, self.cuda.compute())));
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.executable.0.is_null() {
            let _ = self.cuda.bind().and_then(|()| driver!(cuGraphExecDestroy(self.executable.0)));
        }
        let mut arena = lock(&self.cuda.0.arena);
        for &(address, size) in &self.memory {
            arena.free(address, size, LABEL);
        }
    }
}

//! Work that is recorded when it runs for the second time.

use crate::Device;
use crate::runtime::{Graph, Workspace};

/// Work of a GPU that runs many times with the same addresses: run the first time, recorded the second, and replayed
/// from then on.
#[derive(Debug, Default)]
pub struct RecordedStep(State);

#[derive(Debug, Default)]
enum State {
    #[default]
    New,
    /// Ran once, and held this many bytes.
    Measured(usize),
    Recorded(Graph),
    /// Cannot be recorded, for this reason.
    Refused(String),
}

impl RecordedStep {
    /// Runs the work, which must be the same every time. It must drop all memory that it allocates, and must not wait for the
    /// device or upload anything; work that does is not recorded and runs directly every time.
    pub fn run(&mut self, device: &Device, workspace: &mut Workspace, mut work: impl FnMut()) {
        let Device::Cuda(cuda) = device else { return work() };
        let mut work = || cuda.overlapping(&mut work);
        match &self.0 {
            State::New => {
                let ((), bytes) = cuda.measured(work);
                self.0 = State::Measured(bytes);
            }
            State::Measured(bytes) if cuda.can_record() => match cuda.record(workspace, *bytes, &mut work) {
                Ok(graph) => {
                    graph.launch();
                    self.0 = State::Recorded(graph);
                }
                Err(error) => {
                    self.0 = State::Refused(error.to_string());
                    work();
                }
            },
            State::Recorded(graph) if cuda.can_record() => graph.launch(),
            // Also while every operation is measured by itself.
            State::Measured(_) | State::Recorded(_) | State::Refused(_) => work(),
        }
    }

    /// Returns the reason why the work is not recorded, if it was tried.
    pub fn refusal(&self) -> Option<&str> {
        match &self.0 {
            State::Refused(reason) => Some(reason),
            State::New | State::Measured(_) | State::Recorded(_) => None,
        }
    }
}

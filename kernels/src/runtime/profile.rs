//! Device time by operation.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use cudarc::driver::sys;

use super::driver::{Failed, Handle, driver, lock};
use super::{Cuda, CudaError, event};

/// The device's time in one kind of operation.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileEntry {
    /// A kernel's entry point, or a product with its shape.
    pub name: String,
    /// Number of runs.
    pub calls: usize,
    /// The total time of its launches.
    pub milliseconds: f64,
}

/// One operation between two marks of the stream.
pub(super) struct Span {
    name: String,
    marks: [Handle<sys::CUevent>; 2],
}

impl Cuda {
    /// Runs `body` and measures on the device every operation that it queues, longest first.
    ///
    /// Each operation stands between two events, which cost the host about 3 µs: where the host is the slower one, `body`
    /// takes longer than without, and the sum of the times is what the device had to do.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn profile<R>(&self, body: impl FnOnce() -> R) -> Result<(R, Vec<ProfileEntry>), CudaError> {
        self.synchronize()?;
        self.0.profiling.store(true, Relaxed);
        let result = body();
        self.0.profiling.store(false, Relaxed);
        let spans = core::mem::take(&mut *lock(&self.0.profile));
        self.synchronize()?;
        let mut entries = BTreeMap::<String, ProfileEntry>::new();
        for Span { name, marks: [start, end] } in spans {
            let mut milliseconds = 0.0;
            let read = driver!(cuEventElapsedTime_v2(&mut milliseconds, start.0, end.0));
            for mark in [start, end] {
                let _ = driver!(cuEventDestroy_v2(mark.0));
            }
            read.map_err(|failed| failed.during("reading a profile"))?;
            let entry = ProfileEntry { name: name.clone(), calls: 0, milliseconds: 0.0 };
            let entry = entries.entry(name).or_insert(entry);
            entry.calls += 1;
            entry.milliseconds += f64::from(milliseconds);
        }
        let mut entries: Vec<_> = entries.into_values().collect();
        entries.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok((result, entries))
    }

    /// Returns whether [`Cuda::profile`] is measuring.
    pub(super) fn is_profiling(&self) -> bool {
        self.0.profiling.load(Relaxed)
    }

    /// Puts marks around what `work` queues.
    pub(super) fn between_marks(&self, name: &str, work: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
        let mark = || {
            let event = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            driver!(cuEventRecord(event.0, self.compute())).map(|()| event)
        };
        let start = mark()?;
        work()?;
        let marks = [start, mark()?];
        lock(&self.0.profile).push(Span { name: name.to_owned(), marks });
        Ok(())
    }
}

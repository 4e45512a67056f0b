//! The collectives of a run.

use core::fmt::{self, Debug, Display};
use core::ops::Range;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use crate::{Error, RankFailure};

/// The place of a process among all processes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankPosition {
    /// The number of the process, from 0.
    pub rank: usize,
    /// The number of processes.
    pub world_size: usize,
    /// The number of the process on its host, from 0.
    pub local_rank: usize,
    /// The number of processes on its host.
    pub local_world_size: usize,
}

/// Collective operations between the ranks of a run.
///
/// Every rank calls the same operations in the same order; each waits for all ranks. Results have the same bits on all
/// ranks, and the same bits in every run with the same number of ranks. After a failure, every operation returns it.
pub trait Communicator: Debug + Send + Sync {
    /// Returns the place of this process.
    fn position(&self) -> RankPosition;

    /// Replaces `values` by their elementwise sums over all ranks, added in the order of the ranks. All ranks pass the same
    /// number of values.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), Error>;

    /// Replaces the values of this rank's shard by their sums over all ranks, as [`all_reduce_sum`](Self::all_reduce_sum) adds
    /// them. `shards` are adjacent ranges, one for each rank in order. The values of other shards are undefined afterwards.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn reduce_scatter_sum(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error>;

    /// Replaces the values of every shard by those of its rank.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn all_gather_shards(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error>;

    /// Returns the bytes of all ranks on rank 0, in the order of the ranks, and `None` on the others.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn gather(&self, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, Error>;

    /// Returns the bytes of all ranks, in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Returns the bytes of rank 0; those of other ranks are ignored.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Error>;

    /// Reports a failure of this rank to all others, which ends them. Only the first failure of a run counts.
    fn fail(&self, message: &str);

    /// Returns the first failure of the run, if a rank has failed. Waits for nothing.
    fn failure(&self) -> Option<RankFailure>;

    /// Waits until all ranks have finished. Afterwards, the end of another rank is no failure.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn finish(&self) -> Result<(), Error>;

    /// Waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    fn barrier(&self) -> Result<(), Error> {
        self.all_gather(&[]).map(|_| ())
    }

    /// Returns the number of this rank, from 0.
    fn rank(&self) -> usize {
        self.position().rank
    }

    /// Returns the number of ranks.
    fn size(&self) -> usize {
        self.position().world_size
    }

    /// Returns true for rank 0, which writes the files of a run.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }
}

/// A run of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OneRank;

impl Communicator for OneRank {
    fn position(&self) -> RankPosition {
        RankPosition { rank: 0, world_size: 1, local_rank: 0, local_world_size: 1 }
    }

    fn all_reduce_sum(&self, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn reduce_scatter_sum(&self, _: &mut [f32], _: &[Range<usize>]) -> Result<(), Error> {
        Ok(())
    }

    fn all_gather_shards(&self, _: &mut [f32], _: &[Range<usize>]) -> Result<(), Error> {
        Ok(())
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, Error> {
        Ok(Some(vec![bytes]))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![bytes.to_vec()])
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(bytes)
    }

    fn fail(&self, _: &str) {}

    fn failure(&self) -> Option<RankFailure> {
        None
    }

    fn finish(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A communicator that calls a function before each collective, to end an exchange of the ranks outside of it.
pub struct PrecededCommunicator {
    world: Arc<dyn Communicator>,
    before: Box<dyn Fn() + Send + Sync>,
}

impl PrecededCommunicator {
    /// Returns a communicator over `world` that calls `before` before each collective.
    pub fn new(world: Arc<dyn Communicator>, before: impl Fn() + Send + Sync + 'static) -> Self {
        Self { world, before: Box::new(before) }
    }

    fn world(&self) -> &dyn Communicator {
        (self.before)();
        &*self.world
    }
}

impl Debug for PrecededCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrecededCommunicator").field("world", &self.world).finish_non_exhaustive()
    }
}

impl Communicator for PrecededCommunicator {
    fn position(&self) -> RankPosition {
        self.world.position()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), Error> {
        self.world().all_reduce_sum(values)
    }

    fn reduce_scatter_sum(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error> {
        self.world().reduce_scatter_sum(values, shards)
    }

    fn all_gather_shards(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error> {
        self.world().all_gather_shards(values, shards)
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, Error> {
        self.world().gather(bytes)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.world().all_gather(bytes)
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.world().broadcast(bytes)
    }

    fn fail(&self, message: &str) {
        self.world.fail(message);
    }

    fn failure(&self) -> Option<RankFailure> {
        self.world.failure()
    }

    fn finish(&self) -> Result<(), Error> {
        self.world().finish()
    }
}

/// Runs the work of a rank and reports its end to the other ranks: its error or panic ends them too, and its success waits
/// for theirs.
///
/// # Errors
/// The error of `work`, or the failure of another rank.
pub fn supervise<T, E: Display + From<Error>>(
    world: &dyn Communicator,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => {
            world.finish()?;
            Ok(value)
        }
        Ok(Err(error)) => {
            world.fail(&error.to_string());
            Err(error)
        }
        Err(panic) => {
            world.fail(&format!("panicked: {}", panic_message(&*panic)));
            resume_unwind(panic)
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

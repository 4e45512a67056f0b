//! The ranks of a run as those that hold frozen weights together.

use std::sync::Arc;

use rekindle_dist::Communicator;
use rekindle_kernels::ShardExchange;

/// The ranks that divide the frozen weights of a model ([`LoadOptions::shard_base`](rekindle_models::LoadOptions)), connected
/// or planned.
#[derive(Debug)]
pub enum ShardRanks {
    /// The ranks of a run.
    Connected(Arc<dyn Communicator>),
    /// So many ranks, for a model without values.
    Planned(usize),
}

impl ShardExchange for ShardRanks {
    fn rank(&self) -> usize {
        match self {
            Self::Connected(world) => world.rank(),
            Self::Planned(_) => 0,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Connected(world) => world.size(),
            Self::Planned(ranks) => *ranks,
        }
    }

    fn all_gather(&self, own: &[u8]) -> Option<Vec<Vec<u8>>> {
        match self {
            Self::Connected(world) => world.all_gather(own).ok(),
            Self::Planned(_) => None,
        }
    }
}

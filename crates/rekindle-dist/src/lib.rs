//! Ranks of a distributed run: who they are, how they find each other, and how they sum, share and fail together.
//!
//! [`Launch`] reads the variables of torchrun, Slurm, MPI, Kubeflow, Ray and SkyPilot. [`TcpCommunicator`] connects the
//! ranks; [`OneRank`] stands for a run without others and costs nothing. Tensors are unknown here: gradients are slices of
//! `f32`, everything else is bytes.
//!
//! ```
//! use rekindle_dist::{Communicator, OneRank};
//!
//! let world = OneRank;
//! let mut gradient = [1.0, 2.0];
//! world.all_reduce_sum(&mut gradient)?;
//! assert_eq!((world.rank(), world.size(), gradient), (0, 1, [1.0, 2.0]));
//! # Ok::<(), rekindle_dist::Error>(())
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod communicator;
mod deal;
mod error;
mod launch;
mod tcp;

pub use communicator::{Communicator, OneRank, PrecededCommunicator, RankPosition, supervise};
pub use deal::deal_by_length;
pub use error::{Error, RankFailure};
pub use launch::{Launch, LaunchRole, MasterAddress, NodeLaunch, RankLaunch};
pub use tcp::{TcpCommunicator, TcpOptions};

//! The ranks of `rekindle train`: started by this process, or by a launcher.

mod launcher;

use std::io::stdin;
use std::net::TcpListener;
use std::path::Path;
use std::process::{abort, exit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rekindle::dist::{
    Communicator, Launch, LaunchRole, MasterAddress, NodeLaunch, OneRank, RankFailure, RankLaunch, TcpCommunicator,
    TcpOptions,
};
use rekindle::run::{RunConfig, RunObserver};

use crate::args::{GpuCount, TrainArgs};
use crate::failure::{Failure, OTHER_RANK};
use crate::signals;

pub(crate) use launcher::start;

/// The part of this process in a run.
pub(crate) enum TrainRole {
    /// The only rank, or one of several.
    Rank,
    /// Starts the ranks of this host.
    Launcher(NodeLaunch),
}

impl TrainRole {
    /// Returns the role that the arguments and the launcher give.
    pub(crate) fn of(args: &TrainArgs, launch: &Launch) -> Result<Self, Failure> {
        let gpus = args.gpus.map(|gpus| gpu_ranks(gpus, rekindle::cuda_device_count())).transpose()?;
        if args.dry_run {
            return Ok(Self::Rank);
        }
        match (&launch.role, args.ranks.or(gpus)) {
            (LaunchRole::Rank(rank), Some(_)) if !launch.is_own() => Err(Failure::Configuration(format!(
                "{} has started this process as rank {} of {}; remove {}",
                launch.launcher.unwrap_or_default(),
                rank.position.rank,
                rank.position.world_size,
                if gpus.is_some() { "--gpus" } else { "--ranks" }
            ))),
            (LaunchRole::Rank(_), _) | (LaunchRole::Alone, None | Some(1)) => Ok(Self::Rank),
            (LaunchRole::Alone, Some(ranks)) => {
                let master = MasterAddress::new("127.0.0.1", free_port()?);
                Ok(Self::Launcher(NodeLaunch { node_rank: 0, nodes: 1, ranks_per_node: ranks, master }))
            }
            (LaunchRole::Node(node), ranks) => {
                let ranks_per_node = ranks.unwrap_or(node.ranks_per_node);
                Ok(Self::Launcher(NodeLaunch { ranks_per_node, ..node.clone() }))
            }
        }
    }
}

/// Returns the number of ranks that `--gpus` asks for; refuses more than there are.
fn gpu_ranks(gpus: GpuCount, found: usize) -> Result<usize, Failure> {
    let wanted = match gpus {
        GpuCount::All => found,
        GpuCount::Number(number) => number,
    };
    let problem = match found {
        0 => {
            "--gpus: this machine has no CUDA device (see rekindle doctor); train on the CPU with --ranks N".to_owned()
        }
        _ if wanted > found => format!("--gpus {wanted}: this machine has {found} of them"),
        _ => return Ok(wanted),
    };
    Err(Failure::Configuration(problem))
}

/// Returns a port that is free now. If another program takes it, rank 0 takes one of the next.
fn free_port() -> Result<u16, Failure> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    match free {
        Ok(address) => Ok(address.port()),
        Err(error) => Err(Failure::Missing(format!("no port of 127.0.0.1 is free for the ranks: {error}"))),
    }
}

/// Connects with the other ranks, if there are any. `stop` ends the run after the current step.
pub(crate) fn connect(launch: &Launch, stop: &Arc<AtomicBool>) -> Result<Arc<dyn Communicator>, Failure> {
    let LaunchRole::Rank(rank) = &launch.role else { return Ok(Arc::new(OneRank)) };
    let prints = prints_failures(launch, rank);
    let on_failure = move |failure: &RankFailure| {
        let text = failure.to_string();
        // The rank may be in the middle of a long computation, which nothing but its end interrupts.
        thread::spawn(move || {
            thread::sleep(GRACE);
            if prints {
                eprintln!("error: {text}");
            }
            // Libraries that wait for the other ranks may keep the process from ending in order.
            thread::spawn(|| {
                thread::sleep(GRACE);
                abort();
            });
            exit(OTHER_RANK.into());
        });
    };
    let options = TcpOptions { on_failure: Some(Arc::new(on_failure)), ..TcpOptions::default() };
    let world: Arc<dyn Communicator> = Arc::new(TcpCommunicator::connect(rank, options)?);
    if launch.is_own() {
        let (world, stop) = (Arc::clone(&world), Arc::clone(stop));
        thread::spawn(move || obey_launcher(&*world, &stop));
    }
    Ok(world)
}

/// The time that a rank has to end by itself after the failure of another.
const GRACE: Duration = Duration::from_secs(5);

/// The line that tells a rank to end after the current step.
const STOP: &str = "stop";

/// Follows the process that started this rank, which holds the other end of standard input.
fn obey_launcher(world: &dyn Communicator, stop: &AtomicBool) {
    for line in stdin().lines().map_while(Result::ok) {
        if line == STOP {
            stop.store(true, Ordering::Relaxed);
        }
    }
    world.fail("the process that started the ranks has ended");
    exit(OTHER_RANK.into());
}

/// Returns true if this rank prints the failure of another: of the ranks that this program started, rank 0 alone.
fn prints_failures(launch: &Launch, rank: &RankLaunch) -> bool {
    rank.position.rank == 0 || !launch.is_own()
}

/// Returns the failure of a rank as this rank reports it.
pub(crate) fn report(launch: &Launch, failure: Failure) -> Failure {
    let LaunchRole::Rank(rank) = &launch.role else { return failure };
    match failure {
        Failure::Interrupted(_) if rank.position.rank > 0 => Failure::Interrupted(String::new()),
        failure if failure.exit_code() == OTHER_RANK => {
            let text = if prints_failures(launch, rank) { failure.to_string() } else { String::new() };
            Failure::OtherRank(text)
        }
        failure => failure,
    }
}

/// The observer of the ranks after the first, which prints nothing.
pub(crate) struct QuietObserver {
    pub(crate) stop: Arc<AtomicBool>,
}

impl RunObserver for QuietObserver {
    fn started(&self, _: &RunConfig, _: &Path) {
        if signals::raise(&self.stop).is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_become_ranks_or_are_refused_by_name() {
        let ranks = |gpus, found| gpu_ranks(gpus, found).map_err(|error| error.to_string());
        let refused = |gpus, found, part: &str| {
            let problem = ranks(gpus, found).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        };
        refused(GpuCount::All, 0, "no CUDA device");
        refused(GpuCount::Number(1), 0, "--ranks N");
        refused(GpuCount::Number(3), 2, "has 2 of them");
        assert_eq!((ranks(GpuCount::Number(1), 2), ranks(GpuCount::All, 4)), (Ok(1), Ok(4)));
    }
}

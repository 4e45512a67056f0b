//! The process that starts the ranks of a host and waits for them.

use std::env;
use std::io::{self, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use rekindle::dist::{Launch, NodeLaunch, RankPosition};

use super::STOP;
use crate::failure::{Failure, INTERRUPTED, OTHER_RANK};
use crate::signals;

/// A rank that runs, or its end.
struct StartedRank {
    rank: usize,
    child: Child,
    status: Option<ExitStatus>,
}

/// Time between a signal and the request to stop. Signals of a terminal reach the ranks too, and must reach them first: a signal
/// after the request ends a rank at once.
const SIGNAL_PAUSE: Duration = Duration::from_millis(500);

/// Time in which all ranks end after the failure of one.
const END: Duration = Duration::from_secs(20);

/// The same time after a signal ended one. It is shorter because ranks that wait for that rank to connect do not notice.
const END_AFTER_SIGNAL: Duration = Duration::from_secs(4);

/// Starts the ranks of this host with the arguments of this process, and waits until all have ended.
///
/// The ranks share standard error, where rank 0 alone reports progress.
pub(crate) fn start(node: &NodeLaunch) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    signals::raise(&stop).map_err(Failure::Signals)?;
    let mut ranks = Vec::new();
    for local_rank in 0..node.ranks_per_node {
        let position = RankPosition {
            rank: node.node_rank * node.ranks_per_node + local_rank,
            world_size: node.nodes * node.ranks_per_node,
            local_rank,
            local_world_size: node.ranks_per_node,
        };
        match spawn(node, position) {
            Ok(child) => ranks.push(StartedRank { rank: position.rank, child, status: None }),
            Err(error) => {
                kill(&mut ranks);
                return Err(Failure::Missing(format!("rank {} cannot be started: {error}", position.rank)));
            }
        }
    }
    let first_failure = wait(&mut ranks, &stop)
        .map_err(|error| Failure::Missing(format!("the ranks cannot be waited for: {error}")))?;
    let Some((rank, status)) = first_failure else { return Ok(()) };
    // A rank without a handler yet is ended by the signal itself.
    if stop.load(Ordering::Relaxed) && matches!(status.code(), None | Some(130)) {
        return Err(Failure::Interrupted(String::new()));
    }
    let code = status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
    let text = match status.code() {
        Some(code) if code == i32::from(OTHER_RANK) => format!("rank {rank} has ended because another rank failed"),
        Some(code) => format!("rank {rank} has ended with exit code {code}; its error is above"),
        None => format!("rank {rank} was ended by a {status}"),
    };
    Err(Failure::StartedRank { text, code })
}

fn spawn(node: &NodeLaunch, position: RankPosition) -> io::Result<Child> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1)).envs(Launch::rank_variables(position, &node.master)).stdin(Stdio::piped());
    if position.rank > 0 {
        command.stdout(Stdio::null());
    }
    if env::var_os(THREADS).is_none() {
        let threads = available_parallelism().map_or(1, usize::from) / node.ranks_per_node;
        command.env(THREADS, threads.max(1).to_string());
    }
    command.spawn()
}

/// The number of threads of a process.
const THREADS: &str = "RAYON_NUM_THREADS";

/// Returns a number that is smaller the closer a failure is to the first cause: a signal, then an error of the rank itself,
/// then an error that another rank caused. A rank that loses its connection to a killed rank may report an error of its own.
fn distance_from_cause(status: ExitStatus) -> u8 {
    match status.code() {
        None => 0,
        Some(code) if code != i32::from(OTHER_RANK) => 1,
        Some(_) => 2,
    }
}

/// Waits for all ranks. Returns the one whose failure is the first cause, if one failed.
fn wait(ranks: &mut [StartedRank], stop: &AtomicBool) -> io::Result<Option<(usize, ExitStatus)>> {
    let mut failed: Option<(usize, ExitStatus)> = None;
    let mut signalled: Option<Instant> = None;
    let mut is_asked = false;
    let mut deadline: Option<Instant> = None;
    let mut is_killing = false;
    while ranks.iter().any(|rank| rank.status.is_none()) {
        for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
            rank.status = rank.child.try_wait()?;
            let Some(status) = rank.status.filter(|status| !status.success()) else { continue };
            deadline.get_or_insert(Instant::now() + if status.code().is_some() { END } else { END_AFTER_SIGNAL });
            // Ranks that are killed here, after the deadline, have not failed by themselves.
            let is_own = status.code().is_some() || !is_killing;
            if is_own && failed.is_none_or(|(_, other)| distance_from_cause(status) < distance_from_cause(other)) {
                failed = Some((rank.rank, status));
            }
        }
        if stop.load(Ordering::Relaxed) && !is_asked {
            let since = *signalled.get_or_insert_with(Instant::now);
            if since.elapsed() >= SIGNAL_PAUSE {
                ask_to_stop(ranks);
                is_asked = true;
            }
        }
        let is_interrupted = failed.is_some_and(|(_, status)| status.code() == Some(INTERRUPTED.into()));
        if deadline.is_some_and(|deadline| Instant::now() > deadline) && !is_interrupted {
            is_killing = true;
            kill(ranks);
        }
        sleep(Duration::from_millis(20));
    }
    Ok(failed)
}

/// Asks all ranks to end after the current step.
fn ask_to_stop(ranks: &mut [StartedRank]) {
    for rank in ranks {
        if let Some(stdin) = &mut rank.child.stdin {
            // A rank that has ended reads nothing.
            let _ = writeln!(stdin, "{STOP}");
        }
    }
}

fn kill(ranks: &mut [StartedRank]) {
    for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
        // It may have ended in the meantime.
        let _ = rank.child.kill();
    }
}

//! Heartbeats, and the first failure of a run.

use core::time::Duration;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::rendezvous::Link;
use super::wire::ControlMessage;
use super::{OnFailure, TcpOptions};
use crate::{Error, RankFailure};

/// The watch of a rank over those that it is connected with: rank 0 over all, any other over rank 0, which passes failures
/// on.
pub(super) struct Watch {
    rank: usize,
    host: String,
    peers: Vec<Peer>,
    state: Mutex<WatchState>,
    changed: Condvar,
    heartbeat_timeout: Duration,
    on_failure: Option<OnFailure>,
}

struct Peer {
    rank: usize,
    host: String,
    /// Written by several threads, read by one.
    control: Mutex<TcpStream>,
    /// Shut down after a failure, so that collectives stop waiting.
    data: TcpStream,
}

#[derive(Default)]
struct WatchState {
    failure: Option<RankFailure>,
    /// Peers that have received the failure of this rank.
    received: usize,
    /// True from the beginning of the last barrier on: others may close their connections before this rank has left it.
    is_ending: bool,
    /// True when all ranks have finished.
    is_over: bool,
    /// True when the threads must end.
    is_closed: bool,
}

/// The time in which the cause of a broken connection arrives from the other side.
const CAUSE: Duration = Duration::from_secs(2);

impl core::fmt::Debug for Watch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Watch").field("rank", &self.rank).field("host", &self.host).finish_non_exhaustive()
    }
}

impl Watch {
    /// Starts the threads that watch over `links`.
    pub(super) fn start(rank: usize, host: String, links: &[Link], options: TcpOptions) -> io::Result<Arc<Self>> {
        let TcpOptions { heartbeat_timeout, on_failure, .. } = options;
        let mut peers = Vec::new();
        let mut readers = Vec::new();
        for link in links {
            let reader = link.control.try_clone()?;
            reader.set_read_timeout(Some(heartbeat_timeout))?;
            reader.set_write_timeout(Some(heartbeat_timeout))?;
            readers.push(reader);
            peers.push(Peer {
                rank: link.rank,
                host: link.host.clone(),
                control: Mutex::new(link.control.try_clone()?),
                data: link.data.try_clone()?,
            });
        }
        let state = Mutex::default();
        let watch = Arc::new(Self { rank, host, peers, state, changed: Condvar::new(), heartbeat_timeout, on_failure });
        for (index, reader) in readers.into_iter().enumerate() {
            let watch = Arc::clone(&watch);
            thread::Builder::new().name("rank watch".to_owned()).spawn(move || watch.listen(index, reader))?;
        }
        let beats = Arc::clone(&watch);
        thread::Builder::new().name("rank heartbeat".to_owned()).spawn(move || beats.beat())?;
        Ok(watch)
    }

    fn state(&self) -> MutexGuard<'_, WatchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the first failure so far.
    pub(super) fn failure(&self) -> Option<RankFailure> {
        self.state().failure.clone()
    }

    /// Returns the result of reading from or writing to a rank. For a connection that broke, this is the first failure of
    /// the run: that which another rank reports, or else the loss of this connection.
    pub(super) fn checked<T>(&self, rank: usize, result: io::Result<T>) -> Result<T, Error> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let state = self.wait(CAUSE, |state| state.failure.is_some());
        if let Some(failure) = state.failure.clone() {
            return Err(failure.into());
        }
        drop(state);
        Err(self.blame(rank, format!("its connection broke ({error}); {KILLED}")))
    }

    /// Records the failure of another rank. Returns the first failure of the run.
    pub(super) fn blame(&self, rank: usize, message: String) -> Error {
        let host = self.peers.iter().find(|peer| peer.rank == rank).map_or("an unknown host", |peer| &peer.host);
        let failure = RankFailure { rank, host: host.to_owned(), message };
        self.record(failure.clone());
        self.failure().unwrap_or(failure).into()
    }

    /// Records a failure of this rank, and waits until the others know, but not long.
    pub(super) fn fail(&self, message: String) {
        let failure = RankFailure { rank: self.rank, host: self.host.clone(), message };
        if self.record(failure) {
            drop(self.wait(CAUSE, |state| state.received >= self.peers.len()));
        }
    }

    /// Begins the last barrier.
    pub(super) fn begin_end(&self) {
        self.state().is_ending = true;
    }

    /// Ends the watch: all ranks have finished.
    pub(super) fn end(&self) {
        self.state().is_over = true;
        self.send(&ControlMessage::Finished);
    }

    /// Ends the threads.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
        for peer in &self.peers {
            let control = peer.control.lock().unwrap_or_else(PoisonError::into_inner);
            // The other side may have closed it.
            let _ = control.shutdown(Shutdown::Both);
        }
    }

    /// Waits until the condition holds, or the time is over.
    fn wait(&self, time: Duration, holds: impl Fn(&WatchState) -> bool) -> MutexGuard<'_, WatchState> {
        let state = self.state();
        let result = self.changed.wait_timeout_while(state, time, |state| !holds(state));
        result.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Records the first failure and passes it on. Returns false if there was one before, or all ranks have finished.
    fn record(&self, failure: RankFailure) -> bool {
        let mut state = self.state();
        if state.failure.is_some() || state.is_over || state.is_closed {
            return false;
        }
        state.failure = Some(failure.clone());
        drop(state);
        self.send(&ControlMessage::Failed(failure.clone()));
        for peer in &self.peers {
            // It may be the connection that broke.
            let _ = peer.data.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        if let Some(on_failure) = self.on_failure.as_ref().filter(|_| failure.rank != self.rank) {
            on_failure(&failure);
        }
        true
    }

    /// Sends a message to all peers. One that cannot be reached is found by the thread that listens to it.
    fn send(&self, message: &ControlMessage) {
        for peer in &self.peers {
            let mut control = peer.control.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = message.write(&mut *control);
        }
    }

    fn beat(&self) {
        let pause = self.heartbeat_timeout / 5;
        loop {
            let began = Instant::now();
            let state = self.wait(pause, |state| state.is_closed || state.is_over);
            if state.is_closed || state.is_over {
                return;
            }
            drop(state);
            if began.elapsed() >= pause {
                self.send(&ControlMessage::Heartbeat);
            }
        }
    }

    /// Listens to a peer until its connection ends.
    fn listen(&self, index: usize, mut reader: TcpStream) {
        let peer = &self.peers[index];
        loop {
            match ControlMessage::read(&mut reader) {
                Ok(ControlMessage::Heartbeat) => {}
                Ok(ControlMessage::Failed(failure)) => {
                    let mut control = peer.control.lock().unwrap_or_else(PoisonError::into_inner);
                    let _ = ControlMessage::Received.write(&mut *control);
                    drop(control);
                    self.record(failure);
                }
                Ok(ControlMessage::Received) => {
                    self.state().received += 1;
                    self.changed.notify_all();
                }
                Ok(ControlMessage::Finished) => return,
                Err(error) => return self.lost(peer, &error),
            }
        }
    }

    /// Records the loss of a peer, unless the run is over anyway.
    fn lost(&self, peer: &Peer, error: &io::Error) {
        let is_silent = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        // A peer that left the last barrier may close its connection before this rank has left it. If it had not, the
        // barrier fails.
        if self.state().is_ending && !is_silent {
            return;
        }
        let message = match is_silent {
            true => format!(
                "no sign of life for {:.0} s; its machine, its process or the network between has stopped",
                self.heartbeat_timeout.as_secs_f64()
            ),
            false => KILLED.to_owned(),
        };
        self.record(RankFailure { rank: peer.rank, host: peer.host.clone(), message });
    }
}

const KILLED: &str = "its process ended without an error of its own; it was probably killed (SIGKILL, out of memory), or its network was cut";

//! Ranks that are connected over TCP.
//!
//! Every rank has two connections to rank 0: one for collectives, and one for heartbeats and failures. Rank 0 adds the
//! values of all ranks in their order and sends the sums back, so results have the same bits on all ranks and in every run,
//! and only one port must be reachable. Connections are not encrypted, and whoever can reach the port can join with the
//! name of the run: the network between the ranks must be a trusted one, as with NCCL or Gloo.

mod rendezvous;
mod watch;
mod wire;

#[cfg(test)]
mod tests;

use core::fmt;
use core::ops::Range;
use core::time::Duration;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Communicator, Error, RankFailure, RankLaunch, RankPosition};
use rendezvous::Link;
use watch::Watch;
use wire::{Operation, read_bytes, read_header, write_bytes, write_header};

/// Receives the failure of another rank.
type OnFailure = Arc<dyn Fn(&RankFailure) + Send + Sync>;

/// The timeouts of a [`TcpCommunicator`].
#[derive(Clone)]
pub struct TcpOptions {
    /// The time in which all ranks must have connected. Default 5 minutes.
    pub rendezvous_timeout: Duration,
    /// The time without a heartbeat after which a rank counts as lost. Default 15 seconds.
    pub heartbeat_timeout: Duration,
    /// Called once, in another thread, when another rank has failed. The next collective returns the failure too, but a
    /// rank may be far from it.
    pub on_failure: Option<OnFailure>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            rendezvous_timeout: Duration::from_secs(300),
            heartbeat_timeout: Duration::from_secs(15),
            on_failure: None,
        }
    }
}

impl fmt::Debug for TcpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rendezvous_timeout, heartbeat_timeout, .. } = self;
        f.debug_struct("TcpOptions")
            .field("rendezvous_timeout", rendezvous_timeout)
            .field("heartbeat_timeout", heartbeat_timeout)
            .finish_non_exhaustive()
    }
}

/// A rank that is connected with the others over TCP.
///
/// Dropping it before [`finish`](Communicator::finish) is a failure of the rank.
#[derive(Debug)]
pub struct TcpCommunicator {
    position: RankPosition,
    collectives: Mutex<Collectives>,
    watch: Arc<Watch>,
}

/// The connections for collectives.
#[derive(Debug)]
struct Collectives {
    /// Those to all other ranks in order on rank 0, that to rank 0 on any other.
    links: Vec<DataLink>,
    /// The number of operations so far.
    done: u64,
}

#[derive(Debug)]
struct DataLink {
    rank: usize,
    stream: TcpStream,
}

/// Values that are added at a time.
const CHUNK: usize = 1 << 18;

impl TcpCommunicator {
    /// Connects with the other ranks; waits until all have connected.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if rank 0 cannot listen or is not reached, or ranks are missing after the timeout.
    pub fn connect(launch: &RankLaunch, options: TcpOptions) -> Result<Self, Error> {
        let host = host_name();
        let links = rendezvous::meet(launch, &host, options.rendezvous_timeout)?;
        let broken =
            |error: std::io::Error| Error::Rendezvous(format!("a connection between the ranks broke: {error}"));
        let watch = Watch::start(launch.position.rank, host, &links, options).map_err(broken)?;
        let data = |link: Link| DataLink { rank: link.rank, stream: link.data };
        let collectives = Mutex::new(Collectives { links: links.into_iter().map(data).collect(), done: 0 });
        Ok(Self { position: launch.position, collectives, watch })
    }

    /// Begins a collective. Returns the connections, and the number of the operation.
    fn begin(&self) -> Result<(MutexGuard<'_, Collectives>, u64), Error> {
        let mut collectives = self.collectives.lock().unwrap_or_else(PoisonError::into_inner);
        match self.watch.failure() {
            Some(failure) => Err(failure.into()),
            None => {
                collectives.done += 1;
                let number = collectives.done;
                Ok((collectives, number))
            }
        }
    }

    /// Adds the values of all ranks, and gives each rank the sums of its part.
    ///
    /// Every rank sends a chunk and receives its part of it before the next, so that no two wait for each other to read.
    fn reduce(
        &self,
        values: &mut [f32],
        operation: impl FnOnce(u64, usize) -> Operation,
        part_of: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Error> {
        let (mut collectives, number) = self.begin()?;
        let operation = operation(number, values.len());
        let mut bytes = vec![0; 4 * values.len().min(CHUNK)];
        let links = &mut collectives.links;
        if self.is_first() {
            self.expect(links, operation)?;
        } else {
            let link = &mut links[0];
            self.watch.checked(link.rank, write_header(&mut link.stream, operation))?;
        }
        for (index, chunk) in values.chunks_mut(CHUNK).enumerate() {
            let (first, end) = (index * CHUNK, index * CHUNK + chunk.len());
            let wanted = |rank: usize| {
                let part = part_of(rank);
                part.start.clamp(first, end) - first..part.end.clamp(first, end) - first
            };
            if self.is_first() {
                for link in &mut *links {
                    let bytes = &mut bytes[..4 * chunk.len()];
                    self.watch.checked(link.rank, wire::read_exact(&mut link.stream, bytes))?;
                    let others = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                    chunk.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
                }
                for link in &mut *links {
                    self.watch.checked(link.rank, write_values(&mut link.stream, &chunk[wanted(link.rank)]))?;
                }
            } else {
                let link = &mut links[0];
                self.watch.checked(link.rank, write_values(&mut link.stream, chunk))?;
                let wanted = wanted(self.position.rank);
                self.watch.checked(link.rank, read_values(&mut link.stream, &mut chunk[wanted]))?;
            }
        }
        Ok(())
    }

    /// Reads the headers of all other ranks, which must have called the same operation.
    fn expect(&self, links: &mut [DataLink], expected: Operation) -> Result<(), Error> {
        for link in links {
            let found = self.watch.checked(link.rank, read_header(&mut link.stream))?;
            if found != expected {
                let message = format!("its next operation was {found}, and that of rank 0 {expected}");
                return Err(self.watch.blame(link.rank, message));
            }
        }
        Ok(())
    }
}

impl Communicator for TcpCommunicator {
    fn position(&self) -> RankPosition {
        self.position
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), Error> {
        let whole = 0..values.len();
        self.reduce(values, Operation::all_reduce, |_| whole.clone())
    }

    fn reduce_scatter_sum(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error> {
        self.reduce(values, Operation::reduce_scatter, |rank| shards[rank].clone())
    }

    fn all_gather_shards(&self, values: &mut [f32], shards: &[Range<usize>]) -> Result<(), Error> {
        let (mut collectives, number) = self.begin()?;
        let operation = Operation::all_gather_shards(number, values.len());
        let links = &mut collectives.links;
        if !self.is_first() {
            let DataLink { rank, stream } = &mut links[0];
            self.watch.checked(*rank, write_header(stream, operation))?;
            self.watch.checked(*rank, write_values(stream, &values[shards[self.rank()].clone()]))?;
            for shard in shards {
                self.watch.checked(*rank, read_values(stream, &mut values[shard.clone()]))?;
            }
            return Ok(());
        }
        self.expect(links, operation)?;
        for link in &mut *links {
            let shard = shards[link.rank].clone();
            self.watch.checked(link.rank, read_values(&mut link.stream, &mut values[shard]))?;
        }
        for link in links {
            for shard in shards {
                self.watch.checked(link.rank, write_values(&mut link.stream, &values[shard.clone()]))?;
            }
        }
        Ok(())
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let (mut collectives, number) = self.begin()?;
        let operation = Operation::gather(number);
        let links = &mut collectives.links;
        if !self.is_first() {
            let DataLink { rank, stream } = &mut links[0];
            self.watch.checked(*rank, write_header(stream, operation))?;
            self.watch.checked(*rank, write_bytes(stream, &bytes))?;
            return Ok(None);
        }
        self.expect(links, operation)?;
        let mut all = vec![bytes];
        for link in links {
            all.push(self.watch.checked(link.rank, read_bytes(&mut link.stream))?);
        }
        Ok(Some(all))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let (mut collectives, number) = self.begin()?;
        let operation = Operation::all_gather(number);
        let links = &mut collectives.links;
        if !self.is_first() {
            let DataLink { rank, stream } = &mut links[0];
            self.watch.checked(*rank, write_header(stream, operation))?;
            self.watch.checked(*rank, write_bytes(stream, bytes))?;
            return (0..self.size()).map(|_| self.watch.checked(*rank, read_bytes(stream))).collect();
        }
        self.expect(links, operation)?;
        let mut all = vec![bytes.to_vec()];
        for link in &mut *links {
            all.push(self.watch.checked(link.rank, read_bytes(&mut link.stream))?);
        }
        // Many small messages go out in a single write to each rank.
        let is_small = all.iter().map(Vec::len).sum::<usize>() <= CHUNK;
        let joined: Option<Vec<u8>> = is_small.then(|| all.iter().flat_map(|bytes| framed(bytes)).collect());
        for link in links {
            if let Some(joined) = &joined {
                self.watch.checked(link.rank, wire::write_all(&mut link.stream, joined))?;
                continue;
            }
            for bytes in &all {
                self.watch.checked(link.rank, write_bytes(&mut link.stream, bytes))?;
            }
        }
        Ok(all)
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
        let (mut collectives, number) = self.begin()?;
        let operation = Operation::broadcast(number);
        let links = &mut collectives.links;
        if !self.is_first() {
            let DataLink { rank, stream } = &mut links[0];
            self.watch.checked(*rank, write_header(stream, operation))?;
            return self.watch.checked(*rank, read_bytes(stream));
        }
        self.expect(links, operation)?;
        for link in links {
            self.watch.checked(link.rank, write_bytes(&mut link.stream, &bytes))?;
        }
        Ok(bytes)
    }

    fn fail(&self, message: &str) {
        self.watch.fail(message.to_owned());
    }

    fn failure(&self) -> Option<RankFailure> {
        self.watch.failure()
    }

    fn finish(&self) -> Result<(), Error> {
        self.watch.begin_end();
        self.barrier()?;
        self.watch.end();
        Ok(())
    }
}

impl Drop for TcpCommunicator {
    fn drop(&mut self) {
        let message = if std::thread::panicking() { "panicked" } else { "ended before the run" };
        self.watch.fail(message.to_owned());
        self.watch.close();
    }
}

/// Returns what [`write_bytes`] writes.
fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

/// Writes values in little-endian order.
fn write_values(stream: &mut TcpStream, values: &[f32]) -> io::Result<()> {
    let mut bytes = vec![0; 4 * values.len().min(CHUNK)];
    for values in values.chunks(CHUNK) {
        let bytes = &mut bytes[..4 * values.len()];
        for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        wire::write_all(stream, bytes)?;
    }
    Ok(())
}

/// Reads what [`write_values`] writes.
fn read_values(stream: &mut TcpStream, values: &mut [f32]) -> io::Result<()> {
    let mut bytes = vec![0; 4 * values.len().min(CHUNK)];
    for values in values.chunks_mut(CHUNK) {
        let bytes = &mut bytes[..4 * values.len()];
        wire::read_exact(stream, bytes)?;
        let read = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        values.iter_mut().zip(read).for_each(|(value, read)| *value = read);
    }
    Ok(())
}

/// Returns the name of this machine.
fn host_name() -> String {
    let files = ["/proc/sys/kernel/hostname", "/etc/hostname"];
    let of_file = files.iter().find_map(|file| std::fs::read_to_string(file).ok());
    let name = of_file.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "an unnamed host".to_owned() } else { name.to_owned() }
}

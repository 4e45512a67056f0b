//! The first contact of the ranks: rank 0 listens, and the others connect to it.

use core::time::Duration;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::Instant;

use super::wire::{read_array, read_text, read_u64, write_all, write_text};
use crate::{Error, MasterAddress, RankLaunch};

/// The connections to another rank.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) rank: usize,
    pub(super) host: String,
    /// Heartbeats and failures.
    pub(super) control: TcpStream,
    /// Collectives.
    pub(super) data: TcpStream,
}

/// The first bytes of a connection: the protocol and its version.
const MAGIC: [u8; 8] = *b"rekindl1";

/// The use of a connection.
const CONTROL: u8 = 0;
const DATA: u8 = 1;

/// The answers of rank 0 to a connection.
const ACCEPTED: u8 = 0;
const OTHER_ATTEMPT: u8 = 1;
const REFUSED: u8 = 2;

/// The time for the answer of a process that may not be one of ours.
const ANSWER: Duration = Duration::from_secs(3);

/// Connects with the other ranks. Returns the links to all of them in order on rank 0, and the one to rank 0 on any other.
pub(super) fn meet(launch: &RankLaunch, host: &str, timeout: Duration) -> Result<Vec<Link>, Error> {
    let deadline = Instant::now() + timeout;
    match launch.position.rank {
        0 => serve(launch, host, deadline, timeout),
        _ => join(launch, host, deadline, timeout).map(|link| vec![link]),
    }
}

/// A connection as its other end describes it.
struct Hello {
    kind: u8,
    rank: usize,
    world_size: usize,
    attempt: String,
    host: String,
}

fn serve(launch: &RankLaunch, host: &str, deadline: Instant, timeout: Duration) -> Result<Vec<Link>, Error> {
    let listener = listen(&launch.master)?;
    let failed = |error: io::Error| Error::Rendezvous(format!("rank 0 cannot accept connections: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let size = launch.position.world_size;
    let mut waiting: Vec<[Option<(TcpStream, String)>; 2]> = (0..size).map(|_| [None, None]).collect();
    while waiting[1..].iter().flatten().any(Option::is_none) {
        match listener.accept() {
            // A connection that is not of a rank, or broke at once, is none of ours.
            Ok((stream, _)) => _ = welcome(stream, launch, host, &mut waiting),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(5)),
            Err(error) => return Err(failed(error)),
        }
        if Instant::now() > deadline {
            let missing = waiting.iter().enumerate().skip(1).filter(|(_, links)| links.iter().any(Option::is_none));
            let missing: Vec<String> = missing.map(|(rank, _)| rank.to_string()).collect();
            return Err(Error::Rendezvous(format!(
                "ranks {} of {size} have not connected to {} within {} s; look for their own errors, and check that their \
                 hosts reach that address and port",
                missing.join(", "),
                launch.master,
                timeout.as_secs()
            )));
        }
    }
    let mut links = Vec::with_capacity(size - 1);
    for (rank, streams) in waiting.into_iter().enumerate().skip(1) {
        let [Some((control, host)), Some((mut data, _))] = streams else { continue };
        let gone = |error| Error::Rendezvous(format!("rank {rank} on {host} has disconnected: {error}"));
        write_all(&mut data, &[ACCEPTED]).map_err(gone)?;
        links.push(Link { rank, host, control, data });
    }
    Ok(links)
}

/// Listens on the first port that is free: on this machine alone if the address is.
fn listen(master: &MasterAddress) -> Result<TcpListener, Error> {
    let resolved: Vec<SocketAddr> = (&*master.host, 0).to_socket_addrs().map(Iterator::collect).unwrap_or_default();
    let is_local = !resolved.is_empty() && resolved.iter().all(|address| address.ip().is_loopback());
    let hosts: Vec<IpAddr> = match is_local {
        true => resolved.iter().map(SocketAddr::ip).collect(),
        false => vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()],
    };
    let mut last = None;
    for &port in &master.ports {
        for &host in &hosts {
            match TcpListener::bind((host, port)) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = Some(error),
            }
            // A port that is in use on one of the addresses belongs to another program.
            if last.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
                break;
            }
        }
    }
    let error = last.map_or_else(String::new, |error| error.to_string());
    Err(Error::Rendezvous(format!("rank 0 cannot listen on {master}: {error}; set MASTER_PORT to a port that is free")))
}

/// Answers a new connection and keeps it.
fn welcome(
    mut stream: TcpStream,
    launch: &RankLaunch,
    host: &str,
    waiting: &mut [[Option<(TcpStream, String)>; 2]],
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    let hello = read_hello(&mut stream)?;
    let size = launch.position.world_size;
    let refusal = if hello.attempt != launch.attempt {
        Some((OTHER_ATTEMPT, String::new()))
    } else if hello.world_size != size {
        Some((REFUSED, format!("it was started as one of {} ranks, and rank 0 as one of {size}", hello.world_size)))
    } else if hello.rank == 0 || hello.rank >= size || hello.kind > DATA {
        Some((REFUSED, format!("there is no rank {} of {size} to connect", hello.rank)))
    } else if waiting[hello.rank][hello.kind as usize].is_some() {
        Some((REFUSED, "another process has the same rank".to_owned()))
    } else {
        None
    };
    let (answer, text) = refusal.unwrap_or((ACCEPTED, host.to_owned()));
    let mut bytes = MAGIC.to_vec();
    bytes.push(answer);
    write_text(&mut bytes, &text)?;
    write_all(&mut stream, &bytes)?;
    if answer == ACCEPTED {
        stream.set_read_timeout(None)?;
        waiting[hello.rank][hello.kind as usize] = Some((stream, hello.host));
    }
    Ok(())
}

fn read_hello(stream: &mut TcpStream) -> io::Result<Hello> {
    if read_array(stream)? != MAGIC {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Hello {
        kind: read_array::<1>(stream)?[0],
        rank: read_u64(stream)? as usize,
        world_size: read_u64(stream)? as usize,
        attempt: read_text(stream)?,
        host: read_text(stream)?,
    })
}

/// The result of a connection that was not accepted.
enum Refusal {
    /// Rank 0 may come later, or listens on another port.
    NotYet(String),
    /// Rank 0 refuses this rank.
    Final(String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::NotYet(error.to_string())
    }
}

fn join(launch: &RankLaunch, host: &str, deadline: Instant, timeout: Duration) -> Result<Link, Error> {
    let rank = launch.position.rank;
    let mut pause = Duration::from_millis(10);
    let mut last = String::new();
    loop {
        for &port in &launch.master.ports {
            match join_at(launch, host, port, deadline) {
                Ok(link) => return Ok(link),
                Err(Refusal::Final(reason)) => {
                    return Err(Error::Rendezvous(format!(
                        "rank 0 at {} refuses rank {rank}: {reason}",
                        launch.master
                    )));
                }
                Err(Refusal::NotYet(reason)) => last = reason,
            }
        }
        if Instant::now() > deadline {
            return Err(Error::Rendezvous(format!(
                "rank {rank} has not found rank 0 at {} within {} s ({last}); look for the error of rank 0, and check that \
                 this host reaches that address and port",
                launch.master,
                timeout.as_secs()
            )));
        }
        sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(500));
    }
}

fn join_at(launch: &RankLaunch, host: &str, port: u16, deadline: Instant) -> Result<Link, Refusal> {
    let mut address = None;
    let mut connect = |kind: u8| -> Result<(TcpStream, String), Refusal> {
        let mut stream = match address {
            Some(address) => TcpStream::connect_timeout(&address, ANSWER)?,
            None => connect_any(&launch.master.host, port)?,
        };
        address = Some(stream.peer_addr()?);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut bytes = MAGIC.to_vec();
        bytes.push(kind);
        bytes.extend((launch.position.rank as u64).to_le_bytes());
        bytes.extend((launch.position.world_size as u64).to_le_bytes());
        write_text(&mut bytes, &launch.attempt)?;
        write_text(&mut bytes, host)?;
        write_all(&mut stream, &bytes)?;
        if read_array(&mut stream)? != MAGIC {
            return Err(Refusal::NotYet(format!("another program listens on port {port}")));
        }
        let answer = read_array::<1>(&mut stream)?[0];
        let text = read_text(&mut stream)?;
        match answer {
            ACCEPTED => Ok((stream, text)),
            OTHER_ATTEMPT => Err(Refusal::NotYet(format!("another run listens on port {port}"))),
            _ => Err(Refusal::Final(text)),
        }
    };
    let (control, host) = connect(CONTROL)?;
    let (mut data, _) = connect(DATA)?;
    // Rank 0 answers again when all ranks have connected.
    let left = deadline.saturating_duration_since(Instant::now()).max(ANSWER);
    data.set_read_timeout(Some(left + ANSWER))?;
    let gone = |error: io::Error| {
        Refusal::Final(format!("it ended while it waited for the other ranks ({error}); look for its own error"))
    };
    read_array::<1>(&mut data).map_err(gone)?;
    data.set_read_timeout(None)?;
    Ok(Link { rank: 0, host, control, data })
}

/// Connects to the first address of a host that answers.
fn connect_any(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

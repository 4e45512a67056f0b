//! The bytes of connections between ranks.

use core::fmt;
use std::io::{self, Read, Write};

use crate::RankFailure;

/// A collective that a rank has called. Ranks that disagree about it have come apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    kind: u8,
    /// The number of the operation in the run, from 1.
    number: u64,
    /// The number of f32 values.
    values: u64,
}

const ALL_REDUCE: u8 = 1;
const ALL_GATHER: u8 = 2;
const BROADCAST: u8 = 3;
const REDUCE_SCATTER: u8 = 4;
const ALL_GATHER_SHARDS: u8 = 5;
const GATHER: u8 = 6;

impl Operation {
    pub(super) fn all_reduce(number: u64, values: usize) -> Self {
        Self { kind: ALL_REDUCE, number, values: values as u64 }
    }

    pub(super) fn all_gather(number: u64) -> Self {
        Self { kind: ALL_GATHER, number, values: 0 }
    }

    pub(super) fn reduce_scatter(number: u64, values: usize) -> Self {
        Self { kind: REDUCE_SCATTER, number, values: values as u64 }
    }

    pub(super) fn all_gather_shards(number: u64, values: usize) -> Self {
        Self { kind: ALL_GATHER_SHARDS, number, values: values as u64 }
    }

    pub(super) fn gather(number: u64) -> Self {
        Self { kind: GATHER, number, values: 0 }
    }

    pub(super) fn broadcast(number: u64) -> Self {
        Self { kind: BROADCAST, number, values: 0 }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, number, values } = *self;
        match kind {
            ALL_REDUCE => write!(f, "all-reduce {number} of {values} values"),
            ALL_GATHER => write!(f, "all-gather {number}"),
            BROADCAST => write!(f, "broadcast {number}"),
            REDUCE_SCATTER => write!(f, "reduce-scatter {number} of {values} values"),
            ALL_GATHER_SHARDS => write!(f, "all-gather {number} of {values} values"),
            GATHER => write!(f, "gather {number}"),
            _ => write!(f, "the unknown operation {kind}"),
        }
    }
}

pub(super) fn write_header(stream: &mut impl Write, operation: Operation) -> io::Result<()> {
    let mut bytes = [0; 17];
    bytes[0] = operation.kind;
    bytes[1..9].copy_from_slice(&operation.number.to_le_bytes());
    bytes[9..].copy_from_slice(&operation.values.to_le_bytes());
    write_all(stream, &bytes)
}

pub(super) fn read_header(stream: &mut impl Read) -> io::Result<Operation> {
    let kind = read_array::<1>(stream)?[0];
    Ok(Operation { kind, number: read_u64(stream)?, values: read_u64(stream)? })
}

pub(super) fn write_bytes(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    write_all(stream, &(bytes.len() as u64).to_le_bytes())?;
    write_all(stream, bytes)
}

/// Reads bytes with their length in front; a length alone allocates nothing.
pub(super) fn read_bytes(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let length = read_u64(stream)?;
    let mut bytes = Vec::new();
    stream.by_ref().take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

pub(super) fn write_text(stream: &mut impl Write, text: &str) -> io::Result<()> {
    write_bytes(stream, text.as_bytes())
}

/// Reads a text of at most 64 KiB.
pub(super) fn read_text(stream: &mut impl Read) -> io::Result<String> {
    let length = read_u64(stream)?;
    if length > 1 << 16 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length as usize];
    read_exact(stream, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

pub(super) fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    read_exact(stream, &mut bytes)?;
    Ok(bytes)
}

pub(super) fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    read_array(stream).map(u64::from_le_bytes)
}

pub(super) fn read_exact(stream: &mut impl Read, bytes: &mut [u8]) -> io::Result<()> {
    stream.read_exact(bytes)
}

pub(super) fn write_all(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)
}

/// A message beside the collectives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ControlMessage {
    /// The process is alive.
    Heartbeat,
    /// A rank failed.
    Failed(RankFailure),
    /// The failure was received.
    Received,
    /// All ranks have finished; the connection will be closed.
    Finished,
}

impl ControlMessage {
    pub(super) fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::new();
        match self {
            Self::Heartbeat => bytes.push(0),
            Self::Failed(RankFailure { rank, host, message }) => {
                bytes.push(1);
                bytes.extend((*rank as u64).to_le_bytes());
                write_text(&mut bytes, host)?;
                let end = message.floor_char_boundary(1 << 15);
                write_text(&mut bytes, &message[..end])?;
            }
            Self::Received => bytes.push(2),
            Self::Finished => bytes.push(3),
        }
        write_all(stream, &bytes)
    }

    pub(super) fn read(stream: &mut impl Read) -> io::Result<Self> {
        Ok(match read_array::<1>(stream)?[0] {
            0 => Self::Heartbeat,
            1 => {
                let rank = read_u64(stream)? as usize;
                Self::Failed(RankFailure { rank, host: read_text(stream)?, message: read_text(stream)? })
            }
            2 => Self::Received,
            3 => Self::Finished,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let failure = RankFailure { rank: 3, host: "gpu7".to_owned(), message: "ä".repeat(40_000) };
        let messages = [
            ControlMessage::Heartbeat,
            ControlMessage::Failed(failure.clone()),
            ControlMessage::Received,
            ControlMessage::Finished,
        ];
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.write(&mut bytes).unwrap());
        write_header(&mut bytes, Operation::all_reduce(7, 12)).unwrap();
        write_bytes(&mut bytes, b"abc").unwrap();
        let mut stream = &bytes[..];
        for message in messages {
            let expected = match message {
                ControlMessage::Failed(failure) => {
                    ControlMessage::Failed(RankFailure { message: "ä".repeat(16_384), ..failure })
                }
                other => other,
            };
            assert_eq!(ControlMessage::read(&mut stream).unwrap(), expected);
        }
        assert_eq!(read_header(&mut stream).unwrap().to_string(), "all-reduce 7 of 12 values");
        assert_eq!(read_bytes(&mut stream).unwrap(), b"abc");
        assert!(stream.is_empty());
    }

    #[test]
    fn damaged_bytes_are_errors() {
        let huge = u64::MAX.to_le_bytes();
        assert!(read_bytes(&mut &huge[..]).is_err());
        assert!(read_text(&mut &huge[..]).is_err());
        assert!(ControlMessage::read(&mut &[9][..]).is_err());
        assert!(ControlMessage::read(&mut &[1, 0][..]).is_err());
    }
}

//! Results on standard output.

use std::io::{self, ErrorKind, Write};

use crate::failure::Failure;

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    piece(&format!("{text}\n")).map(|_| ())
}

/// Prints a piece of text immediately; returns false if the reader has closed the pipe, as with `| head`.
pub(crate) fn piece(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

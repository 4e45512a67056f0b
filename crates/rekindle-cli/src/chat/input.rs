//! Lines from standard input, and Ctrl-C while waiting for one.

use std::io::{BufRead, IsTerminal, stderr, stdin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// The time between two looks at Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

/// Standard input, read by a thread.
pub(super) struct Input {
    lines: Receiver<String>,
    asks: SyncSender<()>,
    interrupted: Arc<AtomicBool>,
    is_terminal: bool,
}

/// The next line.
pub(super) enum Line {
    Text(String),
    /// Ctrl-C was pressed.
    Interrupted,
    End,
}

impl Input {
    pub(super) fn start(interrupted: Arc<AtomicBool>) -> Self {
        let (sender, lines) = sync_channel(0);
        // One line is read for each time that somebody asks, so that the rest of a pipe stays in it.
        let (asks, asked) = sync_channel::<()>(1);
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let mut line = String::new();
                loop {
                    match stdin().lock().read_line(&mut line) {
                        Ok(count) if count > 0 && line.ends_with("\\\n") => line.replace_range(line.len() - 2.., "\n"),
                        Ok(0) if line.is_empty() => return,
                        Ok(_) => break,
                        Err(error) => {
                            eprintln!("error: standard input cannot be read: {error}");
                            return;
                        }
                    }
                }
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let is_terminal = stdin().is_terminal() && stderr().is_terminal();
        Self { lines, asks, interrupted, is_terminal }
    }

    /// Returns true if a person enters the lines.
    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Waits for the next line.
    pub(super) fn next(&self) -> Line {
        // Full if a line is being read already, as after Ctrl-C.
        let _ = self.asks.try_send(());
        if self.is_terminal {
            eprint!("> ");
        }
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => return Line::Text(line),
                Err(RecvTimeoutError::Disconnected) => return Line::End,
                Err(RecvTimeoutError::Timeout) => {
                    if self.interrupted.swap(false, Ordering::Relaxed) {
                        return Line::Interrupted;
                    }
                }
            }
        }
    }
}

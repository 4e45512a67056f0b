//! One process of a command, with threads for its three streams.

use core::time::Duration;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// The number of bytes of standard error that are kept.
const STDERR_BYTES: usize = 4096;

/// The time that a process has to end after it closed its output, or after its input is closed.
const END: Duration = Duration::from_secs(2);

/// The pause between two looks at a process.
const PAUSE: Duration = Duration::from_millis(10);

/// A running process. Dropping it ends the process.
pub(super) struct Worker {
    child: Child,
    /// `None` after the input was closed.
    requests: Option<Sender<String>>,
    replies: Receiver<String>,
    stderr: Arc<Mutex<VecDeque<u8>>>,
}

/// The reason for which there is no reply.
#[derive(Debug)]
pub(super) enum WorkerFailure {
    /// The process closed its output; the text describes its exit status.
    Died(String),
    /// The time is over.
    TimedOut,
}

impl Worker {
    /// Starts a process.
    pub(super) fn start(command: &[String]) -> Result<Self, String> {
        let (program, arguments) = command.split_first().ok_or("command is empty")?;
        let mut process = Command::new(program);
        process.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // In a group of its own, an interrupt from the keyboard reaches the run alone, which then ends its processes.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut process, 0);
        let mut child = process.spawn().map_err(|error| format!("cannot start {program:?}: {error}"))?;
        let missing = "a stream of a new process is missing";
        let stdin = child.stdin.take().expect(missing);
        let stdout = child.stdout.take().expect(missing);
        let stderr = child.stderr.take().expect(missing);
        let (requests, to_write) = channel();
        let (read, replies) = channel();
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        // The threads end with the streams. A process that does not read blocks its own thread only.
        thread::spawn(move || write_lines(stdin, &to_write));
        thread::spawn(move || read_lines(stdout, &read));
        let tail = Arc::clone(&kept);
        thread::spawn(move || keep_end(stderr, &tail));
        Ok(Self { child, requests: Some(requests), replies, stderr: kept })
    }

    /// Queues a line for the process.
    pub(super) fn send(&self, line: &str) {
        if let Some(requests) = &self.requests {
            // Fails only after the process closed its input; the reply then shows it.
            let _ = requests.send(format!("{line}\n"));
        }
    }

    /// Waits for a line from the process. After a failure the process has ended.
    pub(super) fn receive(&mut self, timeout: Duration) -> Result<String, WorkerFailure> {
        match self.replies.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                self.end();
                Err(WorkerFailure::TimedOut)
            }
            Err(RecvTimeoutError::Disconnected) => Err(WorkerFailure::Died(self.describe_end())),
        }
    }

    /// Returns the end of standard error.
    pub(super) fn stderr(&self) -> String {
        let bytes = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = bytes.as_slices();
        String::from_utf8_lossy(&[first, second].concat()).trim().to_owned()
    }

    /// Waits until a process that closed its output ends, and describes its exit status.
    fn describe_end(&mut self) -> String {
        let Some(status) = self.ends_within(END) else {
            self.end();
            return "it closed its standard output".to_owned();
        };
        // Its last words may still be in the pipe.
        thread::sleep(PAUSE * 5);
        status.to_string()
    }

    /// Returns the exit status of a process that ends within `time`.
    fn ends_within(&mut self, time: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if start.elapsed() < time => thread::sleep(PAUSE),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    fn end(&mut self) {
        // Fails only for a process that has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Worker {
    /// Closes the input, on which a program ends by itself, and kills the process if it does not.
    fn drop(&mut self) {
        self.requests = None;
        if self.ends_within(END).is_none() {
            self.end();
        }
    }
}

fn write_lines(mut stdin: ChildStdin, lines: &Receiver<String>) {
    for line in lines {
        if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: ChildStdout, lines: &Sender<String>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        match stdout.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            // Bytes that are not UTF-8 become a reply that cannot be read, whose error shows them.
            Ok(_) if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() => return,
            Ok(_) => {}
        }
    }
}

fn keep_end(mut stderr: ChildStderr, kept: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&buffer[..count]);
        let excess = kept.len().saturating_sub(STDERR_BYTES);
        kept.drain(..excess);
    }
}

//! Download of one file into the cache: locked, resumed, verified, and only then moved into place.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Seek, SeekFrom, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::{Error, HubErrorKind};

use super::api::{Api, RemoteFile};
use super::checksum::{Hasher, Mismatch};
use super::failure::{DELAYS, Failure};
use super::layout::CachedRepo;
use super::space;

/// Downloads files of one commit into the cache.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub(crate) api: Api,
    pub(crate) repo: CachedRepo,
    pub(crate) commit: String,
    /// Set when one of several downloads has failed, so that the others stop.
    pub(crate) is_cancelled: AtomicBool,
}

/// A progress message.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Progress {
    /// The total size of all files to download in bytes.
    Total(u64),
    /// The number of bytes that arrived; negative if bytes were discarded.
    Arrived(i64),
}

/// The number of bytes read at once.
const CHUNK: usize = 64 << 10;

/// The interval for checking a file that another process is downloading.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The maximum time to wait for another process that makes no progress.
const LOCK_TIMEOUT: Duration = Duration::from_secs(300);

impl Fetcher {
    /// Ensures that the blob of `file` is in the cache and matches the hub's checksum.
    ///
    /// Data that arrived before an error is kept, and the next call resumes from there.
    pub(crate) fn fetch(&self, file: &RemoteFile, progress: &Sender<Progress>) -> Result<(), Error> {
        let _lock = self.lock(file)?;
        let blob = self.repo.blob(&file.etag);
        if blob.exists() {
            report(progress, file.size as i64);
            return Ok(());
        }
        let mut partial =
            PartialBlob::open(&self.repo.incomplete(&file.etag), file).map_err(|error| self.io(file, error))?;
        report(progress, partial.length as i64);
        let mut is_second = false;
        loop {
            self.fill(&mut partial, file, progress)?;
            let Some(mismatch) = partial.mismatch(file) else { break };
            report(progress, -(partial.length as i64));
            // A file assembled from several responses may contain a bad piece, so it is downloaded once more.
            if !partial.is_pieced || is_second {
                fs::remove_file(self.repo.incomplete(&file.etag)).map_err(|error| self.io(file, error))?;
                return Err(self.damaged(file, &mismatch));
            }
            partial.restart(file).map_err(|error| self.io(file, error))?;
            is_second = true;
        }
        match partial.file.sync_all().and_then(|()| fs::rename(self.repo.incomplete(&file.etag), &blob)) {
            // On some network file systems every process gets the lock; another one has then moved the blob.
            Err(error) if error.kind() == ErrorKind::NotFound && blob.exists() => Ok(()),
            renamed => renamed.map_err(|error| self.io(file, error)),
        }
    }

    /// Completes `partial`, over as many connections as needed.
    fn fill(&self, partial: &mut PartialBlob, file: &RemoteFile, progress: &Sender<Progress>) -> Result<(), Error> {
        let mut longest = partial.length;
        let mut delays = DELAYS.iter();
        while partial.length < file.size {
            let Err(failure) = self.receive(partial, file, progress) else { continue };
            // Every attempt that made progress resets the retries.
            if partial.length > longest {
                longest = partial.length;
                delays = DELAYS.iter();
            }
            match delays.next() {
                Some(&delay) if failure.transient => self.pause(delay)?,
                _ => return Err(with_kept_bytes(failure.error, partial.length, file)),
            }
        }
        Ok(())
    }

    /// Appends the data of one connection to `partial`.
    fn receive(
        &self,
        partial: &mut PartialBlob,
        file: &RemoteFile,
        progress: &Sender<Progress>,
    ) -> Result<(), Failure> {
        let (start, answer) = self.api.contents(&self.commit, file, partial.length)?;
        if start < partial.length {
            report(progress, -(partial.length as i64));
            partial.restart(file).map_err(|error| settled(self.io(file, error)))?;
        }
        partial.is_pieced |= start > 0;
        let request = self.api.request();
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = body.read(&mut buffer).map_err(|error| request.interrupted(error))?;
            if count == 0 {
                break;
            }
            if self.is_cancelled.load(Ordering::Relaxed) {
                return Err(settled(self.cancelled()));
            }
            let chunk = &buffer[..count];
            if partial.length + chunk.len() as u64 > file.size {
                let reason = format!("{} is longer than the {} bytes announced by the hub", file.name, file.size);
                return Err(settled(request.error(HubErrorKind::Checksum, reason)));
            }
            partial.append(chunk).map_err(|error| settled(self.io(file, error)))?;
            report(progress, chunk.len() as i64);
        }
        if partial.length < file.size {
            return Err(request.closed_early());
        }
        Ok(())
    }

    /// Waits while another process downloads the same file, as long as it makes progress.
    fn lock(&self, file: &RemoteFile) -> Result<File, Error> {
        let lock = self.repo.blob_lock(&file.etag)?;
        let incomplete = self.repo.incomplete(&file.etag);
        let length = || fs::metadata(&incomplete).map_or(0, |about| about.len());
        let (mut seen, mut since) = (length(), Instant::now());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {}
                // Some network file systems do not support locks.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(lock),
                Err(TryLockError::Error(error)) => return Err(Error::io(&self.repo.locks())(error)),
            }
            let now = length();
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > LOCK_TIMEOUT {
                let reason = format!(
                    "another process has been downloading {} for {} s without progress; stop it and try again",
                    file.name,
                    LOCK_TIMEOUT.as_secs()
                );
                return Err(self.api.request().error(HubErrorKind::Busy, reason));
            }
            self.pause(LOCK_POLL_INTERVAL)?;
        }
    }

    /// Sleeps, unless another download fails meanwhile.
    fn pause(&self, delay: Duration) -> Result<(), Error> {
        let until = Instant::now() + delay;
        while !self.is_cancelled.load(Ordering::Relaxed) {
            let Some(rest) = until.checked_duration_since(Instant::now()) else { return Ok(()) };
            sleep(rest.min(LOCK_POLL_INTERVAL));
        }
        Err(self.cancelled())
    }

    /// Returns the error of a download that stopped because another one failed, whose error is the one reported.
    fn cancelled(&self) -> Error {
        self.api.request().error(HubErrorKind::Network, "the download was cancelled")
    }

    fn io(&self, file: &RemoteFile, source: io::Error) -> Error {
        let path = self.repo.incomplete(&file.etag);
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let reason = format!("{path:?} could not be written: {source}; {}", space::WAY_OUT);
                self.api.request().error(HubErrorKind::Space, reason)
            }
            _ => Error::Io { path, source },
        }
    }

    fn damaged(&self, file: &RemoteFile, mismatch: &Mismatch) -> Error {
        let reason = format!(
            "{} is damaged: its checksum is {} and should be {}; it was deleted, try again",
            file.name, mismatch.found, mismatch.expected
        );
        self.api.request().error(HubErrorKind::Checksum, reason)
    }
}

fn report(progress: &Sender<Progress>, bytes: i64) {
    // Nobody receives progress for the index of a sharded model, or after another file has failed.
    let _ = progress.send(Progress::Arrived(bytes));
}

fn settled(error: Error) -> Failure {
    Failure { error, transient: false }
}

/// Adds that the downloaded data is kept.
fn with_kept_bytes(error: Error, length: u64, file: &RemoteFile) -> Error {
    match error {
        Error::Hub { kind, name, reason } if length > 0 && kind != HubErrorKind::Checksum => {
            let (have, all) = (space::bytes(length), space::bytes(file.size));
            let reason = format!("{reason}; {have} of {all} of {} are kept, and the next run resumes there", file.name);
            Error::Hub { kind, name, reason }
        }
        other => other,
    }
}

/// A partially downloaded blob with the hash of its data.
struct PartialBlob {
    file: File,
    length: u64,
    hasher: Hasher,
    /// True if the data comes from more than one response.
    is_pieced: bool,
}

impl PartialBlob {
    /// Opens the data that an earlier attempt, or an older version of Python's library, left at `path`.
    fn open(path: &Path, remote: &RemoteFile) -> io::Result<PartialBlob> {
        let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
        let length = file.metadata()?.len();
        let mut hasher = Hasher::new(remote.checksum.as_ref(), remote.size);
        hasher.update_from(&mut file)?;
        let mut partial = PartialBlob { file, length, hasher, is_pieced: length > 0 };
        if length > remote.size {
            partial.restart(remote)?;
        }
        Ok(partial)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self, remote: &RemoteFile) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.length = 0;
        self.hasher = Hasher::new(remote.checksum.as_ref(), remote.size);
        self.is_pieced = false;
        Ok(())
    }

    /// Returns the hashes if the complete file is wrong; consumes the hash.
    fn mismatch(&mut self, remote: &RemoteFile) -> Option<Mismatch> {
        let hasher = std::mem::replace(&mut self.hasher, Hasher::None);
        hasher.mismatch(remote.checksum.as_ref())
    }
}

//! One file from the hub into the cache: locked, resumed, checked, and only then in its place.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write as _};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::{Error, HubErrorKind};

use super::api::{Api, RemoteFile};
use super::checksum::{Hasher, Mismatch};
use super::failure::{DELAYS, Failure};
use super::layout::CachedRepo;
use super::space;

/// Brings files of one commit into the cache.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub(crate) api: Api,
    pub(crate) repo: CachedRepo,
    pub(crate) commit: String,
}

/// What the user may be shown.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Progress {
    /// The bytes of all files that are to be downloaded.
    Total(u64),
    /// Bytes that arrived; less than none when some were thrown away.
    Arrived(i64),
}

/// How often to look whether another program is done with a file, and how long to let it stand
/// still.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(300);

impl Fetcher {
    /// Afterwards the blob of `file` is in the cache, and is what the hub announced.
    ///
    /// What arrived before an error is kept, and the next call goes on from there.
    pub(crate) async fn fetch(&self, file: &RemoteFile, progress: &Sender<Progress>) -> Result<(), Error> {
        let _lock = self.lock(file).await?;
        let blob = self.repo.blob(&file.etag);
        if blob.exists() {
            report(progress, file.size as i64);
            return Ok(());
        }
        let mut partial =
            Partial::open(&self.repo.incomplete(&file.etag), file).map_err(|error| self.io(file, error))?;
        report(progress, partial.length as i64);
        let mut is_second = false;
        loop {
            self.fill(&mut partial, file, progress).await?;
            let Some(mismatch) = partial.mismatch(file) else { break };
            report(progress, -(partial.length as i64));
            // What was put together from pieces may have had a bad one.
            if !partial.is_pieced || is_second {
                fs::remove_file(self.repo.incomplete(&file.etag)).map_err(|error| self.io(file, error))?;
                return Err(self.wrong(file, &mismatch));
            }
            partial.restart(file).map_err(|error| self.io(file, error))?;
            is_second = true;
        }
        match partial.file.sync_all().and_then(|()| fs::rename(self.repo.incomplete(&file.etag), &blob)) {
            // On some network file systems everybody gets the lock; then another has put it there.
            Err(error) if error.kind() == ErrorKind::NotFound && blob.exists() => Ok(()),
            renamed => renamed.map_err(|error| self.io(file, error)),
        }
    }

    /// Adds to `partial` until it has all bytes, over as many connections as that takes.
    async fn fill(&self, partial: &mut Partial, file: &RemoteFile, progress: &Sender<Progress>) -> Result<(), Error> {
        let mut most = partial.length;
        let mut delays = DELAYS.iter();
        while partial.length < file.size {
            let Err(failure) = self.receive(partial, file, progress).await else { continue };
            // As long as there is progress, it is worth to go on.
            if partial.length > most {
                most = partial.length;
                delays = DELAYS.iter();
            }
            match delays.next() {
                Some(&delay) if failure.transient => sleep(delay).await,
                _ => return Err(kept(failure.error, partial.length, file)),
            }
        }
        Ok(())
    }

    /// Adds to `partial` what one connection gives.
    async fn receive(
        &self,
        partial: &mut Partial,
        file: &RemoteFile,
        progress: &Sender<Progress>,
    ) -> Result<(), Failure> {
        let (start, mut answer) = self.api.contents(&self.commit, file, partial.length).await?;
        if start < partial.length {
            report(progress, -(partial.length as i64));
            partial.restart(file).map_err(|error| settled(self.io(file, error)))?;
        }
        partial.is_pieced |= start > 0;
        let request = self.api.request();
        while let Some(chunk) = answer.chunk().await.map_err(|error| request.unreachable(&error))? {
            if partial.length + chunk.len() as u64 > file.size {
                let reason = format!("{} is longer than the {} bytes that the hub announced", file.name, file.size);
                return Err(settled(request.error(HubErrorKind::Checksum, reason)));
            }
            partial.append(&chunk).map_err(|error| settled(self.io(file, error)))?;
            report(progress, chunk.len() as i64);
        }
        if partial.length < file.size {
            let reason = format!("{} ended the connection early", request.endpoint);
            return Err(Failure { error: request.error(HubErrorKind::Network, reason), transient: true });
        }
        Ok(())
    }

    /// Waits while another program fetches the same file, as long as it gets anywhere.
    async fn lock(&self, file: &RemoteFile) -> Result<File, Error> {
        let lock = self.repo.blob_lock(&file.etag)?;
        let incomplete = self.repo.incomplete(&file.etag);
        let length = || fs::metadata(&incomplete).map_or(0, |about| about.len());
        let (mut seen, mut since) = (length(), Instant::now());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {}
                // Some network file systems have no locks.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(lock),
                Err(TryLockError::Error(error)) => return Err(Error::io(&self.repo.locks())(error)),
            }
            let now = length();
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > PATIENCE {
                let reason = format!(
                    "another program has been downloading {} for {} s without progress; end it and try again",
                    file.name,
                    PATIENCE.as_secs()
                );
                return Err(self.api.request().error(HubErrorKind::Busy, reason));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    fn io(&self, file: &RemoteFile, source: io::Error) -> Error {
        let path = self.repo.incomplete(&file.etag);
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let reason = format!("{path:?} could not be written on: {source}; {}", space::WAY_OUT);
                self.api.request().error(HubErrorKind::Space, reason)
            }
            _ => Error::Io { path, source },
        }
    }

    fn wrong(&self, file: &RemoteFile, mismatch: &Mismatch) -> Error {
        let reason = format!(
            "{} arrived damaged: its checksum is {} and should be {}; it was thrown away, try again",
            file.name, mismatch.found, mismatch.expected
        );
        self.api.request().error(HubErrorKind::Checksum, reason)
    }
}

fn report(progress: &Sender<Progress>, bytes: i64) {
    // Nobody listens to the index of a sharded model, or when another file has failed.
    let _ = progress.send(Progress::Arrived(bytes));
}

fn settled(error: Error) -> Failure {
    Failure { error, transient: false }
}

/// Adds that the work is not lost.
fn kept(error: Error, length: u64, file: &RemoteFile) -> Error {
    match error {
        Error::Hub { kind, name, reason } if length > 0 && kind != HubErrorKind::Checksum => {
            let (have, all) = (space::bytes(length), space::bytes(file.size));
            let reason = format!("{reason}; {have} of {all} of {} are kept, and the next run goes on there", file.name);
            Error::Hub { kind, name, reason }
        }
        other => other,
    }
}

/// A blob on its way, with the hash of what is there.
struct Partial {
    file: File,
    length: u64,
    hasher: Hasher,
    /// Whether the bytes come from more than one answer.
    is_pieced: bool,
}

impl Partial {
    /// Goes on with what an earlier attempt, or an older version of Python's library, left at `path`.
    fn open(path: &Path, remote: &RemoteFile) -> io::Result<Partial> {
        let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
        let length = file.metadata()?.len();
        let mut hasher = Hasher::new(remote.checksum.as_ref(), remote.size);
        hasher.update_from(&mut file)?;
        let mut partial = Partial { file, length, hasher, is_pieced: length > 0 };
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

    /// What the whole hashes to, if that is wrong; the hash is used up.
    fn mismatch(&mut self, remote: &RemoteFile) -> Option<Mismatch> {
        let hasher = std::mem::replace(&mut self.hasher, Hasher::None);
        hasher.mismatch(remote.checksum.as_ref())
    }
}

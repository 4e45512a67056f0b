use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::Error;

/// An exclusive lock on a directory, released when this value is dropped or the process ends for any reason.
///
/// Locking always succeeds on file systems without locks, and on systems other than Unix.
#[derive(Debug)]
pub struct DirectoryLock(#[allow(dead_code, reason = "the lock is held while the file is open")] Option<File>);

/// The number of attempts before a lock counts as taken, and the pause after each.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);

impl DirectoryLock {
    /// Locks the existing directory at `path`.
    ///
    /// # Errors
    /// [`Error::Unwritable`] if another process holds the lock, [`Error::Io`] if the directory cannot be opened.
    pub fn acquire(path: &Path) -> Result<Self, Error> {
        if !cfg!(unix) {
            return Ok(Self(None));
        }
        let directory = File::open(path).map_err(Error::io(path))?;
        for _ in 0..TRIES {
            // The dashboard takes the lock for an instant to learn whether it is free.
            if !matches!(directory.try_lock(), Err(TryLockError::WouldBlock)) {
                break;
            }
            sleep(PAUSE);
        }
        match directory.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::unwritable(
                path,
                "another process is writing there; wait for it or choose another directory",
            )),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self(Some(directory))),
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn only_one_holder_at_a_time() {
        let scratch = tempfile::tempdir().unwrap();
        let first = DirectoryLock::acquire(scratch.path()).unwrap();
        let error = DirectoryLock::acquire(scratch.path()).unwrap_err().to_string();
        assert!(error.contains("another process is writing there"), "{error}");
        drop(first);
        DirectoryLock::acquire(scratch.path()).unwrap();
        assert!(DirectoryLock::acquire(&scratch.path().join("absent")).is_err());
    }
}

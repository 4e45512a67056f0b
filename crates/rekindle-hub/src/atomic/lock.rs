use std::fs::{File, TryLockError};
use std::path::Path;

use crate::Error;

/// A directory that no other process may take at the same time. It is free again when this is dropped, and when the
/// process ends, however that comes about.
///
/// Where the file system knows no locks, and elsewhere than on Unix, everyone may take it.
#[derive(Debug)]
pub struct DirectoryLock(#[allow(dead_code, reason = "open for as long as it is locked")] Option<File>);

impl DirectoryLock {
    /// Takes the directory at `path`, which is there.
    ///
    /// # Errors
    /// [`Error::Unwritable`] when someone else has it, [`Error::Io`] when it cannot be opened.
    pub fn take(path: &Path) -> Result<Self, Error> {
        if !cfg!(unix) {
            return Ok(Self(None));
        }
        let directory = File::open(path).map_err(Error::io(path))?;
        match directory.try_lock() {
            Err(TryLockError::WouldBlock) => {
                Err(Error::unwritable(path, "another process is writing there; wait for it, or give another directory"))
            }
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self(Some(directory))),
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let scratch = tempfile::tempdir().unwrap();
        let first = DirectoryLock::take(scratch.path()).unwrap();
        let error = DirectoryLock::take(scratch.path()).unwrap_err().to_string();
        assert!(error.contains("another process is writing there"), "{error}");
        drop(first);
        DirectoryLock::take(scratch.path()).unwrap();
        assert!(DirectoryLock::take(&scratch.path().join("absent")).is_err());
    }
}

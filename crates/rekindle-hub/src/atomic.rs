//! Atomic output: a file or directory appears under its final name complete or not at all.
//!
//! Everything is written under a hidden temporary name in the same directory, so that the rename stays within one file
//! system, flushed to the device, and then renamed.

mod directory;
mod file;
mod leftovers;
mod lock;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process;

pub use directory::AtomicDir;
pub use file::AtomicFile;
pub use leftovers::{clear_leftovers, remove_atomic};
pub use lock::DirectoryLock;

use crate::Error;

/// Writes `bytes` to `path`. On success the file contains all of them; on failure it has its previous content.
///
/// # Errors
/// [`Error::Io`], for instance on a full disk. No temporary file is left behind.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io(path))?;
    file.commit()
}

/// Creates a file or directory next to `path` with `create`, under an unused name.
fn create_sibling<T>(
    path: &Path,
    suffix: &str,
    create: impl Fn(&Path) -> io::Result<T>,
) -> Result<(PathBuf, T), Error> {
    let name = path.file_name().ok_or_else(|| Error::unwritable(path, "the path has no file name"))?;
    // A killed process may have left a file with the same process id, so try the next number.
    for attempt in 0_u32.. {
        let mut sibling = OsString::from(".");
        sibling.push(name);
        sibling.push(format!(".{}-{attempt}.{suffix}", process::id()));
        let sibling = path.with_file_name(sibling);
        match create(&sibling) {
            Ok(created) => return Ok((sibling, created)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(path)(error)),
        }
    }
    Err(Error::unwritable(path, "all temporary names next to it are in use"))
}

/// Returns the directory that contains `path`, or `.` for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Flushes the names in a directory. Does nothing except on Unix, where a directory can be opened.
fn sync_directory(path: &Path) -> Result<(), Error> {
    if cfg!(unix) {
        let synced = File::open(path).and_then(|directory| directory.sync_all());
        synced.map_err(Error::io(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod test_support {
    use std::fs;
    use std::path::Path;

    /// Returns the sorted names of the entries of a directory.
    pub(crate) fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("loss.svg");
        write_atomic(&path, b"first, longer").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_left_by_a_killed_process_are_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let left = format!(".loss.svg.{}-0.tmp", process::id());
        fs::write(directory.path().join(&left), b"half").unwrap();
        let path = directory.path().join("loss.svg");
        write_atomic(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read(directory.path().join(left)).unwrap(), b"half");
    }

    #[test]
    fn errors_name_the_target() {
        let directory = tempfile::tempdir().unwrap();
        let error = write_atomic(&directory.path().join("no/such/file"), b"x").unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("no/such/file")), "{error}");
        let error = write_atomic(Path::new(".."), b"x").unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    }
}

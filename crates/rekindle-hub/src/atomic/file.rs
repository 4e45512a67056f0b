use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{create_sibling, parent, sync_directory};
use crate::Error;

/// A file that appears under its final name on [`commit`](AtomicFile::commit). If it is dropped before that, nothing is
/// left.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
}

impl AtomicFile {
    /// Starts a file that will be named `path`, or replace the file there.
    ///
    /// # Errors
    /// [`Error::Unwritable`] if a directory exists there; [`Error::Io`] if its parent is not writable.
    pub fn create(path: &Path) -> Result<AtomicFile, Error> {
        if path.is_dir() {
            return Err(Error::unwritable(path, "it is a directory"));
        }
        let (temporary, file) =
            create_sibling(path, "tmp", |temporary| OpenOptions::new().write(true).create_new(true).open(temporary))?;
        Ok(AtomicFile { path: path.to_path_buf(), temporary, file, committed: false })
    }

    /// Flushes the file to the device and gives it its final name.
    ///
    /// # Errors
    /// [`Error::Io`], for instance on a full disk; `path` then has its previous content.
    pub fn commit(mut self) -> Result<(), Error> {
        // A full disk may only be reported here, when the system writes back its buffers.
        self.file.sync_all().map_err(Error::io(&self.path))?;
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        self.committed = true;
        sync_directory(parent(&self.path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // A failure here cannot be handled, and the error that led here is more important.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_file_is_kept_without_commit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        fs::write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of the ne").unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_is_refused_before_anything_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let error = AtomicFile::create(directory.path()).err().unwrap();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    }
}

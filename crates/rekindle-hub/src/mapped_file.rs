use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::Error;

/// A memory-mapped regular file. Its bytes are read from disk when they are accessed.
///
/// The file must not be modified in place while it is open: truncating it makes a later read fail with a signal. This
/// crate's own writers replace files by renaming, which does not affect open files.
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything but a regular file, [`Error::Io`] if it cannot be opened.
    pub fn open(path: &Path) -> Result<MappedFile, Error> {
        // Checked before opening, because opening a named pipe would wait for a writer.
        let about = fs::metadata(path).map_err(Error::io(path))?;
        if !about.is_file() {
            return Err(Error::malformed(path, "it is not a regular file"));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let map = map(&file).map_err(Error::io(path))?;
        Ok(MappedFile { path: path.to_path_buf(), map })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("MappedFile").field("path", &self.path).finish_non_exhaustive()
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only, and is only accessed as plain bytes, for which every value is valid.
    // The file must not change while it is mapped. No process can enforce this; `MappedFile` documents it as a
    // requirement for callers, and `AtomicFile` complies with it.
    unsafe { Mmap::map(file) }
}

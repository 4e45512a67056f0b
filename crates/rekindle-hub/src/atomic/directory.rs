use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{create_sibling, parent, sync_directory};
use crate::Error;

/// A directory that appears under its final name, with all its files, on [`commit`](AtomicDir::commit). If it is
/// dropped before that, nothing is left.
///
/// A killed process leaves a hidden `.NAME.PID-N.tmp` next to the final name. It may be deleted by hand or with
/// [`clear_leftovers`](crate::clear_leftovers).
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    temporary: PathBuf,
    replace: bool,
    committed: bool,
}

impl AtomicDir {
    /// Starts a new directory that will be named `path`; missing parents are created.
    ///
    /// # Errors
    /// [`Error::Unwritable`] if something other than an empty directory exists there; [`Error::Io`] if the parent is
    /// not writable.
    pub fn create(path: &Path) -> Result<AtomicDir, Error> {
        AtomicDir::new(path, false)
    }

    /// Starts a directory that will replace the one at `path`, if there is one. The old directory is untouched until
    /// [`commit`](AtomicDir::commit), which deletes it **with everything in it**, so use this only for directories that
    /// this program owns. A symbolic link is replaced, not followed.
    ///
    /// # Errors
    /// [`Error::Unwritable`] if a file exists there; [`Error::Io`] if the parent is not writable.
    pub fn replace(path: &Path) -> Result<AtomicDir, Error> {
        AtomicDir::new(path, true)
    }

    fn new(path: &Path, replace: bool) -> Result<AtomicDir, Error> {
        match fs::read_dir(path) {
            Ok(mut entries) => {
                if !replace && entries.next().is_some() {
                    return Err(Error::unwritable(path, "the directory exists and is not empty; choose a new one"));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                return Err(Error::unwritable(path, "a file with this name exists"));
            }
            Err(error) => return Err(Error::io(path)(error)),
        }
        fs::create_dir_all(parent(path)).map_err(Error::io(path))?;
        let (temporary, ()) = create_sibling(path, "tmp", |path| fs::create_dir(path))?;
        Ok(AtomicDir { target: path.to_path_buf(), temporary, replace, committed: false })
    }

    /// Returns the temporary directory to write into.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes all files and renames the directory to its final name.
    ///
    /// An old directory is first moved aside, so for an instant no directory has the name. If the new one then cannot
    /// be renamed, the old one is moved back.
    ///
    /// # Errors
    /// [`Error::Io`]. In every case the old directory is deleted only after the new one has its name; if it cannot be
    /// moved back or deleted, it is in the hidden `.NAME.PID-N.old` next to it.
    pub fn commit(mut self) -> Result<(), Error> {
        sync_tree(&self.temporary)?;
        let aside = if self.replace { move_aside(&self.target)? } else { None };
        if let Err(source) = fs::rename(&self.temporary, &self.target) {
            if let Some(aside) = &aside {
                fs::rename(aside.join(OLD), &self.target).map_err(Error::io(aside))?;
                fs::remove_dir(aside).map_err(Error::io(aside))?;
            }
            return Err(Error::io(&self.target)(source));
        }
        self.committed = true;
        sync_directory(parent(&self.target))?;
        if let Some(aside) = aside {
            fs::remove_dir_all(&aside).map_err(Error::io(&aside))?;
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            // A failure here cannot be handled, and the error that led here is more important.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// The name of the old directory inside the hidden directory it is moved into.
pub(super) const OLD: &str = "old";

/// Moves the entry at `path` into a new hidden directory next to it and returns that directory.
fn move_aside(path: &Path) -> Result<Option<PathBuf>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    // Renaming into a new directory cannot collide with a name that another process created meanwhile.
    let (aside, ()) = create_sibling(path, "old", |aside| fs::create_dir(aside))?;
    match fs::rename(path, aside.join(OLD)) {
        Ok(()) => Ok(Some(aside)),
        Err(source) => {
            fs::remove_dir(&aside).map_err(Error::io(&aside))?;
            Err(Error::io(path)(source))
        }
    }
}

/// Flushes every file and directory below `directory`, including those written by other code.
fn sync_tree(directory: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let entry = entry.map_err(Error::io(directory))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            let synced = File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(Error::io(&path))?;
        }
    }
    sync_directory(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic::test_support::names;

    #[test]
    fn the_directory_appears_complete_on_commit() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("run/adapter");
        let directory = AtomicDir::create(&path).unwrap();
        fs::create_dir(directory.path().join("nested")).unwrap();
        fs::write(directory.path().join("nested/a"), b"1").unwrap();
        assert!(!path.exists());
        directory.commit().unwrap();
        assert_eq!(fs::read(path.join("nested/a")).unwrap(), b"1");
        assert_eq!(names(&scratch.path().join("run")), ["adapter"]);
    }

    #[test]
    fn the_old_directory_is_replaced_entirely() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("adapter");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("stale"), b"old").unwrap();
        let directory = AtomicDir::replace(&path).unwrap();
        fs::write(directory.path().join("fresh"), b"new").unwrap();
        assert_eq!(names(&path), ["stale"]);
        directory.commit().unwrap();
        assert_eq!(names(&path), ["fresh"]);
        assert_eq!(names(scratch.path()), ["adapter"]);
    }

    #[test]
    fn a_dropped_directory_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("adapter");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("kept"), b"old").unwrap();
        let directory = AtomicDir::replace(&path).unwrap();
        fs::write(directory.path().join("half"), b"ne").unwrap();
        drop(directory);
        assert_eq!(names(scratch.path()), ["adapter"]);
        assert_eq!(names(&path), ["kept"]);
    }

    #[test]
    fn the_old_directory_is_restored_if_the_new_one_is_gone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("adapter");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("kept"), b"old").unwrap();
        let directory = AtomicDir::replace(&path).unwrap();
        fs::remove_dir(directory.path()).unwrap();
        let error = directory.commit().unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(names(scratch.path()), ["adapter"]);
        assert_eq!(names(&path), ["kept"]);
    }

    #[test]
    fn existing_files_and_directories_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let error = AtomicDir::create(scratch.path().join("..").as_path()).unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");

        let file = scratch.path().join("thesis.tex");
        fs::write(&file, b"years of work").unwrap();
        for start in [AtomicDir::create, AtomicDir::replace] {
            let error = start(&file).unwrap_err();
            assert!(matches!(error, Error::Unwritable { .. }), "{error}");
        }
        let error = AtomicDir::create(scratch.path()).unwrap_err();
        assert!(error.to_string().contains("not empty"), "{error}");
        assert_eq!(names(scratch.path()), ["thesis.tex"]);
    }

    /// Another process may write there between `create` and `commit`.
    #[test]
    fn a_directory_from_create_never_replaces() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("model");
        let directory = AtomicDir::create(&path).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("other"), b"x").unwrap();
        let error = directory.commit().unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(names(&path), ["other"]);
        assert_eq!(names(scratch.path()), ["model"]);
    }
}

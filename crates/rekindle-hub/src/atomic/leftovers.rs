use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::directory::OLD;
use super::{create_sibling, parent, sync_directory};
use crate::Error;

/// Deletes the directory at `path` atomically: other processes see all of it or nothing. Does nothing if it does not
/// exist.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_atomic(path: &Path) -> Result<(), Error> {
    // A rename into a new directory cannot collide with an existing name.
    let (hidden, ()) = create_sibling(path, "tmp", |hidden| fs::create_dir(hidden))?;
    let moved = fs::rename(path, hidden.join(OLD));
    let removed = fs::remove_dir_all(&hidden).map_err(Error::io(&hidden));
    match moved {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(path)(error)),
        _ => removed?,
    }
    sync_directory(parent(path))
}

/// Removes what killed processes left in `directory` while writing names accepted by `ours`: partial output is deleted,
/// and a directory that was moved aside is restored if its replacement was never renamed.
///
/// No other process may be writing those names at the same time. Does nothing if `directory` does not exist.
///
/// # Errors
/// [`Error::Io`].
pub fn clear_leftovers(directory: &Path, ours: impl Fn(&str) -> bool) -> Result<(), Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(directory)(error)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io(directory))?.path();
        let hidden = path.file_name().and_then(|name| name.to_str()).and_then(parse);
        let Some((name, is_old)) = hidden.filter(|(name, _)| ours(name)) else { continue };
        let (target, old) = (directory.join(name), path.join(OLD));
        if is_old && old.exists() && !target.exists() {
            fs::rename(&old, &target).map_err(Error::io(&target))?;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Parses `.NAME.PID-N.tmp` or `.NAME.PID-N.old` into NAME and whether it was moved aside.
fn parse(hidden: &str) -> Option<(&str, bool)> {
    let (rest, suffix) = hidden.strip_prefix('.')?.rsplit_once('.')?;
    let (name, numbers) = rest.rsplit_once('.')?;
    let (process, attempt) = numbers.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_ours = !name.is_empty() && is_number(process) && is_number(attempt) && ["tmp", "old"].contains(&suffix);
    is_ours.then_some((name, suffix == "old"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AtomicDir;
    use crate::atomic::test_support::names;

    #[test]
    fn partial_output_is_deleted_and_moved_directories_are_restored() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        for path in [".checkpoint-4.7-0.tmp", ".adapter.7-0.old/old", ".model.7-0.old/old", "model", ".notes.7-0.tmp"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::write(root.join(".adapter.7-0.old/old/weights"), b"whole").unwrap();
        fs::write(root.join(".loss.svg.12-3.tmp"), b"half").unwrap();
        for other in [".adapter.tmp", ".adapter.x-0.tmp", "adapter.7-0.tmp"] {
            fs::write(root.join(other), b"someone else's").unwrap();
        }
        let ours = |name: &str| name.starts_with("checkpoint-") || ["adapter", "model", "loss.svg"].contains(&name);
        clear_leftovers(root, ours).unwrap();
        let kept = [".adapter.tmp", ".adapter.x-0.tmp", ".notes.7-0.tmp", "adapter", "adapter.7-0.tmp", "model"];
        assert_eq!(names(root), kept);
        assert_eq!(fs::read(root.join("adapter/weights")).unwrap(), b"whole");
        clear_leftovers(&root.join("absent"), |_| true).unwrap();
    }

    /// Simulates a process killed between the two renames of a replacement.
    #[test]
    fn an_interrupted_replacement_is_undone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("adapter");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("weights"), b"old").unwrap();
        let directory = AtomicDir::replace(&path).unwrap();
        let (aside, ()) = create_sibling(&path, "old", |aside| fs::create_dir(aside)).unwrap();
        fs::rename(&path, aside.join(OLD)).unwrap();
        core::mem::forget(directory);
        clear_leftovers(scratch.path(), |name| name == "adapter").unwrap();
        assert_eq!(names(scratch.path()), ["adapter"]);
        assert_eq!(fs::read(path.join("weights")).unwrap(), b"old");
    }

    #[test]
    fn removing_works_for_full_and_missing_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("checkpoint-2");
        fs::create_dir_all(path.join("nested")).unwrap();
        remove_atomic(&path).unwrap();
        remove_atomic(&path).unwrap();
        assert!(names(scratch.path()).is_empty());
    }
}

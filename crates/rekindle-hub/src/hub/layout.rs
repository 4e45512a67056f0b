//! The layout of the cache shared with Python's `huggingface_hub`.
//!
//! `models--org--name/blobs/<etag>` holds contents, `snapshots/<commit>/<file>` links to them, and `refs/<revision>` is
//! the commit of a branch or tag. A file being downloaded is `blobs/<etag>.incomplete`; its writer holds a lock on
//! `.locks/models--org--name/<etag>.lock`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use crate::adapter::{ADAPTER_CONFIG, ADAPTER_FILE};
use crate::index::{INDEX_FILE, SINGLE_FILE, ShardIndex};
use crate::{Error, write_atomic};

use super::select::CONFIG;

/// The cache directory of one repository.
#[derive(Clone, Debug)]
pub(crate) struct CachedRepo {
    cache_dir: PathBuf,
    folder: String,
}

impl CachedRepo {
    pub(crate) fn new(cache_dir: &Path, folder: &str) -> CachedRepo {
        CachedRepo { cache_dir: cache_dir.to_path_buf(), folder: folder.to_owned() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.cache_dir.join(&self.folder)
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.path().join("blobs")
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.blobs().join(etag)
    }

    /// Returns the path of the blob while it is incomplete.
    pub(crate) fn incomplete(&self, etag: &str) -> PathBuf {
        self.blobs().join(format!("{etag}{INCOMPLETE}"))
    }

    pub(crate) fn references(&self) -> PathBuf {
        self.path().join("refs")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.path().join("snapshots")
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.snapshots().join(commit)
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.cache_dir.join(".locks").join(&self.folder)
    }

    /// Opens the file that is locked while the blob is written.
    pub(crate) fn blob_lock(&self, etag: &str) -> Result<File, Error> {
        self.lock_file(&format!("{etag}.lock"))
    }

    /// Opens the file that a download locks shared and pruning locks exclusively.
    pub(crate) fn use_lock(&self) -> Result<File, Error> {
        self.lock_file("rekindle.lock")
    }

    fn lock_file(&self, name: &str) -> Result<File, Error> {
        let locks = self.locks();
        create_dir(&locks)?;
        let path = locks.join(name);
        OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(Error::io(&path))
    }

    /// Returns the commit `revision` pointed to when it was last looked up.
    pub(crate) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.references().join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(crate) fn write_reference(&self, revision: &str, commit: &str) -> Result<(), Error> {
        let path = self.references().join(revision);
        // An unchanged reference is not rewritten, so that a read-only cache remains usable.
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        create_dir(path.parent().unwrap_or(&path))?;
        write_atomic(&path, commit.as_bytes())
    }

    /// Links the snapshot's `file` to the blob.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), Error> {
        let link = self.snapshot(commit).join(file);
        if link.exists() {
            return Ok(());
        }
        create_dir(link.parent().unwrap_or(&link))?;
        // An existing link is dangling.
        match fs::remove_file(&link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&link)(error)),
            _ => {}
        }
        match point(&link, &self.blob(etag), file, etag) {
            // Another process created it first.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(Error::io(&link)),
        }
    }
}

/// The suffix of an incomplete blob.
pub(crate) const INCOMPLETE: &str = ".incomplete";

/// Creates a relative link, so that the cache can be moved as a whole.
#[cfg(unix)]
fn point(link: &Path, _blob: &Path, file: &str, etag: &str) -> io::Result<()> {
    let up = "../".repeat(2 + file.matches('/').count());
    std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(etag), link)
}

/// Moves the blob, as Python's library does where links need a privilege.
#[cfg(not(unix))]
fn point(link: &Path, blob: &Path, _file: &str, _etag: &str) -> io::Result<()> {
    fs::rename(blob, link)
}

pub(crate) fn create_dir(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(Error::io(path))
}

/// Returns true if `revision` is a full commit id, whose files never change.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hex(revision)
}

pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns true if `text` is a safe path below a directory of the cache.
pub(crate) fn stays_below(text: &str) -> bool {
    let mut components = Path::new(text).components().peekable();
    components.peek().is_some() && components.all(|component| matches!(component, Component::Normal(_)))
}

/// Returns what a model or adapter at `snapshot` still lacks, or `None` if it is complete.
///
/// Python's library creates a snapshot before all its files are there, so an interrupted one is incomplete.
pub(crate) fn lacks(snapshot: &Path) -> Option<String> {
    let has = |file: &str| snapshot.join(file).exists();
    if has(ADAPTER_CONFIG) && has(ADAPTER_FILE) {
        return None;
    }
    if !has(CONFIG) {
        return Some(CONFIG.to_owned());
    }
    if has(SINGLE_FILE) {
        return None;
    }
    if !has(INDEX_FILE) {
        return Some("its weights".to_owned());
    }
    match ShardIndex::read(&snapshot.join(INDEX_FILE)) {
        Ok(index) => index.shards().into_iter().find(|shard| !has(shard)).map(str::to_owned),
        Err(error) => Some(error.to_string()),
    }
}

/// Returns the files of a snapshot, by their names in the repository.
pub(crate) fn names(snapshot: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        // Unreadable directories are skipped; their files count as missing.
        for entry in fs::read_dir(snapshot.join(&folder)).into_iter().flatten().flatten() {
            let name = format!("{folder}{}", entry.file_name().to_string_lossy());
            match entry.path() {
                path if path.is_dir() => folders.push(format!("{name}/")),
                path if path.exists() => names.push(name),
                _ => {}
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn paths_equal_those_of_python() {
        let scratch = tempfile::tempdir().unwrap();
        let repo = CachedRepo::new(scratch.path(), "models--org--name");
        create_dir(&repo.blobs()).unwrap();
        fs::write(repo.blob("e7a9"), "{}").unwrap();
        repo.link(COMMIT, "config.json", "e7a9").unwrap();
        repo.link(COMMIT, "config.json", "e7a9").unwrap();
        repo.link(COMMIT, "data/de/train.parquet", "e7a9").unwrap();
        repo.write_reference("refs/pr/1", COMMIT).unwrap();

        let root = scratch.path().join("models--org--name");
        let file = root.join("snapshots").join(COMMIT).join("config.json");
        assert_eq!(fs::read_to_string(&file).unwrap(), "{}");
        #[cfg(unix)]
        assert_eq!(fs::read_link(&file).unwrap(), Path::new("../../blobs/e7a9"));
        assert_eq!(fs::read_to_string(repo.snapshot(COMMIT).join("data/de/train.parquet")).unwrap(), "{}");
        assert_eq!(fs::read_to_string(root.join("refs/refs/pr/1")).unwrap(), COMMIT);
        assert_eq!(repo.commit_of("refs/pr/1").as_deref(), Some(COMMIT));
        assert_eq!(repo.commit_of("main"), None);
        repo.blob_lock("e7a9").unwrap();
        assert!(scratch.path().join(".locks/models--org--name/e7a9.lock").exists());
    }

    #[test]
    fn paths_outside_the_cache_are_rejected() {
        for inside in ["main", "refs/pr/1", "v1.0"] {
            assert!(stays_below(inside), "{inside}");
        }
        for outside in ["", "..", "a/../../b", "/etc", ".", "./a"] {
            assert!(!stays_below(outside), "{outside}");
        }
    }

    #[test]
    fn an_interrupted_snapshot_is_detected() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(scratch.path().join(file), text).unwrap();
        assert_eq!(lacks(scratch.path()).as_deref(), Some("config.json"));
        write("config.json", "{}");
        assert_eq!(lacks(scratch.path()).as_deref(), Some("its weights"));
        write(INDEX_FILE, r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#);
        write("1.safetensors", "");
        assert_eq!(lacks(scratch.path()).as_deref(), Some("2.safetensors"));
        write("2.safetensors", "");
        assert_eq!(lacks(scratch.path()), None);
    }
}

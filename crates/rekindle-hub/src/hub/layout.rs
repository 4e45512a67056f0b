//! Where a repository's files lie in the cache that Python's `huggingface_hub` shares.
//!
//! `models--org--name/blobs/<etag>` holds contents, `snapshots/<commit>/<file>` links to them,
//! `refs/<revision>` is the commit that a branch or tag stood at. A file on its way is
//! `blobs/<etag>.incomplete`; who writes it holds a lock on `.locks/models--org--name/<etag>.lock`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use crate::adapter::{ADAPTER_CONFIG, ADAPTER_FILE};
use crate::index::{INDEX_FILE, SINGLE_FILE, ShardIndex};
use crate::{Error, write_atomic};

use super::select::CONFIG;

/// One repository's place in the cache.
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

    /// Where the blob lies until it is whole and checked.
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

    /// The file whose lock says that the blob is being written.
    pub(crate) fn blob_lock(&self, etag: &str) -> Result<File, Error> {
        self.lock_file(&format!("{etag}.lock"))
    }

    /// The file that a download holds shared, and pruning alone.
    pub(crate) fn use_lock(&self) -> Result<File, Error> {
        self.lock_file("rekindle.lock")
    }

    fn lock_file(&self, name: &str) -> Result<File, Error> {
        let locks = self.locks();
        create_dir(&locks)?;
        let path = locks.join(name);
        OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(Error::io(&path))
    }

    /// The commit that `revision` stood at when it was last looked up.
    pub(crate) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.references().join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(crate) fn write_reference(&self, revision: &str, commit: &str) -> Result<(), Error> {
        let path = self.references().join(revision);
        // Unchanged, it is left alone: a cache that cannot be written is still good to read.
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        create_dir(path.parent().unwrap_or(&path))?;
        write_atomic(&path, commit.as_bytes())
    }

    /// Makes the snapshot's `file` stand for the blob.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), Error> {
        let link = self.snapshot(commit).join(file);
        if link.exists() {
            return Ok(());
        }
        create_dir(link.parent().unwrap_or(&link))?;
        // What is left there points at nothing.
        match fs::remove_file(&link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&link)(error)),
            _ => {}
        }
        match point(&link, &self.blob(etag), file, etag) {
            // Another program was as quick.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(Error::io(&link)),
        }
    }
}

/// The end of a blob's name while it is on its way.
pub(crate) const INCOMPLETE: &str = ".incomplete";

/// Relative, so that the cache can be moved as a whole.
#[cfg(unix)]
fn point(link: &Path, _blob: &Path, file: &str, etag: &str) -> io::Result<()> {
    let up = "../".repeat(2 + file.matches('/').count());
    std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(etag), link)
}

/// Links need a privilege elsewhere; Python's library moves the blob too.
#[cfg(not(unix))]
fn point(link: &Path, blob: &Path, _file: &str, _etag: &str) -> io::Result<()> {
    fs::rename(blob, link)
}

pub(crate) fn create_dir(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(Error::io(path))
}

/// Whether `revision` is a commit's full id, which never changes its files.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hex(revision)
}

pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether `text` may become a path below a directory of the cache.
pub(crate) fn stays_below(text: &str) -> bool {
    let mut components = Path::new(text).components().peekable();
    components.peek().is_some() && components.all(|component| matches!(component, Component::Normal(_)))
}

/// What a model or an adapter at `snapshot` still lacks; `None` when it can be loaded.
///
/// Python's library makes a snapshot before it has all files, and so may be interrupted.
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

/// All files of a snapshot, by their names in the repository.
pub(crate) fn names(snapshot: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        // What cannot be read cannot be taken either.
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
    fn lies_where_python_looks() {
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
    fn keeps_paths_of_others_inside() {
        for inside in ["main", "refs/pr/1", "v1.0"] {
            assert!(stays_below(inside), "{inside}");
        }
        for outside in ["", "..", "a/../../b", "/etc", ".", "./a"] {
            assert!(!stays_below(outside), "{outside}");
        }
    }

    #[test]
    fn knows_an_interrupted_snapshot() {
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

//! Listing and pruning of the hub cache.
//!
//! The cache is shared with Python's `huggingface_hub`. Only models are handled here: not datasets, and not the shared
//! store that newer versions keep for files of several models.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, DirEntry, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::hub::{CachedRepo, Environment, INCOMPLETE};
use crate::{Error, HubErrorKind};

/// A cached model or adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedModel {
    /// `organization/model`.
    pub name: String,
    /// The directory in the cache.
    pub path: PathBuf,
    /// The cached revisions, by commit.
    pub revisions: Vec<CachedRevision>,
    /// The size of all files in bytes, including interrupted downloads.
    pub bytes: u64,
    /// The size of interrupted downloads in bytes.
    pub incomplete_bytes: u64,
    /// The last time one of its files was read, if the file system records it.
    pub last_used: Option<SystemTime>,
}

/// The cached files of one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedRevision {
    /// The commit id.
    pub commit: String,
    /// The branches and tags that pointed to this commit when they were last looked up.
    pub references: Vec<String>,
    /// The number of cached files.
    pub files: usize,
    /// Their size in bytes; revisions share unchanged files.
    pub bytes: u64,
}

/// The selection to remove from the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune<'a> {
    /// In all models: revisions without a branch or tag, interrupted downloads, and files that belong to no revision.
    Unreferenced,
    /// One model by name, with all its revisions.
    Model(&'a str),
}

/// The result of [`prune`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The number of bytes freed.
    pub bytes: u64,
    /// The names of the models with removed files.
    pub models: Vec<String>,
    /// The names of the models skipped because they are being downloaded.
    pub busy: Vec<String>,
}

/// Returns the cache directory set by the environment: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else
/// `~/.cache/huggingface/hub`.
pub fn default_dir() -> PathBuf {
    Environment::read().cache_dir
}

/// Lists all cached models by name; empty if the cache does not exist.
///
/// # Errors
/// [`Error::Io`] if a directory cannot be read.
pub fn list(cache_dir: &Path) -> Result<Vec<CachedModel>, Error> {
    let models = models(cache_dir)?;
    models.into_iter().map(|(name, repo)| Ok(Contents::read(&repo)?.model(name, &repo))).collect()
}

/// Removes the selection from the cache, skipping models that are being downloaded.
///
/// # Errors
/// [`Error::Hub`] for a named model that is not cached or is being downloaded; [`Error::Io`] for files that cannot be
/// read or removed.
pub fn prune(cache_dir: &Path, what: Prune<'_>) -> Result<Pruned, Error> {
    let mut pruned = Pruned::default();
    let models = models(cache_dir)?;
    match what {
        Prune::Unreferenced => {
            for (name, repo) in models {
                let Some(_alone) = lock(&repo)? else {
                    pruned.busy.push(name);
                    continue;
                };
                if let Some(bytes) = Contents::read(&repo)?.remove_unreferenced(&repo)? {
                    pruned.bytes += bytes;
                    pruned.models.push(name);
                }
            }
        }
        Prune::Model(name) => {
            let refuse = |kind, reason| Error::Hub { kind, name: name.to_owned(), reason };
            let Some((name, repo)) = models.into_iter().find(|(cached, _)| cached == name) else {
                return Err(refuse(HubErrorKind::NotFound, format!("it is not in the cache at {cache_dir:?}")));
            };
            let Some(_alone) = lock(&repo)? else {
                return Err(refuse(
                    HubErrorKind::Busy,
                    "it is being downloaded; try again when that is done".to_owned(),
                ));
            };
            pruned.bytes = Contents::read(&repo)?.bytes(false);
            remove_dir(&repo.path())?;
            remove_dir(&repo.locks())?;
            pruned.models.push(name);
        }
    }
    Ok(pruned)
}

/// Returns the names and cache directories of all models.
fn models(cache_dir: &Path) -> Result<BTreeMap<String, CachedRepo>, Error> {
    let mut models = BTreeMap::new();
    for entry in entries(cache_dir)? {
        let folder = entry.file_name();
        let name = folder.to_str().and_then(|folder| Some((folder, folder.strip_prefix("models--")?)));
        if let Some((folder, name)) = name {
            models.insert(name.replacen("--", "/", 1), CachedRepo::new(cache_dir, folder));
        }
    }
    Ok(models)
}

/// Blocks downloads until the result is dropped; returns `None` if one is running.
fn lock(repo: &CachedRepo) -> Result<Option<Vec<File>>, Error> {
    // Creates the lock file, so that it is among the directory's entries.
    drop(repo.use_lock()?);
    let mut held = Vec::new();
    for entry in entries(&repo.locks())? {
        let path = entry.path();
        let file = OpenOptions::new().write(true).open(&path).map_err(Error::io(&path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Ok(None);
        }
        held.push(file);
    }
    Ok(Some(held))
}

/// The contents of a model's cache directory.
#[derive(Debug, Default)]
struct Contents {
    /// Blobs by file name, including interrupted downloads.
    blobs: BTreeMap<OsString, Blob>,
    snapshots: Vec<Snapshot>,
    last_used: Option<SystemTime>,
}

#[derive(Debug)]
struct Blob {
    bytes: u64,
    /// True for a link into the shared store, which uses no space itself.
    is_shared: bool,
}

#[derive(Debug, Default)]
struct Snapshot {
    commit: String,
    references: Vec<String>,
    files: usize,
    /// The names of the blobs its links point to.
    blobs: BTreeSet<OsString>,
    /// Bytes of regular files, used on systems where links need a privilege.
    own_bytes: u64,
}

impl Contents {
    fn read(repo: &CachedRepo) -> Result<Contents, Error> {
        let mut contents = Contents::default();
        for entry in entries(&repo.blobs())? {
            let path = entry.path();
            let is_shared = entry.file_type().map_err(Error::io(&path))?.is_symlink();
            let about = match fs::metadata(&path) {
                // The link is dangling because the shared store was emptied.
                Err(error) if is_shared && error.kind() == ErrorKind::NotFound => entry.metadata(),
                about => about,
            };
            let about = about.map_err(Error::io(&path))?;
            contents.last_used = contents.last_used.max(about.accessed().ok());
            contents.blobs.insert(entry.file_name(), Blob { bytes: about.len(), is_shared });
        }
        let mut references = BTreeMap::<String, Vec<String>>::new();
        for file in files_below(&repo.references())? {
            let commit = fs::read_to_string(&file).map_err(Error::io(&file))?;
            let name = file.strip_prefix(repo.references()).unwrap_or(&file);
            references.entry(commit.trim().to_owned()).or_default().push(name.display().to_string());
        }
        for entry in entries(&repo.snapshots())? {
            let commit = entry.file_name().display().to_string();
            let references = references.remove(&commit).unwrap_or_default();
            let mut snapshot = Snapshot { commit, references, ..Snapshot::default() };
            for file in files_below(&entry.path())? {
                snapshot.files += 1;
                match fs::read_link(&file) {
                    Ok(target) => snapshot.blobs.extend(target.file_name().map(OsString::from)),
                    Err(_) => snapshot.own_bytes += file.metadata().map_err(Error::io(&file))?.len(),
                }
            }
            contents.snapshots.push(snapshot);
        }
        contents.snapshots.sort_by(|a, b| a.commit.cmp(&b.commit));
        Ok(contents)
    }

    fn bytes(&self, with_shared: bool) -> u64 {
        let blobs = self.blobs.values().filter(|blob| with_shared || !blob.is_shared).map(|blob| blob.bytes);
        blobs.chain(self.snapshots.iter().map(|snapshot| snapshot.own_bytes)).sum()
    }

    fn model(self, name: String, repo: &CachedRepo) -> CachedModel {
        let incomplete = self.blobs.iter().filter(|(blob, _)| blob.to_string_lossy().ends_with(INCOMPLETE));
        CachedModel {
            name,
            path: repo.path(),
            bytes: self.bytes(true),
            incomplete_bytes: incomplete.map(|(_, blob)| blob.bytes).sum(),
            last_used: self.last_used,
            revisions: self.snapshots.iter().map(|snapshot| self.revision(snapshot)).collect(),
        }
    }

    fn revision(&self, snapshot: &Snapshot) -> CachedRevision {
        let linked = snapshot.blobs.iter().filter_map(|name| self.blobs.get(name)).map(|blob| blob.bytes);
        CachedRevision {
            commit: snapshot.commit.clone(),
            references: snapshot.references.clone(),
            files: snapshot.files,
            bytes: snapshot.own_bytes + linked.sum::<u64>(),
        }
    }

    /// Returns the number of bytes freed, or `None` if there was nothing to remove.
    fn remove_unreferenced(&self, repo: &CachedRepo) -> Result<Option<u64>, Error> {
        let (kept, unreferenced): (Vec<_>, Vec<_>) =
            self.snapshots.iter().partition(|snapshot| !snapshot.references.is_empty());
        let needed: BTreeSet<_> = kept.iter().flat_map(|snapshot| &snapshot.blobs).collect();
        let unneeded: Vec<_> = self.blobs.iter().filter(|(name, _)| !needed.contains(name)).collect();
        let mut free = 0;
        for snapshot in &unreferenced {
            remove_dir(&repo.snapshot(&snapshot.commit))?;
            free += snapshot.own_bytes;
        }
        for (name, blob) in &unneeded {
            let path = repo.blobs().join(name);
            fs::remove_file(&path).map_err(Error::io(&path))?;
            free += if blob.is_shared { 0 } else { blob.bytes };
        }
        Ok((!unreferenced.is_empty() || !unneeded.is_empty()).then_some(free))
    }
}

/// Returns the entries of a directory; empty if it does not exist.
fn entries(directory: &Path) -> Result<Vec<DirEntry>, Error> {
    match fs::read_dir(directory).and_then(Iterator::collect) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(Error::io(directory)),
    }
}

/// Returns all files below a directory, with links counted as files.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in entries(directory)? {
        let path = entry.path();
        match entry.file_type().map_err(Error::io(&path))?.is_dir() {
            true => files.append(&mut files_below(&path)?),
            false => files.push(path),
        }
    }
    files.sort();
    Ok(files)
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const OLD: &str = "1111111111111111111111111111111111111111";
    const NEW: &str = "2222222222222222222222222222222222222222";

    /// Creates a cache with two revisions that share one file, and an interrupted download.
    fn cache() -> (tempfile::TempDir, CachedRepo) {
        let scratch = tempfile::tempdir().unwrap();
        let repo = CachedRepo::new(scratch.path(), "models--org--model");
        fs::create_dir_all(repo.blobs()).unwrap();
        for (blob, bytes) in [("config", 10), ("old", 1000), ("new", 2000), ("next.incomplete", 500)] {
            fs::write(repo.blob(blob), vec![0; bytes]).unwrap();
        }
        for (commit, weights) in [(OLD, "old"), (NEW, "new")] {
            repo.link(commit, "config.json", "config").unwrap();
            repo.link(commit, "model.safetensors", weights).unwrap();
        }
        repo.write_reference("main", NEW).unwrap();
        (scratch, repo)
    }

    #[test]
    fn revisions_and_bytes_are_listed() {
        let (scratch, repo) = cache();
        fs::create_dir(scratch.path().join("datasets--org--data")).unwrap();
        let models = list(scratch.path()).unwrap();
        let [model] = &models[..] else { panic!("{models:?}") };
        assert_eq!((model.name.as_str(), &model.path), ("org/model", &repo.path()));
        assert_eq!((model.bytes, model.incomplete_bytes), (3510, 500));
        assert!(model.last_used.is_some());
        let revisions = [
            CachedRevision { commit: OLD.to_owned(), references: vec![], files: 2, bytes: 1010 },
            CachedRevision { commit: NEW.to_owned(), references: vec!["main".to_owned()], files: 2, bytes: 2010 },
        ];
        assert_eq!(model.revisions, revisions);
        assert_eq!(list(&scratch.path().join("none")).unwrap(), []);
    }

    #[test]
    fn unreferenced_files_are_pruned() {
        let (scratch, repo) = cache();
        let pruned = prune(scratch.path(), Prune::Unreferenced).unwrap();
        assert_eq!(pruned, Pruned { bytes: 1500, models: vec!["org/model".to_owned()], busy: vec![] });
        assert!(!repo.snapshot(OLD).exists());
        assert_eq!(fs::read(repo.snapshot(NEW).join("model.safetensors")).unwrap().len(), 2000);
        assert_eq!(list(scratch.path()).unwrap()[0].bytes, 2010);
        assert_eq!(prune(scratch.path(), Prune::Unreferenced).unwrap(), Pruned::default());
    }

    /// Uses the layout of newer versions of Python's library for files shared by models.
    #[test]
    fn shared_files_count_but_are_not_freed() {
        let (scratch, repo) = cache();
        fs::create_dir(scratch.path().join("blobs")).unwrap();
        fs::write(scratch.path().join("blobs/shared"), [0; 2000]).unwrap();
        fs::remove_file(repo.blob("new")).unwrap();
        std::os::unix::fs::symlink("../../blobs/shared", repo.blob("new")).unwrap();
        assert_eq!(list(scratch.path()).unwrap()[0].bytes, 3510);
        assert_eq!(prune(scratch.path(), Prune::Model("org/model")).unwrap().bytes, 1510);
        assert!(scratch.path().join("blobs/shared").exists());
    }

    #[test]
    fn a_model_is_removed_by_name() {
        let (scratch, repo) = cache();
        let error = prune(scratch.path(), Prune::Model("org/mode")).unwrap_err();
        assert_eq!(error.hub_kind(), Some(HubErrorKind::NotFound), "{error}");
        let pruned = prune(scratch.path(), Prune::Model("org/model")).unwrap();
        assert_eq!(pruned.bytes, 3510);
        assert!(!repo.path().exists() && !repo.locks().exists());
    }

    #[test]
    fn models_being_downloaded_are_skipped() {
        let (scratch, repo) = cache();
        let downloads = [repo.use_lock().unwrap(), repo.blob_lock("next").unwrap()];
        for download in downloads {
            download.lock_shared().unwrap();
            let pruned = prune(scratch.path(), Prune::Unreferenced).unwrap();
            assert_eq!(pruned, Pruned { busy: vec!["org/model".to_owned()], ..Pruned::default() });
            let error = prune(scratch.path(), Prune::Model("org/model")).unwrap_err();
            assert_eq!(error.hub_kind(), Some(HubErrorKind::Busy), "{error}");
        }
        assert!(repo.incomplete("next").exists());
    }
}

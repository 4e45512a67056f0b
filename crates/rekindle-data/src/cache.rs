//! A cache of encoded datasets on disk. Files are named by the hash of everything that a dataset is made from.

mod fingerprint;
mod stored;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::dataset::Dataset;
use crate::options::RowTask;
use crate::report::{CacheUse, LoadReport};

pub(crate) use fingerprint::fingerprint;
use stored::Stored;

/// Returns the default directory of the cache: `datasets` in `REKINDLE_CACHE`, or in `rekindle` in `XDG_CACHE_HOME` or
/// `~/.cache`. Returns `None` if none of them is set.
pub fn default_cache_dir() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = || var("XDG_CACHE_HOME").or_else(|| env::home_dir().map(|home| home.join(".cache")));
    let root = var("REKINDLE_CACHE").or_else(|| caches().map(|caches| caches.join("rekindle")))?;
    Some(root.join("datasets"))
}

/// Returns the path of a dataset in a cache.
fn path(dir: &Path, fingerprint: &str) -> PathBuf {
    dir.join(format!("{fingerprint}.safetensors"))
}

/// Reads a cached dataset. A damaged file counts as absent, and the dataset is encoded again.
pub(crate) fn read(dir: &Path, fingerprint: &str, files: &[PathBuf], task: RowTask) -> Option<(Dataset, LoadReport)> {
    let path = path(dir, fingerprint);
    let (stored, mut report) = Stored::open(&path, fingerprint, files.len())?;
    report.files = files.to_vec();
    report.cache = CacheUse::Read(path);
    Some((Dataset::new(stored, files.to_vec(), fingerprint.to_owned(), task), report))
}

/// Writes a dataset to the cache. A failure is recorded in `report` and is no error.
pub(crate) fn write(dir: &Path, dataset: &Dataset, report: &mut LoadReport) {
    let path = path(dir, dataset.fingerprint());
    let made = fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()));
    let write = || Stored::write(&path, dataset.arrays(), dataset.fingerprint(), report);
    let written = made.and_then(|()| write().map_err(|error| error.to_string()));
    report.cache = match written {
        Ok(()) => CacheUse::Written(path),
        Err(why) => CacheUse::Failed(why),
    };
}

#[cfg(test)]
mod tests;

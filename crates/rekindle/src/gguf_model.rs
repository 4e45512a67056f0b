//! GGUF files in the place of model directories.

use std::env;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rekindle_data::default_cache_dir;
use rekindle_hub::AtomicDir;
use rekindle_models::unpack_gguf;
use sha2::{Digest as _, Sha256};

use crate::Error;

/// The version of the directories; raise it when the same file is unpacked differently.
const VERSION: u32 = 1;

/// Returns true if a path is that of a GGUF file: by its name or its first bytes.
pub(crate) fn is_gguf(path: &Path) -> bool {
    if !path.is_file() {
        return false;
    }
    let mut magic = [0; 4];
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
        || (File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"GGUF")
}

/// Returns a directory that stands for the GGUF model in `file`, with everything but the weights in the Hugging Face
/// layout. It is in the cache (`REKINDLE_CACHE`), where it stays until the file changes.
pub(crate) fn unpacked(file: &Path) -> Result<PathBuf, Error> {
    let failed = |source| rekindle_hub::Error::Io { path: file.to_owned(), source };
    let absolute = file.canonicalize().map_err(failed)?;
    let about = fs::metadata(&absolute).map_err(failed)?;
    let modified = about.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let key = format!("{VERSION} {} {} {}", absolute.display(), about.len(), modified.as_nanos());
    let key: String = Sha256::digest(key).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let root = default_cache_dir().and_then(|datasets| Some(datasets.parent()?.to_owned()));
    let stem = absolute.file_stem().unwrap_or_default().to_string_lossy();
    let directory = root.unwrap_or_else(|| env::temp_dir().join("rekindle")).join("gguf").join(format!("{stem}-{key}"));
    if directory.join("config.json").is_file() {
        return Ok(directory);
    }
    let unpacked = AtomicDir::replace(&directory)?;
    unpack_gguf(&absolute, unpacked.path())?;
    match unpacked.commit() {
        // Another process was faster.
        Err(_) if directory.join("config.json").is_file() => Ok(directory),
        done => Ok(done.map(|()| directory)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_file_is_known_by_its_name_or_its_first_bytes() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        fs::write(path("blob"), b"GGUF\x03").unwrap();
        fs::write(path("empty.GGUF"), b"").unwrap();
        fs::write(path("model.safetensors"), b"GG").unwrap();
        assert_eq!(
            ["blob", "empty.GGUF", "model.safetensors", "none.gguf"].map(|name| is_gguf(&path(name))),
            [true, true, false, false]
        );
        let error = unpacked(&path("empty.GGUF")).unwrap_err().to_string();
        assert!(error.contains("a GGUF file begins with"), "{error}");
    }
}

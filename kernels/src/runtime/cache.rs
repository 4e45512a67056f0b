//! Compiled kernels on disk.
//!
//! A file's name is a hash of everything that the code depends on, so that nothing in it ever goes stale; its first
//! bytes are a hash of the rest, so that a damaged file counts as absent. The directory can be removed at any time.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// A file in the cache.
pub(super) struct Entry(Option<PathBuf>);

impl Entry {
    /// The entry for code that depends on these texts.
    pub(super) fn of(texts: &[&str]) -> Self {
        Self(directory().map(|directory| Self::file_in(&directory, texts)))
    }

    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.0.as_ref()?).ok()?;
        let (sum, code) = bytes.split_first_chunk::<16>()?;
        (u128::from_le_bytes(*sum) == hash([code])).then(|| bytes.split_off(16))
    }

    /// Writes the entry, whole or not at all. A failure costs the next start a compilation and is no error.
    pub(super) fn write(&self, code: &[u8]) {
        if let Some(file) = &self.0 {
            let _ = write(file, code);
        }
    }

    fn file_in(directory: &Path, texts: &[&str]) -> PathBuf {
        directory.join(format!("{:032x}.cubin", hash(texts.iter().map(|text| text.as_bytes()))))
    }
}

/// FNV-1a over parts, each followed by its length, so that no two lists of parts run together.
pub(super) fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u128 {
    let mut hash = 0x6c62272e07bb014262b821756295c58du128;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000000001000000000000000000013b);
        }
    };
    for part in parts {
        add(part);
        add(&part.len().to_le_bytes());
    }
    hash
}

/// `$REKINDLE_CACHE`, else `rekindle` in the user's directory of caches, and `kernels` in it.
fn directory() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = var("REKINDLE_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")))?.join("rekindle")));
    root.map(|root| root.join("kernels"))
}

fn write(file: &Path, code: &[u8]) -> io::Result<()> {
    fs::create_dir_all(file.parent().unwrap_or(Path::new("")))?;
    let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
    let bytes = [&hash([code]).to_le_bytes(), code].concat();
    fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, file)).inspect_err(|_| {
        let _ = fs::remove_file(&unfinished);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_counts_as_absence() {
        let directory = env::temp_dir().join(format!("rekindle-cache-{}", std::process::id()));
        let entry = Entry(Some(Entry::file_in(&directory, &["source", "sm_80"])));
        assert_eq!(entry.read(), None);
        entry.write(b"code");
        assert_eq!(entry.read().as_deref(), Some(&b"code"[..]));
        let file = entry.0.clone().expect("a path");
        let mut bytes = fs::read(&file).expect("written above");
        bytes[17] ^= 1;
        for damaged in [&bytes[..], &bytes[..10], b""] {
            fs::write(&file, damaged).expect("writable");
            assert_eq!(entry.read(), None);
        }
        fs::remove_dir_all(directory).expect("made above");
    }

    #[test]
    fn hashes_tell_lists_apart() {
        assert_ne!(hash([&b"ab"[..], b"c"]), hash([&b"a"[..], b"bc"]));
        assert_ne!(hash([&b"a"[..]]), hash([&b"a"[..], b""]));
    }
}

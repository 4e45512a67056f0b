use std::fmt::Write as _;
use std::io::{self, Read};

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use super::layout::is_hex;

/// The expected checksum of a file's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// SHA-256 of the contents, for files in large-file storage.
    Sha256(String),
    /// Git's blob id, SHA-1 of a header and the contents, for files in the repository itself.
    GitBlob(String),
}

impl Checksum {
    /// Interprets an ETag of the hub as a checksum; returns `None` for servers with other ETags.
    pub(crate) fn of_etag(etag: &str) -> Option<Checksum> {
        match etag.len() {
            64 if is_hex(etag) => Some(Checksum::Sha256(etag.to_ascii_lowercase())),
            40 if is_hex(etag) => Some(Checksum::GitBlob(etag.to_ascii_lowercase())),
            _ => None,
        }
    }

    fn expected(&self) -> &str {
        match self {
            Checksum::Sha256(expected) | Checksum::GitBlob(expected) => expected,
        }
    }
}

/// The running hash of a file's bytes.
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
    /// There is no checksum to compare with.
    None,
}

impl Hasher {
    /// Starts a hash for contents of `size` bytes.
    pub(crate) fn new(checksum: Option<&Checksum>, size: u64) -> Hasher {
        match checksum {
            Some(Checksum::Sha256(_)) => Hasher::sha256(),
            Some(Checksum::GitBlob(_)) => Hasher::git_blob(size),
            None => Hasher::None,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hash) => hash.update(bytes),
            Hasher::GitBlob(hash) => hash.update(bytes),
            Hasher::None => {}
        }
    }

    /// Starts the hash of a file in large-file storage.
    pub(crate) fn sha256() -> Hasher {
        Hasher::Sha256(Sha256::new())
    }

    /// Starts the hash of a file of `size` bytes in the repository itself.
    pub(crate) fn git_blob(size: u64) -> Hasher {
        Hasher::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0")))
    }

    /// Adds the rest of `file`.
    pub(crate) fn update_from(&mut self, file: &mut impl Read) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => self.update(&buffer[..read]),
            }
        }
    }

    /// Returns the hash in hexadecimal digits; empty without one.
    pub(crate) fn finish(self) -> String {
        match self {
            Hasher::Sha256(hash) => hex(&hash.finalize()),
            Hasher::GitBlob(hash) => hex(&hash.finalize()),
            Hasher::None => String::new(),
        }
    }

    /// Returns the actual and the expected hash if they differ.
    pub(crate) fn mismatch(self, checksum: Option<&Checksum>) -> Option<Mismatch> {
        let expected = checksum?.expected();
        let found = self.finish();
        (found != expected).then(|| Mismatch { expected: expected.to_owned(), found })
    }
}

/// An actual and an expected hash that differ.
pub(crate) struct Mismatch {
    pub(crate) expected: String,
    pub(crate) found: String,
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uses the output of `git hash-object` and `sha256sum` for "hello\n".
    #[test]
    fn hashes_agree_with_git_and_sha256sum() {
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        for etag in [git, sha256, &sha256.to_ascii_uppercase()] {
            let checksum = Checksum::of_etag(etag).unwrap();
            let mut hasher = Hasher::new(Some(&checksum), 6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert!(hasher.mismatch(Some(&checksum)).is_none(), "{etag}");

            let mut hasher = Hasher::new(Some(&checksum), 6);
            hasher.update(b"hallo\n");
            let mismatch = hasher.mismatch(Some(&checksum)).unwrap();
            assert_eq!(mismatch.expected, etag.to_ascii_lowercase());
            assert_ne!(mismatch.found, mismatch.expected);
        }
        assert_eq!(Checksum::of_etag("\"v1\""), None);
    }
}

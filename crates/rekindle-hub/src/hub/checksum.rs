use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use super::layout::is_hex;

/// What a file's contents must hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// SHA-256 of the contents: a file in large-file storage.
    Sha256(String),
    /// Git's id of the contents, SHA-1 of a header and them: a file in the repository itself.
    GitBlob(String),
}

impl Checksum {
    /// The hub's tags are checksums; `None` for a server whose tags are not.
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

/// The hash of the bytes of a file so far.
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
    /// There is nothing to compare with.
    None,
}

impl Hasher {
    /// For contents of `size` bytes, none of them seen yet.
    pub(crate) fn new(checksum: Option<&Checksum>, size: u64) -> Hasher {
        match checksum {
            Some(Checksum::Sha256(_)) => Hasher::Sha256(Sha256::new()),
            Some(Checksum::GitBlob(_)) => Hasher::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0"))),
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

    /// Takes in what is left of `file`.
    pub(crate) fn update_from(&mut self, file: &mut File) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => self.update(&buffer[..read]),
            }
        }
    }

    /// What the contents hash to instead of `checksum`, if they differ.
    pub(crate) fn mismatch(self, checksum: Option<&Checksum>) -> Option<Mismatch> {
        let found = match self {
            Hasher::Sha256(hash) => hex(&hash.finalize()),
            Hasher::GitBlob(hash) => hex(&hash.finalize()),
            Hasher::None => return None,
        };
        let expected = checksum?.expected();
        (found != expected).then(|| Mismatch { expected: expected.to_owned(), found })
    }
}

/// Two hashes that should be one.
pub(crate) struct Mismatch {
    pub(crate) expected: String,
    pub(crate) found: String,
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `git hash-object` and `sha256sum` of "hello\n".
    #[test]
    fn agrees_with_git_and_sha256sum() {
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

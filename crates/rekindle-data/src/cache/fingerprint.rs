//! The hash of everything that a dataset is made from.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::hash::hex;
use crate::options::EncodeOptions;
use crate::tokenizer::Tokenizer;

/// The version of the encoding. Raise it with every change that gives other ids or labels for the same rows, or stores
/// them in another format.
const VERSION: u32 = 3;

/// The contents of files at the time of hashing.
#[derive(Debug)]
pub(crate) struct Fingerprint {
    /// SHA-256 in hexadecimal of the version of the encoding, the options, the columns, the tokenizer's files, and the
    /// bytes of the row files in their order. Paths are not included.
    pub(crate) hex: String,
    seen: Vec<(u64, Option<SystemTime>)>,
}

/// Hashes everything that a dataset is made from. Returns `None` for a file that can be read only once, such as a pipe.
pub(crate) fn fingerprint(
    files: &[PathBuf],
    columns: &Columns,
    tokenizer: Option<&Tokenizer>,
    options: &EncodeOptions,
) -> Result<Option<Fingerprint>> {
    for path in files {
        // Asked before opening: opening a named pipe would wait for a writer.
        if !fs::metadata(path).map_err(failed(path))?.is_file() {
            return Ok(None);
        }
    }
    let seen = look(files)?;
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&VERSION.to_le_bytes());
    part(&serde_json::to_vec(options).expect("options are plain values"));
    part(&serde_json::to_vec(columns.as_map()).expect("texts"));
    if let Some(tokenizer) = tokenizer {
        let files = tokenizer.files();
        let more = tokenizer.template_files().into_iter().filter(|path| !files.iter().any(|file| file == path));
        for path in files.iter().map(PathBuf::as_path).chain(more) {
            part(path.file_name().unwrap_or_default().as_encoded_bytes());
            part(&fs::read(path).map_err(|error| Error::tokenizer(path, error.to_string()))?);
        }
        tokenizer.eos_ids().iter().for_each(|id| part(&id.to_le_bytes()));
    }
    let of_files: Vec<Result<[u8; 32]>> = files.par_iter().map(|path| hash_file(path).map_err(failed(path))).collect();
    for of_file in of_files {
        part(&of_file?);
    }
    Ok(Some(Fingerprint { hex: hex(&hash.finalize()), seen }))
}

impl Fingerprint {
    /// Checks that the files have not changed since they were hashed.
    ///
    /// # Errors
    /// [`Error::Dataset`] if a file has changed.
    pub(crate) fn check_unchanged(&self, files: &[PathBuf]) -> Result<()> {
        match look(files)?.iter().zip(&self.seen).position(|(now, then)| now != then) {
            Some(index) => Err(Error::dataset(&files[index], "was changed while it was being read; try again")),
            None => Ok(()),
        }
    }
}

fn look(files: &[PathBuf]) -> Result<Vec<(u64, Option<SystemTime>)>> {
    let one = |path: &PathBuf| {
        let about = fs::metadata(path).map_err(failed(path))?;
        Ok((about.len(), about.modified().ok()))
    };
    files.iter().map(one).collect()
}

fn hash_file(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Read { path: path.to_owned(), source }
}

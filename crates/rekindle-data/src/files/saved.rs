//! Folders written by `Dataset.save_to_disk` and `DatasetDict.save_to_disk` of Python's `datasets`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::find::{Choice, listed};
use super::split::canonical;
use crate::error::{Error, Result};

/// `dataset_dict.json`.
#[derive(Deserialize)]
struct Splits {
    splits: Vec<String>,
}

/// `state.json`.
#[derive(Deserialize)]
struct State {
    #[serde(rename = "_data_files")]
    files: Vec<DataFile>,
    /// Files of row numbers, from versions before `save_to_disk` wrote the rows in order.
    #[serde(rename = "_indices_data_files", default)]
    indices: Option<serde_json::Value>,
    #[serde(rename = "_split", default)]
    split: Option<String>,
}

#[derive(Deserialize)]
struct DataFile {
    filename: String,
}

/// Returns the files of such a folder, with notices; `None` for other folders.
pub(super) fn find(dir: &Path, choice: &Choice<'_>) -> Result<Option<(Vec<PathBuf>, Option<String>)>> {
    let dict = dir.join("dataset_dict.json");
    if !dict.is_file() {
        return Ok(match dir.join("state.json").is_file() {
            true => Some((files(dir, Some(choice))?, None)),
            false => None,
        });
    }
    let Splits { splits } = read(&dict)?;
    let is = |split: &str, wanted: &str| canonical(split).unwrap_or(split) == wanted;
    let found = choice.wanted.iter().find_map(|wanted| splits.iter().find(|split| is(split, wanted)));
    let Some(split) = found else { return Err(Error::dataset(dir, choice.missing(listed(&splits)))) };
    let rest: Vec<_> = splits.iter().filter(|other| *other != split).collect();
    let notice = format!("split {split:?} of {}; left out: {}", dir.display(), listed(&rest));
    Ok(Some((files(&dir.join(split), None)?, (!rest.is_empty()).then_some(notice))))
}

fn files(dir: &Path, choice: Option<&Choice<'_>>) -> Result<Vec<PathBuf>> {
    let path = dir.join("state.json");
    let State { files, indices, split } = read(&path)?;
    if indices.is_some_and(|indices| indices.as_array().is_none_or(|files| !files.is_empty())) {
        let message = "its rows are in another order than its files (\"_indices_data_files\"); save it again with \
                       Dataset.flatten_indices().save_to_disk";
        return Err(Error::dataset(dir, message));
    }
    if let (Some(choice), Some(split)) = (choice, &split)
        && choice.explicit
        && canonical(split).unwrap_or(split) != choice.wanted[0]
    {
        return Err(Error::dataset(dir, choice.missing(listed(&[split]))));
    }
    if files.is_empty() {
        return Err(Error::dataset(&path, "names no file"));
    }
    Ok(files.into_iter().map(|file| dir.join(file.filename)).collect())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::dataset(path, format!("is not what Dataset.save_to_disk writes: {error}")))
}

//! Selection of the files that hold the rows of a dataset split.

use std::collections::BTreeSet;

use crate::error::quoted;

/// The requested part of a dataset repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetPart {
    /// A folder of the repository, if it has several sets of rows. Default: the only one.
    pub subset: Option<String>,
    /// `train`, `test`, `validation` or another word in the files' names.
    pub split: String,
}

/// The file endings of supported formats, with preferred formats first.
const KINDS: [&[&str]; 2] = [&[".parquet"], &[".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"]];

/// JSON files in a repository that hold no rows.
const NO_ROWS: [&str; 4] = ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"];

/// Splits and the names used for them in file names.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
    ("validation", &["validation", "valid", "val", "dev"]),
];

/// The maximum number of names in an error.
const MAX_LISTED: usize = 8;

impl DatasetPart {
    /// Selects the split's files from all files of a repository, sorted: `split-00000-of-00002.parquet`, else those
    /// whose path contains a usual name of the split as a folder or as a word of the file name. If no file names a
    /// split, all files are `train`, as in Python's `datasets`.
    ///
    /// # Errors
    /// A message that lists what the repository has instead.
    pub(crate) fn select(&self, all: &[String]) -> Result<Vec<String>, String> {
        let Some(rows) = KINDS.iter().map(|kind| rows_in(all, kind)).find(|rows| !rows.is_empty()) else {
            let found = quoted(all.iter().take(MAX_LISTED).map(String::as_str));
            return Err(format!(
                "it holds no Parquet, JSON or JSON Lines files, only {found}; if the hub has converted it, \
                 set revision = \"refs/convert/parquet\""
            ));
        };
        let rows = self.of_subset(rows)?;
        let splits: BTreeSet<&str> = rows.iter().filter_map(|file| split_of(file)).collect();
        let wanted = canonical(&self.split).unwrap_or(&self.split);
        let mut found: Vec<&str> = match splits.is_empty() && wanted == "train" {
            true => rows,
            false => rows.into_iter().filter(|file| split_of(file) == Some(wanted)).collect(),
        };
        if found.is_empty() {
            let there = if splits.is_empty() {
                "only files without a split, which are \"train\"".to_owned()
            } else {
                quoted(splits)
            };
            return Err(format!("it has no split {:?}; it has {there}", self.split));
        }
        let folders: BTreeSet<&str> = found.iter().map(|file| subset_of(file)).collect();
        if folders.len() > 1 {
            let listed = quoted(folders.iter().copied().take(MAX_LISTED));
            return Err(format!("it has several subsets ({listed}{}); select one with subset", more(folders.len())));
        }
        found.sort_unstable();
        Ok(found.into_iter().map(str::to_owned).collect())
    }

    fn of_subset<'a>(&self, rows: Vec<&'a str>) -> Result<Vec<&'a str>, String> {
        let Some(subset) = &self.subset else { return Ok(rows) };
        let (inside, rest): (Vec<_>, Vec<_>) =
            rows.into_iter().partition(|file| folders_of(file).any(|folder| folder == subset));
        if inside.is_empty() {
            let folders: BTreeSet<&str> =
                rest.iter().map(|file| subset_of(file)).filter(|name| !name.is_empty()).collect();
            let count = folders.len();
            let listed = if count == 0 { "none".to_owned() } else { quoted(folders.into_iter().take(MAX_LISTED)) };
            return Err(format!("it has no subset {subset:?}; it has {listed}{}", more(count)));
        }
        Ok(inside)
    }
}

/// Returns a piece that is missing from `files` according to the count in the other names:
/// `train-00000-of-00002.parquet`.
pub(crate) fn missing_piece(files: &[String]) -> Option<String> {
    for file in files {
        let Some((before, rest)) = file.split_once("-of-") else { continue };
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (Some(stem), Ok(count)) =
            (before.get(..before.len().saturating_sub(digits)), rest[..digits].parse::<usize>())
        else {
            continue;
        };
        let piece = |index: usize| format!("{stem}{index:0digits$}-of-{rest}");
        if let Some(lacking) = (0..count).map(piece).find(|piece| !files.contains(piece)) {
            return Some(lacking);
        }
    }
    None
}

fn more(count: usize) -> &'static str {
    if count > MAX_LISTED { ", …" } else { "" }
}

fn rows_in<'a>(all: &'a [String], endings: &[&str]) -> Vec<&'a str> {
    let is_rows = |file: &&str| {
        let name = file.rsplit('/').next().unwrap_or_default();
        !name.starts_with('.') && !NO_ROWS.contains(&name) && endings.iter().any(|ending| name.ends_with(ending))
    };
    all.iter().map(String::as_str).filter(is_rows).collect()
}

fn folders_of(file: &str) -> impl Iterator<Item = &str> {
    file.rsplit_once('/').map_or("", |(folders, _)| folders).split('/').filter(|folder| !folder.is_empty())
}

/// Returns the words of the file name and the folders.
fn words_of(file: &str) -> impl Iterator<Item = &str> {
    let name = file.rsplit('/').next().unwrap_or_default();
    folders_of(file).chain(name.split(|character: char| !character.is_ascii_alphanumeric()))
}

/// Returns the canonical name of a split.
fn canonical(word: &str) -> Option<&'static str> {
    SPLITS.iter().find(|(_, names)| names.contains(&word)).map(|(split, _)| *split)
}

/// Returns the split of a file, if its path names one.
fn split_of(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next().unwrap_or_default();
    let numbered = name.split_once("-of-").and_then(|(before, _)| before.rsplit_once('-'));
    match numbered.filter(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit())) {
        Some((split, _)) => Some(canonical(split).unwrap_or(split)),
        None => words_of(file).find_map(canonical),
    }
}

/// Returns the folders that are neither a split nor `data`, the usual folder for rows.
fn subset_of(file: &str) -> &str {
    folders_of(file).find(|folder| *folder != "data" && canonical(folder).is_none()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(subset: Option<&str>, split: &str, all: &[&str]) -> Result<Vec<String>, String> {
        let all: Vec<_> = all.iter().map(|file| (*file).to_owned()).collect();
        DatasetPart { subset: subset.map(str::to_owned), split: split.to_owned() }.select(&all)
    }

    const PUSHED: [&str; 5] = [
        ".gitattributes",
        "README.md",
        "data/test-00000-of-00001.parquet",
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
    ];

    #[test]
    fn the_files_of_the_split_are_selected() {
        let train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        assert_eq!(select(None, "train", &PUSHED).unwrap(), train);
        assert_eq!(select(None, "test", &PUSHED).unwrap(), ["data/test-00000-of-00001.parquet"]);
        // The hub's conversion has a folder for the subset and one for the split.
        let converted = ["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"];
        assert_eq!(select(None, "train", &converted).unwrap(), converted[..2]);
        assert_eq!(select(Some("default"), "valid", &converted).unwrap(), converted[2..]);
        // The whole name before the number is the split's name.
        let named = ["data/train_gen-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"];
        assert_eq!(select(None, "train_sft", &named).unwrap(), named[1..]);
        let reason = select(None, "train", &named).unwrap_err();
        assert_eq!(reason, "it has no split \"train\"; it has \"train_gen\", \"train_sft\"");
    }

    #[test]
    fn files_without_a_split_are_train() {
        let plain = ["dataset_infos.json", "alpaca_data.json", "README.md"];
        assert_eq!(select(None, "train", &plain).unwrap(), ["alpaca_data.json"]);
        assert!(select(None, "test", &plain).unwrap_err().contains("only files without a split, which are \"train\""));
        // Parquet is preferred over a possible source format.
        assert_eq!(select(None, "train", &["rows.jsonl", "rows.parquet"]).unwrap(), ["rows.parquet"]);
    }

    #[test]
    fn errors_list_what_is_available() {
        assert_eq!(select(None, "dev", &PUSHED).unwrap_err(), "it has no split \"dev\"; it has \"test\", \"train\"");
        let several = ["de/train.jsonl", "en/train.jsonl", "en/test.jsonl"];
        assert_eq!(
            select(None, "train", &several).unwrap_err(),
            "it has several subsets (\"de\", \"en\"); select one with subset"
        );
        assert_eq!(select(Some("en"), "train", &several).unwrap(), ["en/train.jsonl"]);
        assert_eq!(
            select(Some("fr"), "train", &several).unwrap_err(),
            "it has no subset \"fr\"; it has \"de\", \"en\""
        );
        let reason = select(None, "train", &["rows.csv", "load.py"]).unwrap_err();
        assert!(
            reason.contains("only \"rows.csv\", \"load.py\"") && reason.contains("refs/convert/parquet"),
            "{reason}"
        );
    }

    #[test]
    fn missing_pieces_are_detected() {
        let files = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(missing_piece(&files(&["data/train-00000-of-00001.parquet", "rows.json", "of-x"])), None);
        let lacking = missing_piece(&files(&["data/train-00000-of-00002-ab12.parquet"]));
        assert_eq!(lacking.as_deref(), Some("data/train-00001-of-00002-ab12.parquet"));
        assert_eq!(missing_piece(&files(&["ä-of-3", "-of-999999999999999999999"])).as_deref(), None);
    }
}

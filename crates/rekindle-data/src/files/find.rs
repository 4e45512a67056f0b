//! Resolution of paths, directories and patterns to row files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::saved;
use super::split::{canonical, of_words, split_of};
use crate::error::{Error, Result};

/// Formats of row files, by the endings of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    JsonLines,
    Json,
    Parquet,
    Csv,
    Tsv,
    Arrow,
}

const ENDINGS: [(&str, Kind); 8] = [
    (".jsonl", Kind::JsonLines),
    (".ndjson", Kind::JsonLines),
    (".json", Kind::Json),
    (".parquet", Kind::Parquet),
    (".csv", Kind::Csv),
    (".tsv", Kind::Tsv),
    (".arrow", Kind::Arrow),
    (".feather", Kind::Arrow),
];

/// Endings of compressed files.
const COMPRESSED: [&str; 2] = [".gz", ".zst"];

/// Other endings that only file names have.
const OF_FILES: [&str; 16] = [
    ".txt", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".xlsx", ".xls", ".pkl", ".pickle", ".npy", ".md",
    ".yaml", ".toml",
];

/// JSON files without rows that accompany row files.
const NO_ROWS: [&str; 4] = ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"];

/// The splits to choose in folders, in order of preference.
#[derive(Debug)]
pub(super) struct Choice<'a> {
    pub(super) wanted: Vec<&'a str>,
    /// True if the user named the split.
    pub(super) explicit: bool,
}

impl<'a> Choice<'a> {
    /// Returns the choice of a split that the user named, else of `defaults`.
    pub(super) fn new(split: Option<&'a str>, defaults: &[&'a str]) -> Self {
        let wanted = split.map_or_else(|| defaults.to_vec(), |split| vec![canonical(split).unwrap_or(split)]);
        Self { wanted, explicit: split.is_some() }
    }

    /// Returns the error for a folder without any of them.
    pub(super) fn missing(&self, there: String) -> String {
        let wanted = self.wanted.iter().map(|split| format!("{split:?}")).collect::<Vec<_>>().join(" or ");
        format!("has no split {wanted}; it has {there}; name one of them as split, or name the files")
    }
}

/// Files, and notices about their selection.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) files: Vec<PathBuf>,
    pub(super) notices: Vec<String>,
}

/// Finds the files of `paths`: a file itself, the files of a split of a directory, and the files that match a pattern
/// (`*`, `?`, `[…]`, `**`), the latter two sorted by name.
///
/// # Errors
/// [`Error::Dataset`] for a directory without such files, an invalid pattern or one without a match, or a file that
/// occurs twice; [`Error::Read`] for a directory that cannot be read. The existence of a file is checked when it is
/// opened.
pub(super) fn find(paths: &[PathBuf], choice: &Choice<'_>) -> Result<Found> {
    let mut found = Found::default();
    for path in paths {
        if path.is_dir() {
            in_directory(path, choice, &mut found)?;
        } else if !path.exists() && is_pattern(path) {
            found.files.extend(matching(path)?);
        } else {
            found.files.push(path.clone());
        }
    }
    let mut seen = BTreeSet::new();
    match found.files.iter().find(|file| !seen.insert(*file)) {
        Some(twice) => Err(Error::dataset(twice, "is listed twice; its rows would be used twice")),
        None => Ok(found),
    }
}

fn is_pattern(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains(['*', '?', '[']))
}

/// Returns the format of a row file, by its name.
pub(super) fn kind_of(name: &str) -> Option<Kind> {
    let name = name.to_ascii_lowercase();
    let plain = COMPRESSED.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    let kind = ENDINGS.iter().find(|(ending, _)| plain.ends_with(ending)).map(|(_, kind)| *kind);
    // Parquet is compressed by itself, and is read at any place.
    kind.filter(|kind| *kind != Kind::Parquet || plain.len() == name.len())
}

/// Returns true if a name has the ending of a file: `.jsonl`, `.csv.gz`, `.txt`. Such a name is never searched on the
/// hub.
pub fn is_file_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    kind_of(&name).is_some() || OF_FILES.iter().any(|ending| name.ends_with(ending))
}

/// A row file below a directory.
struct Candidate {
    /// Its path relative to the directory, with `/` as the separator.
    below: String,
    kind: Kind,
}

/// Returns the sorted row files below a directory, and the names at its top for errors. Searches folders named like a
/// split, and `data` and `default`, which contain the rows of repositories.
fn candidates(dir: &Path) -> Result<(Vec<Candidate>, Vec<String>)> {
    let mut found = Vec::new();
    let mut top = Vec::new();
    let mut waiting = vec![String::new()];
    while let Some(folder) = waiting.pop() {
        let path = dir.join(&folder);
        let failed = |source| Error::Read { path: path.clone(), source };
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if folder.is_empty() {
                top.push(name.clone());
            }
            if name.starts_with('.') || NO_ROWS.contains(&name.as_str()) {
                continue;
            }
            let below = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            // Links to folders are not followed: they can lead back.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if ["data", "default"].contains(&name.as_str()) || of_words(&name).is_some() {
                    waiting.push(below);
                }
            } else if let Some(kind) = kind_of(&name) {
                found.push(Candidate { below, kind });
            }
        }
    }
    found.sort_unstable_by(|a, b| a.below.cmp(&b.below));
    top.sort_unstable();
    Ok((found, top))
}

fn in_directory(dir: &Path, choice: &Choice<'_>, found: &mut Found) -> Result<()> {
    if let Some((files, notice)) = saved::find(dir, choice)? {
        found.files.extend(files);
        found.notices.extend(notice);
        return Ok(());
    }
    let (mut all, top) = candidates(dir)?;
    let mut left_out = Vec::new();
    // Tables beside rows in JSON or Parquet are often about them, or the same rows again.
    let first = |kind: Kind| matches!(kind, Kind::JsonLines | Kind::Json | Kind::Parquet);
    if all.iter().any(|file| first(file.kind)) {
        let (rows, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|file| first(file.kind));
        all = rows;
        left_out.extend(others.into_iter().map(|file| file.below));
    }
    if all.is_empty() {
        let there = if top.is_empty() { "nothing".to_owned() } else { listed(&top) };
        let message = format!(
            "the directory has no *.jsonl, *.json, *.parquet, *.csv, *.tsv or *.arrow files, only {there}; name the \
             files"
        );
        return Err(Error::dataset(dir, message));
    }
    let splits: Vec<Option<String>> = all.iter().map(|file| split_of(&file.below)).collect();
    let has = |wanted: &str| splits.iter().any(|split| split.as_deref() == Some(wanted));
    let named: BTreeSet<&str> = splits.iter().filter_map(Option::as_deref).collect();
    if named.is_empty() {
        // Without names of splits all rows are to be trained on, or all to be evaluated.
        if choice.explicit && choice.wanted != ["train"] {
            return Err(Error::dataset(dir, choice.missing("only files without a split in their names".to_owned())));
        }
    }
    let split = match (named.is_empty(), choice.wanted.iter().find(|wanted| has(wanted))) {
        (true, _) => None,
        (false, Some(split)) => Some(*split),
        (false, None) => {
            let named: Vec<_> = named.into_iter().collect();
            return Err(Error::dataset(dir, choice.missing(listed(&named))));
        }
    };
    let mut count = 0;
    for (file, of) in all.iter().zip(&splits) {
        if split.is_none() || of.as_deref() == split {
            count += 1;
            found.files.push(dir.join(&file.below));
        } else {
            left_out.push(file.below.clone());
        }
    }
    if !left_out.is_empty() {
        left_out.sort_unstable();
        let files = crate::counted(count, "file");
        let of = split.map(|split| format!("split {split:?}, ")).unwrap_or_default();
        found.notices.push(format!("{of}{files} of {}; left out: {}", dir.display(), listed(&left_out)));
    }
    Ok(())
}

/// The maximum number of names in a message.
const LISTED: usize = 8;

/// Lists names in quotes, up to a maximum.
pub(super) fn listed(names: &[impl AsRef<str>]) -> String {
    let shown = names.iter().take(LISTED).map(|name| format!("{:?}", name.as_ref())).collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(LISTED) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let text = pattern.to_str().expect("only text is taken for a pattern");
    let paths =
        glob::glob(text).map_err(|error| Error::dataset(pattern, format!("is not a valid file pattern: {error}")))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| Error::Read { path: error.path().to_owned(), source: error.into() })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::dataset(pattern, "no file matches this pattern"));
    }
    files.sort_unstable();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().expect("below the directory")).expect("made");
            std::fs::write(path, "").expect("written");
        }
        dir
    }

    /// Returns the files found for `paths` below the directory, by their names in it.
    fn found(dir: &Path, paths: &[&str]) -> Result<Vec<String>, String> {
        of_split(dir, paths, None, &["train"]).map(|(files, _)| files)
    }

    /// Returns the files of a split, with the notices.
    fn of_split(
        dir: &Path,
        paths: &[&str],
        split: Option<&str>,
        defaults: &[&str],
    ) -> Result<(Vec<String>, Vec<String>), String> {
        let paths: Vec<_> = paths.iter().map(|path| dir.join(path)).collect();
        let below = |path: &PathBuf| path.strip_prefix(dir).expect("below").display().to_string();
        let short =
            |text: String| text.replace(&format!("{}/", dir.display()), "D/").replace(&dir.display().to_string(), "D");
        let found = find(&paths, &Choice::new(split, defaults)).map_err(|error| short(error.to_string()))?;
        Ok((found.files.iter().map(below).collect(), found.notices.into_iter().map(short).collect()))
    }

    const EVAL: [&str; 2] = ["test", "validation"];

    #[test]
    fn the_files_of_a_split_are_found() {
        let dir = scratch(&["train.jsonl", "test.jsonl", "dev.jsonl", "extra.jsonl", "README.md"]);
        let train = of_split(dir.path(), &[""], None, &["train"]).expect("files");
        assert_eq!(train.0, ["train.jsonl"]);
        assert_eq!(
            train.1,
            ["split \"train\", 1 file of D/; left out: \"dev.jsonl\", \"extra.jsonl\", \"test.jsonl\""]
        );
        assert_eq!(of_split(dir.path(), &[""], None, &EVAL).expect("files").0, ["test.jsonl"]);
        assert_eq!(of_split(dir.path(), &[""], Some("val"), &EVAL).expect("files").0, ["dev.jsonl"]);
        // What is named is read.
        assert_eq!(
            of_split(dir.path(), &["test.jsonl", "*.jsonl"], None, &["train"]).expect_err("twice"),
            "D/test.jsonl: is listed twice; its rows would be used twice"
        );
        assert_eq!(
            of_split(dir.path(), &[""], Some("train_sft"), &["train"]).expect_err("none"),
            "D/: has no split \"train_sft\"; it has \"test\", \"train\", \"validation\"; name one of them as split, or name \
             the files"
        );
    }

    #[test]
    fn folders_of_repositories_are_entered() {
        let dir = scratch(&[
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            "data/.cache/train.jsonl",
            "docs/train.jsonl",
            "dataset_infos.json",
        ]);
        let pieces = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        let (files, notices) = of_split(dir.path(), &[""], None, &["train"]).expect("files");
        assert_eq!(files, pieces);
        assert_eq!(notices, ["split \"train\", 2 files of D/; left out: \"data/test-00000-of-00001.parquet\""]);
        let dir = scratch(&["data/train/0000.parquet", "data/train/0001.parquet", "data/validation/0000.parquet"]);
        assert_eq!(found(dir.path(), &[""]).expect("files"), ["data/train/0000.parquet", "data/train/0001.parquet"]);
        assert_eq!(of_split(dir.path(), &["data"], None, &EVAL).expect("files").0, ["data/validation/0000.parquet"]);
        // There are only test files; training on them needs an explicit split.
        let dir = scratch(&["test.csv"]);
        assert!(found(dir.path(), &[""]).expect_err("no train").contains("has no split \"train\"; it has \"test\""));
        assert_eq!(of_split(dir.path(), &[""], Some("test"), &["train"]).expect("files").0, ["test.csv"]);
    }

    #[test]
    fn a_directory_without_names_of_splits_is_one_split() {
        let dir = scratch(&["a.jsonl", "b.jsonl"]);
        for (split, defaults) in [(None, &["train"][..]), (Some("train"), &["train"]), (None, &EVAL)] {
            assert_eq!(of_split(dir.path(), &[""], split, defaults).expect("files").0, ["a.jsonl", "b.jsonl"]);
        }
        let error = of_split(dir.path(), &[""], Some("test"), &["train"]).expect_err("none");
        assert!(
            error.starts_with(
                "D/: has no split \"test\"; it has only files without a split in their \
             names;"
            ),
            "{error}"
        );
    }

    #[test]
    fn tables_beside_rows_are_left_out_and_said() {
        let dir = scratch(&["rows.jsonl", "labels.csv"]);
        let (files, notices) = of_split(dir.path(), &[""], None, &["train"]).expect("files");
        assert_eq!(
            (files, notices),
            (vec!["rows.jsonl".to_owned()], vec!["1 file of D/; left out: \"labels.csv\"".to_owned()])
        );
        let dir = scratch(&["a.csv", "b.tsv", "c.arrow", "d.csv.gz", "e.feather", "f.parquet.gz"]);
        assert_eq!(found(dir.path(), &[""]).expect("files"), ["a.csv", "b.tsv", "c.arrow", "d.csv.gz", "e.feather"]);
    }

    #[test]
    fn names_of_files_are_told_from_names_on_the_hub() {
        for name in
            ["a.jsonl", "A.CSV", "x/y.parquet", "x/y.json.gz", "x/rows.txt", "x/rows.arrow", "x/rows.ndjson", "x/a.zip"]
        {
            assert!(is_file_name(name), "{name}");
        }
        for name in ["org/name", "org/name-v1.5", "org/wiki.en"] {
            assert!(!is_file_name(name), "{name}");
        }
    }

    #[test]
    fn directories_and_patterns_give_their_files_sorted() {
        let dir = scratch(&["b.jsonl", "a.parquet", "c.json.gz", "README.md", ".d.json", "sub/e.jsonl", "[x].jsonl"]);
        assert_eq!(found(dir.path(), &[""]).expect("files"), ["[x].jsonl", "a.parquet", "b.jsonl", "c.json.gz"]);
        assert_eq!(found(dir.path(), &["sub", "?.jsonl"]).expect("files"), ["sub/e.jsonl", "b.jsonl"]);
        assert_eq!(found(dir.path(), &["**/[be].jsonl"]).expect("files"), ["b.jsonl", "sub/e.jsonl"]);
        // An existing file is not a pattern; a missing one is reported when it is opened.
        assert_eq!(found(dir.path(), &["[x].jsonl", "z.jsonl"]).expect("files"), ["[x].jsonl", "z.jsonl"]);
    }

    #[test]
    fn nothing_found_is_an_error() {
        let dir = scratch(&["sub/notes.txt", "empty/x/y", "a.jsonl"]);
        assert_eq!(found(dir.path(), &["*.parquet"]).expect_err("none"), "D/*.parquet: no file matches this pattern");
        assert_eq!(
            found(dir.path(), &["sub"]).expect_err("none"),
            "D/sub: the directory has no *.jsonl, *.json, *.parquet, *.csv, *.tsv or *.arrow files, only \"notes.txt\"; name \
             the files"
        );
        assert_eq!(
            found(dir.path(), &["a.jsonl", "*.jsonl"]).expect_err("twice"),
            "D/a.jsonl: is listed twice; its rows would be used twice"
        );
        let error = found(dir.path(), &["a***b"]).expect_err("not a valid file pattern");
        assert!(error.starts_with("D/a***b: is not a valid file pattern: "), "{error}");
    }
}

//! From what a user writes to files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// How files of rows end.
const ENDINGS: [&str; 7] = [".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"];

/// The files that these are: a file itself, of a directory what ends as rows do, of a pattern (`*`, `?`, `[…]`, `**`) what
/// it matches; each of the latter two sorted by name.
///
/// # Errors
/// [`Error::Dataset`] for a directory without such files, a pattern that matches nothing or is none, a file that comes
/// twice; [`Error::Read`] for a directory that cannot be read. Whether a file exists is seen when it is opened.
pub(crate) fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            files.extend(in_directory(path)?);
        } else if !path.exists() && is_pattern(path) {
            files.extend(matching(path)?);
        } else {
            files.push(path.clone());
        }
    }
    let mut seen = BTreeSet::new();
    match files.iter().find(|file| !seen.insert(*file)) {
        Some(twice) => Err(Error::dataset(twice, "is named twice; its rows would count twice")),
        None => Ok(files),
    }
}

fn is_pattern(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains(['*', '?', '[']))
}

fn in_directory(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::Read { path: dir.to_owned(), source };
    let entries = std::fs::read_dir(dir).map_err(failed)?;
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    names.sort_unstable();
    let rows: Vec<_> =
        names.iter().filter(|name| !name.starts_with('.') && is_file_name(name)).map(|name| dir.join(name)).collect();
    if rows.is_empty() {
        let there = names.iter().take(8).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
        let there = if there.is_empty() { "nothing".to_owned() } else { there };
        let message = format!("the directory has no *.jsonl, *.json or *.parquet in it but {there}; name the files");
        return Err(Error::dataset(dir, message));
    }
    Ok(rows)
}

/// Whether a name ends as files of rows do: `.jsonl`, `.json` or `.parquet`, the first two perhaps with `.gz` or `.zst`.
pub fn is_file_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let text = pattern.to_str().expect("only text is taken for a pattern");
    let paths =
        glob::glob(text).map_err(|error| Error::dataset(pattern, format!("is no pattern of file names: {error}")))?;
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

    /// What `paths` below the directory are, by their names in it.
    fn found(dir: &Path, paths: &[&str]) -> Result<Vec<String>, String> {
        let paths: Vec<_> = paths.iter().map(|path| dir.join(path)).collect();
        let below = |path: &Path| path.strip_prefix(dir).expect("below").display().to_string();
        let files = find(&paths).map_err(|error| error.to_string().replace(&dir.display().to_string(), "D"))?;
        Ok(files.iter().map(|path| below(path)).collect())
    }

    #[test]
    fn directories_and_patterns_give_their_files_sorted() {
        let dir = scratch(&["b.jsonl", "a.parquet", "c.json.gz", "README.md", ".d.json", "sub/e.jsonl", "[x].jsonl"]);
        assert_eq!(found(dir.path(), &[""]).expect("files"), ["[x].jsonl", "a.parquet", "b.jsonl", "c.json.gz"]);
        assert_eq!(found(dir.path(), &["sub", "?.jsonl"]).expect("files"), ["sub/e.jsonl", "b.jsonl"]);
        assert_eq!(found(dir.path(), &["**/[be].jsonl"]).expect("files"), ["b.jsonl", "sub/e.jsonl"]);
        // A file that exists is no pattern, and one that does not is for whoever opens it.
        assert_eq!(found(dir.path(), &["[x].jsonl", "z.jsonl"]).expect("files"), ["[x].jsonl", "z.jsonl"]);
    }

    #[test]
    fn nothing_found_is_an_error() {
        let dir = scratch(&["sub/notes.txt", "empty/x/y", "a.jsonl"]);
        assert_eq!(found(dir.path(), &["*.parquet"]).expect_err("none"), "D/*.parquet: no file matches this pattern");
        assert_eq!(
            found(dir.path(), &["sub"]).expect_err("none"),
            "D/sub: the directory has no *.jsonl, *.json or *.parquet in it but \"notes.txt\"; name the files"
        );
        assert_eq!(
            found(dir.path(), &["a.jsonl", "*.jsonl"]).expect_err("twice"),
            "D/a.jsonl: is named twice; its rows would count twice"
        );
        let error = found(dir.path(), &["a***b"]).expect_err("no pattern");
        assert!(error.starts_with("D/a***b: is no pattern of file names: "), "{error}");
    }
}

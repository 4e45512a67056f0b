//! Splits of a folder, detected from the names of its files as Python's `datasets` does.

/// Splits, each with its words in names of files and folders.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Returns the usual name of a split.
pub(super) fn canonical(word: &str) -> Option<&'static str> {
    SPLITS.iter().find(|(_, words)| words.iter().any(|known| known.eq_ignore_ascii_case(word))).map(|(split, _)| *split)
}

/// Returns the split of a path below a folder, by `NAME-00000-of-00001`, else by a word of a folder or of the file's
/// name. Words are letters between other characters: `my_train2.csv` is of `train`, `contest.csv` of none.
pub(super) fn split_of(path: &str) -> Option<String> {
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    if let Some(numbered) = numbered(name) {
        return Some(canonical(numbered).unwrap_or(numbered).to_owned());
    }
    of_words(folders).or_else(|| of_words(name)).map(str::to_owned)
}

/// Returns the split that a word of a text names.
pub(super) fn of_words(text: &str) -> Option<&'static str> {
    text.split(|character: char| !character.is_alphabetic()).find_map(canonical)
}

/// Returns `NAME` of `NAME-00000-of-00001.parquet`; `data-00000-of-00001.arrow` names no split.
fn numbered(name: &str) -> Option<&str> {
    let (before, after) = name.split_once("-of-")?;
    let (split, number) = before.rsplit_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_numbered = is_number(number) && after.starts_with(|first: char| first.is_ascii_digit());
    (is_numbered && !split.is_empty() && split != "data").then_some(split)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_splits() {
        for (path, split) in [
            ("train.jsonl", Some("train")),
            ("my_train_file_00.csv", Some("train")),
            ("Train.CSV", Some("train")),
            ("train2.csv", Some("train")),
            ("training-v1.json", Some("train")),
            ("dev.jsonl", Some("validation")),
            ("x.valid.jsonl.gz", Some("validation")),
            ("chat val 3.parquet", Some("validation")),
            ("eval.jsonl", Some("test")),
            ("data/test/0000.parquet", Some("test")),
            ("data/train-00000-of-00001.parquet", Some("train")),
            ("data/train-00000-of-00001-ab12.parquet", Some("train")),
            ("data/train_sft-00000-of-00001.parquet", Some("train_sft")),
            ("my-validation/train.csv", Some("validation")),
            ("data-00000-of-00002.arrow", None),
            ("contest.csv", None),
            ("trained.jsonl", None),
            ("heldout.jsonl", None),
            ("evaluations.json", None),
        ] {
            assert_eq!(split_of(path).as_deref(), split, "{path}");
        }
    }
}

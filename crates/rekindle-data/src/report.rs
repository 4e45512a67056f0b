use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::counted;
use crate::error::place;
use crate::row::{RowFormat, RowNumber};

/// The report of loading a dataset; `Display` formats it in one line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LoadReport {
    /// The files, in reading order.
    #[serde(skip)]
    pub files: Vec<PathBuf>,
    /// The formats of the rows.
    pub formats: BTreeSet<RowFormat>,
    /// Rows in the files.
    pub rows: usize,
    /// Examples made from them.
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Labels that count, in all examples.
    pub trained_tokens: usize,
    /// Tokens of the longest row, before truncation.
    pub longest: usize,
    /// The place of that row.
    pub longest_at: Option<RowPlace>,
    /// Rows that were omitted because they were too long, or had no label left after truncation.
    pub dropped: usize,
    /// Rows truncated to `max_seq_length`.
    pub truncated: usize,
    /// Rows split into several examples.
    pub split: usize,
    /// Rows that were omitted because none of their labels counts.
    pub untrained: usize,
    /// Rows of which the chat template omits a part, with `not_shown` as `drop` or `allow`.
    pub not_shown: usize,
    /// True if those were omitted.
    pub not_shown_dropped: bool,
    /// Rows in which a token would span prompt and completion.
    pub joined: usize,
    /// Rows that were omitted because their chosen and rejected answers are the same.
    #[serde(default)]
    pub identical: usize,
    /// In rows of preferences, the number of chosen or desirable answers.
    #[serde(default)]
    pub preferred: Option<usize>,
    /// Rows of prompt and completion as text that do not go through the checkpoint's chat template.
    pub plain_prompts: usize,
    /// The first rows that were omitted, truncated or split.
    pub first_changed: Vec<(RowChange, RowPlace)>,
    /// Notices for the user about the selection of files.
    #[serde(skip)]
    pub notices: Vec<String>,
    /// The use of the cache.
    #[serde(skip)]
    pub cache: CacheUse,
}

/// The use of the cache while a dataset was loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CacheUse {
    /// No cache, or the rows cannot be read twice.
    #[default]
    Off,
    /// The examples are memory-mapped from this file.
    Read(PathBuf),
    /// They were encoded, and written to this file.
    Written(PathBuf),
    /// They were encoded, and could not be written.
    Failed(String),
}

/// The place of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowPlace {
    /// The index of its file.
    pub file: usize,
    /// The line or row number.
    pub row: RowNumber,
}

/// A change of a row during loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowChange {
    /// It was omitted.
    Dropped,
    /// It was truncated.
    Truncated,
    /// It was split into several examples.
    Split,
    /// It was omitted because none of its labels counts.
    Untrained,
    /// The chat template omits a part of it.
    NotShown,
    /// Prompt and completion were encoded separately.
    Joined,
    /// It was omitted because its chosen and rejected answers are the same.
    Identical,
}

/// The note about rows whose prompt does not end at a token border, for example in a space.
const JOINED: &str = "encoded with prompt and answer separately, because one token would span both (a prompt should \
     not end in a space)";

/// The maximum number of rows to name for each change.
const NAMED: usize = 3;

impl LoadReport {
    /// Counts a changed row.
    pub(crate) fn changed(&mut self, change: RowChange, at: RowPlace) {
        let count = match change {
            RowChange::Dropped => &mut self.dropped,
            RowChange::Truncated => &mut self.truncated,
            RowChange::Split => &mut self.split,
            RowChange::Untrained => &mut self.untrained,
            RowChange::NotShown => &mut self.not_shown,
            RowChange::Joined => &mut self.joined,
            RowChange::Identical => &mut self.identical,
        };
        *count += 1;
        if *count <= NAMED {
            self.first_changed.push((change, at));
        }
    }

    /// Returns the place of a row, without the file if there is only one.
    fn place(&self, at: RowPlace) -> String {
        match self.files.get(at.file).filter(|_| self.files.len() > 1) {
            Some(path) => place(path, at.row),
            None => at.row.to_string(),
        }
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let formats = self.formats.iter().map(RowFormat::to_string).collect::<Vec<_>>().join("; ");
        f.write_str(&counted(self.rows, "row"))?;
        if self.files.len() > 1 {
            write!(f, " of {} files", self.files.len())?;
        }
        write!(
            f,
            " ({formats}), {}, {} trained; longest row {}",
            counted(self.tokens, "token"),
            self.trained_tokens,
            self.longest
        )?;
        if let Some(at) = self.longest_at {
            write!(f, " ({})", self.place(at))?;
        }
        let not_shown = match self.not_shown_dropped {
            true => "dropped because the chat template does not render them completely",
            false => "trained without the parts that the chat template does not render",
        };
        let counts = [
            (RowChange::Dropped, self.dropped, "dropped"),
            (RowChange::Truncated, self.truncated, "truncated"),
            (RowChange::Split, self.split, "split"),
            (RowChange::Untrained, self.untrained, "dropped because they have no token to train"),
            (RowChange::NotShown, self.not_shown, not_shown),
            (RowChange::Joined, self.joined, JOINED),
            (RowChange::Identical, self.identical, "dropped because chosen and rejected are the same"),
        ];
        for (change, count, what) in counts.into_iter().filter(|(_, count, _)| *count > 0) {
            let first = self.first_changed.iter().filter(|(other, _)| *other == change);
            let first: Vec<_> = first.map(|(_, at)| self.place(*at)).collect();
            let more = if count > first.len() { ", …" } else { "" };
            write!(f, "; {count} {what} ({}{more})", first.join(", "))?;
        }
        if let Some(preferred) = self.preferred.filter(|_| self.formats.contains(&RowFormat::LabelledCompletion)) {
            write!(f, "; {preferred} desirable and {} undesirable", self.examples - preferred)?;
        }
        if self.split > 0 {
            write!(f, "; {}", counted(self.examples, "example"))?;
        }
        if self.plain_prompts > 0 {
            let rows = if self.plain_prompts == 1 { "row has its" } else { "rows have their" };
            write!(
                f,
                "; {} {rows} prompt and completion as plain text: the chat template is not applied; for chats, write \
                 them as messages or map their columns to instruction and output",
                self.plain_prompts
            )?;
        }
        self.notices.iter().try_for_each(|notice| write!(f, "; {notice}"))?;
        match &self.cache {
            CacheUse::Read(_) => f.write_str("; from the cache"),
            CacheUse::Failed(why) => write!(f, "; not cached: {why}"),
            CacheUse::Off | CacheUse::Written(_) => Ok(()),
        }
    }
}

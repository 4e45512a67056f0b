use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::counted;
use crate::error::place;
use crate::row::{RowFormat, RowNumber};

/// What loading a dataset found and did; `Display` gives it in one line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LoadReport {
    /// The files, in the order in which they were read.
    #[serde(skip)]
    pub files: Vec<PathBuf>,
    /// The shapes of rows that occur.
    pub formats: BTreeSet<RowFormat>,
    /// Rows in the files.
    pub rows: usize,
    /// Examples made of them.
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Labels that count, of all examples.
    pub trained_tokens: usize,
    /// Tokens of the longest row, before anything was cut.
    pub longest: usize,
    /// Where that row is.
    pub longest_at: Option<RowPlace>,
    /// Rows left out because they were too long, or because truncation left nothing to learn of them.
    pub dropped: usize,
    /// Rows cut at `max_seq_length`.
    pub truncated: usize,
    /// Rows made into several examples.
    pub split: usize,
    /// Rows left out because no label of them counts.
    pub untrained: usize,
    /// Rows of which the chat template leaves something out, with `not_shown` as `drop` or `allow`.
    pub not_shown: usize,
    /// True if those were left out.
    pub not_shown_dropped: bool,
    /// Rows in which one token would span what is given and what is learned.
    pub joined: usize,
    /// Rows of a prompt and a completion as text, which the checkpoint's chat template does not show.
    pub plain_prompts: usize,
    /// The first of the rows that were left out, truncated or split.
    pub first_changed: Vec<(Change, RowPlace)>,
    /// What the user should be told of how the files were found.
    #[serde(skip)]
    pub notices: Vec<String>,
    /// What happened to the cache.
    #[serde(skip)]
    pub cache: CacheUse,
}

/// How the cache was used while a dataset was loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CacheUse {
    /// There is none, or the rows cannot be read twice.
    #[default]
    Off,
    /// The examples are memory-mapped from this file.
    Read(PathBuf),
    /// They were encoded, and written to this file.
    Written(PathBuf),
    /// They were encoded, and could not be written.
    Failed(String),
}

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowPlace {
    /// The index of its file.
    pub file: usize,
    /// The line or row in it.
    pub row: RowNumber,
}

/// What happened to a row that was not taken as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It was left out.
    Dropped,
    /// It was cut.
    Truncated,
    /// It became several examples.
    Split,
    /// It was left out because no label of it counts.
    Untrained,
    /// The chat template does not show all of it.
    NotShown,
    /// What is given and what is learned were encoded apart.
    Joined,
}

/// Said of rows whose prompt ends where no token does, in a space for example.
const JOINED: &str = "encoded with prompt and answer apart, where one token would span both (a prompt should not end in a \
                      space)";

/// How many rows of each change are named.
const NAMED: usize = 3;

impl LoadReport {
    /// Counts a row that was changed.
    pub(crate) fn changed(&mut self, change: Change, at: RowPlace) {
        let count = match change {
            Change::Dropped => &mut self.dropped,
            Change::Truncated => &mut self.truncated,
            Change::Split => &mut self.split,
            Change::Untrained => &mut self.untrained,
            Change::NotShown => &mut self.not_shown,
            Change::Joined => &mut self.joined,
        };
        *count += 1;
        if *count <= NAMED {
            self.first_changed.push((change, at));
        }
    }

    /// Where a row is; the file is left out where there is only one.
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
            true => "dropped because the chat template does not show all of them",
            false => "trained without what the chat template does not show",
        };
        let counts = [
            (Change::Dropped, self.dropped, "dropped"),
            (Change::Truncated, self.truncated, "truncated"),
            (Change::Split, self.split, "split"),
            (Change::Untrained, self.untrained, "dropped with nothing to train"),
            (Change::NotShown, self.not_shown, not_shown),
            (Change::Joined, self.joined, JOINED),
        ];
        for (change, count, what) in counts.into_iter().filter(|(_, count, _)| *count > 0) {
            let first = self.first_changed.iter().filter(|(other, _)| *other == change);
            let first: Vec<_> = first.map(|(_, at)| self.place(*at)).collect();
            let more = if count > first.len() { ", …" } else { "" };
            write!(f, "; {count} {what} ({}{more})", first.join(", "))?;
        }
        if self.split > 0 {
            write!(f, "; {}", counted(self.examples, "example"))?;
        }
        if self.plain_prompts > 0 {
            let rows = if self.plain_prompts == 1 { "row has its" } else { "rows have their" };
            write!(
                f,
                "; {} {rows} prompt and completion as plain text: the chat template is not applied; for chats, map their \
                 columns to instruction and output",
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

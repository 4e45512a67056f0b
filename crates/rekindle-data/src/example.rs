//! An encoded row: token ids and labels.

use std::path::Path;

use crate::row::RowNumber;

/// The label of a position that the loss does not cover.
pub const IGNORED: i32 = -100;

/// An encoded row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Example<'a> {
    /// Token ids.
    pub input_ids: &'a [u32],
    /// For each id, the same id if the loss covers it, else [`IGNORED`]. `labels[i]` is predicted from the tokens
    /// before `i`, so the first never counts.
    pub labels: &'a [i32],
    /// The line or row in its file.
    pub row: RowNumber,
    /// The file.
    pub path: &'a Path,
    /// In rows of preferences, true for a chosen or desirable answer.
    pub preferred: Option<bool>,
    /// The margin of its pair, if rows for a reward model have margins.
    pub margin: Option<f32>,
}

impl Example<'_> {
    /// Returns the number of labels that count.
    pub fn trained_tokens(&self) -> usize {
        counted(self.labels)
    }
}

/// An encoded row with owned data, like [`Example`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) labels: Vec<i32>,
    pub(crate) line: usize,
    pub(crate) notes: RowNotes,
    /// In rows of preferences, true for a chosen or desirable answer.
    pub(crate) preferred: Option<bool>,
}

/// Notes about the encoding of a row, for the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RowNotes {
    /// True if a token would span prompt and completion.
    pub(crate) joined: bool,
    /// True if the template omits a part of the row.
    pub(crate) not_shown: bool,
}

impl Encoded {
    /// Returns the number of labels that count.
    pub(crate) fn trained_tokens(&self) -> usize {
        counted(&self.labels)
    }
}

fn counted(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != IGNORED).count()
}

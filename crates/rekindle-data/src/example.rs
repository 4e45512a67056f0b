//! An encoded row: token ids and labels.

use std::path::Path;

use crate::row::RowNumber;

/// The label of a position that does not count in the loss.
pub const IGNORED: i32 = -100;

/// A row as a model takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example<'a> {
    /// Token ids.
    pub input_ids: &'a [u32],
    /// Beside each id the same id where it is learned, else [`IGNORED`]. `labels[i]` is predicted from the tokens before
    /// `i`; the first never counts.
    pub labels: &'a [i32],
    /// The line or row of the file that it comes from.
    pub row: RowNumber,
    /// The file.
    pub path: &'a Path,
}

impl Example<'_> {
    /// How many labels count.
    pub fn trained_tokens(&self) -> usize {
        counted(self.labels)
    }
}

/// A row that was just encoded; as [`Example`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) labels: Vec<i32>,
    pub(crate) line: usize,
    pub(crate) notes: RowNotes,
}

/// What happened to a row while it was encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RowNotes {
    /// A token would span what is given and what is learned.
    pub(crate) joined: bool,
    /// The template leaves something of it out.
    pub(crate) not_shown: bool,
}

impl Encoded {
    /// How many labels count.
    pub(crate) fn trained_tokens(&self) -> usize {
        counted(&self.labels)
    }
}

fn counted(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != IGNORED).count()
}

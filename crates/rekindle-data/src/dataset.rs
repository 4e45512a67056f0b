use std::path::PathBuf;
use std::sync::Arc;

use crate::example::{Encoded, Example};
use crate::options::RowTask;
use crate::row::RowNumber;

mod load;

pub(crate) use load::load;

/// Encoded rows, in the order of their files.
#[derive(Debug, Clone)]
pub struct Dataset {
    examples: Arc<dyn Examples>,
    /// The indices of its examples, if they are not all of the stored ones.
    part: Option<Arc<[usize]>>,
    files: Vec<PathBuf>,
    fingerprint: String,
    task: RowTask,
}

impl Dataset {
    pub(crate) fn new(
        examples: impl Examples + 'static,
        files: Vec<PathBuf>,
        fingerprint: String,
        task: RowTask,
    ) -> Self {
        Dataset { examples: Arc::new(examples), part: None, files, fingerprint, task }
    }

    /// Returns the kind of rows that the examples are from. Those of a pair are at 2i (chosen) and 2i + 1.
    pub fn task(&self) -> RowTask {
        self.task
    }

    /// Returns the number of examples.
    #[allow(clippy::len_without_is_empty, reason = "loading refuses a dataset without examples")]
    pub fn len(&self) -> usize {
        self.part.as_ref().map_or_else(|| self.examples.ends().len(), |part| part.len())
    }

    /// Returns the SHA-256, in hexadecimal, of everything that the examples are made from: the bytes of the row files
    /// (without their paths), the tokenizer's files, the columns and the options. A resumed run on a dataset with the
    /// same fingerprint continues with the same examples.
    ///
    /// A template that inserts the date inserts that of the day of encoding, which is not included.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns an example.
    ///
    /// # Panics
    /// Panics if `index` is out of range.
    pub fn example(&self, index: usize) -> Example<'_> {
        let index = self.part.as_ref().map_or(index, |part| part[index]);
        let ends = self.examples.ends();
        let range = index.checked_sub(1).map_or(0, |before| ends[before] as usize)..ends[index] as usize;
        Example {
            input_ids: &self.examples.input_ids()[range.clone()],
            labels: &self.examples.labels()[range],
            row: unpack(self.examples.rows()[index]),
            path: &self.files[self.examples.files()[index] as usize],
            preferred: self.examples.preferred().get(index).map(|preferred| *preferred != 0),
            margin: self.examples.margins().get(index).copied(),
        }
    }

    /// Returns all examples, in order.
    pub fn examples(&self) -> impl ExactSizeIterator<Item = Example<'_>> + Clone {
        (0..self.len()).map(|index| self.example(index))
    }

    /// Returns a dataset of the examples at `indices`.
    pub(crate) fn with_examples(&self, indices: Vec<usize>, fingerprint: String) -> Self {
        let at = |index: usize| self.part.as_ref().map_or(index, |part| part[index]);
        let part = indices.into_iter().map(at).collect();
        Dataset { part: Some(part), fingerprint, ..self.clone() }
    }

    /// Returns the arrays of all stored examples, including those outside the selection.
    pub(crate) fn arrays(&self) -> &dyn Examples {
        &*self.examples
    }
}

/// All examples concatenated, in memory or in a mapped file.
pub(crate) trait Examples: std::fmt::Debug + Send + Sync {
    fn input_ids(&self) -> &[u32];
    fn labels(&self) -> &[i32];
    /// Returns the end of each example.
    fn ends(&self) -> &[u64];
    /// Returns the index of each example's file.
    fn files(&self) -> &[u32];
    /// Returns each example's row in its file, as [`pack`] encodes it.
    fn rows(&self) -> &[u64];
    /// Returns 1 for each chosen or desirable answer and 0 for others; empty if rows are not preferences.
    fn preferred(&self) -> &[u8];
    /// Returns the margin of each example's pair; empty if no row has one.
    fn margins(&self) -> &[f32];
}

#[derive(Debug, Default)]
pub(crate) struct InMemory {
    input_ids: Vec<u32>,
    labels: Vec<i32>,
    ends: Vec<u64>,
    files: Vec<u32>,
    rows: Vec<u64>,
    preferred: Vec<u8>,
    margins: Vec<f32>,
}

impl InMemory {
    fn push(&mut self, example: &Encoded, file: usize, row: RowNumber) {
        self.input_ids.extend_from_slice(&example.input_ids);
        self.labels.extend_from_slice(&example.labels);
        self.ends.push(self.input_ids.len() as u64);
        self.files.push(u32::try_from(file).expect("fewer files than 2^32"));
        self.rows.push(pack(row));
        self.preferred.extend(example.preferred.map(u8::from));
    }

    /// Adds the margin of the last `examples`. Those before the first row with a margin have 0.
    fn push_margin(&mut self, margin: Option<f32>, examples: usize) {
        if margin.is_some() || !self.margins.is_empty() {
            self.margins.resize(self.ends.len() - examples, 0.0);
            self.margins.resize(self.ends.len(), margin.unwrap_or(0.0));
        }
    }
}

impl Examples for InMemory {
    fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    fn labels(&self) -> &[i32] {
        &self.labels
    }

    fn ends(&self) -> &[u64] {
        &self.ends
    }

    fn files(&self) -> &[u32] {
        &self.files
    }

    fn rows(&self) -> &[u64] {
        &self.rows
    }

    fn preferred(&self) -> &[u8] {
        &self.preferred
    }

    fn margins(&self) -> &[f32] {
        &self.margins
    }
}

/// Encodes a row's number: doubled, plus one if it is not a line.
fn pack(row: RowNumber) -> u64 {
    row.get() as u64 * 2 + u64::from(matches!(row, RowNumber::Row(_)))
}

fn unpack(packed: u64) -> RowNumber {
    let number = (packed / 2) as usize;
    if packed % 2 == 1 { RowNumber::Row(number) } else { RowNumber::Line(number) }
}

#[cfg(test)]
mod tests;

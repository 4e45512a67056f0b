use std::path::PathBuf;
use std::sync::Arc;

use crate::example::{Encoded, Example};
use crate::row::RowNumber;

mod load;

pub(crate) use load::load;

/// Encoded rows, in the order of their files.
#[derive(Debug, Clone)]
pub struct Dataset {
    examples: Arc<dyn Examples>,
    /// The examples that are part of it, where those are not all.
    part: Option<Arc<[usize]>>,
    files: Vec<PathBuf>,
    fingerprint: String,
}

impl Dataset {
    pub(crate) fn new(examples: impl Examples + 'static, files: Vec<PathBuf>, fingerprint: String) -> Self {
        Dataset { examples: Arc::new(examples), part: None, files, fingerprint }
    }

    /// How many examples there are.
    #[allow(clippy::len_without_is_empty, reason = "loading refuses a dataset without examples")]
    pub fn len(&self) -> usize {
        self.part.as_ref().map_or_else(|| self.examples.ends().len(), |part| part.len())
    }

    /// SHA-256, in hexadecimal, of all that the examples are made from: the bytes of the files, wherever they lie, the
    /// tokenizer's, the columns and the options. A run that is resumed on the same one goes on with the same examples.
    ///
    /// A template that writes the date writes that of the day on which the rows were encoded, which is no part of it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// An example.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn example(&self, index: usize) -> Example<'_> {
        let index = self.part.as_ref().map_or(index, |part| part[index]);
        let ends = self.examples.ends();
        let range = index.checked_sub(1).map_or(0, |before| ends[before] as usize)..ends[index] as usize;
        Example {
            input_ids: &self.examples.input_ids()[range.clone()],
            labels: &self.examples.labels()[range],
            row: unpack(self.examples.rows()[index]),
            path: &self.files[self.examples.files()[index] as usize],
        }
    }

    /// All examples, in order.
    pub fn examples(&self) -> impl ExactSizeIterator<Item = Example<'_>> + Clone {
        (0..self.len()).map(|index| self.example(index))
    }

    /// The same examples without those that are not at `indices`.
    pub(crate) fn with_examples(&self, indices: Vec<usize>, fingerprint: String) -> Self {
        let at = |index: usize| self.part.as_ref().map_or(index, |part| part[index]);
        let part = indices.into_iter().map(at).collect();
        Dataset { part: Some(part), fingerprint, ..self.clone() }
    }

    /// The arrays of all examples, also of those that are not part of it.
    pub(crate) fn arrays(&self) -> &dyn Examples {
        &*self.examples
    }
}

/// All examples one behind the other, in memory or in a mapped file.
pub(crate) trait Examples: std::fmt::Debug + Send + Sync {
    fn input_ids(&self) -> &[u32];
    fn labels(&self) -> &[i32];
    /// Where each ends.
    fn ends(&self) -> &[u64];
    /// The index of the file of each.
    fn files(&self) -> &[u32];
    /// The row of each in it, as [`pack`] writes it.
    fn rows(&self) -> &[u64];
}

#[derive(Debug, Default)]
pub(crate) struct InMemory {
    input_ids: Vec<u32>,
    labels: Vec<i32>,
    ends: Vec<u64>,
    files: Vec<u32>,
    rows: Vec<u64>,
}

impl InMemory {
    fn push(&mut self, example: &Encoded, file: usize, row: RowNumber) {
        self.input_ids.extend_from_slice(&example.input_ids);
        self.labels.extend_from_slice(&example.labels);
        self.ends.push(self.input_ids.len() as u64);
        self.files.push(u32::try_from(file).expect("fewer files than 2^32"));
        self.rows.push(pack(row));
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
}

/// A row's number times two, and one for what is no line.
fn pack(row: RowNumber) -> u64 {
    row.get() as u64 * 2 + u64::from(matches!(row, RowNumber::Row(_)))
}

fn unpack(packed: u64) -> RowNumber {
    let number = (packed / 2) as usize;
    if packed % 2 == 1 { RowNumber::Row(number) } else { RowNumber::Line(number) }
}

#[cfg(test)]
mod tests;

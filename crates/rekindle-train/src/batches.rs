//! Batches of examples for a loss.

use rekindle_data::{Dataset, Example, RowTask};
use rekindle_models::{Answer, Batch, IGNORED};

use crate::reference::ReferenceLogProbs;
use crate::{Method, SftConfig};

/// A builder of batches of a dataset's examples, with what the loss of a method needs to know of them.
#[derive(Clone, Copy, Debug)]
pub struct Batches<'a> {
    dataset: &'a Dataset,
    method: &'a Method,
    /// The number of rows whose answers are exchanged for mismatched ones.
    rotation: usize,
    /// The maximum length of a document.
    max_seq_length: usize,
    /// The log-probabilities of the reference model, if they are not computed in each step.
    reference: Option<&'a ReferenceLogProbs>,
}

impl<'a> Batches<'a> {
    /// Returns a builder for the method of `config`. `max_seq_length` is the maximum length of a document.
    pub fn new(dataset: &'a Dataset, config: &'a SftConfig, max_seq_length: usize) -> Self {
        let rotation = config.rows_per_step();
        Self { dataset, method: &config.method, rotation, max_seq_length, reference: None }
    }

    /// Returns the method.
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// Adds log-probabilities of the reference model to the batches.
    pub(crate) fn reference(self, reference: Option<&'a ReferenceLogProbs>) -> Self {
        Self { reference, ..self }
    }

    /// Returns a batch of the examples at `indices`; the first is row `first_row` of the optimizer step. The examples of a
    /// pair must be together, the chosen one first.
    pub fn batch(&self, indices: &[usize], first_row: usize) -> Batch {
        let examples = || indices.iter().map(|&index| self.dataset.example(index));
        let mut batch = batch(examples(), first_row);
        if self.method.task() == RowTask::Sft {
            return batch;
        }
        batch.answers = self.answers(indices, |reference| &reference.answers);
        if self.method.task() == RowTask::ScoredPairs {
            let margins = indices.iter().step_by(2).map(|&index| self.dataset.example(index).margin);
            batch.margins = margins.flatten().map(f64::from).collect();
        }
        if self.method.covers_prompts() {
            cover_prompts(&mut batch);
        }
        if self.method.needs_mismatched() {
            let rows: Vec<_> = indices.iter().map(|&index| self.mismatched(index)).collect();
            let rows = rows.iter().map(|(ids, labels)| (&ids[..], &labels[..]));
            let answers = self.answers(indices, |reference| &reference.mismatched);
            batch.mismatched = Some(Box::new(Batch { answers, ..Batch::from_rows(rows, first_row as u32) }));
        }
        batch
    }

    /// Returns a batch of examples with the numbers that they have within the optimizer step.
    pub(crate) fn batch_with_rows(&self, indices: &[usize], rows: &[u32]) -> Batch {
        let mut batch = self.batch(indices, 0);
        batch.rows = rows.to_vec();
        if let Some(mismatched) = &mut batch.mismatched {
            mismatched.rows = rows.to_vec();
        }
        batch
    }

    /// Returns the number of tokens of an example.
    pub(crate) fn tokens(&self, index: usize) -> usize {
        self.dataset.example(index).input_ids.len()
    }

    fn answers(&self, indices: &[usize], of: impl Fn(&ReferenceLogProbs) -> &Vec<f64>) -> Vec<Answer> {
        let answer = |&index: &usize| Answer {
            preferred: self.dataset.example(index).preferred == Some(true),
            reference: self.reference.map(|reference| of(reference)[index]),
        };
        indices.iter().map(answer).collect()
    }

    /// Returns the prompt of an example with the answer to the example before it, within consecutive groups of `rotation`
    /// examples; the first of a group has the answer of the last, as in TRL.
    fn mismatched(&self, index: usize) -> (Vec<u32>, Vec<i32>) {
        let first = index - index % self.rotation;
        let last = (first + self.rotation).min(self.dataset.len()) - 1;
        let other = self.dataset.example(if index == first { last } else { index - 1 });
        let own = self.dataset.example(index);
        let (prompt, answer) = (prompt_length(&own), prompt_length(&other));
        let ids = own.input_ids[..prompt].iter().chain(&other.input_ids[answer..]);
        let labels = own.labels[..prompt].iter().chain(&other.labels[answer..]);
        (ids.take(self.max_seq_length).copied().collect(), labels.take(self.max_seq_length).copied().collect())
    }
}

/// Returns the number of tokens before the first one that the loss covers.
fn prompt_length(example: &Example<'_>) -> usize {
    let first = example.labels.iter().skip(1).position(|&label| label != IGNORED);
    first.map_or(example.labels.len(), |first| first + 1)
}

/// Gives every token of chosen documents a target.
fn cover_prompts(batch: &mut Batch) {
    batch.prompt_targets = vec![false; batch.tokens()];
    let documents: Vec<_> = batch.documents().zip(&batch.answers).filter(|(_, answer)| answer.preferred).collect();
    let documents: Vec<_> = documents.into_iter().map(|(document, _)| document).collect();
    for token in documents.into_iter().flat_map(|document| document.start..document.end.saturating_sub(1)) {
        if batch.targets[token] == IGNORED {
            batch.targets[token] = batch.input_ids[token + 1] as i32;
            batch.prompt_targets[token] = true;
        }
    }
}

/// Returns a batch of examples whose first is row `first_row` of the optimizer step.
pub(crate) fn batch<'a>(examples: impl Iterator<Item = Example<'a>>, first_row: usize) -> Batch {
    Batch::from_rows(examples.map(|e| (e.input_ids, e.labels)), first_row as u32)
}

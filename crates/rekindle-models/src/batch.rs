//! Batches: concatenated documents.

/// The label of a token that the loss ignores.
pub const IGNORED: i32 = -100;

/// A document's place in a preference, for losses that compare documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// True for a chosen or desirable answer, false for a rejected or undesirable one.
    pub preferred: bool,
    /// The sum of the reference model's log-probabilities of the answer, if it was computed before.
    pub reference: Option<f64>,
}

/// The completion of a document that a model has sampled, for losses of policy gradients.
///
/// Lists of log-probabilities have a value for each target of the document, in order; the loss takes the document's targets as
/// the tokens of the completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledCompletion {
    /// The advantage, which every token has.
    pub advantage: f64,
    /// The mean number of targets of the completions that were sampled together with this one.
    pub mean_tokens: f64,
    /// Log-probabilities of the model that sampled, as a training pass computes them; `None` if it is the model of this step.
    pub old_log_probs: Option<Vec<f32>>,
    /// Log-probabilities that the sampler computed, at the same temperature; `None` if they are unknown.
    pub sampler_log_probs: Option<Vec<f32>>,
    /// Log-probabilities of the reference model; `None` if they are not computed yet.
    pub reference_log_probs: Option<Vec<f32>>,
}

/// One or more concatenated documents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub input_ids: Vec<u32>,
    /// The target of each token: the label of the next token in its document, or [`IGNORED`].
    pub targets: Vec<i32>,
    /// The cumulative lengths of the documents, from 0 to the number of tokens, `[documents + 1]`.
    pub cu_seqlens: Vec<u32>,
    /// The position of each token in its document, `[tokens]`.
    pub positions: Vec<u32>,
    /// The number of each document within the optimizer step, which dropout depends on.
    pub rows: Vec<u32>,
    /// The place of each document in its preference, `[documents]`; empty for losses that compare no documents.
    pub answers: Vec<Answer>,
    /// The sampled completion of each document, `[documents]`; empty for losses that need none.
    pub completions: Vec<SampledCompletion>,
    /// The margin of each pair in the loss of a reward model, `[documents / 2]`; empty if there are none.
    pub margins: Vec<f64>,
    /// True for targets of prompts, which only the negative log-likelihood of a preference loss reads, `[tokens]`; empty if
    /// there are none.
    pub prompt_targets: Vec<bool>,
    /// The prompts of this batch with answers to other prompts, for losses that compare with unrelated answers.
    pub mismatched: Option<Box<Self>>,
}

impl Batch {
    /// Returns a batch of `(input_ids, labels)` documents.
    ///
    /// `labels[i]` stands beside `input_ids[i]` and is predicted from the tokens before i, so a document's
    /// first label never counts. `first_row` is the number of the first document within the optimizer step.
    ///
    /// # Panics
    /// When a document's labels are not as many as its ids.
    pub fn from_rows<'a>(documents: impl IntoIterator<Item = (&'a [u32], &'a [i32])>, first_row: u32) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], ..Self::default() };
        for (number, (ids, labels)) in documents.into_iter().enumerate() {
            assert_eq!(ids.len(), labels.len(), "one label for every token");
            batch.input_ids.extend_from_slice(ids);
            batch.targets.extend(labels.iter().skip(1));
            if !ids.is_empty() {
                batch.targets.push(IGNORED);
            }
            batch.positions.extend(0..ids.len() as u32);
            batch.cu_seqlens.push(batch.input_ids.len() as u32);
            batch.rows.push(first_row + number as u32);
        }
        batch
    }

    /// Returns the number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Returns the number of tokens in the loss.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORED).count()
    }

    /// Returns true if there is a reference log-probability for every document.
    pub fn has_references(&self) -> bool {
        let of_answers = !self.answers.is_empty() && self.answers.iter().all(|answer| answer.reference.is_some());
        let mut of_completions = self.completions.iter().map(|completion| completion.reference_log_probs.is_some());
        of_answers || !self.completions.is_empty() && of_completions.all(|is_known| is_known)
    }

    /// Returns true if the target at `token` is one of a document's answer.
    pub(crate) fn is_answer(&self, token: usize) -> bool {
        self.targets[token] != IGNORED && !self.prompt_targets.get(token).is_some_and(|is_prompt| *is_prompt)
    }

    /// Returns the documents as batches of their own, each with its number within the step.
    pub fn split(&self) -> impl Iterator<Item = Self> + '_ {
        self.documents().zip(&self.rows).map(|(range, &row)| Self {
            input_ids: self.input_ids[range.clone()].to_vec(),
            targets: self.targets[range.clone()].to_vec(),
            cu_seqlens: vec![0, range.len() as u32],
            positions: self.positions[range].to_vec(),
            rows: vec![row],
            ..Self::default()
        })
    }

    /// Returns the token ranges of the documents.
    pub fn documents(&self) -> impl Iterator<Item = core::ops::Range<usize>> + '_ {
        self.cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_to_the_token_that_predicts_them() {
        let batch = Batch::from_rows([(&[5, 6, 7][..], &[5, -100, 7][..]), (&[8], &[8]), (&[1, 2], &[1, 2])], 4);
        assert_eq!(batch.targets, [-100, 7, -100, -100, 2, -100]);
        assert_eq!(batch.cu_seqlens, [0, 3, 4, 6]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 1]);
        assert_eq!(batch.rows, [4, 5, 6]);
        assert_eq!(batch.counted(), 2);
        let last = batch.split().last().unwrap();
        assert_eq!(last, Batch::from_rows([(&[1, 2][..], &[1, 2][..])], 6));
    }
}

//! Scores of documents: the forward and the backward of a reward model.
//!
//! The score of a document is r = w·h with the score head w `[1, hidden]` and the normalized hidden state h `[hidden]` of
//! its last token. The head's products are a few dot products, which are computed on the host in f64; the hidden states
//! of the last tokens and their gradients are all that moves between device and host.

use rekindle_kernels::{Grads, Tensor, embedding, from_f32, to_f32};

use crate::loss::{ApplyGradients, ForwardPass};
use crate::objective::ScoreObjective;
use crate::objective::{BatchLoss, PendingLoss};
use crate::{Batch, CausalLm, Error, StepKey};

/// The scores of a batch, with what their backward needs.
struct Scores {
    /// The score of each document, `[documents]`.
    values: Vec<f64>,
    /// The positions of the tokens that are scored, `[documents]`.
    positions: Vec<usize>,
    /// The hidden states at these positions, `[documents, hidden]`.
    hidden: Vec<f32>,
    /// The score head, `[hidden]`.
    head: Vec<f32>,
}

impl CausalLm {
    /// Returns true for a reward model, whose head is a score instead of the vocabulary.
    pub fn has_score_head(&self) -> bool {
        self.config.has_score_head()
    }

    /// Returns the score of each document of `batch`. No dropout, and nothing is saved for a backward.
    ///
    /// The score is that of the last token other than `pad_token_id` of `config.json`, as in transformers' sequence
    /// classification.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Argument`] for a model without a score head.
    pub fn scores(&self, batch: &Batch) -> Result<Vec<f64>, Error> {
        self.check_score_head()?;
        let hidden = self.hidden(batch, true)?;
        let scores = self.scores_at(&hidden, batch).values;
        self.device().check()?;
        Ok(scores)
    }

    /// Adds the gradients of `scale` · loss of `batch` to `grads`.
    pub(crate) fn score_backward(
        &self,
        objective: &dyn ScoreObjective,
        batch: &Batch,
        scale: f32,
        grads: &mut Grads,
        key: Option<StepKey>,
    ) -> Result<PendingLoss, Error> {
        self.check_score_head()?;
        let pass = self.forward(batch, key)?;
        let (loss, d_hidden) = self.score_loss_and_backward_head(objective, &pass, batch, scale, grads);
        self.backward_decoder(pass, d_hidden, grads);
        self.device().check()?;
        Ok(PendingLoss::known(loss))
    }

    /// [`score_backward`](Self::score_backward) that applies gradients layer by layer.
    pub(crate) fn score_backward_applying(
        &mut self,
        objective: &dyn ScoreObjective,
        batch: &Batch,
        scale: f32,
        key: Option<StepKey>,
        apply: ApplyGradients<'_>,
    ) -> Result<PendingLoss, Error> {
        self.check_score_head()?;
        let mut grads = self.grads_by_layer();
        let pass = self.forward(batch, key)?;
        let (loss, d_hidden) = self.score_loss_and_backward_head(objective, &pass, batch, scale, &mut grads);
        self.backward_decoder_applying(pass, d_hidden, grads, apply);
        self.device().check()?;
        Ok(PendingLoss::known(loss))
    }

    /// Returns the loss of `batch` without dropout and without a backward.
    pub(crate) fn score_loss(&self, objective: &dyn ScoreObjective, batch: &Batch) -> Result<BatchLoss, Error> {
        Ok(objective.loss(batch, &self.scores(batch)?).0)
    }

    /// The loss and the gradient to the hidden states; adds that of the head.
    ///
    /// # Gradients
    /// With g = ∂loss/∂r of each document: dw = Σ g·h, dh = g·w at the scored tokens and 0 elsewhere.
    fn score_loss_and_backward_head(
        &self,
        objective: &dyn ScoreObjective,
        pass: &ForwardPass<'_>,
        batch: &Batch,
        scale: f32,
        grads: &mut Grads,
    ) -> (BatchLoss, Tensor<2>) {
        let Scores { values, positions, hidden, head } = self.scores_at(pass.hidden(), batch);
        let (loss, slopes) = objective.loss(batch, &values);
        let width = head.len();
        let slopes: Vec<f64> = slopes.into_iter().map(|slope| slope * f64::from(scale)).collect();
        if let Some(at) = self.decoder.head(true).trained() {
            let mut d_head = vec![0.0_f64; width];
            for (slope, h) in slopes.iter().zip(hidden.chunks_exact(width)) {
                d_head.iter_mut().zip(h).for_each(|(sum, &h)| *sum += slope * f64::from(h));
            }
            let d_head = d_head.into_iter().map(|value| value as f32).collect();
            grads.add(at, from_f32(d_head, [1, width], self.device(), rekindle_kernels::DType::F32));
        }
        // Row 0 is zero; row i + 1 is the gradient of document i. Each token takes one of them.
        let mut rows = vec![0.0_f32; width];
        for &slope in &slopes {
            rows.extend(head.iter().map(|&w| (slope * f64::from(w)) as f32));
        }
        let rows = from_f32(rows, [slopes.len() + 1, width], self.device(), self.dtype());
        let mut taken = vec![0_u32; batch.tokens()];
        for (document, position) in positions.into_iter().enumerate() {
            taken[position] = document as u32 + 1;
        }
        (loss, embedding::forward(&rows, &taken))
    }

    /// The scores of a batch with these hidden states, `[tokens, hidden]`.
    fn scores_at(&self, hidden: &Tensor<2>, batch: &Batch) -> Scores {
        let positions = score_positions(batch, self.config.pad_token_id());
        let ids: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        let hidden = to_f32(embedding::forward(hidden, &ids));
        let head = to_f32(self.decoder.head(true).matrix(&self.params));
        let dot = |h: &[f32]| h.iter().zip(&head).map(|(&h, &w)| f64::from(h) * f64::from(w)).sum();
        let values = hidden.chunks_exact(head.len()).map(dot).collect();
        Scores { values, positions, hidden, head }
    }

    fn check_score_head(&self) -> Result<(), Error> {
        if self.has_score_head() {
            return Ok(());
        }
        Err(Error::Argument(
            "this model has no score head; load it with a score head to compute scores (method = \"reward\")"
                .to_owned(),
        ))
    }

    /// Refuses a reward model where logits are needed.
    pub(crate) fn check_vocabulary_head(&self) -> Result<(), Error> {
        if !self.has_score_head() {
            return Ok(());
        }
        Err(Error::Argument(
            "this is a reward model: its head is a score, so it has no logits to generate or evaluate text with"
                .to_owned(),
        ))
    }
}

/// Returns the position in the batch of the last token of each document that is not `pad`; of a document of nothing else,
/// the first.
fn score_positions(batch: &Batch, pad: Option<u32>) -> Vec<usize> {
    let last = |document: core::ops::Range<usize>| {
        let mut positions = document.clone().rev();
        positions.find(|&token| Some(batch.input_ids[token]) != pad).unwrap_or(document.start)
    };
    batch.documents().map(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_that_is_no_padding_is_scored() {
        let documents: [(&[u32], &[i32]); 3] = [(&[5, 6, 7], &[0; 3]), (&[8, 0, 0], &[0; 3]), (&[0, 0], &[0; 2])];
        let batch = Batch::from_rows(documents, 0);
        assert_eq!(score_positions(&batch, None), [2, 5, 7]);
        assert_eq!(score_positions(&batch, Some(0)), [2, 3, 6]);
    }
}

//! The loss of a dataset.

use rekindle_data::{Dataset, Example};
use rekindle_models::{Batch, CausalLm};
use serde::Serialize;

use crate::Error;

/// The loss of a dataset, in whole and row by row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Σ nll ÷ counted tokens.
    pub loss: f64,
    /// e^loss.
    pub perplexity: f64,
    /// Counted tokens.
    pub tokens: usize,
    /// Row by row, in the order of the dataset.
    pub rows: Vec<RowLoss>,
}

/// The loss of one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RowLoss {
    /// Σ nll over the counted labels.
    pub nll: f64,
    /// Counted labels.
    pub tokens: usize,
}

/// Evaluates `dataset`, `batch_size` rows at a time; `progress` is told how many rows are done.
///
/// # Errors
/// [`Error::Model`] when a row does not fit the model.
pub fn evaluate(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, Error> {
    let mut go_on = |rows| {
        progress(rows);
        true
    };
    Ok(evaluate_while(model, dataset, batch_size, &mut go_on)?.expect("nothing cuts it short"))
}

/// As [`evaluate`]; `None` when `go_on`, asked after each batch, says no before the end.
pub(crate) fn evaluate_while(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Evaluation>, Error> {
    let mut rows = Vec::with_capacity(dataset.len());
    while rows.len() < dataset.len() {
        let batch = batch(dataset.examples().skip(rows.len()).take(batch_size.max(1)), rows.len());
        let nll = model.nll(&batch)?;
        rows.extend(batch.documents().map(|document| RowLoss {
            nll: nll[document.clone()].iter().map(|&x| f64::from(x)).sum(),
            tokens: batch.targets[document].iter().filter(|&&t| t != rekindle_models::IGNORED).count(),
        }));
        if !go_on(rows.len()) && rows.len() < dataset.len() {
            return Ok(None);
        }
    }
    let tokens: usize = rows.iter().map(|r| r.tokens).sum();
    let loss = rows.iter().map(|r| r.nll).sum::<f64>() / tokens.max(1) as f64;
    Ok(Some(Evaluation { loss, perplexity: loss.exp(), tokens, rows }))
}

/// A batch of examples whose first is row `first_row` of the optimizer step.
pub(crate) fn batch<'a>(examples: impl Iterator<Item = Example<'a>>, first_row: usize) -> Batch {
    Batch::from_rows(examples.map(|e| (e.input_ids, e.labels)), first_row as u32)
}

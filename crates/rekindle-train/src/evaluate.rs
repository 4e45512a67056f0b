//! The loss of a dataset.

use std::ops::Range;

use rekindle_data::Dataset;
use rekindle_dist::Communicator;
use rekindle_models::objective::Metric;
use rekindle_models::{Batch, CausalLm, IGNORED, Objective};
use serde::Serialize;

use crate::Error;
use crate::batches::batch;
use crate::optimizer::step_scale;
use crate::world::{gather_losses, gather_rows};

/// The loss of a dataset, in total and by row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Σ nll ÷ counted tokens.
    pub loss: f64,
    /// e^loss, limited to the largest f64.
    pub perplexity: f64,
    /// Counted tokens.
    pub tokens: usize,
    /// Row by row, in the order of the dataset.
    pub rows: Vec<RowLoss>,
}

/// The loss of one row.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RowLoss {
    /// Σ nll over the counted labels.
    pub nll: f64,
    /// Counted labels.
    pub tokens: usize,
    /// The loss of each counted label, if requested ([`evaluate_tokens`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_nll: Option<Vec<TokenLoss>>,
}

/// The loss of one label.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenLoss {
    /// The token's index in its row, from 0; the first token of a row has no loss.
    pub position: usize,
    /// The token.
    pub id: u32,
    /// The negative log-probability of the token given the tokens before it.
    pub nll: f64,
}

/// Evaluates `dataset`, `batch_size` rows at a time; `progress` receives the number of rows done.
///
/// # Errors
/// [`Error::Model`] when a row does not fit the model; of the kind
/// [`NonFinite`](rekindle_models::Error::NonFinite), with the rows and where it began, for a loss that is not finite.
pub fn evaluate(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, Error> {
    evaluate_finite(model, dataset, batch_size, false, progress)
}

/// Evaluates like [`evaluate`], and returns the loss of every token of every row.
///
/// # Errors
/// As `evaluate`.
pub fn evaluate_tokens(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, Error> {
    evaluate_finite(model, dataset, batch_size, true, progress)
}

fn evaluate_finite(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    per_token: bool,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation, Error> {
    let mut rows = Vec::with_capacity(dataset.len());
    while rows.len() < dataset.len() {
        let batch = next_batch(dataset, rows.len(), batch_size);
        let losses = row_losses(model, &batch, per_token)?;
        let broken = losses.iter().enumerate().filter(|(_, row)| !row.nll.is_finite());
        let broken: Vec<usize> = broken.map(|(index, _)| rows.len() + index).collect();
        if !broken.is_empty() {
            return Err(not_finite(model, dataset, &batch, &broken));
        }
        rows.extend(losses);
        progress(rows.len());
    }
    Ok(Evaluation::of(rows))
}

/// Evaluates `dataset` without a check for finite losses, which a run does itself. The batches are spread over the ranks of
/// `world`; the result has the same bits for any number of them. Calls `go_on` after each batch; returns `None` if it
/// returns false before the end, which must be the same on all ranks.
pub(crate) fn evaluate_while(
    model: &CausalLm,
    dataset: &Dataset,
    batch_size: usize,
    world: &dyn Communicator,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Evaluation>, Error> {
    let batch_size = batch_size.max(1);
    let mut rows = Vec::with_capacity(dataset.len() / world.size());
    for first in (0..dataset.len()).step_by(batch_size).skip(world.rank()).step_by(world.size()) {
        rows.extend(row_losses(model, &next_batch(dataset, first, batch_size), false)?);
        if !go_on(rows.len()) && rows.len() < dataset.len() {
            return Ok(None);
        }
    }
    if world.size() > 1 {
        let own: Vec<[u64; 2]> = rows.iter().map(|row| [row.nll.to_bits(), row.tokens as u64]).collect();
        let all = gather_rows(world, &own, dataset.len(), batch_size)?;
        let row =
            |[nll, tokens]: [u64; 2]| RowLoss { nll: f64::from_bits(nll), tokens: tokens as usize, token_nll: None };
        rows = all.into_iter().map(row).collect();
    }
    Ok(Some(Evaluation::of(rows)))
}

/// The loss of a dataset by an objective.
pub(crate) struct ObjectiveEvaluation {
    pub(crate) loss: f64,
    /// Tokens that the loss covers.
    pub(crate) tokens: usize,
    pub(crate) metrics: Vec<(&'static str, f64)>,
}

/// Evaluates batches as one step of `objective`, without dropout, spread over the ranks of `world` as in
/// [`evaluate_while`]. Calls `go_on` before each batch; returns `None` if it returns false.
pub(crate) fn evaluate_objective_while(
    model: &CausalLm,
    objective: &dyn Objective,
    batches: &[Batch],
    world: &dyn Communicator,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<ObjectiveEvaluation>, Error> {
    let terms = model.step_terms(objective, batches, None)?;
    let mut own = Vec::new();
    for batch in batches.iter().skip(world.rank()).step_by(world.size()) {
        if !go_on() {
            return Ok(None);
        }
        let of_batch = model.objective_loss(objective, batch, &terms)?;
        own.push((of_batch.sum, of_batch.metrics));
    }
    let mut of_ranks: Vec<_> = gather_losses(world, own)?.into_iter().map(Vec::into_iter).collect();
    let (mut loss, mut metrics) = (0.0, Vec::new());
    // In the order of the batches, so that the sums do not depend on the number of ranks.
    for index in 0..batches.len() {
        let (sum, more) = of_ranks[index % world.size()].next().unwrap_or_default();
        loss += sum;
        Metric::add(&mut metrics, more);
    }
    Ok(Some(ObjectiveEvaluation {
        loss: loss * step_scale(objective, batches),
        tokens: batches.iter().map(Batch::counted).sum(),
        metrics: Metric::means(&metrics),
    }))
}

impl Evaluation {
    fn of(rows: Vec<RowLoss>) -> Self {
        let tokens: usize = rows.iter().map(|r| r.tokens).sum();
        let loss = rows.iter().map(|r| r.nll).sum::<f64>() / tokens.max(1) as f64;
        // JSON has no infinity; NaN stays NaN.
        Self { loss, perplexity: loss.exp().clamp(0.0, f64::MAX), tokens, rows }
    }
}

fn next_batch(dataset: &Dataset, first: usize, batch_size: usize) -> Batch {
    batch(dataset.examples().skip(first).take(batch_size.max(1)), first)
}

fn row_losses(model: &CausalLm, batch: &Batch, per_token: bool) -> Result<Vec<RowLoss>, Error> {
    let nll = model.nll(batch)?;
    let row = |document: Range<usize>| {
        let start = document.start;
        let counted = document.clone().filter(|&at| batch.targets[at] != IGNORED);
        // Labels are shifted: a target is at the position of the token before it.
        let token =
            |at: usize| TokenLoss { position: at - start + 1, id: batch.targets[at] as u32, nll: nll[at].into() };
        RowLoss {
            nll: nll[document].iter().map(|&x| f64::from(x)).sum(),
            tokens: counted.clone().count(),
            token_nll: per_token.then(|| counted.map(token).collect()),
        }
    };
    Ok(batch.documents().map(row).collect())
}

/// Returns the error for rows of `batch` whose losses are not finite.
fn not_finite(model: &CausalLm, dataset: &Dataset, batch: &Batch, rows: &[usize]) -> Error {
    let found = match model.first_non_finite_output(std::slice::from_ref(batch), None) {
        Ok(found) => found,
        Err(error) => return error.into(),
    };
    let first = dataset.example(rows[0]);
    let more = match rows.len() - 1 {
        0 => String::new(),
        1 => " and one more row".to_owned(),
        more => format!(" and {more} more rows"),
    };
    let what = format!("the loss of {}:{}{more} is not finite", first.path.display(), first.row.get());
    rekindle_models::Error::NonFinite { what, found }.into()
}

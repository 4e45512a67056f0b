//! The diagnosis of a step or an evaluation with values that are not finite.

use std::path::PathBuf;

use rekindle_data::Dataset;
use rekindle_models::{Batch, CausalLm, NonFinite, StepKey};

use crate::batches::batch;
use crate::optimizer::step_scale;
use crate::{Diverged, Error, Evaluation, LossScaler, SftConfig, StepResult};

/// A pass with a value that is not finite.
pub(super) struct Pass<'a> {
    /// The optimizer step, from 1; for an evaluation, the steps before it.
    pub(super) step: usize,
    pub(super) what: &'static str,
    pub(super) value: f64,
    pub(super) dataset: &'a Dataset,
    /// The micro-batches, and the example of each of their rows.
    pub(super) batches: &'a [Batch],
    pub(super) examples: &'a [usize],
    /// The key of dropout; `None` in evaluation.
    pub(super) key: Option<StepKey>,
    /// The factor of the loss in the backward pass.
    pub(super) loss_scale: f64,
    pub(super) learning_rate: f64,
    pub(super) checkpoint: Option<PathBuf>,
}

/// A number of a step that ends the run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Broken {
    /// `loss` or `grad_norm`.
    pub(super) what: &'static str,
    pub(super) value: f64,
    /// The scale of the step's loss.
    pub(super) loss_scale: f64,
}

/// Returns the number of a step that ends the run: a loss that is not finite, and a gradient unless a smaller scale of the loss
/// may help.
pub(super) fn broken(result: &StepResult, scaler: Option<&LossScaler>) -> Option<Broken> {
    let StepResult { loss, grad_norm, metrics, .. } = result;
    let is_skipped = scaler.is_some_and(LossScaler::can_shrink);
    let fatal = [("loss", *loss, true), ("grad_norm", *grad_norm, !is_skipped)];
    let (what, value, _) = fatal.into_iter().find(|(_, value, ends)| *ends && !value.is_finite())?;
    let scale = metrics.iter().find(|(name, _)| *name == "loss_scale");
    Some(Broken { what, value, loss_scale: scale.map_or(1.0, |(_, scale)| *scale) })
}

impl Pass<'_> {
    /// Repeats the pass to find the first non-finite value, and returns the error.
    pub(super) fn explain(self, model: &CausalLm, config: &SftConfig) -> Error {
        let objective = config.method.objective();
        let scale = (step_scale(&*objective, self.batches) * self.loss_scale) as f32;
        let found = match model.first_non_finite(&*objective, self.batches, scale, self.key) {
            Ok(found) => found,
            Err(error) => return error.into(),
        };
        let blamed: Vec<usize> = found.iter().flat_map(NonFinite::rows).map(|&row| row as usize).collect();
        let all_rows = blamed.is_empty() || blamed.len() == self.examples.len();
        let example = |&index: &usize| {
            let example = self.dataset.example(index);
            (example.path.to_owned(), example.row.get())
        };
        let rows = if blamed.is_empty() {
            self.examples.iter().map(example).collect()
        } else {
            blamed.iter().filter_map(|&row| self.examples.get(row)).map(example).collect()
        };
        let advice = advice(found.as_ref(), all_rows, self.learning_rate, config);
        let Self { step, what, value, checkpoint, .. } = self;
        Error::Diverged(Box::new(Diverged { step, what, value, found, rows, all_rows, advice, checkpoint }))
    }
}

/// Returns batches with the rows of an evaluation whose losses are not finite.
pub(super) fn broken_rows(dataset: &Dataset, evaluation: &Evaluation, batch_size: usize) -> (Vec<Batch>, Vec<usize>) {
    let rows = evaluation.rows.iter().enumerate();
    let examples: Vec<usize> = rows.filter(|(_, row)| !row.nll.is_finite()).map(|(index, _)| index).collect();
    let parts = examples.chunks(batch_size.max(1)).enumerate();
    let of = |part: &[usize], first| batch(part.iter().map(|&index| dataset.example(index)), first);
    let batches = parts.map(|(i, part)| of(part, i * batch_size.max(1))).collect();
    (batches, examples)
}

fn advice(found: Option<&NonFinite>, all_rows: bool, learning_rate: f64, config: &SftConfig) -> Vec<String> {
    if let Some(NonFinite::Weight { trained: false, .. }) = found {
        return vec!["download or save the checkpoint again: that weight is damaged in it".to_owned()];
    }
    let mut advice = Vec::new();
    if !all_rows {
        advice.push("inspect these rows, and remove them if they are wrong".to_owned());
    }
    let mut rate = format!("set learning_rate below {:e}", config.learning_rate.unwrap_or(learning_rate));
    if config.warmup().is_zero() {
        rate += ", or add a warm-up (warmup_steps)";
    }
    advice.push(rate);
    if config.max_grad_norm == 0.0 {
        advice.push("set max_grad_norm = 1: gradients are not clipped now".to_owned());
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepCount;

    #[test]
    fn a_gradient_that_overflows_ends_a_run_unless_the_scale_can_shrink() {
        let step = |loss, grad_norm| {
            let metrics = vec![("loss_scale", 4.0)];
            StepResult { loss, grad_norm, counted: 1, tokens: 1, metrics }
        };
        let ends = |what| Some(Broken { what, value: f64::INFINITY, loss_scale: 4.0 });
        let (large, small) = (LossScaler::default(), LossScaler::new(f64::powi(2.0, -13)));
        assert_eq!(broken(&step(1.0, 1.0), None), None);
        assert_eq!(broken(&step(1.0, f64::INFINITY), None), ends("grad_norm"));
        assert_eq!(broken(&step(1.0, f64::INFINITY), Some(&large)), None);
        assert_eq!(broken(&step(1.0, f64::INFINITY), Some(&small)), ends("grad_norm"));
        assert_eq!(broken(&step(f64::INFINITY, 1.0), Some(&large)), ends("loss"));
    }

    #[test]
    fn advice_follows_from_what_was_found() {
        let config = SftConfig { max_grad_norm: 0.0, learning_rate: Some(3.0), ..SftConfig::default() };
        let of = |found: Option<&NonFinite>, all| advice(found, all, 0.0, &config).join(" | ");
        let weight = |trained| NonFinite::Weight { name: "w".to_owned(), trained, rows: vec![0] };
        assert!(of(Some(&weight(false)), true).contains("damaged"));
        let all = "set learning_rate below 3e0, or add a warm-up (warmup_steps) | set max_grad_norm = 1: gradients are not clipped now";
        assert_eq!(of(Some(&weight(true)), true), all);
        assert_eq!(of(None, false), format!("inspect these rows, and remove them if they are wrong | {all}"));
        let careful = SftConfig { warmup_steps: StepCount::Steps(5), max_grad_norm: 1.0, ..config };
        assert_eq!(advice(None, true, 0.0, &careful), ["set learning_rate below 3e0"]);
    }
}

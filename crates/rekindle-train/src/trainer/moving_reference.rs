//! A reference model that follows the model that is trained.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Dtype, SafetensorsFile, TensorSpec, write_f32, write_safetensors};
use rekindle_models::{Batch, CausalLm, Objective};

use crate::{Error, ReferenceArguments, SftConfig};

/// The trained parameters φ of a reference model that follows those of the model, θ: φ ← α·θ + (1 − α)·φ after every few steps.
///
/// Source: Gorbatovski et al., arXiv:2404.09656, equation 2; TRL 1.16, `SyncRefModelCallback`. TRL has it for full fine-tuning;
/// for an adapter, its factors are mixed.
pub(super) struct MovingReference {
    values: Vec<f32>,
    alpha: f32,
    every: usize,
}

/// The file of a checkpoint, and its tensor.
const FILE: &str = "reference_model.safetensors";
const NAME: &str = "trained_parameters";

impl MovingReference {
    /// Returns the reference of a run that has one: a copy of `model`, or the reference in the checkpoint of a resumed run.
    pub(super) fn begin(
        config: &SftConfig,
        model: &CausalLm,
        ranks: usize,
        checkpoint: Option<&Path>,
    ) -> Result<Option<Self>, Error> {
        let Some(arguments) = config.method.reference().filter(|arguments| arguments.sync_ref_model) else {
            return Ok(None);
        };
        let refused = [
            (!model.device().is_cpu(), "runs on the CPU only in this version; set device = \"cpu\""),
            (ranks > 1, "trains on a single rank; start the run without --ranks"),
            (model.params().are_in_place(), "needs trained weights in f32; load the model in 16 bits"),
        ];
        if let Some((_, problem)) = refused.iter().find(|(is_refused, _)| *is_refused) {
            return Err(Error::Config(vec![format!("sync_ref_model = true {problem}")]));
        }
        let values = match checkpoint {
            Some(checkpoint) => read(checkpoint, model.params().numel())?,
            None => model.params().all_values(),
        };
        let (alpha, every) = (arguments.mixup_alpha() as f32, arguments.sync_steps());
        Ok(Some(Self { values, alpha, every }))
    }

    /// Adds the reference's log-probabilities to the answers of `batches`. The model has the reference's parameters meanwhile.
    pub(super) fn add_to(
        &self,
        model: &mut CausalLm,
        objective: &dyn Objective,
        batches: &mut [Batch],
    ) -> Result<(), Error> {
        let own = model.params().all_values();
        model.params_mut().set_all_values(self.values.clone());
        let added = batches.iter_mut().try_for_each(|batch| add(model, objective, batch));
        model.params_mut().set_all_values(own);
        Ok(added?)
    }

    /// Moves the reference if `done` steps end at a synchronization.
    pub(super) fn after_step(&mut self, done: usize, model: &CausalLm) {
        if done.is_multiple_of(self.every) {
            let alpha = self.alpha;
            let mix = |(own, new): (&mut f32, f32)| *own = *own * (1.0 - alpha) + alpha * new;
            self.values.iter_mut().zip(model.params().all_values()).for_each(mix);
        }
    }

    /// Writes the reference into a checkpoint.
    pub(super) fn save(&self, checkpoint: &Path) -> Result<(), Error> {
        let spec = [TensorSpec::new(NAME, Dtype::F32, [self.values.len()])];
        let write = |_, out: &mut dyn std::io::Write| write_f32(out, Dtype::F32, &self.values);
        Ok(write_safetensors(&checkpoint.join(FILE), &BTreeMap::new(), &spec, write)?)
    }
}

fn add(model: &CausalLm, objective: &dyn Objective, batch: &mut Batch) -> Result<(), rekindle_models::Error> {
    let found = objective.answer_log_probs(batch, &model.log_probs(batch)?.values());
    batch.answers.iter_mut().zip(found).for_each(|(answer, value)| answer.reference = Some(value));
    match &mut batch.mismatched {
        Some(mismatched) => add(model, objective, mismatched),
        None => Ok(()),
    }
}

fn read(checkpoint: &Path, count: usize) -> Result<Vec<f32>, Error> {
    let path = checkpoint.join(FILE);
    let file = SafetensorsFile::open(&path)?;
    let tensor = file.get(NAME).filter(|tensor| tensor.dtype == Dtype::F32);
    let values =
        tensor.map(|tensor| tensor.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect());
    values.filter(|values: &Vec<f32>| values.len() == count).ok_or_else(|| Error::Checkpoint {
        path,
        problem: format!("it has no {count} trained parameters of a reference model"),
    })
}

impl ReferenceArguments {
    /// Returns α of the reference that follows the model.
    fn mixup_alpha(&self) -> f64 {
        self.ref_model_mixup_alpha.unwrap_or(0.6)
    }

    fn sync_steps(&self) -> usize {
        self.ref_model_sync_steps.unwrap_or(512)
    }

    /// Returns one sentence for each value that is out of range or contradicts the others.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let set = [
            (self.ref_model_mixup_alpha.is_some(), "ref_model_mixup_alpha"),
            (self.ref_model_sync_steps.is_some(), "ref_model_sync_steps"),
        ];
        for (_, name) in set.iter().filter(|(is_set, _)| *is_set && !self.sync_ref_model) {
            problems.push(format!("{name} has no effect without sync_ref_model = true"));
        }
        if self.sync_ref_model && self.precompute_ref_log_probs == Some(true) {
            problems.push(
                "sync_ref_model = true changes the reference model, so its log-probabilities cannot be computed before \
                 training; remove precompute_ref_log_probs"
                    .to_owned(),
            );
        }
        let alpha = self.mixup_alpha();
        if !(alpha > 0.0 && alpha <= 1.0) {
            problems.push(format!("ref_model_mixup_alpha is {alpha}; it must be above 0 and at most 1"));
        }
        if self.sync_steps() == 0 {
            problems.push("ref_model_sync_steps is 0; it must be at least 1".to_owned());
        }
        problems
    }
}

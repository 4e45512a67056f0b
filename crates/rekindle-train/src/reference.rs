//! Log-probabilities of the reference model that are computed before training.

use std::path::Path;

use rekindle_data::Dataset;
use rekindle_dist::Communicator;
use rekindle_hub::{Checkpoint as ModelFiles, Dtype, SafetensorsFile, TensorSpec, write_safetensors};
use rekindle_models::{Batch, CausalLm};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::batches::Batches;
use crate::checkpoint::{dataset_fingerprint, hex, weights_fingerprint};
use crate::world::{gather_rows, share};
use crate::{Error, Method, SftConfig};

/// The log-probabilities of a model's answers before training, by example.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReferenceLogProbs {
    /// ln π_ref of each example's answer, as the loss reads it.
    pub(crate) answers: Vec<f64>,
    /// The same for its mismatched answer, if the loss compares with those.
    pub(crate) mismatched: Vec<f64>,
}

/// The names of both lists in a file.
const NAMES: [&str; 2] = ["answers", "mismatched"];

/// Returns true if the reference log-probabilities of a run are computed before its first step.
///
/// # Errors
/// [`Error::Config`] if the configuration forbids it, but the adapter turned off is not the model before training.
pub(crate) fn is_precomputed(method: &Method, model: &CausalLm) -> Result<bool, Error> {
    let Some(arguments) = method.reference().filter(|arguments| !arguments.sync_ref_model) else { return Ok(false) };
    // An adapter that changes nothing is the reference when it is off. PiSSA and OLoRA change the base for their adapter.
    let is_base = model.lora().is_some() && model.adapter_changes_nothing();
    match (arguments.precompute_ref_log_probs, is_base) {
        (Some(true), _) | (None, false) => Ok(true),
        (None | Some(false), true) => Ok(false),
        (Some(false), false) => Err(Error::Config(vec![
            "precompute_ref_log_probs = false computes the reference with the adapter turned off, which is not the model \
             before training here (all weights are trained, or the adapter was trained before); remove it"
                .to_owned(),
        ])),
    }
}

impl ReferenceLogProbs {
    /// Returns the log-probabilities of the examples of `dataset` by `model`: those in `file` if they are of the same
    /// model, rows and configuration, otherwise computed by all ranks of `world` and written there. The file is that of
    /// rank 0.
    pub(crate) fn of(
        model: &CausalLm,
        dataset: &Dataset,
        config: &SftConfig,
        file: Option<&Path>,
        world: &dyn Communicator,
    ) -> Result<Self, Error> {
        let fingerprint = fingerprint(model, dataset, config)?;
        let found = file.and_then(|file| Self::read(file, &fingerprint, dataset.len()));
        if let Some(found) = share(world, found)? {
            return Ok(found);
        }
        let computed = Self::compute(model, dataset, config, world)?;
        if let Some(file) = file {
            computed.write(file, &fingerprint)?;
        }
        Ok(computed)
    }

    fn compute(
        model: &CausalLm,
        dataset: &Dataset,
        config: &SftConfig,
        world: &dyn Communicator,
    ) -> Result<Self, Error> {
        let objective = config.method.objective();
        let batches = Batches::new(dataset, config, model.max_seq_length());
        let of = |batch: &Batch| -> Result<Vec<f64>, Error> {
            Ok(objective.answer_log_probs(batch, &model.log_probs(batch)?.values()))
        };
        let per_row = dataset.task().examples_per_row();
        let indices: Vec<usize> = (0..dataset.len()).collect();
        let size = per_row * config.per_device_train_batch_size;
        let mut own = Self::default();
        for indices in indices.chunks(size).skip(world.rank()).step_by(world.size()) {
            let batch = batches.batch(indices, 0);
            own.answers.extend(of(&batch)?);
            if let Some(mismatched) = &batch.mismatched {
                own.mismatched.extend(of(mismatched)?);
            }
        }
        if world.size() == 1 {
            return Ok(own);
        }
        let gather = |own: &[f64], rows: usize| -> Result<Vec<f64>, Error> {
            let bits: Vec<[u64; 1]> = own.iter().map(|value| [value.to_bits()]).collect();
            let all = gather_rows(world, &bits, rows, size)?;
            Ok(all.into_iter().map(|[bits]| f64::from_bits(bits)).collect())
        };
        let mismatched = if config.method.needs_mismatched() { dataset.len() } else { 0 };
        Ok(Self { answers: gather(&own.answers, dataset.len())?, mismatched: gather(&own.mismatched, mismatched)? })
    }

    fn read(file: &Path, fingerprint: &str, examples: usize) -> Option<Self> {
        let file = SafetensorsFile::open(file).ok()?;
        if file.metadata().get("fingerprint").map(String::as_str) != Some(fingerprint) {
            return None;
        }
        let list = |name: &str| {
            let tensor = file.get(name).filter(|tensor| tensor.dtype == Dtype::F64)?;
            Some(tensor.data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect::<Vec<_>>())
        };
        let [answers, mismatched] = NAMES.map(list);
        let found = Self { answers: answers?, mismatched: mismatched? };
        (found.answers.len() == examples).then_some(found)
    }

    fn write(&self, file: &Path, fingerprint: &str) -> Result<(), Error> {
        let metadata = [("fingerprint".to_owned(), fingerprint.to_owned())].into();
        let lists = [&self.answers, &self.mismatched];
        let specs: Vec<_> =
            NAMES.iter().zip(lists).map(|(name, list)| TensorSpec::new(*name, Dtype::F64, [list.len()])).collect();
        Ok(write_safetensors(file, &metadata, &specs, |index, out| {
            lists[index].iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
        })?)
    }
}

/// Returns the hash of everything that the log-probabilities depend on: the base, the trained parameters before training,
/// the rows, the method, and the size of its groups of rows.
fn fingerprint(model: &CausalLm, dataset: &Dataset, config: &SftConfig) -> Result<String, Error> {
    /// Parameters that are hashed of each tensor.
    const SAMPLE: usize = 4096;
    let mut hash = Sha256::new_with_prefix("reference log-probabilities, version 1");
    hash.update(weights_fingerprint(&ModelFiles::open(model.path())?)?);
    hash.update(dataset_fingerprint(dataset));
    hash.update(serde_json::to_string(&config.method).expect("names and numbers"));
    hash.update(config.rows_per_step().to_le_bytes());
    hash.update(format!("{:?} {:?} {:?}", model.dtype(), model.lora(), model.quantization_config()));
    for info in model.params().infos() {
        hash.update(&info.name);
        model.params().values(info.at).iter().take(SAMPLE).for_each(|value| hash.update(value.to_le_bytes()));
    }
    Ok(hex(&hash.finalize()))
}

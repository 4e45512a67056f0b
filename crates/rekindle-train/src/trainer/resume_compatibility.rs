//! The settings that a resumed run must share with its checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_data::Dataset;
use rekindle_models::open_checkpoint;
use serde::Serialize;
use serde_json::{Value, json};

use super::Trainer;
use crate::checkpoint::{TrainerState, dataset_fingerprint, weights_fingerprint};
use crate::{Error, LrSchedulerType, Method, SftConfig, TrainerArguments};

/// Keys of `[train]` that a resumed run may change. They do not affect parameters, or a notice says how they do
/// (`max_steps` through the schedule, the batch size through the order of sums).
const MAY_CHANGE: [&str; 23] = [
    "run_name",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "logging_first_step",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "report_to",
    "sample_prompts",
    "eval_samples",
    "sample_max_new_tokens",
    "use_gradient_checkpointing",
    "shard_optimizer",
];

/// The settings of a run that a checkpoint records.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct RecordedSettings {
    /// Settings that must be the same.
    pub(super) configuration: BTreeMap<String, Value>,
    /// Settings that may change, with consequences.
    pub(super) changeable: BTreeMap<String, Value>,
}

impl RecordedSettings {
    /// Returns the settings of a run of `total` steps.
    pub(super) fn of(job: &Trainer<'_>, total: usize) -> Result<Self, Error> {
        let config = &job.config;
        let full = job.model.lora().is_none();
        let terms = RunTerms { config, train: &job.train, full, arguments: &job.arguments };
        let mut configuration = terms.configuration();
        let mut changeable = BTreeMap::new();
        let lora = job.model.lora().map(object).unwrap_or_default();
        configuration.extend(lora.into_iter().map(|(key, value)| (format!("[lora] {key}"), value)));
        let model = &*job.model;
        let weights = open_checkpoint(model.path())?;
        configuration.insert("base weights (SHA-256)".to_owned(), weights_fingerprint(&weights)?.into());
        configuration.insert("dtype".to_owned(), format!("{:?}", model.dtype()).into());
        configuration.insert("quantization_config".to_owned(), model.quantization_config().unwrap_or_default());
        configuration.insert("max_seq_length".to_owned(), model.max_seq_length().into());
        configuration
            .insert("rope".to_owned(), model.context_extension().map(|w| json!(format!("{w}"))).unwrap_or_default());
        configuration.insert("vocab_size".to_owned(), model.config().vocab_size().into());

        changeable.insert("max_steps".to_owned(), total.into());
        changeable.insert("warmup_steps".to_owned(), config.warmup().of(total).into());
        changeable.insert("device".to_owned(), model.device().name().into());
        for (key, value) in [
            ("per_device_train_batch_size", config.per_device_train_batch_size),
            ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        ] {
            changeable.insert(key.to_owned(), value.into());
        }
        let eval = job.eval.as_ref().map(|eval| dataset_fingerprint(eval).into());
        changeable.insert("evaluation rows (SHA-256)".to_owned(), eval.unwrap_or_default());
        Ok(Self { configuration, changeable })
    }

    /// Returns the settings that all ranks of a run must share.
    pub(super) fn for_ranks(job: &Trainer<'_>, total: usize) -> Result<BTreeMap<String, Value>, Error> {
        let Self { mut configuration, changeable } = Self::of(job, total)?;
        configuration.extend(changeable);
        // It does not change results, and a host with less memory may need another.
        let keys = object(&job.config).into_iter().filter(|(key, _)| key != "use_gradient_checkpointing");
        configuration.extend(keys.map(|(key, value)| (format!("[train] {key}"), value)));
        Ok(configuration)
    }

    /// Compares the settings with those of the run that wrote `state`; returns a notice for each change.
    ///
    /// # Errors
    /// [`Error::Differs`] if settings differ that must be the same.
    pub(super) fn check(&self, path: &Path, state: &TrainerState, job: &Trainer<'_>) -> Result<Vec<String>, Error> {
        let mut problems: Vec<String> = differences(&state.configuration, &self.configuration)
            .iter()
            .map(|(key, was, is)| sentence(key, was, is))
            .collect();
        let mut notes = Vec::new();
        for (key, was, is) in differences(&state.changeable, &self.changeable) {
            let what = sentence(&key, &was, &is);
            match &*key {
                "max_steps" => {
                    let flat = [LrSchedulerType::Constant, LrSchedulerType::ConstantWithWarmup];
                    let schedule = !flat.contains(&job.config.lr_scheduler_type);
                    let follows = if schedule { "; from here on, learning rates follow the new length" } else { "" };
                    notes.push(format!("{what}{follows}"));
                }
                "evaluation rows (SHA-256)" => {
                    if job.config.load_best_model_at_end || job.config.early_stopping_patience.is_some() {
                        problems.push(format!("{what}, so the best evaluation is not comparable"));
                    } else {
                        notes.push(
                            "the evaluation rows have changed; losses before and after are not \
                             comparable"
                                .to_owned(),
                        );
                    }
                }
                "warmup_steps" if state.global_step >= most(&was).max(most(&is)) => {}
                "warmup_steps" => notes.push(format!("{what}; the learning rates of the warm-up change")),
                _ => notes.push(format!(
                    "{what}: sums are computed in another order, so the result is not \
                         bit-identical"
                )),
            }
        }
        if problems.is_empty() {
            Ok(notes)
        } else {
            Err(Error::Differs { path: path.to_owned(), differences: problems })
        }
    }
}

/// The settings that must be the same and do not depend on the model.
pub(super) struct RunTerms<'a> {
    pub(super) config: &'a SftConfig,
    pub(super) train: &'a Dataset,
    /// True if all weights are trained.
    pub(super) full: bool,
    pub(super) arguments: &'a TrainerArguments,
}

impl RunTerms<'_> {
    fn configuration(&self) -> BTreeMap<String, Value> {
        let mut config = self.config.clone();
        config.resolve(self.full, false);
        let keys = object(&config).into_iter().filter(|(key, _)| !MAY_CHANGE.contains(&&**key));
        let mut configuration: BTreeMap<_, _> = keys.map(|(key, value)| (format!("[train] {key}"), value)).collect();
        if config.method != Method::Sft {
            let keys = object(&config.method).into_iter().map(|(key, value)| (format!("[train] {key}"), value));
            configuration.extend(keys);
        }
        configuration.insert("rows of a step".to_owned(), config.rows_per_step().into());
        if let Some(rollouts) = config.method.rollouts(&config) {
            configuration.insert("completions of a generation".to_owned(), rollouts.rows.into());
        }
        configuration.insert("[data] shuffle".to_owned(), self.arguments.shuffle.into());
        configuration.insert("seed".to_owned(), self.arguments.seed.into());
        configuration.insert("training rows (SHA-256)".to_owned(), dataset_fingerprint(self.train).into());
        configuration.insert("full_finetuning".to_owned(), self.full.into());
        configuration
    }

    /// Refuses a checkpoint of another run, as far as that is known without the model.
    pub(super) fn check(&self, path: &Path, state: &TrainerState) -> Result<(), Error> {
        let ours = self.configuration();
        let theirs =
            state.configuration.iter().filter(|(key, _)| key.starts_with("[train] ") || ours.contains_key(*key));
        let theirs = theirs.map(|(key, value)| (key.clone(), value.clone())).collect();
        let differences: Vec<String> =
            differences(&theirs, &ours).iter().map(|(key, was, is)| sentence(key, was, is)).collect();
        match differences.is_empty() {
            true => Ok(()),
            false => Err(Error::Differs { path: path.to_owned(), differences }),
        }
    }
}

type Difference = (String, Value, Value);

/// Returns the keys with different values, each with its old and new value; absent keys are null.
fn differences(was: &BTreeMap<String, Value>, is: &BTreeMap<String, Value>) -> Vec<Difference> {
    let mut keys: Vec<&String> = was.keys().chain(is.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let get = |map: &BTreeMap<String, Value>, key: &str| map.get(key).cloned().unwrap_or_default();
    let pairs = keys.into_iter().map(|key| (key.clone(), get(was, key), get(is, key)));
    pairs.filter(|(_, was, is)| was != is).collect()
}

/// Returns the first setting of a rank that differs from rank 0.
pub(super) fn first_difference(first: &BTreeMap<String, Value>, own: &BTreeMap<String, Value>) -> Option<String> {
    let (key, there, here) = differences(first, own).into_iter().next()?;
    Some(match key.strip_suffix(" (SHA-256)") {
        Some(what) => format!("it has other {what}"),
        None => format!("{key} is {here} on it and {there} on rank 0"),
    })
}

fn sentence(key: &str, was: &Value, is: &Value) -> String {
    if key.ends_with("(SHA-256)") {
        return format!("the {} have changed", key.trim_end_matches(" (SHA-256)"));
    }
    let show = |value: &Value| if value.is_null() { "not set".to_owned() } else { value.to_string() };
    format!("{key} was {} and is now {}", show(was), show(is))
}

fn most(value: &Value) -> usize {
    value.as_u64().unwrap_or(0) as usize
}

/// Returns the serialized fields of a configuration.
fn object(config: &impl Serialize) -> BTreeMap<String, Value> {
    match serde_json::to_value(config).expect("a configuration is numbers and texts") {
        Value::Object(fields) => fields.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

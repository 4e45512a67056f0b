//! Run files: the configuration of a training run, and the run itself.
//!
//! A [`RunConfig`] is everything that `rekindle train` reads from a run file, so a program or a server can do what the
//! command does:
//!
//! ```
//! use rekindle::run::RunConfig;
//!
//! let text = r#"
//! model = "Qwen/Qwen3-0.6B"
//! [lora]
//! r = 16
//! [data]
//! train = "train.jsonl"
//! "#;
//! let config = RunConfig::from_toml(text, &["train.max_steps=60".parse()?])?;
//! assert_eq!(config.train.max_steps, Some(60));
//! # Ok::<(), rekindle::Error>(())
//! ```
//!
//! [`RunConfig::train`] does what the command does with it, and reports to a [`RunObserver`]. [`TrainingRun`] separates
//! loading from training. A configuration can also be built without a file; its parts are structs with public fields.

mod adapter;
mod check;
mod data_arguments;
mod foreign;
mod lora_arguments;
mod method;
mod model_arguments;
mod nearest;
mod observer;
mod overrides;
mod rewards;
mod sections;
mod shard_base;
mod training_run;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::rewards::RewardConfig;
use crate::{Error, LoraConfig, SftConfig};
use lora_arguments::InitFrom;
use sections::{SectionReader, fields_of};

pub use data_arguments::{DataArguments, DataPaths, SAMPLE_SEED};
pub use lora_arguments::LoraArguments;
pub use model_arguments::ModelArguments;
pub use nearest::nearest;
pub use observer::RunObserver;
pub use overrides::{ConfigOverride, parse_value};
pub use shard_base::ShardBase;
pub use training_run::{STOP_FILE, TrainOptions, TrainingRun};

/// The configuration of a training run: the sections of a run file, with every default filled in.
///
/// Unknown keys, values of the wrong type and contradictions are errors that name the key; all of them are reported at
/// once.
#[derive(Clone, Debug, Serialize)]
pub struct RunConfig {
    /// Directory for checkpoints, the result, metrics and the report. Default `outputs/` and the name of the run file.
    pub output_dir: PathBuf,
    /// Seed of the adapter's initialization, the order of rows and dropout. Default 3407.
    pub seed: u64,
    /// The device: `auto`, `cpu`, `cuda[:N]` or `wgpu[:N]`. Default `auto`.
    pub device: String,
    /// `[model]`: the model and how it is loaded.
    pub model: ModelArguments,
    /// `[lora]`: the adapter; `None` trains all weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraArguments>,
    /// `[data]`: the rows.
    pub data: DataArguments,
    /// `[train]`: the method, batches, steps, learning rates and the like.
    #[serde(serialize_with = "method::serialize")]
    pub train: SftConfig,
    /// `[[rewards]]`: the rewards of completions, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rewards: Vec<RewardConfig>,
    /// The run file that this was read from, which a run never overwrites.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

/// The default of `seed`.
const SEED: u64 = 3407;

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            output_dir: Path::new("outputs").join("run"),
            seed: SEED,
            device: "auto".to_owned(),
            model: ModelArguments::default(),
            lora: None,
            data: DataArguments::default(),
            train: SftConfig::default(),
            rewards: Vec::new(),
            path: None,
        }
    }
}

/// The keys above the first section, and the sections as tables.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TopLevel {
    output_dir: Option<PathBuf>,
    seed: u64,
    device: String,
    model: Table,
    lora: Option<Table>,
    data: Table,
    train: Table,
    rewards: Vec<Table>,
}

impl Default for TopLevel {
    fn default() -> Self {
        let (model, data, train, rewards) = Default::default();
        Self { output_dir: None, seed: SEED, device: "auto".to_owned(), model, lora: None, data, train, rewards }
    }
}

impl RunConfig {
    /// Reads the run file at `path` and applies `overrides` in order.
    ///
    /// # Errors
    /// [`Error::Argument`] for a file that cannot be read, [`Error::RunFile`] with every problem in it.
    pub fn load(path: impl AsRef<Path>, overrides: &[ConfigOverride]) -> Result<Self, Error> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::Argument(format!("cannot read the run file {}: {error}", path.display())))?;
        let stem = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy());
        match Self::parse(&text, &stem, overrides) {
            Ok(config) => Ok(Self { path: Some(path.to_owned()), ..config }),
            Err(problems) => Err(Error::RunFile { name: path.display().to_string(), problems }),
        }
    }

    /// Reads the text of a run file and applies `overrides` in order. The default `output_dir` is `outputs/run`.
    ///
    /// # Errors
    /// [`Error::RunFile`] with every problem in the text.
    pub fn from_toml(text: &str, overrides: &[ConfigOverride]) -> Result<Self, Error> {
        let config = Self::parse(text, "run", overrides);
        config.map_err(|problems| Error::RunFile { name: "run file".to_owned(), problems })
    }

    /// Reads the text of a run file called `stem`; returns one sentence for each problem in it.
    fn parse(text: &str, stem: &str, overrides: &[ConfigOverride]) -> Result<Self, Vec<String>> {
        let mut table = text.parse::<Table>().map_err(|error| vec![error.to_string().trim_end().to_owned()])?;
        expand_model(&mut table);
        move_gradient_checkpointing(&mut table).map_err(|problem| vec![problem])?;
        for change in overrides {
            change.apply(&mut table).map_err(|problem| vec![problem])?;
        }
        let lora_keys = [fields_of::<LoraConfig>(), fields_of::<InitFrom>()].concat();
        let mut reader = SectionReader::new(vec![
            ("", fields_of::<TopLevel>()),
            ("model", fields_of::<ModelArguments>()),
            ("lora", lora_keys),
            ("data", fields_of::<DataArguments>()),
            ("train", method::train_keys()),
        ]);
        let mut top: TopLevel = reader.read("", table);
        let method = method::take_method(&mut reader, &mut top.train);
        let config = Self {
            output_dir: top.output_dir.unwrap_or_else(|| Path::new("outputs").join(stem)),
            seed: top.seed,
            device: top.device,
            model: reader.read("model", top.model),
            lora: top.lora.map(|table| LoraArguments::read(&mut reader, table, top.seed)),
            data: reader.read("data", top.data),
            train: SftConfig { method, ..reader.read("train", top.train) },
            rewards: rewards::read(&mut reader.problems, top.rewards),
            path: None,
        };
        let mut problems = reader.problems;
        // A key that could not be read has its default here; reporting what follows from that would only confuse.
        if problems.is_empty() {
            config.list_problems(&mut problems);
        }
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// Returns the text of an equivalent run file. It omits the hub token.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration contains only what TOML can represent")
    }
}

/// Expands `model = "…"`, which is short for a section with the name alone.
fn expand_model(table: &mut Table) {
    if let Some(model) = table.get_mut("model").filter(|model| model.is_str()) {
        *model = Table::from_iter([("name_or_path".to_owned(), model.clone())]).into();
    }
}

/// The key of `[train]` that `[lora]` and `[model]` had in earlier versions.
const GRADIENT_CHECKPOINTING: &str = "use_gradient_checkpointing";

/// Sections whose `use_gradient_checkpointing` is an alias of the key in `[train]`.
const ALIAS_SECTIONS: [&str; 2] = ["lora", "model"];

/// Moves `use_gradient_checkpointing` from `[lora]` or `[model]` to `[train]`. Two places with different values are an
/// error.
fn move_gradient_checkpointing(table: &mut Table) -> Result<(), String> {
    for section in ALIAS_SECTIONS {
        let Some(alias) = table.get_mut(section).and_then(|section| section.as_table_mut()) else { continue };
        let Some(value) = alias.remove(GRADIENT_CHECKPOINTING) else { continue };
        let train = table.entry("train").or_insert_with(|| Table::new().into());
        // A value of the wrong type is reported when the section is read.
        let Some(train) = train.as_table_mut() else { continue };
        match train.get(GRADIENT_CHECKPOINTING) {
            Some(other) if *other != value => {
                return Err(format!(
                    "{GRADIENT_CHECKPOINTING} is {value} in [{section}] and {other} elsewhere; keep one of them, in [train]"
                ));
            }
            _ => _ = train.insert(GRADIENT_CHECKPOINTING.to_owned(), value),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! `RUN.toml`: what a run trains, on what, and how.

use std::path::{Path, PathBuf};

use rekindle::{
    Blocksize, DeviceKind, Dtype, FastLanguageModel, GradientCheckpointing, Loader, LoraConfig, Model, QuantConfig,
    RopeScaling, SftConfig, Source, parse_device, stored_quantization,
};
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::failure::Failure;
use crate::overrides::Override;
use crate::reader::{Reader, fields_of};

mod data;

#[cfg(test)]
pub(crate) use data::Paths;
pub(crate) use data::{DataSection, SAMPLE_SEED};

/// A run with every default filled in.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RunConfig {
    pub(crate) output_dir: PathBuf,
    pub(crate) seed: u64,
    pub(crate) device: String,
    pub(crate) model: ModelSection,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lora: Option<LoraSection>,
    pub(crate) data: DataSection,
    pub(crate) train: SftConfig,
}

/// The arguments of `from_pretrained`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelSection {
    pub(crate) name_or_path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_seq_length: Option<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) full_finetuning: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) stochastic_rounding: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) load_in_4bit: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) load_in_8bit: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) load_in_16bit: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) quant_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) double_quant: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) skip_modules: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rope_scaling: Option<RopeScaling>,
    #[serde(skip_serializing_if = "is_off")]
    pub(crate) use_gradient_checkpointing: GradientCheckpointing,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resize_model_vocab: Option<usize>,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) fast_inference: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    /// Read and never written: run files are shown to others.
    #[serde(skip_serializing)]
    pub(crate) token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache_dir: Option<PathBuf>,
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) local_files_only: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_off(value: &GradientCheckpointing) -> bool {
    !value.recomputes()
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

impl ModelSection {
    /// The loader that these arguments describe.
    pub(crate) fn loader(&self, device: DeviceKind) -> Result<Loader, rekindle::Error> {
        let mut loader = FastLanguageModel::from_pretrained(&self.name_or_path)
            .dtype(self.dtype)
            .device(device)
            .full_finetuning(self.full_finetuning)
            .stochastic_rounding(self.stochastic_rounding)
            .load_in_4bit(self.load_in_4bit)
            .load_in_8bit(self.load_in_8bit)
            .load_in_16bit(self.load_in_16bit)
            .use_gradient_checkpointing(self.use_gradient_checkpointing)
            .fast_inference(self.fast_inference)
            .local_files_only(self.local_files_only);
        if let Some(length) = self.max_seq_length {
            loader = loader.max_seq_length(length);
        }
        if let Some(rope_scaling) = &self.rope_scaling {
            loader = loader.rope_scaling(rope_scaling.clone());
        }
        if let Some(config) = self.quant_config()? {
            loader = loader.quant_config(config);
        }
        if let Some(modules) = &self.skip_modules {
            loader = loader.skip_modules(modules);
        }
        if let Some(rows) = self.resize_model_vocab {
            loader = loader.resize_model_vocab(rows);
        }
        if let Some(revision) = &self.revision {
            loader = loader.revision(revision);
        }
        if let Some(token) = &self.token {
            loader = loader.token(token);
        }
        if let Some(cache_dir) = &self.cache_dir {
            loader = loader.cache_dir(cache_dir);
        }
        Ok(loader)
    }

    /// An adapter beside the model, to be looked for in the same way.
    pub(crate) fn source(&self, adapter: &Path) -> Source<'static> {
        let mut source = Source::new(adapter).local_files_only(self.local_files_only);
        if let Some(token) = &self.token {
            source = source.token(token);
        }
        if let Some(cache_dir) = &self.cache_dir {
            source = source.cache_dir(cache_dir);
        }
        source
    }

    /// Writes the 4-bit format out where this quantized `model`; a checkpoint that came in codes has its own.
    pub(crate) fn fill_quant_config(&mut self, model: &Model) {
        let has_its_own = stored_quantization(&model.causal_lm().config().json).is_some();
        if self.load_in_4bit && !has_its_own {
            let QuantConfig { quant_type, blocksize, double_quant } = QuantConfig::default();
            self.quant_type.get_or_insert_with(|| quant_type.name().to_owned());
            self.blocksize.get_or_insert(blocksize.get());
            self.double_quant.get_or_insert(double_quant);
        }
    }

    /// The 4-bit format, if any part of it is given.
    fn quant_config(&self) -> Result<Option<QuantConfig>, rekindle::Error> {
        if self.quant_type.is_none() && self.blocksize.is_none() && self.double_quant.is_none() {
            return Ok(None);
        }
        let mut config = QuantConfig::default();
        let wrong = |error: rekindle::QuantError| rekindle::Error::Argument(error.to_string());
        if let Some(name) = &self.quant_type {
            config.quant_type = name.parse().map_err(wrong)?;
        }
        if let Some(size) = self.blocksize {
            config.blocksize = Blocksize::new(size).map_err(wrong)?;
        }
        config.double_quant = self.double_quant.unwrap_or(config.double_quant);
        Ok(Some(config))
    }
}

/// The arguments of `get_peft_model`, or an adapter to go on with.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LoraSection {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) init_from: Option<PathBuf>,
    #[serde(flatten)]
    pub(crate) config: LoraConfig,
    /// The keys that were written out, which an adapter to go on with must agree with.
    #[serde(skip)]
    pub(crate) given: Vec<String>,
}

/// The top of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Top {
    output_dir: Option<PathBuf>,
    seed: u64,
    device: String,
    model: Table,
    lora: Option<Table>,
    data: Table,
    train: Table,
}

impl Default for Top {
    fn default() -> Self {
        let (model, data, train) = Default::default();
        Self { output_dir: None, seed: 3407, device: "auto".to_owned(), model, lora: None, data, train }
    }
}

/// The part of `[lora]` that is not an argument of `get_peft_model`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Start {
    init_from: Option<PathBuf>,
}

impl RunConfig {
    /// Reads the file at `path` with `overrides` put in.
    pub(crate) fn load(path: &Path, overrides: &[Override]) -> Result<Self, Failure> {
        let name = path.display();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::Configuration(format!("cannot read the run file {name}: {error}")))?;
        let stem = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy());
        Self::parse(&text, &stem, overrides).map_err(|problems| {
            let (count, list) = (problems.len(), problems.join("\n  "));
            let message = if count == 1 { format!("{name}: {list}") } else { format!("{name}:\n  {list}") };
            Failure::Configuration(message)
        })
    }

    /// Reads the text of a run file called `stem`; every problem in it is one sentence.
    pub(crate) fn parse(text: &str, stem: &str, overrides: &[Override]) -> Result<Self, Vec<String>> {
        let mut table = text.parse::<Table>().map_err(|error| vec![error.to_string().trim_end().to_owned()])?;
        expand_model(&mut table);
        for change in overrides {
            change.apply(&mut table).map_err(|problem| vec![problem])?;
        }
        let lora_keys = [fields_of::<LoraConfig>(), fields_of::<Start>()].concat();
        let mut reader = Reader::new(vec![
            ("", fields_of::<Top>()),
            ("model", fields_of::<ModelSection>()),
            ("lora", lora_keys),
            ("data", fields_of::<DataSection>()),
            ("train", fields_of::<SftConfig>()),
        ]);
        let top: Top = reader.read("", table);
        let config = Self {
            output_dir: top.output_dir.unwrap_or_else(|| Path::new("outputs").join(stem)),
            seed: top.seed,
            device: top.device,
            model: reader.read("model", top.model),
            lora: top.lora.map(|table| LoraSection::read(&mut reader, table, top.seed)),
            data: reader.read("data", top.data),
            train: reader.read("train", top.train),
        };
        let mut problems = reader.problems;
        // A key that could not be read is at its default here; what follows from that would only confuse.
        if problems.is_empty() {
            config.check(&mut problems);
        }
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// The text of a run file that says the same.
    pub(crate) fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration holds only what TOML can")
    }

    fn check(&self, problems: &mut Vec<String>) {
        if self.model.name_or_path.as_os_str().is_empty() {
            problems.push(
                "[model] name_or_path is missing; give a checkpoint's directory, or its name on the hub".to_owned(),
            );
        }
        self.data.check(problems);
        match parse_device(&self.device) {
            Err(error) => problems.push(error.to_string()),
            Ok(device) => {
                if let Err(error) = self.model.loader(device).and_then(|loader| loader.check()) {
                    problems.push(format!("[model] {error}"));
                }
            }
        }
        match (&self.lora, self.model.full_finetuning) {
            (None, false) => problems.push(
                "nothing to train: add a section [lora] (for instance with r = 16) to train an adapter, or write \
                 full_finetuning = true in [model] to train all weights"
                    .to_owned(),
            ),
            (Some(_), true) => problems.push(
                "[lora] and full_finetuning = true exclude each other; remove [lora] to train all weights, or \
                 full_finetuning to train an adapter"
                    .to_owned(),
            ),
            _ => {}
        }
        if let Some(LoraSection { init_from: None, config, .. }) = &self.lora
            && let Err(error) = config.validate()
        {
            problems.push(format!("[lora] {error}"));
        }
        if let Err(error) = self.train.validate() {
            problems.push(format!("[train] {error}"));
        }
        if self.model.dtype == Dtype::F16 {
            problems.push(
                "[model] dtype = \"f16\" is not for training: its smallest value is 6e-8, and the loss is not scaled to keep \
                 gradients above that; use \"bf16\" or \"f32\""
                    .to_owned(),
            );
        }
        if let Some(LoraSection { init_from: None, config, .. }) = &self.lora {
            if self.train.embedding_learning_rate.is_some() && config.modules_to_save.is_empty() {
                problems.push(
                    "[train] embedding_learning_rate needs an embedding table or output layer that is trained: modules_to_save \
                     = [\"embed_tokens\", \"lm_head\"] in [lora], or full_finetuning"
                        .to_owned(),
                );
            }
            if self.train.optimizer_in_bwd {
                problems.push(
                    "[train] optimizer_in_bwd is for full_finetuning: the gradients of an adapter are small; remove it"
                        .to_owned(),
                );
            }
        }
        for (_, key) in self.train.needs_eval().iter().filter(|(wanted, _)| *wanted && !self.data.has_eval()) {
            problems.push(format!(
                "[train] {key} needs rows to evaluate; give eval = \"…\" or eval_fraction = 0.05 in [data]"
            ));
        }
        if self.train.eval_samples > 0 && !self.data.has_eval() {
            problems.push(
                "[train] eval_samples takes prompts of rows to evaluate; give eval = \"…\" in [data], or sample_prompts"
                    .to_owned(),
            );
        }
    }
}

/// `model = "…"` is short for a section with the name alone.
fn expand_model(table: &mut Table) {
    if let Some(model) = table.get_mut("model").filter(|model| model.is_str()) {
        *model = Table::from_iter([("name_or_path".to_owned(), model.clone())]).into();
    }
}

impl LoraSection {
    /// A new adapter is drawn from the run's seed unless `random_state` is given.
    fn read(reader: &mut Reader, mut table: Table, seed: u64) -> Self {
        let start = fields_of::<Start>();
        let start: Table = start.into_iter().filter_map(|key| table.remove_entry(key)).collect();
        let Start { init_from } = reader.read("lora", start);
        let given: Vec<String> = table.keys().cloned().collect();
        let mut config: LoraConfig = reader.read("lora", table);
        if !given.iter().any(|key| key == "random_state") {
            config.random_state = seed;
        }
        Self { init_from, config, given }
    }
}

#[cfg(test)]
mod tests;

//! GGUF files as checkpoints: under the names, in the order of rows and with the values of the Hugging Face layout.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rekindle_gguf::{GgufModel, GgufTensor, GgufTokenizerFiles};
use rekindle_hub::{
    ADDITIONAL_CHAT_TEMPLATES, Checkpoint, Dtype, TensorStore, TensorView, read_config, read_json, write_atomic,
    write_f32,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::gguf_decoder::architecture;
use super::gguf_tensors::{self, GgufTensorPart, tensors_of};
use super::kept_blocks;
use crate::parameters::{ExpertStack, ParameterSpec};
use crate::{Error, ModelConfig, Role, families};

/// The file in a directory that names the GGUF file with its weights.
const POINTER: &str = "gguf.json";

/// Tensors of a GGUF file that are read into the configuration.
const IN_CONFIG: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The content of [`POINTER`].
#[derive(Serialize, Deserialize)]
struct GgufPointer {
    /// The GGUF file, or the first of a split model.
    file: PathBuf,
}

/// Writes everything but the weights of a GGUF model into the existing directory `dir`, in the Hugging Face layout:
/// `config.json`, the tokenizer and its chat templates, `generation_config.json`, and the path of `file`.
///
/// # Errors
/// [`Error::Gguf`] for a damaged file, and one with an architecture or a tokenizer that is not supported.
pub fn unpack_gguf(file: &Path, dir: &Path) -> Result<(), Error> {
    let model = GgufModel::open(file)?;
    let mut config = families::config_of_gguf(&model)?;
    let write = |name: &str, json: &Value| write_atomic(&dir.join(name), format!("{json:#}\n").as_bytes());
    if let Some(files) = GgufTokenizerFiles::read(&model)? {
        let ends: Value = match files.ends[..] {
            [] => Value::Null,
            [end] => end.into(),
            _ => files.ends.clone().into(),
        };
        let ids = [("bos_token_id", files.bos.into()), ("eos_token_id", ends), ("pad_token_id", files.padding.into())];
        let mut generation = json!({});
        for (key, value) in ids.into_iter().filter(|(_, value): &(_, Value)| !value.is_null()) {
            config[key] = value.clone();
            generation[key] = value;
        }
        write("generation_config.json", &generation)?;
        write("tokenizer_config.json", &files.config)?;
        for (name, text) in &files.chat_templates {
            let path = if name == "default" {
                dir.join("chat_template.jinja")
            } else {
                let others = dir.join(ADDITIONAL_CHAT_TEMPLATES);
                let made = fs::create_dir_all(&others);
                made.map_err(|source| rekindle_hub::Error::Io { path: others.clone(), source })?;
                others.join(format!("{name}.jinja"))
            };
            write_atomic(&path, text.as_bytes())?;
        }
        write_atomic(&dir.join("tokenizer.json"), files.tokenizer.to_string().as_bytes())?;
    }
    if let Some((key, section)) = kept_blocks::section(quantized_linears(&model, &config, file)?) {
        config[key] = section;
    }
    write("config.json", &config)?;
    let absolute = file.canonicalize().map_err(|source| rekindle_hub::Error::Io { path: file.to_owned(), source })?;
    write(POINTER, &json!(GgufPointer { file: absolute }))?;
    Ok(())
}

/// Returns the types of the linears that can stay in their blocks, by module: those with the columns of the checkpoint. The
/// linears of the experts of a layer are one weight, so they stay if all have one type.
fn quantized_linears(model: &GgufModel, config: &Value, file: &Path) -> Result<BTreeMap<String, &'static str>, Error> {
    let config =
        ModelConfig::from_json(config).map_err(|problems| Error::Config { path: file.to_owned(), problems })?;
    let architecture = architecture(&config)?;
    let (mut types, mut experts) = (BTreeMap::new(), BTreeMap::<_, BTreeMap<String, &str>>::new());
    for needed in config.parameters() {
        let (true, &[_, input]) = (needed.role.is_linear(), needed.shape.as_slice()) else { continue };
        let parts = tensors_of(&architecture, &config, &needed)?;
        let kinds: BTreeSet<_> = parts.iter().map(|part| model.tensor(&part.name).map(|tensor| tensor.kind)).collect();
        if kinds.len() > 1 || parts.iter().any(|part| part.change.columns.is_some()) {
            continue;
        }
        let codec = kept_blocks::codec(kinds.into_iter().next().flatten());
        if let Some(codec) = codec.filter(|codec| input.is_multiple_of(codec.elements)) {
            let same_weight = match (needed.role, needed.role.expert()) {
                (Role::Layer(layer, _), Some((role, _))) => {
                    experts.entry((layer, role.place().0 == ExpertStack::Down)).or_default()
                }
                _ => &mut types,
            };
            same_weight.insert(needed.module().to_owned(), codec.name);
        }
    }
    let is_uniform = |stack: &BTreeMap<String, &str>| stack.values().all(|name| stack.values().next() == Some(name));
    types.extend(experts.into_values().filter(is_uniform).flatten());
    Ok(types)
}

/// Opens the checkpoint in a directory: safetensors files, or the GGUF file that [`unpack_gguf`] wrote the directory for.
///
/// # Errors
/// [`Error::File`] and [`Error::Gguf`] for missing or damaged files; [`Error::Config`] for a configuration of a GGUF file
/// that is not supported.
pub fn open_checkpoint(dir: &Path) -> Result<Checkpoint, Error> {
    let pointer = dir.join(POINTER);
    if !pointer.is_file() {
        return Ok(Checkpoint::open(dir)?);
    }
    let GgufPointer { file } = read_json(&pointer)?;
    let model = GgufModel::open(&file)?;
    let json = read_config(dir)?;
    let config = ModelConfig::from_json(&json).map_err(|problems| Error::Config { path: file.clone(), problems })?;
    let store = GgufStore::new(model, &config)?;
    Ok(Checkpoint::with_store(dir, json, Box::new(store)))
}

/// The tensors of a GGUF file under the model's own names.
#[derive(Debug)]
struct GgufStore {
    model: GgufModel,
    tensors: BTreeMap<String, StoredTensor>,
}

/// A tensor of the model in a GGUF file.
#[derive(Debug)]
struct StoredTensor {
    /// The name in the file.
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    content: TensorContent,
}

#[derive(Debug)]
enum TensorContent {
    /// These bytes of the tensor in the file.
    InFile(Range<usize>),
    /// Rows in another order, such as queries and keys in the order of pairs: those of the checkpoint in the order of the
    /// file. They are put in their places when they are first read.
    Rows { order: Vec<usize>, rows: OnceLock<Vec<u8>> },
    /// Rows that alternate between these bytes of the tensor and those of another one.
    Alternating { even: Range<usize>, other: String },
    /// Values that differ from those in the file.
    Computed(Vec<u8>),
}

impl GgufStore {
    fn new(model: GgufModel, config: &ModelConfig) -> Result<Self, Error> {
        let architecture = architecture(config)?;
        let mut tensors = BTreeMap::new();
        let mut used: BTreeSet<String> = IN_CONFIG.map(str::to_owned).into();
        for needed in config.parameters() {
            let parts = tensors_of(&architecture, config, &needed)?;
            let found: Option<Vec<_>> = parts.iter().map(|part| model.tensor(&part.name)).collect();
            let Some(found) = found else { continue };
            let stored = match &found[..] {
                [found] => StoredTensor::new(found, &parts[0], &needed)?,
                found => StoredTensor::alternating(found, &parts, &needed)?,
            };
            tensors.insert(needed.name, stored);
            used.extend(parts.into_iter().map(|part| part.name));
        }
        // Others keep their names, for the check of tensors to report.
        for other in model.tensors().filter(|tensor| !used.contains(tensor.name)) {
            tensors.insert(other.name.to_owned(), StoredTensor::as_it_is(&other));
        }
        Ok(Self { model, tensors })
    }
}

impl StoredTensor {
    fn as_it_is(found: &GgufTensor<'_>) -> Self {
        Self {
            name: found.name.to_owned(),
            dtype: found.kind.dtype(),
            // Extents are at most the length of a file unless one of them is 0.
            shape: found.shape.iter().map(|&extent| usize::try_from(extent).unwrap_or(usize::MAX)).collect(),
            content: TensorContent::InFile(0..found.data.len()),
        }
    }

    fn new(found: &GgufTensor<'_>, part: &GgufTensorPart, needed: &ParameterSpec) -> Result<Self, Error> {
        let mut stored = Self::as_it_is(found);
        let extents = |shape: &[usize]| shape.iter().copied().filter(|extent| *extent != 1).collect::<Vec<_>>();
        // The linears of all experts are one tensor.
        let (experts, shape) = match (needed.role.expert(), stored.shape.split_first()) {
            (Some((_, expert)), Some((&experts, rest))) if expert < experts => (experts, rest),
            _ => (1, &stored.shape[..]),
        };
        if extents(shape) != extents(&needed.shape) {
            // The check of tensors reports both shapes.
            return Ok(stored);
        }
        stored.shape.clone_from(&needed.shape);
        if let Some((_, expert)) = needed.role.expert() {
            let size = found.data.len() / experts.max(1);
            stored.content = TensorContent::InFile(expert * size..(expert + 1) * size);
            return Ok(stored);
        }
        let change = &part.change;
        if let Some(order) = change.of_rows_alone() {
            stored.content = TensorContent::Rows { order: order.to_vec(), rows: OnceLock::new() };
        } else if !change.is_identity() {
            let columns = if needed.shape.len() == 1 { 1 } else { needed.shape.last().copied().unwrap_or(1) };
            let values = change.undo(found.to_f32()?, columns);
            let mut bytes = Vec::with_capacity(4 * values.len());
            write_f32(&mut bytes, Dtype::F32, &values).expect("memory takes what is written");
            stored.dtype = Dtype::F32;
            stored.content = TensorContent::Computed(bytes);
        }
        Ok(stored)
    }

    /// Returns a parameter whose rows, or columns in the biases of experts, alternate between two tensors.
    fn alternating(found: &[GgufTensor<'_>], parts: &[GgufTensorPart], needed: &ParameterSpec) -> Result<Self, Error> {
        let (mut stored, odd) = (Self::as_it_is(&found[0]), Self::as_it_is(&found[1]));
        let experts = match needed.role.expert() {
            Some(_) => stored.shape.first().copied().unwrap_or(0),
            None => 1,
        };
        let expected: Vec<usize> = match needed.role.expert() {
            Some((_, expert)) if expert < experts => [&[experts], &parts[0].shape[..]].concat(),
            _ => parts[0].shape.clone(),
        };
        if stored.shape != expected || odd.shape != expected || stored.dtype != odd.dtype {
            // The check of tensors reports the shapes.
            return Ok(stored);
        }
        stored.shape.clone_from(&needed.shape);
        if let Some((_, expert)) = needed.role.expert() {
            let size = found[0].data.len() / experts;
            let even = expert * size..(expert + 1) * size;
            stored.content = TensorContent::Alternating { even, other: odd.name };
            return Ok(stored);
        }
        let (even, odd) = (found[0].to_f32()?, found[1].to_f32()?);
        let values: Vec<f32> = even.into_iter().zip(odd).flat_map(|(even, odd)| [even, odd]).collect();
        let mut bytes = Vec::with_capacity(4 * values.len());
        write_f32(&mut bytes, Dtype::F32, &values).expect("memory takes what is written");
        stored.dtype = Dtype::F32;
        stored.content = TensorContent::Computed(bytes);
        Ok(stored)
    }
}

impl TensorStore for GgufStore {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, stored) = self.tensors.get_key_value(name)?;
        let data = self.model.tensor(&stored.name)?.data;
        let mut odd_rows = None;
        let data = match &stored.content {
            TensorContent::InFile(range) => data.get(range.clone())?,
            TensorContent::Alternating { even, other } => {
                odd_rows = Some(self.model.tensor(other)?.data.get(even.clone())?);
                data.get(even.clone())?
            }
            TensorContent::Rows { order, rows } => {
                rows.get_or_init(|| gguf_tensors::in_place(data, order, data.len() / order.len().max(1)))
            }
            TensorContent::Computed(bytes) => bytes,
        };
        Some(TensorView { name, dtype: stored.dtype, shape: &stored.shape, data, transposed: false, odd_rows })
    }

    fn total_bytes(&self) -> u64 {
        self.model.tensors().map(|tensor| tensor.data.len() as u64).sum()
    }
}

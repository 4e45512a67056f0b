//! Writing a checkpoint: tensors in shards, and the `config.json` beside them.

use std::io;
use std::path::Path;

use rekindle_hub::{Checkpoint, DEFAULT_MAX_SHARD_SIZE, Dtype, TensorSpec, TensorView, write_atomic, write_sharded};
use rekindle_quant::bnb::StoredWeight;
use serde_json::Value;

use super::gguf_base::open_checkpoint;
use super::tensor_names::{TensorNaming, canonical};
use crate::{Error, ModelConfig};

/// A tensor of a checkpoint that is written, and what it is written from.
pub(super) struct CheckpointTensor<S> {
    pub(super) spec: TensorSpec,
    pub(super) source: S,
}

impl<S: Clone> CheckpointTensor<S> {
    /// The tensors that a quantized weight called `name` consists of in a file.
    pub(super) fn quantized(name: &str, weight: &StoredWeight, source: &S) -> Vec<Self> {
        let tensors = weight.write(name).into_iter();
        let tensor = |(key, tensor): (String, rekindle_quant::bnb::RawTensor<'_>)| Self {
            spec: TensorSpec::new(key, tensor.dtype, tensor.shape),
            source: source.clone(),
        };
        tensors.map(tensor).collect()
    }
}

/// Tensors of a checkpoint that are no part of the decoder, such as a vision tower, and the names that its files have.
pub(super) struct KeptTensors {
    checkpoint: Option<Checkpoint>,
    names: Vec<String>,
    naming: TensorNaming,
}

impl KeptTensors {
    /// Those of the checkpoint at `path`.
    pub(super) fn of(path: &Path, config: &ModelConfig) -> Result<Self, Error> {
        if !config.names.has_kept() && config.names.stored_parts.is_empty() {
            return Ok(Self { checkpoint: None, names: Vec::new(), naming: TensorNaming::default() });
        }
        let stored = open_checkpoint(path)?;
        let naming = TensorNaming::of(&config.json, stored.names());
        let checkpoint = canonical(&stored);
        let names = checkpoint.names().filter(|name| config.names.keeps(name)).map(str::to_owned).collect();
        Ok(Self { checkpoint: Some(checkpoint), names, naming })
    }

    fn views(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names.iter().filter_map(|name| self.checkpoint.as_ref()?.get(name))
    }
}

/// Writes tensors and those that are kept into the existing directory `dir`; `write` writes the data of each of the former.
pub(super) fn write_tensors<S>(
    dir: &Path,
    kept: &KeptTensors,
    tensors: Vec<CheckpointTensor<S>>,
    mut write: impl FnMut(&S, &TensorSpec, &mut dyn io::Write) -> io::Result<()>,
) -> Result<(), Error> {
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let (specs, sources): (Vec<_>, Vec<_>) = tensors.into_iter().map(|tensor| (tensor.spec, tensor.source)).unzip();
    let views: Vec<TensorView<'_>> = kept.views().collect();
    let stored_as = |name: &str, dtype, shape: &[usize]| TensorSpec::new(kept.naming.stored(name), dtype, shape);
    let mut stored: Vec<TensorSpec> = specs.iter().map(|spec| stored_as(&spec.name, spec.dtype, &spec.shape)).collect();
    stored.extend(views.iter().map(|view| stored_as(view.name, view.dtype, view.shape)));
    write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &stored, |index, out| match sources.get(index) {
        Some(source) => write(source, &specs[index], out),
        None => out.write_all(views[index - sources.len()].data),
    })?;
    Ok(())
}

/// Writes the data of one of the tensors that the quantized weight `name` consists of.
pub(super) fn write_quantized(
    name: &str,
    weight: &StoredWeight,
    spec: &TensorSpec,
    out: &mut dyn io::Write,
) -> io::Result<()> {
    let tensors = weight.write(name);
    let found = tensors.iter().find(|(key, _)| *key == spec.name);
    out.write_all(&found.expect("the keys follow from the format").1.bytes)
}

/// Writes `config.json` into `dir`.
pub(super) fn write_config(dir: &Path, json: &Value) -> Result<(), Error> {
    Ok(write_atomic(&dir.join("config.json"), format!("{json:#}\n").as_bytes())?)
}

/// Sets the dtype that a `config.json` names, under the key that it uses.
pub(super) fn set_dtype(json: &mut Value, dtype: Dtype) {
    if let Value::Object(fields) = json {
        let key = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        fields.insert(key.to_owned(), Value::from(dtype.torch_name()));
    }
}

/// Sets or removes the `quantization_config` of a `config.json`.
pub(super) fn set_quantization(json: &mut Value, config: Option<Value>) {
    if let Value::Object(fields) = json {
        fields.remove("quantization_config");
        if let Some(config) = config {
            fields.insert("quantization_config".to_owned(), config);
        }
    }
}

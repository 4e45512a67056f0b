//! Adapters in memory and in PEFT's files.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Dtype, SafetensorsFile, TensorSpec, write_atomic, write_f32, write_safetensors};

use crate::peft::{AdapterConfig, CONFIG_FILE, Factor, TENSORS_FILE, parse_tensor_key, tensor_key};
use crate::{Error, match_targets};

/// A `[r, in]` and B `[out, r]` of one adapted linear, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// The rank.
    pub r: usize,
    /// A's values.
    pub a: Vec<f32>,
    /// B's values.
    pub b: Vec<f32>,
}

/// An adapter: its configuration and the factors of every adapted linear by module name.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What `adapter_config.json` says.
    pub config: AdapterConfig,
    /// Factors by the full name of the linear.
    pub factors: BTreeMap<String, Factors>,
}

impl Adapter {
    /// Reads an adapter directory for a model with `linears` (full name, in, out).
    ///
    /// The adapted linears are those that the tensors name.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::AdapterConfig`] for unreadable files; [`Error::Tensors`] that lists every tensor
    /// which is missing, unexpected or misshaped.
    pub fn load(dir: &Path, linears: &[(String, usize, usize)]) -> Result<Self, Error> {
        let config_path = dir.join(CONFIG_FILE);
        let value: serde_json::Value = rekindle_hub::read_json(&config_path)?;
        let config = AdapterConfig::from_json(&value.to_string())?;
        let path = dir.join(TENSORS_FILE);
        let file = SafetensorsFile::open(&path)?;
        let r = config.lora().r;
        let mut problems = Vec::new();
        let mut modules: Vec<&str> = Vec::new();
        for name in file.names() {
            match parse_tensor_key(name) {
                Some((module, _)) if linears.iter().any(|(linear, ..)| linear == module) => {
                    if !modules.contains(&module) {
                        modules.push(module);
                    }
                }
                _ => problems.push(format!("tensor \"{name}\" belongs to no linear of this model")),
            }
        }
        let mut factors = BTreeMap::new();
        for module in modules {
            let Some((_, in_features, out_features)) = linears.iter().find(|(linear, ..)| linear == module) else {
                continue;
            };
            let mut read = |factor, shape: [usize; 2]| -> Result<Vec<f32>, Error> {
                let key = tensor_key(module, factor);
                match file.get(&key) {
                    None => problems.push(format!("tensor \"{key}\" is missing")),
                    Some(tensor) if tensor.shape != shape => {
                        problems.push(format!("tensor \"{key}\" has shape {:?}, expected {shape:?}", tensor.shape));
                    }
                    Some(tensor) => return Ok(tensor.to_f32()?),
                }
                Ok(Vec::new())
            };
            let a = read(Factor::A, [r, *in_features])?;
            let b = read(Factor::B, [*out_features, r])?;
            factors.insert(module.to_owned(), Factors { r, a, b });
        }
        // A pattern that only Python's regular expressions understand cannot be checked; its tensors still are.
        let names: Vec<&str> = linears.iter().map(|(name, ..)| name.as_str()).collect();
        for module in match_targets(config.lora(), &names).unwrap_or_default() {
            if !factors.contains_key(&module) {
                problems.push(format!("tensor \"{}\" is missing", tensor_key(&module, Factor::A)));
            }
        }
        if factors.is_empty() && problems.is_empty() {
            problems.push("holds no adapter tensors".to_owned());
        }
        if problems.is_empty() { Ok(Self { config, factors }) } else { Err(Error::Tensors { path, problems }) }
    }

    /// Writes the files that PEFT reads into the existing directory `dir`, factors in `f32`.
    ///
    /// # Errors
    /// [`Error::File`] when the system refuses; nothing half-written stands under a final name.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let mut specs = Vec::new();
        let mut values: Vec<&[f32]> = Vec::new();
        for (module, factors) in &self.factors {
            let r = factors.r;
            specs.push(TensorSpec::new(tensor_key(module, Factor::A), Dtype::F32, [r, factors.a.len() / r]));
            values.push(&factors.a);
            specs.push(TensorSpec::new(tensor_key(module, Factor::B), Dtype::F32, [factors.b.len() / r, r]));
            values.push(&factors.b);
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&dir.join(TENSORS_FILE), &metadata, &specs, |i, out| write_f32(out, Dtype::F32, values[i]))?;
        write_atomic(&dir.join(CONFIG_FILE), self.config.to_json().as_bytes())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoraConfig;

    fn adapter() -> Adapter {
        let module = "model.layers.0.self_attn.q_proj".to_owned();
        let factors = Factors { r: 2, a: (0..6).map(|i| i as f32).collect(), b: vec![0.5; 8] };
        Adapter {
            config: AdapterConfig::new(&LoraConfig::new(2), Some("base"), std::slice::from_ref(&module)),
            factors: BTreeMap::from([(module, factors)]),
        }
    }

    fn linears(input: usize) -> Vec<(String, usize, usize)> {
        vec![("model.layers.0.self_attn.q_proj".to_owned(), input, 4)]
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        adapter().save(dir.path()).unwrap();
        let loaded = Adapter::load(dir.path(), &linears(3)).unwrap();
        assert_eq!(loaded.factors, adapter().factors);
        assert_eq!(loaded.config.lora().r, 2);
    }

    #[test]
    fn every_wrong_tensor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        adapter().save(dir.path()).unwrap();
        let error = Adapter::load(dir.path(), &linears(5)).unwrap_err().to_string();
        assert!(error.contains("q_proj.lora_A.weight\" has shape [2, 3], expected [2, 5]"), "{error}");
        let other = vec![("model.layers.1.self_attn.q_proj".to_owned(), 3, 4)];
        let error = Adapter::load(dir.path(), &other).unwrap_err().to_string();
        assert!(error.contains("lora_A.weight\" belongs to no linear of this model"), "{error}");
        assert!(error.contains("lora_B.weight"), "{error}");
    }
}

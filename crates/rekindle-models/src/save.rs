//! From a model to a checkpoint.

use std::path::Path;

use rekindle_hub::{DEFAULT_MAX_SHARD_SIZE, Dtype, TensorSpec, write_atomic, write_f32, write_sharded};
use rekindle_kernels::{Weight, to_f32};
use serde_json::Value;

use crate::names::{self, EMBED, HEAD, NORM, Projection};
use crate::{CausalLm, Error};

impl CausalLm {
    /// Writes `config.json` and the weights, as `dtype`, into the existing directory `dir`.
    ///
    /// # Errors
    /// [`Error::File`] when the system refuses.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<(), Error> {
        let needed = names::needed(&self.config);
        let specs: Vec<_> = needed.iter().map(|n| TensorSpec::new(n.name.clone(), dtype, n.shape.clone())).collect();
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &specs, |index, out| {
            let weight = self.find(&needed[index].name).expect("every needed tensor has its weight");
            let values = match weight {
                Weight::Frozen(tensor) => to_f32(tensor.clone()),
                Weight::Trained(at) => self.params.values(*at),
            };
            write_f32(out, dtype, &values)
        })?;
        let mut json = self.config.json.clone();
        if let Value::Object(fields) = &mut json {
            let name = match dtype {
                Dtype::BF16 => "bfloat16",
                Dtype::F16 => "float16",
                _ => "float32",
            };
            let key = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            fields.insert(key.to_owned(), Value::from(name));
        }
        write_atomic(&dir.join("config.json"), format!("{json:#}\n").as_bytes())?;
        Ok(())
    }

    /// The weight with this name in a checkpoint.
    fn find(&self, name: &str) -> Option<&Weight> {
        match name {
            EMBED => return Some(&self.embed),
            NORM => return Some(&self.norm),
            HEAD => return self.head.as_ref(),
            _ => {}
        }
        let layer: usize = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
        let block = self.blocks.get(layer)?;
        let (module, kind) = name.rsplit_once('.')?;
        if Projection::ALL.iter().any(|p| p.module(layer) == module) {
            let linear = block.groups().into_iter().flat_map(|g| g.linears()).find(|l| l.name == module)?;
            return if kind == "bias" { linear.bias.as_ref() } else { Some(&linear.weight) };
        }
        [
            ("input_layernorm", Some(&block.input_layernorm)),
            ("post_attention_layernorm", Some(&block.post_attention_layernorm)),
            ("self_attn.q_norm", block.qk_norm.as_ref().map(|n| &n.0)),
            ("self_attn.k_norm", block.qk_norm.as_ref().map(|n| &n.1)),
        ]
        .into_iter()
        .find(|(part, _)| names::norm(layer, part) == name)?
        .1
    }
}

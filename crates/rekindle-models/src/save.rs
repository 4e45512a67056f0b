//! From a model to a checkpoint.

use std::path::Path;

use rekindle_hub::{DEFAULT_MAX_SHARD_SIZE, Dtype, TensorSpec, write_atomic, write_f32, write_sharded};
use rekindle_kernels::{Weight, to_f32};
use rekindle_quant::bnb::StoredWeight;
use serde_json::Value;

use crate::names::{self, EMBED, HEAD, NORM, Projection};
use crate::quantization::hub_dtype;
use crate::{CausalLm, Error};

impl CausalLm {
    /// The dtype that holds trained weights as they are: f32, or bf16 where they are kept in place. What was trained in codes
    /// is rounded to bf16.
    pub fn trained_dtype(&self) -> Dtype {
        if self.params.are_in_place() { Dtype::BF16 } else { Dtype::F32 }
    }

    /// Writes `config.json` and the weights, as `dtype`, into the existing directory `dir`: those under the adapter, if there
    /// is one, which is what a pissa or olora adapter left of them.
    ///
    /// # Errors
    /// [`Error::File`] when the system refuses.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<(), Error> {
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let (specs, sources): (Vec<_>, Vec<_>) = self.files(dtype)?.into_iter().unzip();
        let mut last = Codes::default();
        write_sharded(dir, DEFAULT_MAX_SHARD_SIZE, &metadata, &specs, |index, out| {
            let name = &sources[index];
            match self.find(name).expect("every needed tensor has its weight") {
                Weight::Frozen(tensor) => write_f32(out, specs[index].dtype, &to_f32(tensor.clone())),
                Weight::Trained(at) => write_f32(out, specs[index].dtype, &self.params.values(*at)),
                Weight::Quantized(_) => {
                    let stored = last.of(name, || self.stored(name)).map_err(std::io::Error::other)?;
                    let tensors = stored.write(name);
                    let found = tensors.iter().find(|(key, _)| *key == specs[index].name);
                    out.write_all(&found.expect("the keys follow from the format").1.bytes)
                }
            }
        })?;
        // What is read from a device that failed is no weight.
        self.device.check()?;
        let mut json = self.config.json.clone();
        if let Value::Object(fields) = &mut json {
            let name = match dtype {
                Dtype::BF16 => "bfloat16",
                Dtype::F16 => "float16",
                _ => "float32",
            };
            let key = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            // What a merged model was made from may have been quantized.
            fields.remove("quantization_config");
            if let Some(quantization) = &self.quantization {
                // The dense tensors stay what they were, and so does what the file says of them.
                fields.insert("quantization_config".to_owned(), quantization.config.to_json());
            } else {
                fields.insert(key.to_owned(), Value::from(name));
            }
        }
        write_atomic(&dir.join("config.json"), format!("{json:#}\n").as_bytes())?;
        Ok(())
    }

    /// What each tensor in the files will be, with the name of the weight that it belongs to.
    fn files(&self, dtype: Dtype) -> Result<Vec<(TensorSpec, String)>, Error> {
        let mut list = Vec::new();
        for needed in names::needed(&self.config) {
            if let Some(Weight::Quantized(_)) = self.find(&needed.name) {
                for (key, tensor) in self.stored(&needed.name)?.write(&needed.name) {
                    list.push((TensorSpec::new(key, hub_dtype(tensor.dtype), tensor.shape), needed.name.clone()));
                }
                continue;
            }
            let as_read = self.quantization.as_ref().and_then(|q| q.dtypes.get(&needed.name).copied());
            list.push((TensorSpec::new(needed.name.clone(), as_read.unwrap_or(dtype), needed.shape), needed.name));
        }
        Ok(list)
    }

    /// The codes of the weight `name` as they are written.
    fn stored(&self, name: &str) -> Result<StoredWeight, Error> {
        let quantization = self.quantization.as_ref().expect("a model with codes says where they came from");
        let origin = quantization.origins.get(name).expect("every weight in codes has its origin");
        let Some(Weight::Quantized(packed)) = self.find(name) else { unreachable!("\"{name}\" is in codes") };
        let codes = std::sync::Arc::unwrap_or_clone(packed.data());
        origin.restore(codes).map_err(|error| Error::Argument(format!("tensor \"{name}\": {error}")))
    }

    /// The weight with this name in a checkpoint.
    pub(crate) fn find(&self, name: &str) -> Option<&Weight> {
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

/// The weight in codes that was written last: its tensors mostly come one after another.
#[derive(Default)]
struct Codes(Option<(String, StoredWeight)>);

impl Codes {
    fn of(&mut self, name: &str, make: impl FnOnce() -> Result<StoredWeight, Error>) -> Result<&StoredWeight, Error> {
        if self.0.as_ref().is_none_or(|(last, _)| last != name) {
            self.0 = None;
            self.0 = Some((name.to_owned(), make()?));
        }
        Ok(&self.0.as_ref().expect("just made").1)
    }
}

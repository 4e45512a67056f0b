//! From a model to a checkpoint.

use std::path::Path;

use rekindle_hub::{Dtype, TensorSpec, write_f32};
use rekindle_kernels::{Weight, to_f32};
use rekindle_quant::bnb::StoredWeight;

use super::writer::{self, CheckpointTensor, KeptTensors};
use crate::parameters::ParameterSpec;
use crate::{CausalLm, Error};

impl CausalLm {
    /// The dtype that holds trained weights as they are: f32, or bf16 where they are kept in place. Weights trained in
    /// quantized form are rounded to bf16.
    pub fn trained_dtype(&self) -> Dtype {
        if self.params.are_in_place() { Dtype::BF16 } else { Dtype::F32 }
    }

    /// Writes `config.json` and the weights, as `dtype`, into the existing directory `dir`: those under the active
    /// adapter, if there is one. A pissa or olora adapter has subtracted its initial B·A from them.
    ///
    /// # Errors
    /// [`Error::File`] when the system refuses.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<(), Error> {
        let mut last = LastQuantized::default();
        let kept = KeptTensors::of(&self.provenance.path, &self.config)?;
        writer::write_tensors(dir, &kept, self.files(dtype)?, |source, spec, out| match self.weight(source) {
            Weight::Frozen(tensor) => write_f32(out, spec.dtype, &to_f32(tensor.clone())),
            Weight::Trained(at) => write_f32(out, spec.dtype, &self.params.values(*at)),
            Weight::Quantized(_) => {
                let stored = last.of(&source.name, || self.stored(source)).map_err(std::io::Error::other)?;
                writer::write_quantized(&source.name, stored, spec, out)
            }
        })?;
        // What is read from a device that failed is no weight.
        self.device().check()?;
        let mut json = self.config.json.clone();
        // The base of a merged model may have been quantized.
        writer::set_quantization(&mut json, self.quantization_config());
        if self.provenance.quantization.is_none() {
            // Beside quantized linears the dense tensors stay what they were, and so does what the file says of them.
            writer::set_dtype(&mut json, dtype);
        }
        writer::write_config(dir, &json)
    }

    /// The tensors of the files, each with the parameter that it belongs to.
    fn files(&self, dtype: Dtype) -> Result<Vec<CheckpointTensor<ParameterSpec>>, Error> {
        let mut list = Vec::new();
        for source in self.config.parameters() {
            if let Weight::Quantized(_) = self.weight(&source) {
                list.extend(CheckpointTensor::quantized(&source.name, &self.stored(&source)?, &source));
                continue;
            }
            let as_read = self.provenance.quantization.as_ref().and_then(|q| q.dtypes.get(&source.name).copied());
            let spec = TensorSpec::new(source.name.clone(), as_read.unwrap_or(dtype), source.shape.clone());
            list.push(CheckpointTensor { spec, source });
        }
        Ok(list)
    }

    /// The quantized weight of a parameter as it is written.
    fn stored(&self, parameter: &ParameterSpec) -> Result<StoredWeight, Error> {
        let name = &parameter.name;
        let quantization =
            self.provenance.quantization.as_ref().expect("a quantized model says how its weights were stored");
        let metadata = quantization.disk_metadata.get(name).expect("every quantized weight has its disk metadata");
        let Weight::Quantized(packed) = self.weight(parameter) else { unreachable!("\"{name}\" is quantized") };
        let codes = std::sync::Arc::unwrap_or_clone(packed.data());
        metadata.restore(codes).map_err(|error| Error::Argument(format!("tensor \"{name}\": {error}")))
    }

    /// The weight of a parameter of this model.
    pub(crate) fn weight(&self, parameter: &ParameterSpec) -> &Weight {
        self.decoder.weight(parameter.role).expect("every parameter of the configuration has its weight")
    }
}

/// The quantized weight that was written last: its tensors mostly come one after another.
#[derive(Default)]
struct LastQuantized(Option<(String, StoredWeight)>);

impl LastQuantized {
    fn of(&mut self, name: &str, make: impl FnOnce() -> Result<StoredWeight, Error>) -> Result<&StoredWeight, Error> {
        if self.0.as_ref().is_none_or(|(last, _)| last != name) {
            self.0 = None;
            self.0 = Some((name.to_owned(), make()?));
        }
        Ok(&self.0.as_ref().expect("just made").1)
    }
}

//! Writes a model as a checkpoint.

use std::path::Path;

use rekindle_hub::{Dtype, TensorSpec, write_f32};
use rekindle_quant::bnb::StoredWeight;
use rekindle_quant::{DiskMetadata, QuantFormat};

use super::experts::stored_order;
use super::read_weights::ReadWeights;
use super::writer::{self, CheckpointTensor, KeptTensors};
use crate::parameters::{LayerRole, ParameterSpec, WeightPart};
use crate::spec::FeedForwardSpec;
use crate::{CausalLm, Error, Role};

impl CausalLm {
    /// Returns the dtype that stores trained weights without loss: f32, or bf16 where they are kept in place. Weights trained in
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
        let (mut last, mut read) = (LastQuantized::default(), ReadWeights::default());
        let kept = KeptTensors::of(&self.provenance.path, &self.config)?;
        writer::write_tensors(dir, &kept, self.files(dtype)?, |source, spec, out| {
            if self.weight(source).weight.is_quantized() && self.keeps_codes(source) {
                let stored = last.of(&source.name, || self.stored(source, &mut read)).map_err(std::io::Error::other)?;
                return writer::write_quantized(&source.name, stored, spec, out);
            }
            // Blocks of a GGUF file are written as what they decode to, and so are linears quantized beside MXFP4.
            let values = stored_order(read.values(self, source.role), &self.config, source.role);
            write_f32(out, spec.dtype, &values)
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
        let (mut list, mut read) = (Vec::new(), ReadWeights::default());
        for source in self.config.parameters() {
            if self.weight(&source).weight.is_quantized() && self.keeps_codes(&source) {
                // MXFP4 has no other layout than the tensors of all experts.
                let source = if self.is_mxfp4(&source) { self.config.stacked_parameter(source) } else { Some(source) };
                let Some(source) = source else { continue };
                list.extend(CheckpointTensor::quantized(&source.name, &self.stored(&source, &mut read)?, &source));
                continue;
            }
            let as_read = self.provenance.quantization.as_ref().and_then(|q| q.dtypes.get(&source.name).copied());
            let Some(source) = self.as_it_was_read(source) else { continue };
            let spec = TensorSpec::new(source.name.clone(), as_read.unwrap_or(dtype), source.shape.clone());
            list.push(CheckpointTensor { spec, source });
        }
        Ok(list)
    }

    /// A parameter as the checkpoint had it: the linears of experts that were one tensor are one again, in the place of the
    /// first. So are those of a family whose checkpoints have no others.
    fn as_it_was_read(&self, source: ParameterSpec) -> Option<ParameterSpec> {
        if !self.provenance.stacked_experts && !self.config.names.experts.only_stacked {
            return Some(source);
        }
        self.config.stacked_parameter(source)
    }

    /// The quantized weight of a parameter as it is written.
    fn stored(&self, parameter: &ParameterSpec, read: &mut ReadWeights) -> Result<StoredWeight, Error> {
        let name = &parameter.name;
        let failed = |error| Error::Argument(format!("tensor \"{name}\": {error}"));
        let metadata = self.disk_metadata(parameter).expect("every quantized weight has its disk metadata");
        let codes = read.codes(self, parameter.role);
        let [rows, input] = codes.dims;
        match (metadata.restore(codes).map_err(failed)?, parameter.role) {
            (StoredWeight::Mxfp4(tensor), Role::Layer(_, LayerRole::Experts(_))) => {
                let experts = parameter.shape[0];
                tensor.reshaped(vec![experts, rows / experts, input]).map(StoredWeight::Mxfp4).map_err(failed)
            }
            (weight, _) => Ok(weight),
        }
    }

    /// Returns true if a quantized weight is written as codes: files with experts in MXFP4 have no other ones.
    fn keeps_codes(&self, parameter: &ParameterSpec) -> bool {
        let quantization = self.provenance.quantization.as_ref();
        quantization
            .is_some_and(|quantization| quantization.config.format() != QuantFormat::Mxfp4 || self.is_mxfp4(parameter))
    }

    fn is_mxfp4(&self, parameter: &ParameterSpec) -> bool {
        self.disk_metadata(parameter).is_some_and(|metadata| metadata.format() == QuantFormat::Mxfp4)
    }

    /// The metadata of a quantized weight; of all experts, those of the first.
    fn disk_metadata(&self, parameter: &ParameterSpec) -> Option<&DiskMetadata> {
        let first = match parameter.role {
            Role::Layer(layer, LayerRole::Experts(stack)) => {
                let FeedForwardSpec::Moe(moe) = &self.config.spec.layers[layer].feed_forward else { return None };
                self.config.names.tensor(Role::Layer(layer, LayerRole::Expert(moe.roles(stack)[0], 0)))
            }
            _ => parameter.name.clone(),
        };
        self.provenance.quantization.as_ref()?.disk_metadata.get(&first)
    }

    /// The weight of a parameter of this model, or the part of one that it is.
    pub(crate) fn weight(&self, parameter: &ParameterSpec) -> WeightPart<'_> {
        self.decoder.weight_part(parameter.role).expect("every parameter of the configuration has its weight")
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

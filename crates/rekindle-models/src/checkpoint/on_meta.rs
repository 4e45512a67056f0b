//! Models without the values of their weights, for memory plans.

use std::path::Path;

use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::rope::HeadNorm;
use rekindle_kernels::{Group, ParamsBuilder, QuantizedWeight, Weight, unfilled};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{Adapter, LoraConfig, LoraFactors};
use serde_json::Value;
use std::collections::BTreeMap;

use super::kept_blocks::KeptBlocks;
use super::master_weights;
use super::quantization::{LinearFormat, is_quantized};
use crate::causal_lm::Provenance;
use crate::layers::{StackedTensors, WeightSource, plain_head_norm};
use crate::parameters::ParameterSpec;
use crate::{CausalLm, DEFAULT_ADAPTER, Decoder, Error, LoadOptions, ModelConfig};

impl CausalLm {
    /// The model that the `config.json` of a checkpoint called `path` describes, as [`load`](Self::load) would make it,
    /// without its values. On a planned device ([`Device::is_planned`](rekindle_kernels::Device::is_planned)) it takes
    /// no memory.
    ///
    /// # Errors
    /// As [`load`](Self::load), but for what is wrong with tensors.
    pub fn on_meta(json: &Value, path: &Path, options: &LoadOptions) -> Result<Self, Error> {
        let config = ModelConfig::from_json(json)
            .map_err(|problems| Error::Config { path: path.join("config.json"), problems })?;
        let (mut config, extension) = options.prepare(config)?;
        if let Some(rows) = options.resize_model_vocab {
            config = config.resized(rows)?;
        }
        let stored = is_quantized(json);
        let options = &options.with_fp8_weights(stored);
        let as_trained = options.full_finetuning && !stored;
        let load_in = if as_trained { options.load_in.map(master_weights::format) } else { options.load_in };
        let options = &LoadOptions { load_in, ..options.clone() };
        let skip_modules = config.skip_modules(options.skip_modules.as_deref());
        let format = LinearFormat::of(json, path, load_in, options.skip_modules.as_deref(), skip_modules)?;
        let in_place = master_weights::in_place(options, format.is_some(), &config)?;
        let (device, dtype) = (&options.device, options.dtype);
        let params = if in_place { ParamsBuilder::in_place(device, dtype) } else { ParamsBuilder::new(device, dtype) };
        let kept = KeptBlocks::of(json, options)?;
        let mut source = MetaWeights { options, format, kept, in_place, params, vectors: BTreeMap::new() };
        source.make_vectors(&config);
        let mut decoder =
            Decoder::build(&config, &mut source, device, dtype, options.max_seq_length, options.shards())?;
        if let Some(products) = options.fp8 {
            decoder.multiply_in_fp8(products, dtype)?;
        }
        options.device.check()?;
        Ok(Self::new(config, decoder, source.params, Provenance::new(path, extension)))
    }

    /// [`add_adapter`](Self::add_adapter) for a model without values: the adapter is attached and all zeros.
    ///
    /// # Errors
    /// [`Error::Lora`] for a configuration that is invalid or matches nothing.
    pub fn add_adapter_on_meta(&mut self, config: &LoraConfig) -> Result<(), Error> {
        let config = &self.with_trained_score(config);
        config.validate()?;
        let modules = self.modules();
        let targets = modules.targets(config)?;
        modules.check_expert_dropout(config, &targets)?;
        let by_name = modules.by_name();
        let zeros = |name: &String| {
            let linear = by_name[name.as_str()];
            let r = config.rank_of(name);
            let magnitude = config.use_dora.then(|| vec![0.0; linear.out]);
            LoraFactors { r, a: vec![0.0; r * linear.input], b: vec![0.0; linear.out * r], magnitude }
        };
        let factors: BTreeMap<String, LoraFactors> = targets.iter().map(|name| (name.clone(), zeros(name))).collect();
        let biased = modules.biased(config.bias, |name| factors.contains_key(name)).into_iter();
        let biases = biased.map(|linear| (linear.name.clone(), vec![0.0; linear.out])).collect();
        let names = modules.saved(config)?;
        let saved = modules.savable.iter().filter(|(name, _)| names.contains(name));
        let saved = saved.map(|(name, shape)| (name.clone(), (*shape, vec![0.0; shape[0] * shape[1]])));
        let adapter = Adapter {
            config: AdapterConfig::new(config, None, &targets),
            factors,
            biases,
            saved: saved.collect(),
            tables: BTreeMap::new(),
        };
        self.attach(DEFAULT_ADAPTER, adapter)
    }
}

/// Weights of the right sizes without values.
struct MetaWeights<'a> {
    options: &'a LoadOptions,
    format: Option<LinearFormat>,
    /// The linears that stay in the blocks of a GGUF file.
    kept: Option<KeptBlocks>,
    /// True if trained weights have no f32 copy.
    in_place: bool,
    params: ParamsBuilder,
    /// Frozen norms and biases, by name, which are made first as they are loaded first.
    vectors: BTreeMap<String, Weight>,
}

impl MetaWeights<'_> {
    fn make_vectors(&mut self, config: &ModelConfig) {
        if !self.options.full_finetuning {
            for tensor in config.parameters().into_iter().filter(ParameterSpec::is_vector) {
                let weight = self.dense(&tensor);
                self.vectors.insert(tensor.name, weight);
            }
        }
    }

    fn quantized(&mut self, name: &str, codes: QuantizedData) -> Result<Weight, Error> {
        let weight = QuantizedWeight::new(codes, &self.options.device);
        if !self.options.full_finetuning {
            return Ok(Weight::Quantized(weight));
        }
        if !weight.can_be_trained() {
            return Err(master_weights::untrainable(
                name,
                self.format.as_ref().expect("something is quantized").config.format(),
            ));
        }
        Ok(Weight::Trained(self.params.push_quantized(name, weight)))
    }

    fn dense(&mut self, tensor: &ParameterSpec) -> Weight {
        let shape = &tensor.shape;
        if self.in_place && !tensor.is_vector() {
            let bytes = vec![0; 2 * tensor.numel()];
            return Weight::Trained(self.params.push_bf16(Group::Default, &tensor.name, shape, &bytes));
        }
        if self.options.full_finetuning && !tensor.is_buffer() {
            let values = vec![0.0; tensor.numel()];
            return Weight::Trained(self.params.push(&tensor.name, shape, tensor.decays(), &values));
        }
        let [rows, cols] = match *shape.as_slice() {
            [rows, cols] | [rows, 1, cols] => [rows, cols],
            _ => [1, tensor.numel()],
        };
        Weight::Frozen(unfilled([rows, cols], &self.options.device, self.options.dtype))
    }
}

impl WeightSource for MetaWeights<'_> {
    fn weight(&mut self, tensor: &ParameterSpec) -> Result<Weight, Error> {
        if let Some(weight) = self.vectors.remove(&tensor.name) {
            return Ok(weight);
        }
        if let (true, &[out, input]) = (tensor.role.is_linear(), tensor.shape.as_slice()) {
            if let Some(codec) = self.kept.as_ref().and_then(|kept| kept.of_module(tensor.module())) {
                return self.quantized(&tensor.name, QuantizedData::block_zeros([out, input], codec));
            }
            let format = self.format.as_ref().and_then(|linears| linears.of_module(tensor.module()));
            if let Some(format) = format {
                return self.quantized(&tensor.name, format.zeros([out, input]));
            }
        }
        Ok(self.dense(tensor))
    }

    fn ones(&self, head_dim: usize, eps: f64) -> HeadNorm {
        plain_head_norm(head_dim, eps, &self.options.device, self.options.dtype)
    }

    fn stacked(&mut self, StackedTensors { whole, parts }: &StackedTensors) -> Result<Weight, Error> {
        let dims = [whole.shape[0], whole.shape[1]];
        if let Some(codec) = self.kept.as_ref().and_then(|kept| kept.of_module(parts[0].module())) {
            return self.quantized(&whole.name, QuantizedData::block_zeros(dims, codec));
        }
        match self.format.as_ref().and_then(|linears| linears.of_module(parts[0].module())) {
            Some(format) => self.quantized(&whole.name, format.stacked_zeros(dims, parts.len())),
            None => Ok(self.dense(whole)),
        }
    }
}

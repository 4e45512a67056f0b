//! A model without the values of its weights: what its configuration alone says, for plans.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::{Group, ParamsBuilder, QuantizedWeight, Weight, unfilled};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{Adapter, Factors, LoraConfig, match_targets};
use rekindle_quant::Blocksize;
use rekindle_quant::bnb::{Format, QuantizationConfig};
use serde_json::Value;

use crate::load::{Parts, Weights};
use crate::names::{self, Needed};
use crate::quantization::LoadIn;
use crate::{CausalLm, DEFAULT_ADAPTER, Error, LoadOptions, ModelConfig, stored_quantization, trainable};

/// How the linears of a model that are in codes are coded.
#[derive(Clone, Debug)]
pub struct Coding {
    config: QuantizationConfig,
    /// Elements of a 4-bit block.
    blocksize: Blocksize,
}

impl Coding {
    /// What becomes of the linears of the checkpoint with this `config.json` when it is loaded with `options`; `None`
    /// when they are dense. Of a checkpoint that is in codes, all linears but those that it skips are, in blocks of 64
    /// unless asked for otherwise.
    ///
    /// # Errors
    /// [`Error::Config`] for a `quantization_config` that is not bitsandbytes'.
    pub fn of(json: &Value, path: &Path, options: &LoadOptions) -> Result<Option<Self>, Error> {
        let asked = match options.load_in {
            Some(LoadIn::FourBit(config)) => config,
            _ => None,
        };
        let blocksize = asked.unwrap_or_default().blocksize;
        if let Some(stored) = stored_quantization(json) {
            let config = QuantizationConfig::parse(stored).map_err(|error| Error::Config {
                path: path.join("config.json"),
                problems: vec![format!("quantization_config: {error}")],
            })?;
            return Ok(Some(Self { config, blocksize }));
        }
        let (dtype, skip) = (rekindle_quant::Dtype::Bf16, options.skip_modules.clone());
        let config = match options.load_in {
            None | Some(LoadIn::SixteenBit) => return Ok(None),
            Some(LoadIn::FourBit(config)) => QuantizationConfig::four_bit(&config.unwrap_or_default(), dtype, skip),
            Some(LoadIn::EightBit) => QuantizationConfig::int8(skip),
        };
        Ok(Some(Self { config, blocksize }))
    }

    /// Quantized data as long as those of the linear `module` `[out, in]`; `None` when it is dense.
    pub(crate) fn codes(&self, module: &str, dims: [usize; 2]) -> Option<QuantizedData> {
        if self.config.skips(module) {
            return None;
        }
        Some(match self.config.format() {
            Format::FourBit { double_quant, .. } => {
                let nested = double_quant.then(|| Blocksize::B256.get());
                QuantizedData::four_bit_zeros(dims, self.blocksize.get(), nested)
            }
            Format::Int8 => QuantizedData::int8_zeros(dims),
        })
    }

    /// Bytes of the codes of the linear `module` `[out, in]`, and of their scales; `None` when it is dense.
    pub(crate) fn bytes(&self, module: &str, dims: [usize; 2]) -> Option<(usize, usize)> {
        self.codes(module, dims).map(|codes| codes.bytes())
    }
}

impl CausalLm {
    /// The model that the `config.json` of a checkpoint called `path` describes, as [`load`](Self::load) would make it,
    /// without its values. On a planned device ([`Device::is_planned`](rekindle_kernels::Device::is_planned)) it takes
    /// no memory.
    ///
    /// # Errors
    /// As [`load`](Self::load), but for what is wrong with tensors.
    pub fn outline(json: &Value, path: &Path, options: &LoadOptions) -> Result<Self, Error> {
        let config = ModelConfig::from_json(json)
            .map_err(|problems| Error::Config { path: path.join("config.json"), problems })?;
        let (mut config, widened) = options.prepare(config)?;
        if let Some(rows) = options.resize_model_vocab {
            config = config.resized(rows)?;
        }
        let shapes: BTreeMap<String, Vec<usize>> =
            names::needed(&config).into_iter().map(|Needed { name, shape }| (name, shape)).collect();
        let stored = stored_quantization(json).is_some();
        let load_in =
            if options.full_finetuning && !stored { options.load_in.map(trainable::format) } else { options.load_in };
        let options = &LoadOptions { load_in, ..options.clone() };
        let coding = Coding::of(json, path, options)?;
        let in_place = trainable::in_place(options, coding.is_some(), &config)?;
        let (device, dtype) = (&options.device, options.dtype);
        let params = if in_place { ParamsBuilder::in_place(device, dtype) } else { ParamsBuilder::new(device, dtype) };
        let mut source = Shapes { shapes, options, coding, in_place, params, vectors: BTreeMap::new() };
        source.make_vectors(&config)?;
        let parts = Parts::of(&mut source, &config)?;
        options.device.check()?;
        let Shapes { params, .. } = source;
        Ok(parts.model(params, config, options, widened, path))
    }

    /// [`add_adapter`](Self::add_adapter) for a model without values: the adapter takes its place and holds nothing.
    ///
    /// # Errors
    /// [`Error::Lora`] for a configuration that is invalid or matches nothing.
    pub fn outline_adapter(&mut self, config: &LoraConfig) -> Result<(), Error> {
        config.validate()?;
        let modules = self.modules();
        let targets = match_targets(config, &modules.names())?;
        let zeros = |name: &String| {
            let linear = modules.linear(name).expect("a target is a linear of the model");
            let r = config.rank_of(name);
            let magnitude = config.use_dora.then(|| vec![0.0; linear.out]);
            Factors { r, a: vec![0.0; r * linear.input], b: vec![0.0; linear.out * r], magnitude }
        };
        let factors: BTreeMap<String, Factors> = targets.iter().map(|name| (name.clone(), zeros(name))).collect();
        let biased = modules.biased(config.bias, |name| factors.contains_key(name)).into_iter();
        let biases = biased.map(|linear| (linear.name.clone(), vec![0.0; linear.out])).collect();
        let [rows, hidden] = [self.config.vocab_size, self.config.hidden_size];
        let saved = modules.saved(config)?.into_iter().map(|name| (name, ([rows, hidden], vec![0.0; rows * hidden])));
        let adapter = Adapter {
            config: AdapterConfig::new(config, None, &targets),
            factors,
            biases,
            saved: saved.collect(),
            tables: BTreeMap::new(),
        };
        self.place(DEFAULT_ADAPTER, adapter)
    }
}

/// Weights of the right sizes.
struct Shapes<'a> {
    shapes: BTreeMap<String, Vec<usize>>,
    options: &'a LoadOptions,
    coding: Option<Coding>,
    /// Whether trained weights have no f32 copy.
    in_place: bool,
    params: ParamsBuilder,
    /// Frozen norms and biases, by name, which are made first as they are loaded first.
    vectors: BTreeMap<String, Weight>,
}

impl Shapes<'_> {
    fn make_vectors(&mut self, config: &ModelConfig) -> Result<(), Error> {
        if !self.options.full_finetuning {
            for Needed { name, .. } in names::needed(config).into_iter().filter(|needed| needed.shape.len() == 1) {
                let weight = self.weight(&name)?;
                self.vectors.insert(name, weight);
            }
        }
        Ok(())
    }
}

impl Weights for Shapes<'_> {
    fn weight(&mut self, name: &str) -> Result<Weight, Error> {
        if let Some(weight) = self.vectors.remove(name) {
            return Ok(weight);
        }
        let shape = self.shapes.get(name).expect("every tensor of the model has a shape");
        if self.in_place && shape.len() > 1 {
            let bytes = vec![0; 2 * shape.iter().product::<usize>()];
            return Ok(Weight::Trained(self.params.push_bf16(Group::Default, name, shape, &bytes)));
        }
        if self.options.full_finetuning {
            let values = vec![0.0; shape.iter().product()];
            return Ok(Weight::Trained(self.params.push(name, shape, shape.len() > 1, &values)));
        }
        let [rows, cols] = match *shape.as_slice() {
            [rows, cols] => [rows, cols],
            _ => [1, shape.iter().product()],
        };
        Ok(Weight::Frozen(unfilled([rows, cols], &self.options.device, self.options.dtype)))
    }

    fn linear(&mut self, name: &str, shape: &[usize]) -> Result<Weight, Error> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let dims = [shape[0], shape[1]];
        match self.coding.as_ref().and_then(|coding| coding.codes(module, dims)) {
            Some(codes) => {
                let weight = QuantizedWeight::new(codes, &self.options.device);
                if !self.options.full_finetuning {
                    return Ok(Weight::Quantized(weight));
                }
                if !weight.can_be_trained() {
                    return Err(trainable::coded_scales(&format!("tensor \"{name}\" of the checkpoint")));
                }
                Ok(Weight::Trained(self.params.push_quantized(name, weight)))
            }
            None => self.weight(name),
        }
    }
}

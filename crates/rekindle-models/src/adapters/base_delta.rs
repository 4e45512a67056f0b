//! Initialization of adapters from the weights: the initial B·A that some subtract from the base, the restoration of the
//! base, and the quantization errors that LoftQ starts from.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::Checkpoint;
use rekindle_kernels::{DType, Device, Weight, from_f32, to_f32};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{
    Adapter, InitLoraWeights, Linear, LoraConfig, LoraFactors, WeightSplit, initial_factors, loftq, split_weight,
};
use rekindle_quant::bnb::QuantizationConfig;
use rekindle_quant::{Blocksize, QuantConfig, QuantFormat};
use serde_json::{Map, Value, json};

use crate::checkpoint::{LoadIn, QuantizationPlan, canonical, frozen, is_quantized, open_checkpoint};
use crate::{CausalLm, Error, ModelConfig};

/// The initial B·A that the active adapter subtracted from the base, and how to restore that.
#[derive(Debug, Default)]
pub(crate) struct BaseDelta {
    /// The subtracted factors by the linear's name.
    linears: BTreeMap<String, LinearDelta>,
    /// The weights are read again from here.
    checkpoint: Option<Checkpoint>,
}

#[derive(Debug)]
struct LinearDelta {
    factors: LoraFactors,
    /// The weight before the subtraction, where the checkpoint does not hold it.
    kept: Option<Weight>,
}

impl BaseDelta {
    /// Returns true if nothing was subtracted.
    pub(crate) fn is_empty(&self) -> bool {
        self.linears.is_empty()
    }

    /// Returns the subtracted factors by the linear's name.
    pub(crate) fn factors(&self) -> BTreeMap<String, LoraFactors> {
        self.linears.iter().map(|(name, delta)| (name.clone(), delta.factors.clone())).collect()
    }
}

impl CausalLm {
    /// The checkpoint for an adapter that starts from weights; `None` for one that does not.
    ///
    /// # Errors
    /// [`Error::Argument`] where the targets are not kept as `config.init_lora_weights` needs them.
    pub(crate) fn init_source(&self, config: &LoraConfig, targets: &[String]) -> Result<Option<Checkpoint>, Error> {
        let init = &config.init_lora_weights;
        let needs_codes = *init == InitLoraWeights::Loftq;
        if !needs_codes && !init.changes_base() {
            return Ok(None);
        }
        let in_codes = |name: &&String| self.linear(name).weight.is_quantized();
        let name = json!(init);
        if self.decoder.shards().is_some() {
            return Err(Error::Argument(format!(
                "init_lora_weights {name} starts from whole weights, and shard_base divides them; remove one of them"
            )));
        }
        if let (Some(linear), true) = (targets.iter().find(in_codes), init.changes_base()) {
            return Err(Error::Argument(format!(
                "init_lora_weights {name} subtracts from the base weights, but {linear} is quantized; use \"loftq\" \
                 with a base that is quantized while loading, or load the base in 16 bits"
            )));
        }
        if let (Some(linear), true) = (targets.iter().find(|name| !in_codes(name)), needs_codes) {
            return Err(Error::Argument(format!(
                "init_lora_weights {name} starts from quantization errors, but {linear} is not quantized; set \
                 load_in_4bit or load_in_8bit, exclude the linear from the targets, or use \"pissa\""
            )));
        }
        let format = self.provenance.quantization.as_ref().map(|quantization| quantization.config.format());
        if let (Some(format @ QuantFormat::Fp8(_)), true) = (format, needs_codes) {
            return Err(Error::Argument(format!(
                "init_lora_weights {name} is not supported over {format}, whose quantization errors are small; remove it, \
                 or set load_in_4bit or load_in_8bit"
            )));
        }
        let checkpoint = canonical(&open_checkpoint(&self.provenance.path)?);
        if needs_codes && is_quantized(checkpoint.config()) {
            return Err(Error::Argument(format!(
                "init_lora_weights {name} starts from quantization errors, but {} contains only quantized weights; \
                 load the 16-bit checkpoint that it was made from with load_in_4bit or load_in_8bit",
                self.provenance.path.display()
            )));
        }
        self.check_loftq_bits(config, &targets[0])?;
        Ok(Some(checkpoint))
    }

    fn check_loftq_bits(&self, config: &LoraConfig, target: &str) -> Result<(), Error> {
        let (Some(asked), Some(codes)) = (config.loftq_config, self.quantized_format(target)) else { return Ok(()) };
        if codes["loftq_bits"] == json!(asked.loftq_bits) {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "loftq_bits is {}, but the base is quantized to {} bits; remove it, or load the base with {}",
            asked.loftq_bits,
            codes["loftq_bits"],
            if asked.loftq_bits == 8 { "load_in_8bit" } else { "load_in_4bit" }
        )))
    }

    /// The first factors of every target; of those that the base loses, it loses them here. `source` is what
    /// [`init_source`](Self::init_source) gave.
    ///
    /// # Errors
    /// [`Error::Argument`] for a weight that is not finite; the base is then as it was.
    pub(crate) fn initial_factors(
        &mut self,
        config: &LoraConfig,
        targets: &[String],
        source: Option<Checkpoint>,
    ) -> Result<Vec<LoraFactors>, Error> {
        let Some(checkpoint) = source else {
            let modules = self.modules();
            let by_name = modules.by_name();
            let start = |name: &String| {
                let module = by_name[name.as_str()];
                initial_factors(config, name, module.input, module.out)
            };
            return Ok(targets.iter().map(start).collect());
        };
        let starts = targets.iter().map(|name| match config.init_lora_weights {
            InitLoraWeights::Loftq => self.quantization_error(config, name, &checkpoint),
            _ => self.subtract_init(name, &checkpoint, |w, shape| {
                split_weight(config, name, w, shape).expect("the source is for nothing else")
            }),
        });
        let starts: Result<Vec<LoraFactors>, Error> = starts.collect();
        self.adapters.base_delta.checkpoint = Some(checkpoint);
        if starts.is_err() {
            self.restore_base();
        }
        starts
    }

    /// Returns factors of the quantization error of a weight.
    fn quantization_error(
        &self,
        config: &LoraConfig,
        name: &str,
        checkpoint: &Checkpoint,
    ) -> Result<LoraFactors, Error> {
        let Weight::Quantized(packed) = &self.linear(name).weight else { unreachable!("the source was checked") };
        let view = checkpoint.get(&format!("{name}.weight")).expect("the codes were made from it");
        let w = view.to_f32()?;
        let decoded = to_f32(packed.decode(DType::F32));
        self.device().check()?;
        check_finite(name, &w)?;
        Ok(loftq(config, name, &w, packed.dims(), 1, |_| decoded.clone()).factors)
    }

    /// Subtracts the initial B·A of a reactivated adapter from the base again; the result is bit-identical.
    ///
    /// # Errors
    /// [`Error::File`] when the checkpoint is gone; the base is then as it was.
    pub(crate) fn subtract_init_again(
        &mut self,
        parts: &BTreeMap<String, LoraFactors>,
        config: &LoraConfig,
    ) -> Result<(), Error> {
        if parts.is_empty() {
            return Ok(());
        }
        let checkpoint = canonical(&open_checkpoint(&self.provenance.path)?);
        let take = |(name, factors): (&String, &LoraFactors)| {
            self.subtract_init(name, &checkpoint, |w, shape| {
                WeightSplit::again(w, shape, factors, config.scale_of(name))
            })
            .map(|_| ())
        };
        let done = parts.iter().try_for_each(take);
        self.adapters.base_delta.checkpoint = Some(checkpoint);
        if done.is_err() {
            self.restore_base();
        }
        done
    }

    fn subtract_init(
        &mut self,
        name: &str,
        checkpoint: &Checkpoint,
        start: impl FnOnce(&[f32], [usize; 2]) -> WeightSplit,
    ) -> Result<LoraFactors, Error> {
        let weight = self.linear(name).weight.clone();
        let shape = weight.dims();
        let w = to_f32(weight.matrix(&self.params));
        self.device().check()?;
        check_finite(name, &w)?;
        let stored = match checkpoint.get(&format!("{name}.weight")) {
            Some(view) if view.shape == shape => to_f32(frozen(&view, shape, &Device::cpu(), self.dtype())?) == w,
            _ => false,
        };
        let WeightSplit { factors, base } = start(&w, shape);
        let base = Weight::Frozen(from_f32(base, shape, self.device(), self.dtype()));
        self.set_weight(name, base);
        // Without a reference to the memory of the weights beside it.
        let kept = (!stored).then(|| match weight {
            Weight::Frozen(weight) => Weight::Frozen(weight.detached()),
            other => other,
        });
        self.adapters.base_delta.linears.insert(name.to_owned(), LinearDelta { factors: factors.clone(), kept });
        Ok(factors)
    }

    /// Restores the base after the active adapter was detached.
    pub(crate) fn restore_base(&mut self) {
        let BaseDelta { linears, checkpoint } = core::mem::take(&mut self.adapters.base_delta);
        for (name, delta) in linears {
            let weight = delta.kept.unwrap_or_else(|| {
                let checkpoint = checkpoint.as_ref().expect("it is opened before anything is taken");
                let view = checkpoint.get(&format!("{name}.weight")).expect("the weight was compared with it");
                let shape = self.linear(&name).weight.dims();
                Weight::Frozen(frozen(&view, shape, self.device(), self.dtype()).expect("it has been read before"))
            });
            self.set_weight(&name, weight);
        }
    }

    /// Returns the description of the format of `linear` that adapters record, or `None` for a dense weight.
    pub(crate) fn quantized_format(&self, linear: &str) -> Option<Map<String, Value>> {
        if !self.linear(linear).weight.is_quantized() {
            return None;
        }
        let quantization = self.provenance.quantization.as_ref().expect("a model with codes says where they came from");
        let skipped = quantization.config.to_json()["llm_int8_skip_modules"].clone();
        let format = quantization.disk_metadata[&format!("{linear}.weight")].format();
        let mut codes = json!({ "loftq_bits": format.bits(), "loftq_iter": 1 });
        if let QuantFormat::FourBit(config) = format {
            codes["quant_type"] = json!(config.quant_type.name());
            codes["blocksize"] = json!(config.blocksize.get());
            codes["double_quant"] = json!(config.double_quant);
        }
        codes["skip_modules"] = skipped;
        codes.as_object().cloned()
    }

    /// Refuses an adapter that was initialized for a base that is quantized differently.
    pub(crate) fn check_quantized_format(&self, dir: &Path, adapter: &Adapter) -> Result<(), Error> {
        let Some(wanted) = adapter.config.codes() else { return Ok(()) };
        let Some(LoftqBase { load_in, skip_modules }) = loftq_base(&adapter.config)? else { return Ok(()) };
        let same = |found: &Map<String, Value>| {
            ["loftq_bits", "quant_type", "blocksize", "double_quant"]
                .iter()
                .all(|key| found.get(*key) == wanted.get(*key))
        };
        let fits = |name: &&String| self.quantized_format(name).is_some_and(|found| same(&found));
        if let Some(linear) = adapter.factors.keys().find(|name| !fits(name)) {
            return Err(Error::Argument(format!(
                "the adapter in {} was initialized by LoftQ for a quantized base, but {linear} is not quantized so: \
                 {}; load the base with {}",
                dir.display(),
                Value::from(wanted.clone()),
                load_in.argument()
            )));
        }
        // The other linears too: it was trained beside them as they were.
        let skip = QuantizationConfig::new(QuantFormat::Int8, rekindle_hub::Dtype::F32, skip_modules);
        let differs = |linear: &&Linear| linear.weight.is_quantized() == skip.skips(&linear.name);
        let Some(linear) = self.decoder.linears().find(differs) else { return Ok(()) };
        let (name, was) = (&linear.name, if skip.skips(&linear.name) { "dense" } else { "in codes" });
        let asked = match wanted.get("skip_modules").filter(|skipped| !skipped.is_null()) {
            Some(skipped) => format!("with skip_modules = {skipped}"),
            None => "without skip_modules".to_owned(),
        };
        Err(Error::Argument(format!(
            "the adapter in {} was trained (loftq) with {name} {was}, which is different here; load the base {asked}",
            dir.display()
        )))
    }

    fn set_weight(&mut self, name: &str, weight: Weight) {
        self.decoder.replace_weights(|linear| {
            let found = linear.name == name;
            if found {
                linear.weight = weight.clone();
            }
            found
        });
    }
}

/// The base that a LoftQ adapter was initialized for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoftqBase {
    /// The format of its linears.
    pub load_in: LoadIn,
    /// The modules that are not quantized.
    pub skip_modules: Option<Vec<String>>,
}

/// Returns the base that a LoftQ adapter was initialized for, or `None` for other adapters.
///
/// # Errors
/// [`Error::Argument`] for codes that are not known here.
pub fn loftq_base(config: &AdapterConfig) -> Result<Option<LoftqBase>, Error> {
    // PEFT leaves these alone: there it is an argument, and nothing says what the codes were.
    let Some(codes) = config.codes().filter(|codes| codes.contains_key("skip_modules")) else { return Ok(None) };
    let unknown =
        || Error::Argument(format!("loftq_config {} names an unknown quantized format", Value::from(codes.clone())));
    let skip_modules = serde_json::from_value(codes["skip_modules"].clone()).map_err(|_| unknown())?;
    if codes.get("loftq_bits") == Some(&json!(8)) {
        return Ok(Some(LoftqBase { load_in: LoadIn::EightBit, skip_modules }));
    }
    let size = codes.get("blocksize").and_then(Value::as_u64).and_then(|size| Blocksize::new(size as usize).ok());
    let quant_type = codes.get("quant_type").and_then(Value::as_str).and_then(|name| name.parse().ok());
    let double_quant = codes.get("double_quant").and_then(Value::as_bool);
    match (quant_type, size, double_quant) {
        (Some(quant_type), Some(blocksize), Some(double_quant)) => {
            let load_in = LoadIn::FourBit(Some(QuantConfig { quant_type, blocksize, double_quant }));
            Ok(Some(LoftqBase { load_in, skip_modules }))
        }
        _ => Err(unknown()),
    }
}

/// Returns the quantization of `base` for a merge with an adapter: the format that the adapter was initialized for, if
/// any. A base that is already in another format is an error.
pub(crate) fn quantization_plan(
    base: &Checkpoint,
    adapter: &Adapter,
    config: &ModelConfig,
) -> Result<Option<QuantizationPlan>, Error> {
    let stored = QuantizationPlan::of(base, None, None, config)?;
    match loftq_base(&adapter.config)? {
        None => Ok(stored),
        Some(on) => {
            let skip = on.skip_modules.as_deref().filter(|_| stored.is_none());
            QuantizationPlan::of(base, Some(on.load_in), skip, config)
        }
    }
}

fn check_finite(name: &str, w: &[f32]) -> Result<(), Error> {
    match w.iter().find(|w| !w.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::Argument(format!(
            "tensor \"{name}.weight\" holds {value}; an adapter can only be initialized from finite weights (use \
             init_lora_weights = true)"
        ))),
    }
}

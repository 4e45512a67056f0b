//! The quantized linears of a model: those of a quantized checkpoint, or those quantized while loading.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype, TensorView, write_f32};
use rekindle_quant::bnb::{self, QuantizationConfig, RawTensor, StoredWeight};
use rekindle_quant::{DiskMetadata, Fp8Scaling, QuantConfig, QuantFormat};
use serde_json::Value;

use super::kept_blocks::is_gguf;
use crate::non_finite::check_view;
use crate::{Error, ModelConfig};

/// The storage of the blocks' linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadIn {
    /// Dense, in the compute dtype.
    SixteenBit,
    /// NF4 or FP4. `None` is NF4 in blocks of 64 with double quantization, or whatever 4-bit format a quantized
    /// checkpoint has.
    FourBit(Option<QuantConfig>),
    /// LLM.int8().
    EightBit,
    /// fp8 (E4M3) with a scale per row, or whatever fp8 format a quantized checkpoint has.
    Fp8,
}

impl LoadIn {
    /// Returns the argument of `from_pretrained` that selects it.
    pub fn argument(self) -> &'static str {
        match self {
            Self::SixteenBit => "load_in_16bit",
            Self::FourBit(_) => "load_in_4bit",
            Self::EightBit => "load_in_8bit",
            Self::Fp8 => "load_in_fp8",
        }
    }

    /// Returns the format that a dense checkpoint is quantized to; `None` if it stays dense.
    pub fn format(self) -> Option<QuantFormat> {
        match self {
            Self::SixteenBit => None,
            Self::FourBit(config) => Some(QuantFormat::FourBit(config.unwrap_or_default())),
            Self::EightBit => Some(QuantFormat::Int8),
            Self::Fp8 => Some(QuantFormat::Fp8(Fp8Scaling::Row)),
        }
    }

    /// Returns the part of this request that a checkpoint in the format `stored` does not satisfy.
    fn conflict(self, stored: QuantFormat) -> Option<String> {
        match (self, stored) {
            (Self::FourBit(None), QuantFormat::FourBit(_))
            | (Self::EightBit, QuantFormat::Int8)
            | (Self::Fp8, QuantFormat::Fp8(_)) => None,
            // The linears beside the experts can be quantized.
            (Self::FourBit(_), QuantFormat::Mxfp4) => None,
            // Each weight says its own block size.
            (Self::FourBit(Some(asked)), QuantFormat::FourBit(stored)) => {
                let differs = (asked.quant_type, asked.double_quant) != (stored.quant_type, stored.double_quant);
                let (name, double) = (asked.quant_type.name(), asked.double_quant);
                differs.then(|| format!("quant_type \"{name}\" with double_quant = {double}"))
            }
            (asked, _) => Some(asked.argument().to_owned()),
        }
    }
}

/// Returns the `quantization_config` of a `config.json`; `None` for a dense checkpoint, and for a GGUF file, whose tensors
/// are decoded like dense ones.
pub fn stored_quantization(config: &Value) -> Option<&Value> {
    config.get("quantization_config").filter(|found| !found.is_null() && !is_gguf(found))
}

/// Returns true if the checkpoint with this `config.json` is quantized.
pub fn is_quantized(config: &Value) -> bool {
    stored_quantization(config).is_some()
}

/// The properties of a quantized checkpoint that a loaded model keeps, so that it is saved as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Quantization {
    pub(crate) config: QuantizationConfig,
    /// The metadata of quantized weights, by name.
    pub(crate) disk_metadata: BTreeMap<String, DiskMetadata>,
    /// The dtypes of the dense tensors in the checkpoint, by name.
    pub(crate) dtypes: BTreeMap<String, Dtype>,
}

impl Quantization {
    /// Lists `modules`, which were quantized, among those that are dense.
    pub(crate) fn keep_dense<'a>(&mut self, modules: impl IntoIterator<Item = &'a String>) {
        // Which experts are in MXFP4 is said by their tensors alone.
        let Some(skip) = self.config.skip_key() else { return };
        let mut json = self.config.to_json();
        // A list replaces the default, which is the head.
        let mut names = json[skip].as_array().cloned().unwrap_or_else(|| vec![Value::from("lm_head")]);
        names.extend(modules.into_iter().map(|name| Value::from(name.as_str())));
        json[skip] = Value::Array(names);
        self.config = QuantizationConfig::parse(&json).expect("only names were added");
    }
}

/// The format of a model's quantized linears, and which of them stay dense. It follows from `config.json` and the
/// arguments alone, so that plans and loading agree.
#[derive(Clone, Debug)]
pub(crate) struct LinearFormat {
    pub(crate) config: QuantizationConfig,
    format: QuantFormat,
    /// True if the checkpoint itself is quantized.
    is_stored: bool,
    /// The format of the linears that a checkpoint has in 16 bits beside experts in MXFP4; `None` if they stay dense.
    beside: Option<(QuantizationConfig, QuantFormat)>,
}

impl LinearFormat {
    /// Returns the format of the linears of the checkpoint at `path` with the `config.json` `json`; `None` if all are
    /// dense. 4-bit weights of a quantized checkpoint count as in blocks of 64 unless `load_in` names another size.
    ///
    /// `skip_modules` is the argument of that name, `dense` the list of [`ModelConfig::skip_modules`] for it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a quantized checkpoint asked for in another format, [`Error::Config`] for a
    /// `quantization_config` that is not supported.
    pub(crate) fn of(
        json: &Value,
        path: &Path,
        load_in: Option<LoadIn>,
        skip_modules: Option<&[String]>,
        dense: Option<Vec<String>>,
    ) -> Result<Option<Self>, Error> {
        let asked = load_in.and_then(LoadIn::format);
        let Some(stored) = stored_quantization(json) else {
            let Some(format) = asked else {
                return match skip_modules {
                    None => Ok(None),
                    Some(_) => Err(Error::Argument(
                        "skip_modules has no effect because nothing is quantized; set load_in_fp8, load_in_4bit or load_in_8bit, \
                         or remove it"
                            .to_owned(),
                    )),
                };
            };
            let config = QuantizationConfig::new(format, compute_dtype(json), dense);
            return Ok(Some(Self { config, format, is_stored: false, beside: None }));
        };
        let config = QuantizationConfig::parse(stored).map_err(|error| Error::Config {
            path: path.join("config.json"),
            problems: vec![format!("quantization_config: {error}")],
        })?;
        let found = config.format();
        let skips = || skip_modules.map(|_| "skip_modules".to_owned());
        if let Some(asked) = load_in.and_then(|asked| asked.conflict(found)).or_else(skips) {
            return Err(Error::Argument(format!(
                "{} is already quantized, {found}, but {asked} selects another format; remove it to load the \
                 checkpoint as it is, or use the 16-bit checkpoint that it was made from",
                path.display()
            )));
        }
        if found == QuantFormat::Mxfp4 {
            let beside = asked.map(|format| (QuantizationConfig::new(format, compute_dtype(json), dense), format));
            return Ok(Some(Self { config, format: found, is_stored: true, beside }));
        }
        // A request for fp8 has no scales of its own.
        let format = asked.filter(|asked| !matches!(asked, QuantFormat::Fp8(_))).unwrap_or(found);
        Ok(Some(Self { config, format, is_stored: true, beside: None }))
    }

    /// Returns the format of the linear `module`; `None` if it stays dense.
    pub(crate) fn of_module(&self, module: &str) -> Option<QuantFormat> {
        if self.config.skips(module) { self.beside_experts(module) } else { Some(self.format) }
    }

    /// Returns the format to which the linear `module` is quantized beside experts in MXFP4.
    fn beside_experts(&self, module: &str) -> Option<QuantFormat> {
        let (config, format) = self.beside.as_ref()?;
        (self.config.skips(module) && !config.skips(module)).then_some(*format)
    }
}

/// The source of each quantized weight of a checkpoint.
#[derive(Debug)]
pub(crate) struct QuantizationPlan {
    linears: LinearFormat,
    /// The weights that the checkpoint holds quantized.
    stored: BTreeSet<String>,
    /// The format that was asked for, if any was.
    asked: Option<QuantFormat>,
}

impl QuantizationPlan {
    /// Returns the plan for the checkpoint of `model` when it is asked for in `load_in`; `None` keeps everything dense.
    ///
    /// # Errors
    /// As [`LinearFormat::of`].
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        load_in: Option<LoadIn>,
        skip_modules: Option<&[String]>,
        model: &ModelConfig,
    ) -> Result<Option<Self>, Error> {
        let dense = model.skip_modules(skip_modules);
        let linears = LinearFormat::of(checkpoint.config(), checkpoint.path(), load_in, skip_modules, dense)?;
        let asked = load_in.filter(|asked| *asked != LoadIn::FourBit(None)).and_then(LoadIn::format);
        Ok(linears.map(|linears| {
            let stored =
                if linears.is_stored { checkpoint.names().filter_map(bnb::owner).collect() } else { BTreeSet::new() };
            Self { linears, stored, asked }
        }))
    }

    /// The `quantization_config` of the result.
    pub(crate) fn config(&self) -> &QuantizationConfig {
        &self.linears.config
    }

    /// Returns true if the checkpoint itself holds `name` quantized.
    pub(crate) fn is_stored(&self, name: &str) -> bool {
        self.stored.contains(name)
    }

    /// Returns the quantized weight `name` `[out, in]`; `None` when it stays dense. Codes cannot hold an infinity or NaN,
    /// so a dense weight with one is [`Error::NonFinite`].
    pub(crate) fn weight(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<StoredWeight>, Error> {
        let fail = |problem: String| Error::Tensors { path: checkpoint.path().to_owned(), problems: vec![problem] };
        let failed = |error: rekindle_quant::Error| fail(format!("tensor \"{name}\": {error}"));
        let module = name.strip_suffix(".weight").unwrap_or(name);
        if self.is_stored(name) {
            let find = |key: &str| checkpoint.get(key).map(|view| raw(&view));
            let weight = StoredWeight::read(name, find).map_err(failed)?;
            let weight = weight.ok_or_else(|| fail(format!("tensor \"{name}\" has scales but no quantized data")))?;
            if weight.shape() != shape {
                let found = weight.shape();
                return Err(fail(format!(
                    "tensor \"{name}\" has quantized data of shape {found:?}, expected \
                     {shape:?}"
                )));
            }
            self.check_fp8(module, &weight).map_err(|problem| fail(format!("tensor \"{name}\" {problem}")))?;
            let asked = self.asked.filter(|_| self.linears.beside.is_none());
            let blocksizes = weight.format().blocksize().zip(asked.and_then(QuantFormat::blocksize));
            if let Some((found, asked)) = blocksizes.filter(|(found, asked)| found != asked) {
                return Err(Error::Argument(format!(
                    "tensor \"{name}\" has blocks of {}, but blocksize is {}; remove the 4-bit format to load the \
                     checkpoint as it is",
                    found.get(),
                    asked.get()
                )));
            }
            return Ok(Some(weight));
        }
        if let Some(format @ QuantFormat::Fp8(_)) = self.linears.of_module(module).filter(|_| self.linears.is_stored) {
            return Err(fail(format!(
                "tensor \"{name}\" has no scales, but quantization_config says {format} and does not list \"{module}\" in \
                 {}",
                self.skip_key()
            )));
        }
        let format =
            if self.linears.is_stored { self.linears.beside_experts(module) } else { self.linears.of_module(module) };
        let Some(format) = format else { return Ok(None) };
        let view = checkpoint.get(name).expect("every needed tensor was checked to be there");
        check_view(&view)?;
        if matches!(view.dtype, Dtype::Blocks(_)) {
            let mut bytes = Vec::new();
            write_f32(&mut bytes, Dtype::F32, &view.to_f32()?).expect("memory takes what is written");
            return format.quantize(&bytes, Dtype::F32, view.shape).map(Some).map_err(failed);
        }
        format.quantize(&view.row_major(), view.dtype, view.shape).map(Some).map_err(failed)
    }
}

impl QuantizationPlan {
    /// Compares an fp8 weight of the checkpoint with its configuration, by which memory is planned.
    fn check_fp8(&self, module: &str, weight: &StoredWeight) -> Result<(), String> {
        let StoredWeight::Fp8(weight) = weight else { return Ok(()) };
        let found = weight.tensor.scaling();
        let key = self.skip_key();
        match self.linears.of_module(module) {
            None => {
                Err(format!("is in fp8, but quantization_config lists \"{module}\" in {key}, or does not target it"))
            }
            Some(QuantFormat::Fp8(expected))
                if expected.grid(weight.tensor.shape()) == found.grid(weight.tensor.shape()) =>
            {
                Ok(())
            }
            Some(other) => Err(format!("has {}, but quantization_config says {other}", found.name())),
        }
    }

    fn skip_key(&self) -> &'static str {
        self.linears.config.skip_key().unwrap_or("modules_to_not_convert")
    }
}

/// Returns the dtype in which the values of a stored tensor are written to a safetensors file: that of the tensor, or BF16
/// for blocks.
pub(crate) fn written_dtype(stored: Dtype) -> Dtype {
    if matches!(stored, Dtype::Blocks(_)) { Dtype::BF16 } else { stored }
}

/// The bytes that a weight takes in the checkpoint, scales included.
pub(crate) fn stored_bytes(checkpoint: &Checkpoint, name: &str) -> u64 {
    bnb::keys(name).filter_map(|key| checkpoint.get(&key)).map(|view| view.data.len() as u64).sum()
}

/// A stored tensor as `rekindle-quant` takes it.
fn raw<'a>(view: &TensorView<'a>) -> RawTensor<'a> {
    RawTensor { dtype: view.dtype, shape: view.shape.to_vec(), bytes: Cow::Borrowed(view.data) }
}

/// The dtype that `config.json` gives for 16-bit computation, which a quantized checkpoint names as its compute dtype.
fn compute_dtype(config: &Value) -> Dtype {
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str());
    let dtype = name.and_then(Dtype::from_torch_name);
    dtype.filter(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)).unwrap_or(Dtype::BF16)
}

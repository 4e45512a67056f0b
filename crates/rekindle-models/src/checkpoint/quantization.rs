//! Which linears of a model are kept in codes: those of a quantized checkpoint, or those quantized while loading.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rekindle_hub::{Checkpoint, Dtype, TensorView};
use rekindle_quant::bnb::{self, Format, FourBitWeight, QuantizationConfig, RawDtype, RawTensor, StoredWeight};
use rekindle_quant::{Blocksize, DiskMetadata, Int8Tensor, QuantConfig, QuantizedTensor};
use serde_json::Value;

use crate::Error;
use crate::non_finite::check_view;

/// How the linears of the blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadIn {
    /// Dense, in the compute dtype.
    SixteenBit,
    /// NF4 or FP4 codes. `None` is NF4 in blocks of 64 with double quantization, or whatever 4-bit format a
    /// quantized checkpoint has.
    FourBit(Option<QuantConfig>),
    /// LLM.int8() codes.
    EightBit,
}

impl LoadIn {
    /// The argument of `from_pretrained` that asks for it.
    pub fn argument(self) -> &'static str {
        match self {
            Self::SixteenBit => "load_in_16bit",
            Self::FourBit(_) => "load_in_4bit",
            Self::EightBit => "load_in_8bit",
        }
    }
}

/// What a `config.json` says of the codes that its checkpoint is in; `None` for a dense one.
pub fn stored_quantization(config: &Value) -> Option<&Value> {
    config.get("quantization_config").filter(|found| !found.is_null())
}

/// What a loaded model keeps to be saved as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Quantization {
    pub(crate) config: QuantizationConfig,
    /// By the weight's name.
    pub(crate) disk_metadata: BTreeMap<String, DiskMetadata>,
    /// The dtypes of the dense tensors in the checkpoint, by name.
    pub(crate) dtypes: BTreeMap<String, Dtype>,
}

impl Quantization {
    /// Says of `modules`, which were in codes, that they are dense from now on.
    pub(crate) fn keep_dense<'a>(&mut self, modules: impl IntoIterator<Item = &'a String>) {
        const SKIP: &str = "llm_int8_skip_modules";
        let mut json = self.config.to_json();
        // A list replaces the default, which is the head.
        let mut names = json[SKIP].as_array().cloned().unwrap_or_else(|| vec![Value::from("lm_head")]);
        names.extend(modules.into_iter().map(|name| Value::from(name.as_str())));
        json[SKIP] = Value::Array(names);
        self.config = QuantizationConfig::parse(&json).expect("only names were added");
    }
}

/// How the linears of one checkpoint come to their codes.
#[derive(Debug)]
pub(crate) struct QuantizationPlan {
    pub(crate) config: QuantizationConfig,
    source: QuantizeFrom,
}

#[derive(Debug)]
enum QuantizeFrom {
    /// The weights that the checkpoint holds in codes, and the block size that was asked for, if any was.
    Stored(BTreeSet<String>, Option<Blocksize>),
    FourBit(QuantConfig),
    EightBit,
}

impl QuantizationPlan {
    /// What to do with `checkpoint` when asked for `load_in`; `None` keeps everything dense.
    ///
    /// # Errors
    /// [`Error::Argument`] for a quantized checkpoint asked for in another format, [`Error::Config`] for a
    /// `quantization_config` that is not bitsandbytes'.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        load_in: Option<LoadIn>,
        skip_modules: Option<&[String]>,
    ) -> Result<Option<Self>, Error> {
        if let Some(json) = stored_quantization(checkpoint.config()) {
            return Self::stored(checkpoint, json, load_in, skip_modules).map(Some);
        }
        let dtype = dtype_name(checkpoint.config());
        let skip = skip_modules.map(<[String]>::to_vec);
        Ok(match load_in {
            None | Some(LoadIn::SixteenBit) => {
                if skip_modules.is_some() {
                    return Err(Error::Argument(
                        "skip_modules names linears that stay dense, and nothing is quantized; \
                         add load_in_4bit or load_in_8bit, or leave it out"
                            .to_owned(),
                    ));
                }
                None
            }
            Some(LoadIn::FourBit(config)) => {
                let four_bit = config.unwrap_or_default();
                let config = QuantizationConfig::four_bit(&four_bit, dtype, skip);
                Some(Self { config, source: QuantizeFrom::FourBit(four_bit) })
            }
            Some(LoadIn::EightBit) => {
                Some(Self { config: QuantizationConfig::int8(skip), source: QuantizeFrom::EightBit })
            }
        })
    }

    fn stored(
        checkpoint: &Checkpoint,
        json: &Value,
        load_in: Option<LoadIn>,
        skip_modules: Option<&[String]>,
    ) -> Result<Self, Error> {
        let config = QuantizationConfig::parse(json).map_err(|error| Error::Config {
            path: checkpoint.path().join("config.json"),
            problems: vec![format!("quantization_config: {error}")],
        })?;
        let found = match config.format() {
            Format::FourBit { quant_type, .. } => format!("4-bit ({})", quant_type.name()),
            Format::Int8 => "8-bit (LLM.int8())".to_owned(),
        };
        let refuse = |asked: &str| {
            Error::Argument(format!(
                "{} is quantized already, {found}, and {asked} asks for something else; leave that out to load it as \
                 it is, or give the 16-bit checkpoint that it was made from",
                checkpoint.path().display()
            ))
        };
        match (load_in, config.format()) {
            (None, _)
            | (Some(LoadIn::FourBit(None)), Format::FourBit { .. })
            | (Some(LoadIn::EightBit), Format::Int8) => {}
            (Some(LoadIn::FourBit(Some(asked))), Format::FourBit { quant_type, double_quant }) => {
                if (asked.quant_type, asked.double_quant) != (quant_type, double_quant) {
                    return Err(refuse(&format!(
                        "quant_type \"{}\" with double_quant = {}",
                        asked.quant_type.name(),
                        asked.double_quant
                    )));
                }
            }
            (Some(asked), _) => return Err(refuse(asked.argument())),
        }
        if skip_modules.is_some() {
            return Err(refuse("skip_modules"));
        }
        // Each weight says its own block size; the configuration does not.
        let blocksize = match load_in {
            Some(LoadIn::FourBit(Some(asked))) => Some(asked.blocksize),
            _ => None,
        };
        let source = QuantizeFrom::Stored(checkpoint.names().filter_map(bnb::owner).collect(), blocksize);
        Ok(Self { config, source })
    }

    /// Returns true if the checkpoint itself holds `name` in codes.
    pub(crate) fn is_stored(&self, name: &str) -> bool {
        matches!(&self.source, QuantizeFrom::Stored(names, _) if names.contains(name))
    }

    /// The codes of the weight `name` `[out, in]`; `None` when it stays dense. Codes cannot hold an infinity or NaN, so a
    /// dense weight with one is [`Error::NonFinite`].
    pub(crate) fn codes(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<StoredWeight>, Error> {
        let fail = |problem: String| Error::Tensors { path: checkpoint.path().to_owned(), problems: vec![problem] };
        let failed = |error: rekindle_quant::Error| fail(format!("tensor \"{name}\": {error}"));
        if let QuantizeFrom::Stored(names, blocksize) = &self.source {
            if !names.contains(name) {
                return Ok(None);
            }
            let find = |key: &str| checkpoint.get(key).and_then(|view| raw(&view));
            let weight = StoredWeight::read(name, find).map_err(failed)?;
            let weight = weight.ok_or_else(|| fail(format!("tensor \"{name}\" has scales but no codes")))?;
            if weight.shape() != shape {
                let found = weight.shape();
                return Err(fail(format!("tensor \"{name}\" holds codes of shape {found:?}, expected {shape:?}")));
            }
            if let (StoredWeight::FourBit(weight), Some(asked)) = (&weight, blocksize)
                && weight.tensor.config().blocksize != *asked
            {
                return Err(Error::Argument(format!(
                    "tensor \"{name}\" has blocks of {}, and blocksize {} was asked for; leave the 4-bit format out to \
                     load the checkpoint as it is",
                    weight.tensor.config().blocksize.get(),
                    asked.get()
                )));
            }
            return Ok(Some(weight));
        }
        let module = name.strip_suffix(".weight").unwrap_or(name);
        if self.config.skips(module) {
            return Ok(None);
        }
        let view = checkpoint.get(name).expect("every needed tensor was checked to be there");
        check_view(&view)?;
        self.encode(&view).map(Some).map_err(failed)
    }

    /// Quantizes a dense tensor straight from its file.
    pub(crate) fn encode(&self, view: &TensorView<'_>) -> Result<StoredWeight, rekindle_quant::Error> {
        let dtype: rekindle_quant::Dtype = raw_name(view.dtype).parse()?;
        let [out, input] = view.shape.try_into().unwrap_or([1, view.shape.iter().product()]);
        match &self.source {
            QuantizeFrom::EightBit => {
                Int8Tensor::quantize_le_bytes(view.data, dtype, [out, input]).map(StoredWeight::Int8)
            }
            QuantizeFrom::FourBit(config) => QuantizedTensor::quantize_le_bytes(view.data, dtype, view.shape, config)
                .map(|tensor| StoredWeight::FourBit(FourBitWeight::new(tensor))),
            QuantizeFrom::Stored(..) => unreachable!("what is stored is not encoded again"),
        }
    }
}

/// The bytes that a weight takes in the checkpoint, scales included.
pub(crate) fn stored_bytes(checkpoint: &Checkpoint, name: &str) -> u64 {
    let keys = checkpoint.names().filter(|key| *key == name || bnb::owner(key).as_deref() == Some(name));
    keys.filter_map(|key| checkpoint.get(key)).map(|view| view.data.len() as u64).sum()
}

/// A stored tensor as `rekindle-quant` takes it; `None` for a dtype that bitsandbytes never writes.
fn raw<'a>(view: &TensorView<'a>) -> Option<RawTensor<'a>> {
    let dtype = RawDtype::from_name(&view.dtype.to_string())?;
    Some(RawTensor { dtype, shape: view.shape.to_vec(), bytes: Cow::Borrowed(view.data) })
}

/// The hub's dtype of a tensor that `rekindle-quant` writes.
pub(crate) fn hub_dtype(dtype: RawDtype) -> Dtype {
    match dtype {
        RawDtype::U8 => Dtype::U8,
        RawDtype::I8 => Dtype::I8,
        RawDtype::I16 => Dtype::I16,
        RawDtype::I32 => Dtype::I32,
        RawDtype::I64 => Dtype::I64,
        RawDtype::F16 => Dtype::F16,
        RawDtype::Bf16 => Dtype::BF16,
        RawDtype::F32 => Dtype::F32,
        RawDtype::F64 => Dtype::F64,
    }
}

/// PyTorch's name of a dtype.
fn raw_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        Dtype::F64 => "float64",
        _ => "an integer",
    }
}

/// The dtype that `config.json` gives for 16-bit computation, which a quantized checkpoint names as its compute dtype.
fn dtype_name(config: &Value) -> rekindle_quant::Dtype {
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str());
    name.and_then(|name| name.parse().ok()).unwrap_or(rekindle_quant::Dtype::Bf16)
}

//! Linears of GGUF files that stay in the blocks of the file.

use std::collections::BTreeMap;

use rekindle_gguf::GgmlType;
use rekindle_hub::{Checkpoint, Dtype};
use rekindle_kernels::Device;
use rekindle_kernels::quantized::{BlockCodec, QuantizedData, QuantizedFormat};
use serde_json::{Map, Value, json};

use crate::{Error, LoadOptions};

/// The key of `config.json` under which a GGUF model lists the types of its quantized linears.
const SECTION: &str = "quantization_config";
const METHOD: &str = "quant_method";
/// The value of [`METHOD`].
const GGUF: &str = "gguf";
const TYPES: &str = "types";

/// Returns the section of `config.json` for linears of these types, by module.
pub(super) fn section(types: BTreeMap<String, &str>) -> Option<(&'static str, Value)> {
    (!types.is_empty()).then(|| (SECTION, json!({METHOD: GGUF, TYPES: types})))
}

/// Returns true if a `quantization_config` is that of a GGUF file. Its tensors decode as dense ones do.
pub(crate) fn is_gguf(section: &Value) -> bool {
    section[METHOD] == GGUF
}

/// The linears of a GGUF file that stay in its blocks, with their formats.
#[derive(Clone, Debug)]
pub(crate) struct KeptBlocks(BTreeMap<String, BlockCodec>);

impl KeptBlocks {
    /// Returns the linears that stay in blocks when the model with this `config.json` is loaded; `None` if all are decoded,
    /// because the model has none, another storage is asked for, or all weights are trained.
    ///
    /// # Errors
    /// [`Error::Argument`] for a type without a decoder on the device.
    pub(crate) fn of(json: &Value, options: &LoadOptions) -> Result<Option<Self>, Error> {
        let Some(types) =
            json.get(SECTION).filter(|section| is_gguf(section)).and_then(|section| section[TYPES].as_object())
        else {
            return Ok(None);
        };
        if options.load_in.is_some() || options.full_finetuning {
            return Ok(None);
        }
        let kept = Self::read(types)?;
        if options.is_cuda()
            && let Some((module, codec)) = kept.0.iter().find(|(_, codec)| !codec.has_cuda_decoder())
        {
            return Err(Error::Argument(format!(
                "\"{module}\" is stored in blocks of {}, for which CUDA has no decoder; set load_in_16bit = true to decode \
                 the weights while they are loaded, load_in_4bit = true for QLoRA, or use device \"cpu\"",
                codec.name
            )));
        }
        Ok(Some(kept))
    }

    fn read(types: &Map<String, Value>) -> Result<Self, Error> {
        let codec = |(module, name): (&String, &Value)| match codec(name.as_str().and_then(GgmlType::from_name)) {
            Some(codec) => Ok((module.clone(), codec)),
            None => Err(Error::Argument(format!("\"{module}\" has the type {name}, which cannot be decoded"))),
        };
        Ok(Self(types.iter().map(codec).collect::<Result<_, _>>()?))
    }

    /// Returns the format of a linear; `None` if it is decoded.
    pub(crate) fn of_module(&self, module: &str) -> Option<BlockCodec> {
        self.0.get(module).copied()
    }

    /// Returns the blocks of a linear; `None` if it is decoded.
    ///
    /// # Errors
    /// [`Error::Tensors`] for a tensor of another type than the configuration says.
    pub(crate) fn blocks(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        module: &str,
        dims: [usize; 2],
    ) -> Result<Option<QuantizedData>, Error> {
        let Some(codec) = self.of_module(module) else { return Ok(None) };
        let view = checkpoint.get(name).expect("every needed tensor was checked to be there");
        let is_same = matches!(view.dtype, Dtype::Blocks(format) if format.name == codec.name);
        if !is_same || !dims[1].is_multiple_of(codec.elements) {
            let problem = format!("tensor \"{name}\" is {} {dims:?} instead of rows in {}", view.dtype, codec.name);
            return Err(Error::Tensors { path: checkpoint.path().to_owned(), problems: vec![problem] });
        }
        Ok(Some(QuantizedData {
            dims,
            format: QuantizedFormat::Blocks { bytes: view.row_major().into_owned(), codec },
        }))
    }
}

/// Returns the format of a type in which linears stay; `None` for one that is not quantized or has no decoder.
pub(super) fn codec(kind: Option<GgmlType>) -> Option<BlockCodec> {
    match kind?.dtype() {
        Dtype::Blocks(format) => {
            let (name, elements, bytes) = (format.name, format.elements, format.bytes);
            Some(BlockCodec { name, elements, bytes, decode: format.decode? })
        }
        _ => None,
    }
}

impl LoadOptions {
    /// Returns true if the device of the weights is a CUDA device, real or planned.
    fn is_cuda(&self) -> bool {
        matches!(self.device, Device::Cuda(_))
    }
}

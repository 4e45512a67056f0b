//! Arguments of quantizing while loading.

use rekindle::Fp8;

/// The quantization of the linears.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct QuantArgs {
    /// Quantize the linears to 4 bits while loading; a quantized checkpoint needs no flag
    #[arg(long = "load-in-4bit")]
    pub(crate) load_in_4bit: bool,
    /// Quantize the linears to LLM.int8() while loading
    #[arg(long = "load-in-8bit")]
    pub(crate) load_in_8bit: bool,
    /// Quantize the linears to fp8 (E4M3) with a scale per row while loading
    #[arg(long = "load-in-fp8")]
    pub(crate) load_in_fp8: bool,
    /// Decode the linears of a GGUF file while loading, instead of keeping their blocks
    #[arg(long = "load-in-16bit")]
    pub(crate) load_in_16bit: bool,
    /// Multiply with the linears in fp8: true, or forward for the forward pass alone [default: false]
    #[arg(long, value_name = "PRODUCTS", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) fp8: Option<Fp8>,
    /// The 4-bit data type, nf4 or fp4 [default: nf4]
    #[arg(long, value_name = "TYPE")]
    pub(crate) quant_type: Option<String>,
    /// Weights per scale, a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) blocksize: Option<usize>,
    /// Quantize the scales of 4-bit weights too [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) double_quant: Option<bool>,
    /// Modules to leave unquantized, by commas: linears, or paths such as model.layers.0 [default: lm_head]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub(crate) skip_modules: Option<Vec<String>>,
}

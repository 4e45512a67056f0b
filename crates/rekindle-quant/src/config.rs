use crate::Error;

/// Settings for quantizing a weight to four bits.
///
/// The default is that of bitsandbytes' QLoRA recipe: NF4 in blocks of 64 with double quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantConfig {
    /// The 4-bit data type.
    pub quant_type: QuantType,
    /// The number of elements that share one scale.
    pub blocksize: Blocksize,
    /// If true, the scales are quantized to 8 bits.
    pub double_quant: bool,
}

impl QuantConfig {
    /// Returns the bits per weight of a large tensor including scales: 4 + 32/b, or 4 + 8/b + 32/(256·b) with double
    /// quantization. Excludes the 1 KiB code table and the offset, which each tensor has once.
    pub fn bits_per_weight(&self) -> f64 {
        let blocksize = self.blocksize.get() as f64;
        let scale = if self.double_quant { 8.0 + 32.0 / 256.0 } else { 32.0 };
        4.0 + scale / blocksize
    }
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self { quant_type: QuantType::Nf4, blocksize: Blocksize::B64, double_quant: true }
    }
}

/// A 4-bit data type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: 16 quantiles of the normal distribution (arXiv:2305.14314, §3).
    Nf4,
    /// A float of 1 sign, 2 exponent and 1 mantissa bits, divided by 12.
    Fp4,
}

impl QuantType {
    /// Both types.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// Returns the name used in configuration files: `nf4` or `fp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

impl std::str::FromStr for QuantType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| Error::QuantType { got: name.to_owned() })
    }
}

/// The number of elements that share a scale: a power of two from 32 to 4,096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Blocksize(u16);

impl Blocksize {
    /// 64, the default for weights.
    pub const B64: Self = Self(64);
    /// 256, the default for scales and for optimizer states.
    pub const B256: Self = Self(256);
    /// Every size that bitsandbytes supports.
    pub const ALL: [Self; 8] =
        [Self(32), Self(64), Self(128), Self(256), Self(512), Self(1024), Self(2048), Self(4096)];

    /// Creates a block size.
    ///
    /// # Errors
    /// [`Error::Blocksize`] if `size` is not in [`Blocksize::ALL`].
    pub fn new(size: usize) -> Result<Self, Error> {
        Self::try_from(size as u64)
    }

    /// Returns the size.
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// Returns the number of blocks for `elements`; the last one may be short.
    pub const fn blocks(self, elements: usize) -> usize {
        elements.div_ceil(self.get())
    }
}

impl TryFrom<u64> for Blocksize {
    type Error = Error;

    fn try_from(size: u64) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|b| b.get() as u64 == size).ok_or(Error::Blocksize { got: size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_uses_4_127_bits_per_weight() {
        assert_eq!(QuantConfig::default().bits_per_weight(), 4.0 + 8.0 / 64.0 + 32.0 / 16384.0);
        let single = QuantConfig { double_quant: false, ..QuantConfig::default() };
        assert_eq!(single.bits_per_weight(), 4.5);
    }

    #[test]
    fn errors_list_the_supported_values() {
        let error = Blocksize::new(100).expect_err("100 is not a power of two").to_string();
        assert_eq!(error, "blocksize 100 is not supported; use one of [32, 64, 128, 256, 512, 1024, 2048, 4096]");
        assert_eq!(Blocksize::new(16), Err(Error::Blocksize { got: 16 }));
        assert_eq!(Blocksize::new(65536 + 64), Err(Error::Blocksize { got: 65600 }));
        let error = "int4".parse::<QuantType>().expect_err("not a 4-bit type of bitsandbytes").to_string();
        assert_eq!(error, r#"unknown quant_type "int4"; use one of ["nf4", "fp4"]"#);
        assert_eq!("fp4".parse(), Ok(QuantType::Fp4));
    }
}

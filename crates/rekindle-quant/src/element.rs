use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rekindle_hub::Dtype;

use crate::Error;

/// A floating-point type that weights are quantized from and decoded to: `f32`, `f16` or `bf16`.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + Send + Sync + 'static {
    /// The type as a [`Dtype`].
    const DTYPE: Dtype;

    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Converts `from` to f32 exactly; both slices must have the same length.
    fn to_f32_slice(from: &[Self], to: &mut [f32]);
}

/// The dtypes of the [`Element`] types.
pub(crate) const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Returns the element dtype with PyTorch's name: `float32`, `float16` or `bfloat16`.
pub(crate) fn parse_float(name: &str) -> Result<Dtype, Error> {
    let found = FLOATS.into_iter().find(|dtype| dtype.torch_name() == name);
    found.ok_or_else(|| Error::Dtype { got: name.to_owned() })
}

/// The error for a dtype that is not that of an [`Element`].
pub(crate) fn not_a_float(dtype: Dtype) -> Error {
    Error::Dtype { got: dtype.torch_name().to_owned() }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32_slice(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    fn to_f32_slice(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Equal to `bf16::from_f32`, without its branch.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        Self::from_bits((if value.is_nan() { bits | 0x0040_0000 } else { rounded } >> 16) as u16)
    }

    #[inline(always)]
    fn to_f32_slice(from: &[Self], to: &mut [f32]) {
        for (wide, narrow) in to.iter_mut().zip(from) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                assert_eq!(<bf16 as Element>::from_f32(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
            }
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

//! 8-bit floats (E4M3) and their scales.

use core::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::{QuantizedData, QuantizedFormat};
use crate::host::simd;

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// The elements of an fp8 weight that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8Scaling {
    /// All of them.
    Tensor,
    /// A row.
    Row,
    /// A block of 128 × 128, fewer at the edges.
    Block,
}

impl Fp8Scaling {
    /// Returns the rows and columns of the matrix of scales of one weight.
    pub const fn grid(self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Tensor => [1, 1],
            Self::Row => [rows, 1],
            Self::Block => [rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)],
        }
    }

    /// Returns the number of scales of one weight.
    pub const fn scales(self, dims: [usize; 2]) -> usize {
        let [rows, cols] = self.grid(dims);
        rows * cols
    }

    /// The row of scales for a row of a weight that is stacked from sections of so many rows.
    pub(crate) fn scale_row(self, section: usize, row: usize) -> usize {
        let within = match self {
            Self::Tensor => 0,
            Self::Row => row % section,
            Self::Block => row % section / BLOCK,
        };
        row / section * self.grid([section, 1])[0] + within
    }

    /// Adjacent columns with one scale.
    pub(crate) fn columns(self, cols: usize) -> usize {
        match self {
            Self::Tensor | Self::Row => cols,
            Self::Block => BLOCK,
        }
    }
}

/// The value of a code that is not NaN.
#[inline(always)]
pub(crate) fn value(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    // The exponent is 120 less than that of an f32. Below the smallest normal number, one with the next exponent is exact.
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let subnormal = f32::from_bits((magnitude << 20) + (121 << 23)) - 1.0 / 64.0;
    let value = if magnitude < 8 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// Decodes some rows on the CPU.
pub(super) fn decode_row(codes: &[u8], scales: &[f32], width: usize, out: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for ((out, codes), &scale) in out.chunks_mut(width).zip(codes.chunks(width)).zip(scales) {
                out.iter_mut().zip(codes).for_each(|(out, &code)| *out = value(code) * scale);
            }
        },
    );
}

/// The scales of some rows `[rows, cols]`, in Burn's operations.
pub(super) fn row_scales(
    scales: &Tensor<1>,
    (scaling, section): (Fp8Scaling, usize),
    rows: Range<usize>,
    cols: usize,
) -> Tensor<2> {
    let ([count], per_row) = (scales.dims(), scaling.grid([1, cols])[1]);
    let device: Device = scales.device();
    let index: Vec<i32> = rows.map(|row| scaling.scale_row(section, row) as i32).collect();
    let index = Tensor::<1, Int>::from_data(TensorData::from(&index[..]), (&device, DType::I32));
    let [rows] = index.dims();
    let width = scaling.columns(cols);
    let by_row = scales.clone().reshape([count / per_row, per_row]).select(0, index).reshape([rows * per_row, 1]);
    by_row.repeat_dim(1, width).reshape([rows, per_row * width]).narrow(1, 0, cols)
}

impl QuantizedData {
    /// fp8 codes of a weight `[out, in]` that is all zeros, stacked from `parts`.
    pub fn fp8_zeros(dims: [usize; 2], parts: usize, scaling: Fp8Scaling) -> Self {
        let section = dims[0] / parts;
        let (codes, scales) = (vec![0; dims[0] * dims[1]], vec![0.0; parts * scaling.scales([section, dims[1]])]);
        Self { dims, format: QuantizedFormat::Fp8 { codes, scales, scaling, section } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, QuantizedWeight, to_f32};

    #[test]
    fn values_by_hand() {
        let codes = [0x00, 0x01, 0x07, 0x08, 0x38, 0x39, 0x7e, 0x80, 0xb8, 0xfe];
        let expected = [0.0, 1.0 / 512.0, 7.0 / 512.0, 1.0 / 64.0, 1.0, 1.125, 448.0, -0.0, -1.0, -448.0_f32];
        assert_eq!(codes.map(value).map(f32::to_bits), expected.map(f32::to_bits));
    }

    #[test]
    fn stacked_blocks_keep_their_scales() {
        // Two blocks of rows, the second with two rows, and two of columns.
        let part = |at: u8| {
            let dims = [130, 129];
            let codes = vec![0x38; 130 * 129];
            let scales = (0..4).map(|block| f32::from(at) + block as f32).collect();
            let format = QuantizedFormat::Fp8 { codes, scales, scaling: Fp8Scaling::Block, section: 130 };
            QuantizedData { dims, format }
        };
        let stack = QuantizedData::stacked(vec![part(10), part(20), part(30)]).expect("parts of one kind");
        let values = to_f32(QuantizedWeight::new(stack.clone(), &Device::cpu()).decode(DType::F32));
        let at = |row: usize, col: usize| values[row * 129 + col];
        assert_eq!([at(0, 0), at(127, 128), at(128, 127), at(129, 128)], [10.0, 11.0, 12.0, 13.0]);
        assert_eq!([at(130, 0), at(257, 128), at(258, 0), at(259, 128)], [20.0, 21.0, 22.0, 23.0]);
        assert_eq!(stack.part(2, 3), part(30));
    }
}

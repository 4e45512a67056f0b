//! A kernel on wgpu that decodes rows of 4-bit codes; the formulas stand in [`super`].
//!
//! A unit decodes one element, and units side by side read the same words. Bytes an element: 1/2 and its share of the scales
//! read, 4 written, in one launch. Burn's operations take 6 launches, 11 with scales in 8 bits, and write the codes and the
//! scales of every element. Values are those of the CPU, but a driver may fuse the product and the sum of a scale in 8 bits.

use core::ops::Range;

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::portable::{WordAbsmax, WordFormat, Words};
use crate::tensor::wgpu::{arg, cubes, empty, floats, ints, of_burn, result};

/// Units of a workgroup.
const UNITS: u32 = 256;

/// Some rows of a matrix of 4-bit codes in `f32`.
pub(super) fn rows(words: &Words, rows: Range<usize>, dtype: DType) -> Option<Tensor<2>> {
    let WordFormat::FourBit { table, blocksize, absmax } = &words.format else { return None };
    if dtype != DType::F32 || rows.is_empty() {
        return None;
    }
    let input = words.dims()[1];
    let (first, elements) = (rows.start * input, rows.len() * input);
    let codes = ints(&words.codes)?;
    let values = empty(&codes, [rows.len(), input]);
    let scales = Scales::of(absmax, &codes)?;
    // SAFETY: the kernel reads the words of elements below the end of the rows, and writes elements below `elements`.
    #[allow(unsafe_code)]
    unsafe {
        decode_kernel::launch_unchecked(
            &codes.client,
            cubes(elements.div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS),
            arg(&codes),
            floats(&codes, table),
            arg(&scales.scales),
            arg(&scales.codes),
            floats(&codes, scales.map),
            floats(&codes, scales.offsets),
            arg(&values),
            first as u32,
            elements as u32,
            *blocksize as u32,
            scales.nesting as u32,
            scales.section as u32,
            scales.is_double,
        );
    }
    Some(result::<2>(values).into_burn())
}

/// The scales of blocks; of scales in `f32`, only `scales` is read.
struct Scales<'a> {
    /// One for each block, or for `nesting` codes.
    scales: CubeTensor,
    codes: CubeTensor,
    map: &'a [f32],
    offsets: &'a [f32],
    nesting: usize,
    /// Blocks that share an offset.
    section: usize,
    is_double: bool,
}

impl<'a> Scales<'a> {
    fn of(absmax: &'a WordAbsmax, any: &CubeTensor) -> Option<Self> {
        Some(match absmax {
            WordAbsmax::Single(absmax) => Self {
                scales: of_burn(absmax)?,
                codes: any.clone(),
                map: &[0.0],
                offsets: &[0.0],
                nesting: 1,
                section: 1,
                is_double: false,
            },
            WordAbsmax::Double { codes, blocks, map, nested, blocksize, offsets } => Self {
                scales: of_burn(nested)?,
                codes: ints(codes)?,
                map: &map[..],
                offsets,
                nesting: *blocksize,
                section: blocks / offsets.len(),
                is_double: true,
            },
        })
    }
}

#[cube(launch_unchecked)]
fn decode_kernel(
    codes: &[u32],
    table: &[f32],
    scales: &[f32],
    scale_codes: &[u32],
    map: &[f32],
    offsets: &[f32],
    values: &mut [f32],
    first: u32,
    elements: u32,
    blocksize: u32,
    nesting: u32,
    section: u32,
    #[comptime] is_double: bool,
) {
    let i = CUBE_POS * UNITS as usize + UNIT_POS as usize;
    if i < elements as usize {
        let element = first + i as u32;
        let block = element / blocksize;
        let scale = if comptime!(is_double) {
            let code = (scale_codes[(block / 4) as usize] >> (block % 4 * 8)) & 255;
            map[code as usize] * scales[(block / nesting) as usize] + offsets[(block / section) as usize]
        } else {
            scales[block as usize]
        };
        // The even element of a byte is in its high nibble.
        let code = (codes[(element / 8) as usize] >> (((element % 8) ^ 1) * 4)) & 15;
        values[i] = table[code as usize] * scale;
    }
}

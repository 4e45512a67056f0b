//! Codes on Burn's other devices, and decoding them in Burn's operations.

use core::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

#[cfg(feature = "wgpu")]
use super::wgpu;
use super::{Absmax, Fp8Scaling, QuantizedData, QuantizedFormat, fp8};
use crate::tensor::on_wgpu;

/// Codes on a device, several in each 32-bit word: the one integer that every backend stores and shifts.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    dims: [usize; 2],
    pub(super) codes: Tensor<1, Int>,
    pub(super) format: WordFormat,
    bytes: (usize, usize),
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a few hundred of them, each behind an `Arc`")]
pub(super) enum WordFormat {
    FourBit { table: [f32; 16], blocksize: usize, absmax: WordAbsmax },
    Int8 { scales: Tensor<1>, factor: f32 },
    Fp8 { scales: Tensor<1>, scaling: Fp8Scaling, section: usize },
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "as above")]
pub(super) enum WordAbsmax {
    Single(Tensor<1>),
    Double {
        codes: Tensor<1, Int>,
        blocks: usize,
        map: Box<[f32; 256]>,
        nested: Tensor<1>,
        blocksize: usize,
        offsets: Vec<f32>,
    },
}

impl Words {
    pub(crate) fn new(codes: &QuantizedData, device: &Device) -> Self {
        let floats = |values: &[f32]| {
            let data = TensorData::from(values);
            Tensor::<1>::from_data(data, (device, DType::F32))
        };
        let (words, format) = match &codes.format {
            QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
                let absmax = match absmax {
                    Absmax::Single(absmax) => WordAbsmax::Single(floats(absmax)),
                    Absmax::Double { codes, map, nested, blocksize, offsets } => WordAbsmax::Double {
                        codes: words(codes, device),
                        blocks: codes.len(),
                        map: map.clone(),
                        nested: floats(nested),
                        blocksize: *blocksize,
                        offsets: offsets.clone(),
                    },
                };
                (words(codes, device), WordFormat::FourBit { table: *table, blocksize: *blocksize, absmax })
            }
            QuantizedFormat::Fp8 { codes, scales, scaling, section } => {
                let format = WordFormat::Fp8 { scales: floats(scales), scaling: *scaling, section: *section };
                (words(codes, device), format)
            }
            QuantizedFormat::Blocks { .. } => unreachable!("blocks stay in plain memory"),
            QuantizedFormat::Int8 { codes, scales, factor } => {
                let bytes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
                (words(&bytes, device), WordFormat::Int8 { scales: floats(scales), factor: *factor })
            }
        };
        Self { dims: codes.dims, codes: words, format, bytes: codes.bytes() }
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(crate) fn bytes(&self) -> (usize, usize) {
        self.bytes
    }

    /// Back to the host.
    pub(crate) fn codes(&self) -> QuantizedData {
        let bytes = bytes(&self.codes, self.bytes.0);
        let format = match &self.format {
            WordFormat::FourBit { table, blocksize, absmax } => {
                let absmax = match absmax {
                    WordAbsmax::Single(absmax) => Absmax::Single(floats(absmax)),
                    WordAbsmax::Double { codes, blocks, map, nested, blocksize, offsets } => Absmax::Double {
                        codes: self::bytes(codes, *blocks),
                        map: map.clone(),
                        nested: floats(nested),
                        blocksize: *blocksize,
                        offsets: offsets.clone(),
                    },
                };
                QuantizedFormat::FourBit { codes: bytes, table: *table, blocksize: *blocksize, absmax }
            }
            WordFormat::Int8 { scales, factor } => QuantizedFormat::Int8 {
                codes: bytes.into_iter().map(u8::cast_signed).collect(),
                scales: floats(scales),
                factor: *factor,
            },
            WordFormat::Fp8 { scales, scaling, section } => {
                QuantizedFormat::Fp8 { codes: bytes, scales: floats(scales), scaling: *scaling, section: *section }
            }
        };
        QuantizedData { dims: self.dims, format }
    }

    /// Some rows of the matrix in `dtype`.
    pub(crate) fn rows(&self, rows: Range<usize>, dtype: DType) -> Tensor<2> {
        on_wgpu!(wgpu::rows(self, rows.clone(), dtype));
        let input = self.dims[1];
        let elements = rows.start * input..rows.end * input;
        let shape = [rows.len(), input];
        let values = match &self.format {
            WordFormat::FourBit { table, blocksize, absmax } => {
                let values = lookup(&NIBBLES, &self.codes, elements.clone(), table);
                let blocks = elements.start / blocksize..elements.end.div_ceil(*blocksize);
                let scales = repeat(absmax.values(blocks.clone()), *blocksize);
                values * scales.narrow(0, elements.start - blocks.start * blocksize, elements.len())
            }
            WordFormat::Int8 { scales, factor } => {
                // Codes are two's complement: 0 to 127, then −128 to −1.
                let table: [f32; 256] = core::array::from_fn(|code| f32::from((code as u8).cast_signed()));
                let values = lookup(&BYTES, &self.codes, elements, &table);
                values * repeat(scales.clone().narrow(0, rows.start, rows.len()), input) * *factor
            }
            WordFormat::Fp8 { scales, scaling, section } => {
                let table: [f32; 256] = core::array::from_fn(|code| fp8::value(code as u8));
                let values = lookup(&BYTES, &self.codes, elements, &table);
                let scales = fp8::row_scales(scales, (*scaling, *section), rows, input);
                return (values.reshape(shape) * scales).cast(dtype);
            }
        };
        values.reshape(shape).cast(dtype)
    }
}

impl WordAbsmax {
    /// The scales of some blocks.
    fn values(&self, blocks: Range<usize>) -> Tensor<1> {
        match self {
            Self::Single(absmax) => absmax.clone().narrow(0, blocks.start, blocks.len()),
            Self::Double { codes, blocks: all, map, nested, blocksize, offsets } => {
                let values = lookup(&BYTES, codes, blocks.clone(), &map[..]);
                let nesting = blocks.start / blocksize..blocks.end.div_ceil(*blocksize);
                let scales = repeat(nested.clone().narrow(0, nesting.start, nesting.len()), *blocksize);
                let values = values * scales.narrow(0, blocks.start - nesting.start * blocksize, blocks.len());
                // One term for each section, so that a weight of its own adds a scalar.
                let section = all / offsets.len();
                let parts = (blocks.start / section..=(blocks.end - 1) / section).map(|index| {
                    let first = blocks.start.max(index * section);
                    let count = blocks.end.min((index + 1) * section) - first;
                    values.clone().narrow(0, first - blocks.start, count) + offsets[index]
                });
                Tensor::cat(parts.collect(), 0)
            }
        }
    }
}

/// First bits of the codes in a word, in the order of elements: two a byte, the high nibble first.
const NIBBLES: [i32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];
/// The shifts of [`NIBBLES`] for one value per byte.
const BYTES: [i32; 4] = [0, 8, 16, 24];

/// Looks up the values of some elements.
fn lookup(shifts: &[i32], words: &Tensor<1, Int>, elements: Range<usize>, table: &[f32]) -> Tensor<1> {
    let (each, device) = (shifts.len(), words.device());
    let (first, last) = (elements.start / each, elements.end.div_ceil(each));
    let words = words.clone().narrow(0, first, last - first).reshape([last - first, 1]);
    let shifts = Tensor::<1, Int>::from_data(TensorData::from(shifts), (&device, DType::I32)).reshape([1, each]);
    let codes = words.repeat_dim(1, each).bitwise_right_shift(shifts.repeat_dim(0, last - first));
    let codes = codes.bitwise_and_scalar(table.len() as i32 - 1); // [words, codes of a word]
    let codes = codes.reshape([(last - first) * each]).narrow(0, elements.start - first * each, elements.len());
    Tensor::<1>::from_data(TensorData::from(table), (&device, DType::F32)).select(0, codes)
}

/// Every element `times` times in a row.
fn repeat(x: Tensor<1>, times: usize) -> Tensor<1> {
    let [n] = x.dims();
    x.reshape([n, 1]).repeat_dim(1, times).reshape([n * times])
}

fn floats(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.clone().into_data().try_into_vec::<f32>().expect("scales are made as f32")
}

fn words(bytes: &[u8], device: &Device) -> Tensor<1, Int> {
    let word = |chunk: &[u8]| {
        let mut four = [0; 4];
        four[..chunk.len()].copy_from_slice(chunk);
        i32::from_le_bytes(four)
    };
    let words: Vec<i32> = bytes.chunks(4).map(word).collect();
    let shape = [words.len()];
    Tensor::from_data(TensorData::new(words, shape), (device, DType::I32))
}

fn bytes(words: &Tensor<1, Int>, count: usize) -> Vec<u8> {
    let words = words.clone().into_data().try_into_vec::<i32>().expect("words are made as i32");
    words.into_iter().flat_map(i32::to_le_bytes).take(count).collect()
}

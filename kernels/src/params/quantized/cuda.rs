//! Codes on a CUDA device: decoding and storing.

use std::sync::Arc;

use super::{Absmax, QuantizedData, QuantizedFormat};
use crate::params::stochastic::RoundingRng;
use crate::runtime::op::{blocks, check_dims, int, kernel};
use crate::runtime::{Array, Buffer, Cuda, CudaError, DType, MemoryUse, args, entry};

/// Groups of eight values that one block of the decoders takes.
const GROUPS: usize = 512;

/// A weight `[out, in]` as codes. Cloning gives another handle of the same memory.
#[derive(Clone, Debug)]
pub(crate) struct QuantizedArray {
    dims: [usize; 2],
    codes: Arc<Buffer>,
    /// f32 scales, or the codes of scales.
    scales: Arc<Buffer>,
    format: Format,
}

#[derive(Clone, Debug)]
enum Format {
    /// `table`: the values of the sixteen codes.
    FourBit {
        table: Arc<Buffer>,
        block_shift: u32,
        double: Option<Double>,
    },
    Int8,
}

/// The addresses that a kernel reads 4-bit blocks of 64 values by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FourBitBlocks {
    pub(crate) codes: u64,
    /// f32 scales, or with `double` their codes.
    pub(crate) scales: u64,
    /// The values of the sixteen codes.
    pub(crate) table: u64,
    pub(crate) double: Option<DoubleScales>,
}

/// A scale is map\[code\] · nested\[block >> shift\] + offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DoubleScales {
    pub(crate) map: u64,
    pub(crate) nested: u64,
    pub(crate) shift: u32,
    pub(crate) offset: u64,
}

/// The second level of scales.
#[derive(Clone, Debug)]
struct Double {
    map: Arc<Buffer>,
    nested: Arc<Buffer>,
    shift: u32,
    /// Added to `section` blocks each.
    offsets: Arc<Buffer>,
    section: usize,
}

impl QuantizedArray {
    /// Uploads codes whose lengths were checked.
    pub(crate) fn new(cuda: &Cuda, data: &QuantizedData) -> Self {
        let (codes, scales, format) = match &data.format {
            QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
                let (scales, double) = match absmax {
                    Absmax::Single(absmax) => (floats(cuda, absmax), None),
                    Absmax::Double { codes, map, nested, blocksize, offsets } => {
                        let section = codes.len() / offsets.len();
                        let [map, nested, offsets] = [&map[..], nested, offsets].map(|values| floats(cuda, values));
                        let double = Double { map, nested, shift: blocksize.ilog2(), offsets, section };
                        (Arc::new(cuda.uploaded(codes, MemoryUse::QuantizedWeights)), Some(double))
                    }
                };
                let format = Format::FourBit { table: floats(cuda, table), block_shift: blocksize.ilog2(), double };
                (cuda.uploaded(codes, MemoryUse::QuantizedWeights), scales, format)
            }
            // A model that keeps them is refused when it is loaded.
            QuantizedFormat::Blocks { codec, .. } => panic!("CUDA has no decoder for blocks of {}", codec.name),
            QuantizedFormat::Int8 { codes, scales, .. } => {
                let placed = cuda.alloc(codes.len(), MemoryUse::QuantizedWeights);
                if !cuda.is_planned() {
                    let bytes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
                    cuda.upload(&placed, &bytes);
                }
                (placed, floats(cuda, scales), Format::Int8)
            }
        };
        Self { dims: data.dims, codes: Arc::new(codes), scales, format }
    }

    /// The device that the codes are on.
    pub(crate) fn cuda(&self) -> &Cuda {
        self.codes.cuda()
    }

    /// `[out, in]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// The blocks of a 4-bit weight whose rows are whole blocks of 64 values; `None` for any other.
    pub(crate) fn four_bit_blocks(&self) -> Option<FourBitBlocks> {
        let Format::FourBit { table, block_shift: 6, double } = &self.format else { return None };
        let one_offset = double.as_ref().is_none_or(|double| double.offsets.bytes() == size_of::<f32>());
        let double = double.as_ref().map(|Double { map, nested, shift, offsets, .. }| DoubleScales {
            map: map.ptr(),
            nested: nested.ptr(),
            shift: *shift,
            offset: offsets.ptr(),
        });
        let [codes, scales, table] = [&self.codes, &self.scales, table].map(|buffer| buffer.ptr());
        (one_offset && self.dims[1].is_multiple_of(64)).then_some(FourBitBlocks { codes, scales, table, double })
    }

    /// Returns the bytes of the codes, and of their scales.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        let nested = match &self.format {
            Format::FourBit { double: Some(double), .. } => double.nested.bytes() + double.offsets.bytes(),
            _ => 0,
        };
        (self.codes.bytes(), self.scales.bytes() + nested)
    }

    /// The codes as they were given, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub(crate) fn download_codes(&self) -> Result<Vec<u8>, CudaError> {
        let mut codes = vec![0; self.codes.bytes()];
        self.codes.cuda().download(&self.codes, &mut codes)?;
        Ok(codes)
    }

    /// The scales as they are now, after waiting for everything queued so far; none where they are in codes.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub(crate) fn download_scales(&self) -> Result<Option<Vec<f32>>, CudaError> {
        if matches!(self.format, Format::FourBit { double: Some(_), .. }) {
            return Ok(None);
        }
        let mut bytes = vec![0; self.scales.bytes()];
        self.scales.cuda().download(&self.scales, &mut bytes)?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    /// The whole matrix, in `scratch` if it is given.
    pub(crate) fn decode(&self, dtype: DType, scratch: Option<Array>) -> Array {
        let (cuda, [rows, cols]) = (self.codes.cuda(), self.dims);
        let w = scratch.unwrap_or_else(|| Array::empty(cuda, self.dims, dtype, MemoryUse::DecodedWeights));
        check_dims("the scratch", &w, self.dims);
        assert!(w.dtype() == dtype && w.is_aligned(), "scratch is of {} and begins at 16 bytes", dtype.name());
        let grid = [blocks((rows * cols.div_ceil(8)).div_ceil(GROUPS)), 1, 1];
        let (codes, scales) = (self.codes.ptr(), self.scales.ptr());
        let [out, width, ld] = [int(rows), int(cols), int(w.ld())];
        match &self.format {
            Format::FourBit { table, block_shift, double: None } => {
                kernel(cuda, entry!("dequant.cu", "dequant_4bit"), dtype).launch(
                    grid,
                    [256, 1, 1],
                    0,
                    args![codes, scales, table.ptr(), w.ptr(), out, width, ld, *block_shift],
                );
            }
            Format::FourBit { table, block_shift, double: Some(Double { map, nested, shift, offsets, section }) } => {
                let entry = if offsets.bytes() > size_of::<f32>() {
                    entry!("dequant.cu", "dequant_4bit_stacked")
                } else {
                    entry!("dequant.cu", "dequant_4bit_double")
                };
                kernel(cuda, entry, dtype).launch(
                    grid,
                    [256, 1, 1],
                    0,
                    args![
                        codes,
                        scales,
                        map.ptr(),
                        nested.ptr(),
                        offsets.ptr(),
                        table.ptr(),
                        w.ptr(),
                        out,
                        width,
                        ld,
                        *block_shift,
                        *shift,
                        int(*section)
                    ],
                );
            }
            Format::Int8 => {
                kernel(cuda, entry!("dequant.cu", "dequant_int8"), dtype).launch(
                    grid,
                    [256, 1, 1],
                    0,
                    args![codes, scales, w.ptr(), out, width, ld],
                );
            }
        }
        w
    }

    /// Replaces all values by `values`, f32 with nothing between the rows; scales follow from them.
    ///
    /// # Panics
    /// If the scales of 4-bit blocks are in codes, or rows of 8-bit codes are not whole words.
    pub(crate) fn store(&self, values: &Array, rng: RoundingRng) {
        check_dims("the values", values, self.dims);
        assert!(values.is_contiguous() && values.is_aligned() && values.dtype() == DType::F32, "dense f32 values");
        let (cuda, [rows, cols]) = (self.codes.cuda(), self.dims);
        let (codes, scales) = (self.codes.ptr(), self.scales.ptr());
        let (key, param, step) = (rng.key.for_rounding(), rng.param, rng.key.step);
        match &self.format {
            Format::FourBit { table, block_shift, double: None } => {
                let (n, blocksize) = (rows * cols, 1usize << block_shift);
                kernel(cuda, entry!("stochastic.cu", "store_4bit"), DType::F32).launch(
                    [blocks(n.div_ceil(blocksize).div_ceil(8)), 1, 1],
                    [256, 1, 1],
                    0,
                    args![values.ptr(), codes, scales, table.ptr(), n as i64, int(blocksize), key, param, step],
                );
            }
            Format::FourBit { .. } => panic!("scales in codes cannot follow values that change"),
            Format::Int8 => {
                assert!(cols.is_multiple_of(4), "rows of {cols} codes; the kernel takes whole words");
                kernel(cuda, entry!("stochastic.cu", "store_int8"), DType::F32).launch(
                    [blocks(rows), 1, 1],
                    [256, 1, 1],
                    0,
                    args![values.ptr(), codes, scales, int(rows), int(cols), key, param, step],
                );
            }
        }
    }
}

fn floats(cuda: &Cuda, values: &[f32]) -> Arc<Buffer> {
    let placed = cuda.alloc(4 * values.len(), MemoryUse::QuantizedWeights);
    if !cuda.is_planned() {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        cuda.upload(&placed, &bytes);
    }
    Arc::new(placed)
}

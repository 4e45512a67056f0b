//! Codes on a CUDA device: decoding and storing.

use std::sync::Arc;

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

/// The scales of 4-bit blocks, on the host.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Absmax<'a> {
    /// As they are.
    Single(&'a [f32]),
    /// map\[code\] · nested + offset.
    Double {
        /// One for each block.
        codes: &'a [u8],
        /// The values of the codes.
        map: &'a [f32; 256],
        /// One for every `blocksize` codes.
        nested: &'a [f32],
        /// Codes that share a nested scale: a power of two.
        blocksize: usize,
        /// Added last.
        offset: f32,
    },
}

#[derive(Clone, Debug)]
enum Format {
    /// `table`: what the sixteen codes stand for.
    FourBit {
        table: Arc<Buffer>,
        block_shift: u32,
        double: Option<Double>,
    },
    Int8,
}

/// The second level of scales.
#[derive(Clone, Debug)]
struct Double {
    map: Arc<Buffer>,
    nested: Arc<Buffer>,
    shift: u32,
    offset: f32,
}

impl QuantizedArray {
    /// Two codes a byte, the even element in the high nibble; `blocksize` elements of the flattened matrix share a scale.
    ///
    /// # Panics
    /// If lengths do not follow from `dims`, or `blocksize` is not a power of two from 32 on.
    pub(crate) fn four_bit(
        cuda: &Cuda,
        dims: [usize; 2],
        codes: &[u8],
        table: &[f32; 16],
        blocksize: usize,
        absmax: Absmax<'_>,
    ) -> Self {
        let elements = dims[0] * dims[1];
        let n_blocks = elements.div_ceil(blocksize);
        assert!(
            blocksize.is_power_of_two() && blocksize >= 32,
            "blocks of {blocksize} codes; the kernels take 32, 64, …"
        );
        assert_eq!(codes.len(), elements.div_ceil(2), "packed codes of {} × {}", dims[0], dims[1]);
        let (scales, double) = match absmax {
            Absmax::Single(absmax) => {
                assert_eq!(absmax.len(), n_blocks, "scales of {} × {}", dims[0], dims[1]);
                (floats(cuda, absmax, MemoryUse::QuantizedWeights), None)
            }
            Absmax::Double { codes, map, nested, blocksize, offset } => {
                assert!(blocksize.is_power_of_two(), "blocks of {blocksize} scales");
                assert_eq!(codes.len(), n_blocks, "scales of {} × {}", dims[0], dims[1]);
                assert_eq!(nested.len(), n_blocks.div_ceil(blocksize), "nested scales of {} × {}", dims[0], dims[1]);
                let (map, nested) =
                    (floats(cuda, map, MemoryUse::QuantizedWeights), floats(cuda, nested, MemoryUse::QuantizedWeights));
                let double = Double { map, nested, shift: blocksize.ilog2(), offset };
                (Arc::new(cuda.uploaded(codes, MemoryUse::QuantizedWeights)), Some(double))
            }
        };
        let format = Format::FourBit {
            table: floats(cuda, table, MemoryUse::QuantizedWeights),
            block_shift: blocksize.ilog2(),
            double,
        };
        Self { dims, codes: Arc::new(cuda.uploaded(codes, MemoryUse::QuantizedWeights)), scales, format }
    }

    /// One code a byte, one scale a row; value = (code · scale) · (1 / 127).
    ///
    /// # Panics
    /// If lengths do not follow from `dims`.
    pub(crate) fn int8(cuda: &Cuda, dims: [usize; 2], codes: &[i8], scales: &[f32]) -> Self {
        assert_eq!(codes.len(), dims[0] * dims[1], "codes of {} × {}", dims[0], dims[1]);
        assert_eq!(scales.len(), dims[0], "scales of {} × {}", dims[0], dims[1]);
        let placed = cuda.alloc(codes.len(), MemoryUse::QuantizedWeights);
        if !cuda.is_planned() {
            let bytes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
            cuda.upload(&placed, &bytes);
        }
        let codes = Arc::new(placed);
        Self { dims, codes, scales: floats(cuda, scales, MemoryUse::QuantizedWeights), format: Format::Int8 }
    }

    /// The device that the codes are on.
    pub(crate) fn cuda(&self) -> &Cuda {
        self.codes.cuda()
    }

    /// `[out, in]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Returns the bytes of the codes, and of their scales.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        let nested = match &self.format {
            Format::FourBit { double: Some(double), .. } => double.nested.bytes() + 4,
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
            Format::FourBit { table, block_shift, double: Some(Double { map, nested, shift, offset }) } => {
                kernel(cuda, entry!("dequant.cu", "dequant_4bit_double"), dtype).launch(
                    grid,
                    [256, 1, 1],
                    0,
                    args![
                        codes,
                        scales,
                        map.ptr(),
                        nested.ptr(),
                        *offset,
                        table.ptr(),
                        w.ptr(),
                        out,
                        width,
                        ld,
                        *block_shift,
                        *shift
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

fn floats(cuda: &Cuda, values: &[f32], usage: MemoryUse) -> Arc<Buffer> {
    let placed = cuda.alloc(4 * values.len(), usage);
    if !cuda.is_planned() {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        cuda.upload(&placed, &bytes);
    }
    Arc::new(placed)
}

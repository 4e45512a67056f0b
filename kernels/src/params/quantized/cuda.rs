//! Codes on a CUDA device: decoding and storing.

mod bytes;

use bytes::Bytes;

use super::{Absmax, BlockCodec, Fp8Scaling, QuantizedData, QuantizedFormat};
use crate::params::stochastic::RoundingRng;
use crate::runtime::op::{blocks, check_dims, int, kernel};
use crate::runtime::{Array, Cuda, CudaError, DType, MemoryUse, args, entry};

/// Groups of eight values that a thread block of `dequant.cu` decodes, and one of `dequant_blocks.cu`.
const GROUPS: usize = 512;
const BLOCK_GROUPS: usize = 1024;

/// Rows that a block of the kernel for a few rows of x takes at a time.
pub(crate) const TILE: usize = 16;

/// A weight `[out, in]` as codes. Cloning gives another handle of the same memory.
#[derive(Clone, Debug)]
pub(crate) struct QuantizedArray {
    dims: [usize; 2],
    /// Codes, or blocks.
    codes: Bytes,
    /// f32 scales, or the codes of scales; empty for blocks.
    scales: Bytes,
    format: Format,
}

#[derive(Clone, Debug)]
enum Format {
    /// `table`: the values of the sixteen codes.
    FourBit {
        table: Bytes,
        block_shift: u32,
        double: Option<Double>,
    },
    Int8,
    Fp8 {
        scaling: Fp8Scaling,
        section: usize,
    },
    Blocks(BlockCodec),
}

/// The addresses of an fp8 weight's codes `[out, in]` and f32 scales, as [`QuantizedFormat::Fp8`] has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fp8Codes {
    pub(crate) codes: u64,
    pub(crate) scales: u64,
    pub(crate) scaling: Fp8Scaling,
    pub(crate) section: usize,
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
    /// One offset for every `section` rows of the weight.
    pub(crate) offsets: u64,
    pub(crate) section: usize,
}

/// The experts whose rows are decoded: those that a few tokens chose, by the arrays of a dispatch on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChosenExperts {
    /// The first row of each expert, `[experts + 1]`.
    pub(crate) offsets: u64,
    /// The selection of each row.
    pub(crate) sorted: u64,
    /// The expert of each selection.
    pub(crate) chosen: u64,
    pub(crate) selections: usize,
    /// The expert whose rows are decoded first.
    pub(crate) first: usize,
    /// Rows of the matrix of an expert.
    pub(crate) rows: usize,
}

/// The second level of scales.
#[derive(Clone, Debug)]
struct Double {
    map: Bytes,
    nested: Bytes,
    shift: u32,
    /// Added to `section` blocks each.
    offsets: Bytes,
    section: usize,
}

impl QuantizedArray {
    /// Uploads codes whose lengths were checked.
    pub(crate) fn new(cuda: &Cuda, data: &QuantizedData) -> Self {
        let floats = |values: &[f32]| Bytes::floats(cuda, values);
        let uploaded = |bytes: &[u8]| Bytes::whole(cuda.uploaded(bytes, MemoryUse::QuantizedWeights));
        let (codes, scales, format) = match &data.format {
            QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
                let (scales, double) = match absmax {
                    Absmax::Single(absmax) => (floats(absmax), None),
                    Absmax::Double { codes, map, nested, blocksize, offsets } => {
                        let section = codes.len() / offsets.len();
                        let [map, nested, offsets] = [&map[..], nested, offsets].map(floats);
                        let double = Double { map, nested, shift: blocksize.ilog2(), offsets, section };
                        (uploaded(codes), Some(double))
                    }
                };
                let format = Format::FourBit { table: floats(table), block_shift: blocksize.ilog2(), double };
                (uploaded(codes), scales, format)
            }
            QuantizedFormat::Blocks { bytes, codec } => {
                assert!(codec.has_cuda_decoder(), "CUDA has no decoder for blocks of {}", codec.name);
                let stored = uploaded(bytes);
                let none = stored.part(0, 0);
                (stored, none, Format::Blocks(*codec))
            }
            QuantizedFormat::Fp8 { codes, scales, scaling, section } => {
                (uploaded(codes), floats(scales), Format::Fp8 { scaling: *scaling, section: *section })
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                let placed = cuda.alloc(codes.len(), MemoryUse::QuantizedWeights);
                if !cuda.is_planned() {
                    let bytes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
                    cuda.upload(&placed, &bytes);
                }
                (Bytes::whole(placed), floats(scales), Format::Int8)
            }
        };
        Self { dims: data.dims, codes, scales, format }
    }

    /// Moves 4-bit weights with the same tables into adjacent memory and returns all of them as one weight; `None`, and no
    /// weight is moved, where the kernel for a few rows of x does not read them so.
    pub(crate) fn adjoin(parts: &mut [&mut Self]) -> Option<Self> {
        let cols = parts.first()?.dims[1];
        if parts.iter().any(|part| part.dims[1] != cols || part.four_bit_blocks().is_none()) {
            return None;
        }
        let blocks_of = |part: &Self| part.dims[0] * cols / 64;
        let rows = parts.iter().map(|part| part.dims[0]).sum();
        let blocks: Vec<usize> = parts.iter().map(|part| blocks_of(part)).collect();
        let doubles = parts.iter().filter_map(|part| part.double().cloned()).collect::<Vec<_>>();
        let section = blocks.iter().copied().fold(0, gcd);
        if !doubles.is_empty() {
            let fills = |(double, blocks): (&Double, &usize)| blocks.is_multiple_of(1 << double.shift);
            let fit = doubles.len() == parts.len() && doubles.iter().zip(&blocks).all(fills);
            if !fit || !(section * 64).is_multiple_of(cols * TILE) {
                return None;
            }
        }
        let codes = Bytes::adjoin(&mut parts.iter_mut().map(|part| &mut part.codes).collect::<Vec<_>>());
        let scales = Bytes::adjoin(&mut parts.iter_mut().map(|part| &mut part.scales).collect::<Vec<_>>());
        let mut format = parts[0].format.clone();
        if let Format::FourBit { double: Some(double), .. } = &mut format {
            let nested = parts.iter_mut().filter_map(|part| part.double_mut()).map(|double| &mut double.nested);
            double.nested = Bytes::adjoin(&mut nested.collect::<Vec<_>>());
            let repeated = doubles.iter().zip(&blocks);
            let repeated = repeated.flat_map(|(double, blocks)| (0..blocks / section).map(|_| double.offsets.clone()));
            double.offsets = Bytes::joined(&repeated.collect::<Vec<_>>());
            double.section = section;
        }
        Some(Self { dims: [rows, cols], codes, scales, format })
    }

    /// Moves fp8 weights with a scale for each row into adjacent memory and returns all of them as one weight; `None`, and
    /// no weight is moved, for any other.
    pub(crate) fn adjoin_fp8(parts: &mut [&mut Self]) -> Option<Self> {
        let cols = parts.first()?.dims[1];
        let is_by_row = |part: &Self| part.fp8().is_some_and(|codes| codes.scaling == Fp8Scaling::Row);
        if parts.iter().any(|part| part.dims[1] != cols || !is_by_row(part)) {
            return None;
        }
        let rows = parts.iter().map(|part| part.dims[0]).sum();
        let codes = Bytes::adjoin(&mut parts.iter_mut().map(|part| &mut part.codes).collect::<Vec<_>>());
        let scales = Bytes::adjoin(&mut parts.iter_mut().map(|part| &mut part.scales).collect::<Vec<_>>());
        let format = Format::Fp8 { scaling: Fp8Scaling::Row, section: rows };
        Some(Self { dims: [rows, cols], codes, scales, format })
    }

    fn double(&self) -> Option<&Double> {
        match &self.format {
            Format::FourBit { double, .. } => double.as_ref(),
            Format::Int8 | Format::Fp8 { .. } | Format::Blocks(_) => None,
        }
    }

    fn double_mut(&mut self) -> Option<&mut Double> {
        match &mut self.format {
            Format::FourBit { double, .. } => double.as_mut(),
            Format::Int8 | Format::Fp8 { .. } | Format::Blocks(_) => None,
        }
    }

    /// The device that the codes are on.
    pub(crate) fn cuda(&self) -> &Cuda {
        self.codes.buffer.cuda()
    }

    /// `[out, in]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// The blocks of a 4-bit weight whose rows are whole blocks of 64 values, and whose offsets, if there are several, are
    /// for whole tiles of 16 rows; `None` for any other.
    pub(crate) fn four_bit_blocks(&self) -> Option<FourBitBlocks> {
        let Format::FourBit { table, block_shift: 6, double } = &self.format else { return None };
        let [rows, cols] = self.dims;
        if !cols.is_multiple_of(64) {
            return None;
        }
        let double = match double {
            None => None,
            Some(Double { map, nested, shift, offsets, section }) => {
                let is_single = offsets.len == size_of::<f32>();
                if !is_single && !(section * 64).is_multiple_of(cols * TILE) {
                    return None;
                }
                let section = if is_single { rows.next_multiple_of(TILE) } else { section * 64 / cols };
                let [map, nested, offsets] = [map, nested, offsets].map(Bytes::ptr);
                Some(DoubleScales { map, nested, shift: *shift, offsets, section })
            }
        };
        let [codes, scales, table] = [&self.codes, &self.scales, table].map(Bytes::ptr);
        Some(FourBitBlocks { codes, scales, table, double })
    }

    /// The codes and scales of an fp8 weight; `None` for any other.
    pub(crate) fn fp8(&self) -> Option<Fp8Codes> {
        let Format::Fp8 { scaling, section } = self.format else { return None };
        Some(Fp8Codes { codes: self.codes.ptr(), scales: self.scales.ptr(), scaling, section })
    }

    /// Returns the bytes of the codes, and of their scales.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        let nested = self.double().map_or(0, |double| double.nested.len + double.offsets.len);
        (self.codes.len, self.scales.len + nested)
    }

    /// The codes as they were given, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub(crate) fn download_codes(&self) -> Result<Vec<u8>, CudaError> {
        self.codes.download()
    }

    /// Returns the current scales, after waiting for everything queued so far; `None` where they are quantized or part of
    /// blocks.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub(crate) fn download_scales(&self) -> Result<Option<Vec<f32>>, CudaError> {
        if self.double().is_some() || matches!(self.format, Format::Blocks(_)) {
            return Ok(None);
        }
        let bytes = self.scales.download()?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    /// Decodes the whole matrix, into `scratch` if it is given.
    pub(crate) fn decode(&self, dtype: DType, scratch: Option<Array>) -> Array {
        let w = scratch.unwrap_or_else(|| Array::empty(self.cuda(), self.dims, dtype, MemoryUse::DecodedWeights));
        check_dims("the scratch", &w, self.dims);
        assert!(w.dtype() == dtype, "scratch is of {}", dtype.name());
        self.decode_rows(0, &w);
        w
    }

    /// Returns true if decoding can begin at each multiple of `rows`: blocks begin there, and so do the nested blocks of
    /// their scales.
    pub(crate) fn splits_at(&self, rows: usize) -> bool {
        let elements = rows * self.dims[1];
        match &self.format {
            Format::FourBit { block_shift, double, .. } => {
                let blocks = elements >> block_shift;
                let divides = |Double { shift, offsets, section, .. }: &Double| {
                    let has_one_offset = offsets.len == size_of::<f32>();
                    blocks.is_multiple_of(1 << shift) && (has_one_offset || blocks.is_multiple_of(*section))
                };
                elements.is_multiple_of(1 << block_shift) && double.as_ref().is_none_or(divides)
            }
            // Kernels load up to 16 bytes at a time.
            Format::Int8 | Format::Fp8 { .. } => elements.is_multiple_of(16),
            Format::Blocks(codec) => (elements / codec.elements * codec.bytes).is_multiple_of(16),
        }
    }

    /// Decodes the rows from `first` on into `w`, as many as it has.
    ///
    /// # Panics
    /// If `w` is not aligned or not as wide as the matrix, or no block begins at the row.
    pub(crate) fn decode_rows(&self, first: usize, w: &Array) {
        self.decode_chosen(first, w, None);
    }

    /// [`decode_rows`](Self::decode_rows), of int8 and blocks only the rows of `experts` if they are given: other rows of `w`
    /// stay as they are.
    pub(crate) fn decode_chosen(&self, first: usize, w: &Array, experts: Option<ChosenExperts>) {
        let (cuda, rows, cols, dtype) = (self.cuda(), w.rows(), self.dims[1], w.dtype());
        assert!(first + rows <= self.dims[0] && w.cols() == cols, "rows {first}.. of {:?}", self.dims);
        assert!(w.is_aligned(), "scratch begins at 16 bytes");
        assert!(first == 0 || self.splits_at(first), "no block begins at row {first} of {:?}", self.dims);
        let element = first * cols;
        let [out, width, ld] = [int(rows), int(cols), int(w.ld())];
        let grid = |groups| [blocks((rows * cols.div_ceil(8)).div_ceil(groups)), 1, 1];
        let experts = experts.filter(|experts| self.splits_at(experts.rows));
        let chosen_grid = |groups| match experts {
            None => grid(groups),
            Some(experts) => {
                [blocks((experts.rows * cols.div_ceil(8)).div_ceil(groups)), blocks(experts.selections), 1]
            }
        };
        let [offsets, sorted, chosen] = experts.map_or([0; 3], |e| [e.offsets, e.sorted, e.chosen]);
        let [first_expert, expert_rows] = experts.map_or([0; 2], |e| [int(e.first), int(e.rows)]);
        let after = |bytes: &Bytes, first: usize| bytes.ptr() + first as u64;
        if let Some(Fp8Codes { codes, scales, scaling, section }) = self.fp8() {
            let [sections, per_row] = scaling.grid([section, cols]);
            let entry = match scaling {
                Fp8Scaling::Tensor => entry!("dequant_fp8.cu", "dequant_fp8_tensor"),
                Fp8Scaling::Row => entry!("dequant_fp8.cu", "dequant_fp8_row"),
                Fp8Scaling::Block => entry!("dequant_fp8.cu", "dequant_fp8_block"),
            };
            let [first, section, per_section, per_row] = [first, section, sections * per_row, per_row].map(int);
            kernel(cuda, entry, dtype).launch(
                grid(GROUPS),
                [256, 1, 1],
                0,
                args![codes + element as u64, scales, w.ptr(), out, width, ld, first, section, per_section, per_row],
            );
            return;
        }
        match &self.format {
            Format::Fp8 { .. } => unreachable!("decoded above"),
            Format::FourBit { table, block_shift, double: None } => {
                let scales = after(&self.scales, 4 * (element >> block_shift));
                let codes = after(&self.codes, element / 2);
                kernel(cuda, entry!("dequant.cu", "dequant_4bit"), dtype).launch(
                    grid(GROUPS),
                    [256, 1, 1],
                    0,
                    args![codes, scales, table.ptr(), w.ptr(), out, width, ld, *block_shift],
                );
            }
            Format::FourBit { table, block_shift, double: Some(Double { map, nested, shift, offsets, section }) } => {
                let block = element >> block_shift;
                let (codes, scales) = (after(&self.codes, element / 2), after(&self.scales, block));
                let nested = after(nested, 4 * (block >> shift));
                let (entry, offset) = if offsets.len > size_of::<f32>() {
                    (entry!("dequant.cu", "dequant_4bit_stacked"), 4 * (block / section))
                } else {
                    (entry!("dequant.cu", "dequant_4bit_double"), 0)
                };
                kernel(cuda, entry, dtype).launch(
                    grid(GROUPS),
                    [256, 1, 1],
                    0,
                    args![
                        codes,
                        scales,
                        map.ptr(),
                        nested,
                        after(offsets, offset),
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
                let (codes, scales) = (after(&self.codes, element), after(&self.scales, 4 * first));
                kernel(cuda, entry!("dequant.cu", "dequant_int8"), dtype).launch(
                    chosen_grid(GROUPS),
                    [256, 1, 1],
                    0,
                    args![codes, scales, w.ptr(), out, width, ld, offsets, sorted, chosen, first_expert, expert_rows],
                );
            }
            Format::Blocks(codec) => {
                let stored = after(&self.codes, element / codec.elements * codec.bytes);
                let defines = [("T", dtype.name()), ("FORMAT", codec.name)];
                cuda.kernel(entry!("dequant_blocks.cu", "dequant_blocks"), &defines).launch(
                    chosen_grid(BLOCK_GROUPS),
                    [256, 1, 1],
                    0,
                    args![stored, w.ptr(), out, width, ld, offsets, sorted, chosen, first_expert, expert_rows],
                );
            }
        }
    }

    /// Replaces all values by `values`, f32 with nothing between the rows; scales follow from them.
    ///
    /// # Panics
    /// If the scales of 4-bit blocks are in codes, or rows of 8-bit codes are not whole words.
    pub(crate) fn store(&self, values: &Array, rng: RoundingRng) {
        check_dims("the values", values, self.dims);
        assert!(values.is_contiguous() && values.is_aligned() && values.dtype() == DType::F32, "dense f32 values");
        let (cuda, [rows, cols]) = (self.cuda(), self.dims);
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
            Format::Fp8 { .. } => panic!("fp8 codes are only decoded"),
            Format::Blocks(codec) => panic!("blocks of {} are only decoded", codec.name),
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

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

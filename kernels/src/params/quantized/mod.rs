//! Frozen weights kept as codes: the codes are the only copy that stays. Products decode a few rows at a time, on CUDA the
//! whole weight into scratch memory that the next product takes over.
//!
//! Three families of codes, and the blocks of other crates:
//!
//! - [`QuantizedFormat::FourBit`]: value = table\[code\] · absmax of the code's block; blocks run over the flattened matrix,
//!   two codes lie in a byte, the even element in the high nibble. absmax itself may be coded in 8 bits:
//!   absmax = map\[code\] · nested + offset, a rounding after the product and one after the sum. A weight that is stacked
//!   from several has an offset for each.
//! - [`QuantizedFormat::Int8`]: value = (code · scale of the row) · factor.
//! - [`QuantizedFormat::Fp8`]: value = code · scale, codes in E4M3; a scale for the weight, each row or each block of
//!   128 × 128.
//!
//! [`QuantizedFormat::Blocks`] is for the block formats of other crates, such as those of GGUF files. A function of that crate
//! decodes them on the CPU, and other devices of Burn get decoded rows. On CUDA, `cu/dequant_blocks.cu` decodes those that
//! [`BlockCodec::has_cuda_decoder`] names, to the same f32 values.
//!
//! `rekindle-quant` decides what the tables hold.
//!
//! # Shapes
//! W `[out, in]`; x, dx `[tokens, in]`; y, dy `[tokens, out]`.
//!
//! # Dtypes
//! Decoded in `f32`, subnormals flushed to zero as on a GPU (fp8 keeps them, and blocks of other
//! crates are decoded as they define), rounded once to the dtype of x; products as in `ops/matmul`.
//!
//! # Gradients
//! To x alone: dx = dy·W. Nothing is saved.

mod blocks;
pub(crate) mod cpu;
pub(crate) mod cuda;
mod data;
pub(crate) mod fp8;
mod planned;
pub(crate) mod portable;
mod stacked;
#[cfg(feature = "wgpu")]
mod wgpu;

use std::sync::Arc;

use burn::tensor::{DType, Device as BurnDevice, Tensor as BurnTensor};

pub use blocks::BlockCodec;
pub use fp8::Fp8Scaling;
pub(crate) use planned::PlannedQuantized;

use crate::params::stochastic::RoundingRng;
use crate::runtime::MemoryUse;
use crate::tensor::{MetaDevice, MetaMemory, MetaTensor, cuda_dtype, two_devices};
use crate::{Device, Tensor, host};

/// A weight as codes, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedData {
    /// `[out, in]`.
    pub dims: [usize; 2],
    /// The codes and how to decode them.
    pub format: QuantizedFormat,
}

/// The codes of a weight and how to decode them.
#[derive(Clone, Debug, PartialEq)]
pub enum QuantizedFormat {
    /// Two codes a byte, a scale for each block.
    FourBit {
        /// `⌈out · in / 2⌉` bytes.
        codes: Vec<u8>,
        /// The values of the sixteen codes.
        table: [f32; 16],
        /// Elements that share a scale: a power of two, at least 32.
        blocksize: usize,
        /// `⌈out · in / blocksize⌉` scales.
        absmax: Absmax,
    },
    /// One code a byte, a scale for each row.
    Int8 {
        /// `out · in` codes.
        codes: Vec<i8>,
        /// `out` scales.
        scales: Vec<f32>,
        /// The last factor of every value: 1/127.
        factor: f32,
    },
    /// One code a byte, an 8-bit float (E4M3).
    Fp8 {
        /// `out · in` codes. None is NaN.
        codes: Vec<u8>,
        /// Those of the first section, row-major, then those of the next.
        scales: Vec<f32>,
        /// The elements that share a scale.
        scaling: Fp8Scaling,
        /// The rows of each weight that this one is stacked from.
        section: usize,
    },
    /// Blocks of several elements, each with its scales. A row is whole blocks.
    Blocks {
        /// The blocks of all rows.
        bytes: Vec<u8>,
        /// The format of a block.
        codec: BlockCodec,
    },
}

impl QuantizedFormat {
    /// Returns its name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::FourBit { .. } => "4-bit codes",
            Self::Int8 { .. } => "8-bit codes",
            Self::Fp8 { .. } => "fp8 codes",
            Self::Blocks { codec, .. } => codec.name,
        }
    }
}

/// The scales of 4-bit blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// Scales in f32.
    Single(Vec<f32>),
    /// Scales in 8 bits.
    Double {
        /// One for each block.
        codes: Vec<u8>,
        /// The values of the codes.
        map: Box<[f32; 256]>,
        /// One for every `blocksize` codes.
        nested: Vec<f32>,
        /// Codes that share a nested scale: a power of two.
        blocksize: usize,
        /// Added last; each to as many blocks as the others.
        offsets: Vec<f32>,
    },
}

/// Codes where they are used: in plain memory on the CPU, as words on another device of Burn, as bytes on CUDA.
#[derive(Clone, Debug)]
pub struct QuantizedWeight(pub(crate) Place);

#[derive(Clone, Debug)]
pub(crate) enum Place {
    Host(Arc<QuantizedData>),
    /// In plain memory; decoded rows are copied to another device of Burn.
    Copied(Arc<QuantizedData>, BurnDevice),
    Meta(Arc<MetaQuantized>),
    Burn(Arc<portable::Words>),
    /// On CUDA, with the small remaining data on the host.
    Cuda(cuda::QuantizedArray, Arc<QuantizedData>),
}

/// A quantized weight without values, on [`Device::Meta`].
#[derive(Debug)]
pub(crate) struct MetaQuantized {
    pub(crate) dims: [usize; 2],
    device: MetaDevice,
    bytes: (usize, usize),
    can_be_trained: bool,
    _memory: MetaMemory,
}

impl MetaQuantized {
    fn new(data: &QuantizedData, device: &MetaDevice) -> Self {
        let bytes = data.bytes();
        let memory = device.charge(MemoryUse::QuantizedWeights, bytes.0 + bytes.1);
        let can_be_trained = data.can_be_trained();
        Self { dims: data.dims, device: device.clone(), bytes, can_be_trained, _memory: memory }
    }

    /// Decoded rows.
    fn rows(&self, count: usize, dtype: DType) -> MetaTensor {
        MetaTensor::new(&self.device, [count, self.dims[1]], dtype, MemoryUse::DecodedWeights)
    }
}

impl QuantizedWeight {
    /// Moves `codes` to `device`.
    ///
    /// # Panics
    /// If the lengths of the codes and scales do not follow from their shape.
    pub fn new(mut codes: QuantizedData, device: &Device) -> Self {
        codes.check();
        Self(match device {
            Device::Burn(device) if *device == BurnDevice::flex() => Place::Host(Arc::new(codes)),
            Device::Burn(device) if matches!(codes.format, QuantizedFormat::Blocks { .. }) => {
                Place::Copied(Arc::new(codes), device.clone())
            }
            Device::Burn(device) => Place::Burn(Arc::new(portable::Words::new(&codes, device))),
            Device::Meta(device) => Place::Meta(Arc::new(MetaQuantized::new(&codes, device))),
            Device::Cuda(cuda) => {
                let array = cuda::QuantizedArray::new(cuda, &codes);
                codes.take_bytes();
                Place::Cuda(array, Arc::new(codes))
            }
        })
    }

    /// Returns whether it holds no values.
    pub(crate) fn is_planned(&self) -> bool {
        match &self.0 {
            Place::Host(_) | Place::Copied(..) | Place::Burn(_) => false,
            Place::Meta(_) => true,
            Place::Cuda(array, _) => array.cuda().is_planned(),
        }
    }

    /// The codes on a CUDA device, if they are there.
    pub(crate) fn cuda(&self) -> Option<&cuda::QuantizedArray> {
        match &self.0 {
            Place::Cuda(array, _) => Some(array),
            Place::Host(_) | Place::Copied(..) | Place::Burn(_) | Place::Meta(_) => None,
        }
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        match &self.0 {
            Place::Host(codes) | Place::Copied(codes, _) => codes.dims,
            Place::Burn(words) => words.dims(),
            Place::Meta(weight) => weight.dims,
            Place::Cuda(array, _) => array.dims(),
        }
    }

    /// The codes on the host. After an error of a CUDA device they are zeros, and [`Device::check`] says what happened.
    pub fn data(&self) -> Arc<QuantizedData> {
        match &self.0 {
            Place::Host(codes) | Place::Copied(codes, _) => Arc::clone(codes),
            Place::Burn(words) => Arc::new(words.codes()),
            Place::Meta(_) => panic!("a weight without values has no quantized data"),
            Place::Cuda(array, rest) => {
                let bytes = array.download_codes().unwrap_or_else(|_| vec![0; array.bytes().0]);
                Arc::new(rest.with_bytes(bytes, array.download_scales().unwrap_or_default()))
            }
        }
    }

    /// Returns the bytes of the codes, and of their scales.
    pub fn bytes(&self) -> (usize, usize) {
        match &self.0 {
            Place::Host(codes) | Place::Copied(codes, _) => codes.bytes(),
            Place::Burn(words) => words.bytes(),
            Place::Meta(weight) => weight.bytes,
            Place::Cuda(array, _) => array.bytes(),
        }
    }

    /// Decodes the whole matrix.
    pub fn decode(&self, dtype: DType) -> Tensor<2> {
        match &self.0 {
            Place::Host(_) | Place::Copied(..) | Place::Burn(_) => self.rows(0..self.dims()[0], dtype).into(),
            Place::Meta(weight) => weight.rows(weight.dims[0], dtype).into(),
            Place::Cuda(array, _) => array.decode(cuda_dtype(dtype), None).into(),
        }
    }

    /// Returns whether its values can be replaced: on the CPU and on CUDA those of 4-bit codes with f32 scales and of 8-bit
    /// integers.
    pub fn can_be_trained(&self) -> bool {
        match &self.0 {
            Place::Host(data) | Place::Cuda(_, data) => data.can_be_trained(),
            Place::Burn(_) | Place::Copied(..) => false,
            Place::Meta(weight) => weight.can_be_trained,
        }
    }

    /// Replaces all values, rounded stochastically ([`stochastic`](crate::params::stochastic)); scales follow from them.
    ///
    /// # Panics
    /// Unless [`can_be_trained`](Self::can_be_trained).
    pub(crate) fn store(&mut self, flat: Tensor<1>, rng: RoundingRng) {
        let dims = self.dims();
        match &mut self.0 {
            Place::Host(codes) => Arc::make_mut(codes).store(host::View::of(flat.burn()).as_slice(), rng),
            Place::Meta(_) => {}
            Place::Burn(_) | Place::Copied(..) => panic!("words of Burn's other devices are not written"),
            Place::Cuda(array, _) => array.store(&flat.cuda().part(0, dims), rng),
        }
    }

    /// Some rows of the matrix, in `f32`.
    pub fn decode_rows(&self, first: usize, count: usize) -> Tensor<2> {
        match &self.0 {
            Place::Host(_) | Place::Copied(..) | Place::Burn(_) => self.rows(first..first + count, DType::F32).into(),
            Place::Meta(weight) => weight.rows(count, DType::F32).into(),
            Place::Cuda(array, _) => Tensor::from(array.decode(cuda_dtype(DType::F32), None)).rows(first, count),
        }
    }

    /// Some rows of the matrix, in Burn's tensor.
    pub(crate) fn rows(&self, rows: core::ops::Range<usize>, dtype: DType) -> BurnTensor<2> {
        match &self.0 {
            Place::Host(codes) => codes.rows_on(&Device::cpu(), rows, dtype),
            Place::Copied(codes, device) => codes.rows_on(&Device::Burn(device.clone()), rows, dtype),
            Place::Burn(words) => words.rows(rows, dtype),
            Place::Cuda(..) | Place::Meta(_) => two_devices(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::noise;

    /// Devices other than the CPU keep words; on the CPU they can be looked at without one.
    #[test]
    fn words_decode_as_bytes_do() {
        let device = BurnDevice::flex();
        let bytes = |seed, n| noise(seed, n).into_iter().map(|x| (x * 128.0) as i8).collect::<Vec<_>>();
        let unsigned = |seed, n| bytes(seed, n).into_iter().map(i8::cast_unsigned).collect::<Vec<u8>>();
        for dims in [[1usize, 1], [5, 13], [9, 64], [16, 64], [33, 129], [130, 257]] {
            let n = dims[0] * dims[1];
            let blocks = n.div_ceil(32);
            let absmax = [
                Absmax::Single(noise(1, blocks)),
                Absmax::Double {
                    codes: unsigned(2, blocks),
                    map: Box::new(noise(3, 256).try_into().expect("256 values")),
                    nested: noise(4, blocks.div_ceil(8)),
                    blocksize: 8,
                    // One for each half of the scales where they have halves.
                    offsets: if blocks.is_multiple_of(2) { vec![0.25, -0.5] } else { vec![0.25] },
                },
            ];
            let table = noise(5, 16).try_into().expect("16 values");
            let mut formats = absmax
                .map(|absmax| {
                    let codes = unsigned(6, n.div_ceil(2));
                    QuantizedFormat::FourBit { codes, table, blocksize: 32, absmax }
                })
                .to_vec();
            let fp8 = [Fp8Scaling::Tensor, Fp8Scaling::Row, Fp8Scaling::Block].map(|scaling| QuantizedFormat::Fp8 {
                codes: unsigned(9, n).into_iter().map(|code| code & 0xf7).collect(),
                scales: noise(10, scaling.scales(dims)),
                scaling,
                section: dims[0],
            });
            formats.extend(fp8);
            formats.push(QuantizedFormat::Int8 { codes: bytes(7, n), scales: noise(8, dims[0]), factor: 1.0 / 127.0 });
            for format in formats {
                let codes = QuantizedData { dims, format };
                let words = portable::Words::new(&codes, &device);
                assert_eq!(words.codes(), codes);
                for rows in [0..dims[0], dims[0] / 2..dims[0], 0..dims[0].div_ceil(3)] {
                    let mut expected = vec![0.0; rows.len() * dims[1]];
                    cpu::decode_rows(&codes, rows.clone(), &mut expected);
                    let got = crate::to_f32(Tensor::from(words.rows(rows.clone(), DType::F32)));
                    assert_eq!(got, expected, "rows {rows:?} of {dims:?}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "packed codes of 3 × 5")]
    fn lengths_follow_from_the_shape() {
        let absmax = Absmax::Single(vec![1.0]);
        let format = QuantizedFormat::FourBit { codes: vec![0; 7], table: [0.0; 16], blocksize: 32, absmax };
        QuantizedWeight::new(QuantizedData { dims: [3, 5], format }, &Device::cpu());
    }
}

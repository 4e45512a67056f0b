//! Blocks in the formats of other crates.

use core::fmt;
use core::ops::Range;

use burn::tensor::{DType, Tensor as BurnTensor};

use super::{QuantizedData, QuantizedFormat, cpu};
use crate::Device;
use crate::runtime::BLOCK_FORMATS;

/// A format of blocks that another crate defines.
#[derive(Clone, Copy)]
pub struct BlockCodec {
    /// The unique name.
    pub name: &'static str,
    /// The elements of a block.
    pub elements: usize,
    /// The bytes of a block.
    pub bytes: usize,
    /// Decodes whole blocks into as many elements.
    pub decode: fn(&[u8], &mut [f32]),
}

impl BlockCodec {
    /// Returns true if CUDA has a kernel that decodes these blocks.
    pub fn has_cuda_decoder(&self) -> bool {
        BLOCK_FORMATS.contains(&(self.name, self.elements, self.bytes))
    }
}

impl fmt::Debug for BlockCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for BlockCodec {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl QuantizedData {
    /// Blocks of a weight `[out, in]` that are all zero bytes.
    pub fn block_zeros(dims: [usize; 2], codec: BlockCodec) -> Self {
        let bytes = vec![0; dims[0] * dims[1] / codec.elements * codec.bytes];
        Self { dims, format: QuantizedFormat::Blocks { bytes, codec } }
    }

    /// Decodes some rows on the CPU and moves them to `device`.
    pub(super) fn rows_on(&self, device: &Device, rows: Range<usize>, dtype: DType) -> BurnTensor<2> {
        let shape = [rows.len(), self.dims[1]];
        let mut values = vec![0.0; shape[0] * shape[1]];
        cpu::decode_rows(self, rows, &mut values);
        crate::from_f32(values, shape, device, dtype).into_burn()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::tensor::Device as BurnDevice;

    use super::*;
    use crate::QuantizedWeight;
    use crate::params::quantized::Place;

    /// Blocks of four elements: a scale and four codes.
    const FIVE_BYTES: BlockCodec = BlockCodec {
        name: "five bytes",
        elements: 4,
        bytes: 5,
        decode: |blocks, out| {
            for (block, out) in blocks.chunks(5).zip(out.chunks_mut(4)) {
                out.iter_mut().zip(&block[1..]).for_each(|(out, code)| *out = f32::from(block[0]) * f32::from(*code));
            }
        },
    };

    #[test]
    fn blocks_are_decoded_by_their_codec_on_every_device_of_burn() {
        // More rows than a task takes.
        let dims = [700, 24];
        let bytes: Vec<u8> = (0..dims[0] * dims[1] / 4 * 5).map(|at| (at * 7 % 251) as u8).collect();
        let mut expected = vec![0.0; dims[0] * dims[1]];
        (FIVE_BYTES.decode)(&bytes, &mut expected);
        let data = QuantizedData { dims, format: QuantizedFormat::Blocks { bytes, codec: FIVE_BYTES } };
        let copied = QuantizedWeight(Place::Copied(Arc::new(data.clone()), BurnDevice::flex()));
        for weight in [QuantizedWeight::new(data.clone(), &Device::cpu()), copied] {
            assert_eq!(crate::to_f32(weight.decode(DType::F32)), expected);
            assert_eq!(crate::to_f32(weight.decode_rows(650, 3)), expected[650 * 24..653 * 24]);
            assert!(!weight.can_be_trained());
            assert_eq!((weight.dims(), weight.bytes()), (dims, (700 * 6 * 5, 0)));
        }
        assert_eq!(data.with_values(&data.to_bytes()), Some(data.clone()));
        let stack = QuantizedData::stacked(vec![data.clone(), data.clone()]).expect("one format");
        assert_eq!((stack.dims, stack.part(1, 2)), ([1400, 24], data));
    }
}

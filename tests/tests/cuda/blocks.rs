//! Blocks of GGUF files.

use rekindle_gguf::GgmlType;
use rekindle_hub::Dtype;
use rekindle_kernels::quantized::{BlockCodec, QuantizedData, QuantizedFormat};
use rekindle_kernels::{DType, Device, QuantizedWeight, from_f32, to_f32};

/// Every format decodes to the values of its codec, to the bit in f32 and rounded once in 16 bits.
pub(super) fn decoding(device: &Device) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for kind in GgmlType::SUPPORTED.into_iter().filter(|kind| kind.is_quantized()) {
        let codec = codec(kind);
        // The last has several thread blocks, the last of which is not full.
        for [rows, columns] in [[1, 1], [5, 3], [33, 37]].map(|[rows, blocks]| [rows, blocks * codec.elements]) {
            let bytes = blocks(kind, rows * columns / codec.elements, &mut random);
            let mut expected = vec![0.0; rows * columns];
            (codec.decode)(&bytes, &mut expected);
            let data = QuantizedData { dims: [rows, columns], format: QuantizedFormat::Blocks { bytes, codec } };
            let weight = QuantizedWeight::new(data.clone(), device);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let rounded = to_f32(from_f32(expected.clone(), [rows, columns], device, dtype));
                let got = to_f32(weight.decode(dtype));
                let differ = got.iter().zip(&rounded).position(|(got, want)| got.to_bits() != want.to_bits());
                if let Some(at) = differ {
                    panic!(
                        "{kind} [{rows}, {columns}] in {dtype:?}: element {at} is {} instead of {}",
                        got[at], rounded[at]
                    );
                }
            }
            assert!(*weight.data() == data, "{kind}: the blocks come back unchanged");
            assert_eq!(weight.bytes(), data.bytes());
        }
    }
}

fn codec(kind: GgmlType) -> BlockCodec {
    let Dtype::Blocks(format) = kind.dtype() else { unreachable!("{kind} is quantized") };
    let decode = format.decode.expect("supported types have a decoder");
    BlockCodec { name: format.name, elements: format.elements, bytes: format.bytes, decode }
}

/// Returns random blocks whose f16 factors are smaller than 2, some of them subnormal.
fn blocks(kind: GgmlType, count: usize, random: &mut u64) -> Vec<u8> {
    let factors: &[usize] = match kind {
        GgmlType::MXFP4 => &[],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        _ => &[0],
    };
    let mut next = || {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        (*random >> 32) as u8
    };
    let mut bytes: Vec<u8> = (0..count * kind.block_bytes()).map(|_| next()).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        factors.iter().for_each(|at| block[at + 1] &= !0x40);
    }
    bytes
}

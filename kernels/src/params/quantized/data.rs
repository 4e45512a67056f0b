//! Weights as codes on the host: sizes, bytes and checks.

use super::{Absmax, QuantizedData, QuantizedFormat};

impl QuantizedData {
    /// 4-bit codes of a weight `[out, in]` that is all zeros, stacked from `parts`; `blocksize` of them with one scale; with
    /// `nested`, so many scales with one of their own.
    pub fn four_bit_zeros(dims: [usize; 2], parts: usize, blocksize: usize, nested: Option<usize>) -> Self {
        let elements = dims[0] * dims[1];
        let blocks = elements.div_ceil(blocksize);
        let absmax = match nested {
            None => Absmax::Single(vec![0.0; blocks]),
            Some(blocksize) => Absmax::Double {
                codes: vec![0; blocks],
                map: Box::new([0.0; 256]),
                nested: vec![0.0; blocks.div_ceil(blocksize)],
                blocksize,
                offsets: vec![0.0; parts],
            },
        };
        let codes = vec![0; elements.div_ceil(2)];
        Self { dims, format: QuantizedFormat::FourBit { codes, table: [0.0; 16], blocksize, absmax } }
    }

    /// 8-bit codes of a weight `[out, in]` that is all zeros.
    pub fn int8_zeros(dims: [usize; 2]) -> Self {
        let (codes, scales) = (vec![0; dims[0] * dims[1]], vec![0.0; dims[0]]);
        Self { dims, format: QuantizedFormat::Int8 { codes, scales, factor: 1.0 / 127.0 } }
    }

    /// Returns whether its values can be replaced: double-quantized scales cannot follow them, and fp8 codes and
    /// blocks of other crates are only decoded.
    pub(super) fn can_be_trained(&self) -> bool {
        match &self.format {
            QuantizedFormat::FourBit { absmax, .. } => matches!(absmax, Absmax::Single(_)),
            QuantizedFormat::Int8 { .. } => true,
            QuantizedFormat::Fp8 { .. } | QuantizedFormat::Blocks { .. } => false,
        }
    }

    /// Returns the bytes of the codes and the bytes of their scales. GGUF blocks hold both and count as codes.
    pub fn bytes(&self) -> (usize, usize) {
        match &self.format {
            QuantizedFormat::Blocks { bytes, .. } => (bytes.len(), 0),
            QuantizedFormat::FourBit { codes, absmax: Absmax::Single(absmax), .. } => (codes.len(), 4 * absmax.len()),
            QuantizedFormat::FourBit {
                codes, absmax: Absmax::Double { codes: absmax, nested, offsets, .. }, ..
            } => (codes.len(), absmax.len() + 4 * nested.len() + 4 * offsets.len()),
            QuantizedFormat::Int8 { codes, scales, .. } => (codes.len(), 4 * scales.len()),
            QuantizedFormat::Fp8 { codes, scales, .. } => (codes.len(), 4 * scales.len()),
        }
    }

    /// The codes and their scales one after another, without what stays the same when values change.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        match &self.format {
            QuantizedFormat::FourBit { codes, absmax: Absmax::Single(absmax), .. } => {
                [codes.clone(), floats(absmax)].concat()
            }
            QuantizedFormat::FourBit { codes, absmax: Absmax::Double { codes: scales, nested, .. }, .. } => {
                [codes.clone(), scales.clone(), floats(nested)].concat()
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                let codes = codes.iter().map(|code| code.cast_unsigned()).collect();
                [codes, floats(scales)].concat()
            }
            QuantizedFormat::Fp8 { codes, scales, .. } => [codes.clone(), floats(scales)].concat(),
            QuantizedFormat::Blocks { bytes, .. } => bytes.clone(),
        }
    }

    /// The same with what [`to_bytes`](Self::to_bytes) gave in its place; `None` when there are not as many bytes.
    pub(crate) fn with_values(&self, bytes: &[u8]) -> Option<Self> {
        let mut whole = self.clone();
        let mut rest = bytes;
        let mut take = |n: usize| rest.split_off(..n);
        let floats =
            |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>();
        match &mut whole.format {
            QuantizedFormat::FourBit { codes, absmax: Absmax::Single(absmax), .. } => {
                *codes = take(codes.len())?.to_vec();
                *absmax = floats(take(4 * absmax.len())?);
            }
            QuantizedFormat::FourBit { codes, absmax: Absmax::Double { codes: scales, nested, .. }, .. } => {
                *codes = take(codes.len())?.to_vec();
                *scales = take(scales.len())?.to_vec();
                *nested = floats(take(4 * nested.len())?);
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                *codes = take(codes.len())?.iter().map(|code| code.cast_signed()).collect();
                *scales = floats(take(4 * scales.len())?);
            }
            QuantizedFormat::Fp8 { codes, scales, .. } => {
                *codes = take(codes.len())?.to_vec();
                *scales = floats(take(4 * scales.len())?);
            }
            QuantizedFormat::Blocks { bytes, .. } => *bytes = take(bytes.len())?.to_vec(),
        }
        rest.is_empty().then_some(whole)
    }

    /// Leaves everything but the codes themselves.
    pub(super) fn take_bytes(&mut self) {
        match &mut self.format {
            QuantizedFormat::FourBit { codes, .. } => *codes = Vec::new(),
            QuantizedFormat::Int8 { codes, .. } => *codes = Vec::new(),
            QuantizedFormat::Fp8 { codes, .. } => *codes = Vec::new(),
            QuantizedFormat::Blocks { bytes, .. } => *bytes = Vec::new(),
        }
    }

    /// Undoes [`take_bytes`](Self::take_bytes), with the scales as they are now where they follow from values.
    pub(super) fn with_bytes(&self, bytes: Vec<u8>, now: Option<Vec<f32>>) -> Self {
        let mut whole = self.clone();
        match &mut whole.format {
            QuantizedFormat::FourBit { codes, absmax, .. } => {
                *codes = bytes;
                if let (Absmax::Single(absmax), Some(now)) = (absmax, now) {
                    *absmax = now;
                }
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                *codes = bytes.into_iter().map(u8::cast_signed).collect();
                *scales = now.unwrap_or_else(|| core::mem::take(scales));
            }
            QuantizedFormat::Fp8 { codes, .. } => *codes = bytes,
            QuantizedFormat::Blocks { bytes: blocks, .. } => *blocks = bytes,
        }
        whole
    }

    /// # Panics
    /// If the lengths do not follow from `dims`.
    pub(super) fn check(&self) {
        let [rows, cols] = self.dims;
        let elements = rows * cols;
        match &self.format {
            QuantizedFormat::FourBit { codes, blocksize, absmax, .. } => {
                assert!(blocksize.is_power_of_two() && *blocksize >= 32, "a block of {blocksize} codes");
                assert_eq!(codes.len(), elements.div_ceil(2), "packed codes of {rows} × {cols}");
                let blocks = elements.div_ceil(*blocksize);
                match absmax {
                    Absmax::Single(absmax) => assert_eq!(absmax.len(), blocks, "scales of {rows} × {cols}"),
                    Absmax::Double { codes, nested, blocksize, offsets, .. } => {
                        let sections = offsets.len();
                        assert!(
                            sections > 0 && blocks.is_multiple_of(sections),
                            "{sections} offsets of {blocks} scales"
                        );
                        assert!(blocksize.is_power_of_two(), "a block of {blocksize} scales");
                        assert_eq!(codes.len(), blocks, "scales of {rows} × {cols}");
                        assert_eq!(nested.len(), blocks.div_ceil(*blocksize), "nested scales of {rows} × {cols}");
                    }
                }
            }
            QuantizedFormat::Int8 { codes, scales, factor } => {
                assert!(*factor == 1.0 / 127.0, "LLM.int8()'s factor is 1/127, not {factor}");
                assert_eq!((codes.len(), scales.len()), (elements, rows), "codes and scales of {rows} × {cols}");
            }
            QuantizedFormat::Fp8 { codes, scales, scaling, section } => {
                assert!(*section > 0 && rows.is_multiple_of(*section), "sections of {section} rows of {rows}");
                let expected = rows / section * scaling.scales([*section, cols]);
                assert_eq!((codes.len(), scales.len()), (elements, expected), "codes and scales of {rows} × {cols}");
            }
            QuantizedFormat::Blocks { bytes, codec } => {
                assert!(cols.is_multiple_of(codec.elements), "rows of {cols} in blocks of {}", codec.elements);
                assert_eq!(bytes.len(), elements / codec.elements * codec.bytes, "blocks of {rows} × {cols}");
            }
        }
    }
}

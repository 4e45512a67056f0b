//! Quantized weights of one shape stacked into one, and its parts; weights in adjacent memory.

use super::cuda::QuantizedArray;
use super::{Absmax, Place, QuantizedData, QuantizedFormat, QuantizedWeight};

impl QuantizedWeight {
    /// Moves 4-bit weights of one format on a CUDA device into adjacent memory and returns all of them as one weight.
    /// `None` for anything else.
    pub(crate) fn adjoin(parts: &mut [&mut Self]) -> Option<QuantizedArray> {
        let places = parts.iter_mut().map(|part| match &mut part.0 {
            Place::Cuda(array, rest) => Some((array, rest)),
            _ => None,
        });
        let (mut arrays, data): (Vec<_>, Vec<_>) = places.collect::<Option<Vec<_>>>()?.into_iter().unzip();
        let first = data.first()?;
        if data.iter().any(|other| !first.decodes_as(other)) {
            return None;
        }
        QuantizedArray::adjoin(&mut arrays)
    }

    /// Moves fp8 weights with a scale for each row on a CUDA device into adjacent memory and returns all of them as one
    /// weight. `None` for anything else.
    pub(crate) fn adjoin_fp8(parts: &mut [&mut Self]) -> Option<QuantizedArray> {
        let arrays = parts.iter_mut().map(|part| match &mut part.0 {
            Place::Cuda(array, _) => Some(array),
            _ => None,
        });
        QuantizedArray::adjoin_fp8(&mut arrays.collect::<Option<Vec<_>>>()?)
    }
}

impl QuantizedData {
    /// One weight with the rows of several, one below another. Codes and scales stay what they are; doubly quantized scales
    /// are decoded where those of a part do not fill their blocks, or their maps differ.
    ///
    /// `None` where the parts are not of one shape and format, or their elements do not fill blocks.
    pub fn stacked(parts: Vec<Self>) -> Option<Self> {
        let count = parts.len();
        let [rows, cols] = parts.first()?.dims;
        let dims = [count * rows, cols];
        let elements = rows * cols;
        if parts.iter().any(|part| part.dims != [rows, cols]) {
            return None;
        }
        let mut parts = parts.into_iter();
        let format = match parts.next()?.format {
            QuantizedFormat::Int8 { mut codes, mut scales, factor } => {
                for part in parts {
                    let QuantizedFormat::Int8 { codes: more, scales: more_scales, .. } = part.format else {
                        return None;
                    };
                    codes.extend(more);
                    scales.extend(more_scales);
                }
                QuantizedFormat::Int8 { codes, scales, factor }
            }
            QuantizedFormat::Fp8 { mut codes, mut scales, scaling, section } => {
                for part in parts {
                    match part.format {
                        QuantizedFormat::Fp8 { codes: more, scales: of_more, scaling: other, section: size }
                            if other == scaling && size == section =>
                        {
                            codes.extend(more);
                            scales.extend(of_more);
                        }
                        _ => return None,
                    }
                }
                QuantizedFormat::Fp8 { codes, scales, scaling, section }
            }
            QuantizedFormat::Blocks { mut bytes, codec } => {
                for part in parts {
                    match part.format {
                        QuantizedFormat::Blocks { bytes: more, codec: other } if other == codec => bytes.extend(more),
                        _ => return None,
                    }
                }
                QuantizedFormat::Blocks { bytes, codec }
            }
            QuantizedFormat::FourBit { mut codes, table, blocksize, absmax } => {
                if !elements.is_multiple_of(blocksize) {
                    return None;
                }
                let mut scales = vec![absmax];
                for part in parts {
                    match part.format {
                        QuantizedFormat::FourBit { codes: more, table: other, blocksize: size, absmax }
                            if other == table && size == blocksize =>
                        {
                            codes.extend(more);
                            scales.push(absmax);
                        }
                        _ => return None,
                    }
                }
                let absmax = stacked_absmax(scales, elements / blocksize);
                QuantizedFormat::FourBit { codes, table, blocksize, absmax }
            }
        };
        Some(Self { dims, format })
    }

    /// Part `index` of a weight that was stacked from `count` weights; its doubly quantized scales as they were, where they
    /// were kept.
    ///
    /// # Panics
    /// If there is no such part.
    #[must_use]
    pub fn part(&self, index: usize, count: usize) -> Self {
        let [rows, cols] = [self.dims[0] / count, self.dims[1]];
        assert!(index < count && self.dims[0] == rows * count, "part {index} of {count} of {} rows", self.dims[0]);
        let (elements, scaled) = (rows * cols, index * rows..(index + 1) * rows);
        let format = match &self.format {
            QuantizedFormat::Int8 { codes, scales, factor } => QuantizedFormat::Int8 {
                codes: codes[index * elements..][..elements].to_vec(),
                scales: scales[scaled].to_vec(),
                factor: *factor,
            },
            QuantizedFormat::Fp8 { codes, scales, scaling, section } => {
                let section = rows.min(*section);
                let each = rows / section * scaling.scales([section, cols]);
                QuantizedFormat::Fp8 {
                    codes: codes[index * elements..][..elements].to_vec(),
                    scales: scales[index * each..][..each].to_vec(),
                    scaling: *scaling,
                    section,
                }
            }
            QuantizedFormat::Blocks { bytes, codec } => {
                let size = elements / codec.elements * codec.bytes;
                QuantizedFormat::Blocks { bytes: bytes[index * size..][..size].to_vec(), codec: *codec }
            }
            QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
                let blocks = elements / blocksize;
                QuantizedFormat::FourBit {
                    codes: codes[index * elements / 2..][..elements / 2].to_vec(),
                    table: *table,
                    blocksize: *blocksize,
                    absmax: absmax.part(index, blocks),
                }
            }
        };
        Self { dims: [rows, cols], format }
    }
}

/// The scales of weights with `blocks` of them each.
fn stacked_absmax(scales: Vec<Absmax>, blocks: usize) -> Absmax {
    let is_double = |first: &Absmax, other: &Absmax| match (first, other) {
        (Absmax::Double { map, blocksize, .. }, Absmax::Double { map: other, blocksize: size, .. }) => {
            map == other && size == blocksize && blocks.is_multiple_of(*blocksize)
        }
        _ => false,
    };
    let stays_double = scales.iter().all(|other| is_double(&scales[0], other));
    let mut scales = scales.into_iter();
    match scales.next() {
        Some(Absmax::Double { mut codes, map, mut nested, blocksize, mut offsets }) if stays_double => {
            for other in scales {
                if let Absmax::Double { codes: more, nested: more_nested, offsets: more_offsets, .. } = other {
                    codes.extend(more);
                    nested.extend(more_nested);
                    offsets.extend(more_offsets);
                }
            }
            Absmax::Double { codes, map, nested, blocksize, offsets }
        }
        first => {
            let all = first.into_iter().chain(scales);
            Absmax::Single(all.flat_map(|scales| (0..blocks).map(move |block| scales.at(block))).collect())
        }
    }
}

impl QuantizedData {
    /// Returns whether both are 4-bit codes with the same tables.
    fn decodes_as(&self, other: &Self) -> bool {
        match (&self.format, &other.format) {
            (
                QuantizedFormat::FourBit { table, blocksize, absmax, .. },
                QuantizedFormat::FourBit { table: other_table, blocksize: other_size, absmax: other, .. },
            ) => {
                let scales = match (absmax, other) {
                    (Absmax::Single(_), Absmax::Single(_)) => true,
                    (
                        Absmax::Double { map, blocksize, .. },
                        Absmax::Double { map: other, blocksize: other_size, .. },
                    ) => map == other && blocksize == other_size,
                    _ => false,
                };
                table == other_table && blocksize == other_size && scales
            }
            _ => false,
        }
    }
}

impl Absmax {
    fn part(&self, index: usize, blocks: usize) -> Self {
        match self {
            Self::Single(absmax) => Self::Single(absmax[index * blocks..][..blocks].to_vec()),
            Self::Double { codes, map, nested, blocksize, offsets } => Self::Double {
                codes: codes[index * blocks..][..blocks].to_vec(),
                map: map.clone(),
                nested: nested[index * blocks / blocksize..][..blocks / blocksize].to_vec(),
                blocksize: *blocksize,
                offsets: vec![offsets[index]],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::host::tests::noise;
    use crate::{Device, QuantizedWeight, to_f32};

    fn four_bit(seed: u64, rows: usize, cols: usize, nested: Option<usize>) -> QuantizedData {
        let bytes = |seed, n| noise(seed, n).into_iter().map(|x| (x * 128.0) as i8 as u8).collect::<Vec<_>>();
        let blocks = rows * cols / 32;
        let absmax = match nested {
            None => Absmax::Single(noise(seed + 1, blocks)),
            Some(blocksize) => Absmax::Double {
                codes: bytes(seed + 2, blocks),
                map: Box::new(noise(3, 256).try_into().expect("256 values")),
                nested: noise(seed + 4, blocks.div_ceil(blocksize)),
                blocksize,
                offsets: noise(seed + 5, 1),
            },
        };
        let table = noise(6, 16).try_into().expect("16 values");
        let format = QuantizedFormat::FourBit { codes: bytes(seed, rows * cols / 2), table, blocksize: 32, absmax };
        QuantizedData { dims: [rows, cols], format }
    }

    fn int8(seed: u64, rows: usize, cols: usize) -> QuantizedData {
        let codes = noise(seed, rows * cols).into_iter().map(|x| (x * 128.0) as i8).collect();
        let format = QuantizedFormat::Int8 { codes, scales: noise(seed + 1, rows), factor: 1.0 / 127.0 };
        QuantizedData { dims: [rows, cols], format }
    }

    fn values(data: &QuantizedData) -> Vec<f32> {
        to_f32(QuantizedWeight::new(data.clone(), &Device::cpu()).decode(DType::F32))
    }

    #[test]
    fn a_stack_decodes_as_its_parts_do_and_gives_them_back() {
        let kinds: [fn(u64) -> QuantizedData; 4] = [
            |seed| four_bit(seed, 4, 64, None),
            |seed| four_bit(seed, 4, 64, Some(4)),
            // Eight scales do not fill a nested block of 16.
            |seed| four_bit(seed, 4, 64, Some(16)),
            |seed| int8(seed, 4, 64),
        ];
        for (kind, keeps) in kinds.into_iter().zip([true, true, false, true]) {
            let parts: Vec<QuantizedData> = [10, 20, 30].map(kind).into();
            let stack = QuantizedData::stacked(parts.clone()).expect("parts of one kind");
            assert_eq!(stack.dims, [12, 64]);
            let expected: Vec<f32> = parts.iter().flat_map(values).collect();
            assert_eq!(values(&stack), expected);
            for (index, part) in parts.iter().enumerate() {
                assert_eq!(stack.part(index, 3) == *part, keeps);
                assert_eq!(values(&stack.part(index, 3)), values(part));
            }
        }
    }

    #[test]
    fn what_cannot_be_stacked_is_not() {
        assert_eq!(QuantizedData::stacked(Vec::new()), None);
        assert_eq!(QuantizedData::stacked(vec![int8(1, 4, 64), four_bit(2, 4, 64, None)]), None);
        assert_eq!(QuantizedData::stacked(vec![int8(1, 4, 64), int8(2, 8, 64)]), None);
        assert_eq!(QuantizedData::stacked(vec![four_bit(1, 3, 24, None)]), None, "72 elements in blocks of 32");
    }
}

//! A frozen linear layer whose weight is kept in codes, forward and backward.

use burn::tensor::DType;
use rekindle_kernels::QuantizedWeight;
use rekindle_kernels::quantized::{Absmax, Fp8Scaling, QuantizedData, QuantizedFormat};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

/// y = x · Wᵀ + bias with x `[m, k]` and W `[n, k]` in codes.
pub(crate) struct Packed {
    m: usize,
    codes: QuantizedData,
    x: Vec<f32>,
    bias: Vec<f32>,
    dy: Vec<f32>,
    beside: Vec<f32>,
}

/// The format of the weight.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    FourBit,
    FourBitDouble,
    Int8,
    Fp8(Fp8Scaling),
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::FourBit,
        Self::FourBitDouble,
        Self::Int8,
        Self::Fp8(Fp8Scaling::Tensor),
        Self::Fp8(Fp8Scaling::Row),
        Self::Fp8(Fp8Scaling::Block),
    ];
}

/// Scales that share a nested one.
const NESTED: usize = 4;

/// Codes that share a scale: as in a checkpoint where rows are whole blocks, which has a kernel of its own on CUDA.
fn blocksize(width: usize) -> usize {
    if width.is_multiple_of(64) { 64 } else { 32 }
}

impl Packed {
    pub(crate) fn new(sizes: [usize; 3], kind: Kind, dtype: DType) -> Self {
        Self::part(0, sizes, kind, dtype)
    }

    /// A case with values of its own; the tables are the same for all parts.
    pub(crate) fn part(index: u64, [m, n, k]: [usize; 3], kind: Kind, dtype: DType) -> Self {
        let own = |seed: u64| 100 * index + seed;
        let input = |seed, n| rounded(noise(seed, n), dtype);
        let bytes = |seed, n| noise(seed, n).into_iter().map(|x| (x * 128.0) as i8).collect::<Vec<_>>();
        let blocks = (n * k).div_ceil(blocksize(k));
        let absmax = match kind {
            Kind::FourBit => Absmax::Single(noise(own(8), blocks)),
            _ => Absmax::Double {
                codes: bytes(own(8), blocks).into_iter().map(i8::cast_unsigned).collect(),
                map: Box::new(noise(9, 256).try_into().expect("256 values")),
                nested: noise(own(10), blocks.div_ceil(NESTED)),
                blocksize: NESTED,
                offsets: vec![0.7 - 0.2 * index as f32],
            },
        };
        let format = match kind {
            Kind::Int8 => {
                QuantizedFormat::Int8 { codes: bytes(own(7), n * k), scales: noise(own(8), n), factor: 1.0 / 127.0 }
            }
            Kind::Fp8(scaling) => QuantizedFormat::Fp8 {
                // No code is NaN, and values are at most 1.
                codes: bytes(own(7), n * k).into_iter().map(|code| code.cast_unsigned() & 0xb7).collect(),
                scales: noise(own(8), scaling.scales([n, k])),
                scaling,
                section: n,
            },
            _ => QuantizedFormat::FourBit {
                codes: bytes(own(7), (n * k).div_ceil(2)).into_iter().map(i8::cast_unsigned).collect(),
                table: noise(11, 16).try_into().expect("16 values"),
                blocksize: blocksize(k),
                absmax,
            },
        };
        let codes = QuantizedData { dims: [n, k], format };
        Self { m, codes, x: input(1, m * k), bias: input(3, n), dy: input(4, m * n), beside: input(6, m * k) }
    }

    pub(crate) fn into_codes(self) -> QuantizedData {
        self.codes
    }

    /// The weight by the definition, element by element.
    pub(crate) fn weight(&self) -> Vec<f32> {
        let [rows, cols] = self.codes.dims;
        let element = |i: usize| match &self.codes.format {
            QuantizedFormat::Int8 { codes, scales, factor } => f32::from(codes[i]) * scales[i / cols] * factor,
            QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
                let code = if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
                let block = i / blocksize;
                let scale = match absmax {
                    Absmax::Single(absmax) => absmax[block],
                    Absmax::Double { codes, map, nested, blocksize, offsets } => {
                        map[usize::from(codes[block])] * nested[block / blocksize] + offsets[0]
                    }
                };
                table[usize::from(code)] * scale
            }
            QuantizedFormat::Fp8 { codes, scales, scaling, .. } => {
                let (row, col, code) = (i / cols, i % cols, codes[i]);
                let at = match scaling {
                    Fp8Scaling::Tensor => 0,
                    Fp8Scaling::Row => row,
                    Fp8Scaling::Block => row / 128 * cols.div_ceil(128) + col / 128,
                };
                let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
                let value = if exponent == 0 {
                    fraction * 2.0_f32.powi(-6)
                } else {
                    (1.0 + fraction) * 2.0_f32.powi(exponent - 7)
                };
                if code < 128 { value * scales[at] } else { -value * scales[at] }
            }
            QuantizedFormat::Blocks { codec, .. } => panic!("{} is defined elsewhere", codec.name),
        };
        (0..rows * cols).map(element).collect()
    }
}

impl Case for Packed {
    fn naive(&self, dtype: DType) -> Results {
        let (m, [n, k]) = (self.m, self.codes.dims);
        let oracle = Oracle::new(dtype);
        let weight = oracle.constant(&self.weight(), [n, k]);
        let (x, dy) = (oracle.leaf(&self.x, [m, k]), oracle.constant(&self.dy, [m, n]));
        let product = x.clone().matmul(weight.clone().transpose());
        let y = product.clone() + oracle.constant(&self.bias, [n]).unsqueeze::<2>();
        let grads = (product.clone() * dy.clone()).sum().backward();
        // The same product in a loss of its own, with a second way from the loss to x.
        let x2 = oracle.leaf(&self.x, [m, k]);
        let product2 = x2.clone().matmul(weight.clone().transpose());
        let beside = (x2.clone() * oracle.constant(&self.beside, [m, k])).sum();
        let grads2 = ((product2 * dy).sum() + beside).backward();
        vec![
            ("weight", values(weight)),
            ("product", values(product)),
            ("y", values(y)),
            ("dx", grad(&x, &grads)),
            ("dx added", grad(&x2, &grads2)),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let (m, [n, k]) = (self.m, self.codes.dims);
        let weight = QuantizedWeight::new(self.codes.clone(), &place.device);
        assert_eq!(*weight.data(), self.codes, "codes come back as they were");
        let (x, dy) = (place.matrix(&self.x, [m, k]), place.matrix(&self.dy, [m, n]));
        let bias = place.vector(&self.bias);
        vec![
            ("weight", values(weight.decode(place.dtype))),
            ("product", values(weight.nt(&x, None))),
            ("y", values(weight.nt(&x, Some(&bias)))),
            ("dx", values(weight.nn(&dy, None))),
            ("dx added", values(weight.nn(&dy, Some(place.matrix(&self.beside, [m, k]))))),
        ]
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} × {:?}", self.codes.format.name(), self.m, self.codes.dims)
    }
}

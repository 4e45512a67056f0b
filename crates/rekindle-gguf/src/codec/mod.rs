//! Quantizers and decoders.
//!
//! # Source
//! The block formats and the searches for scales are those of ggml's reference quantizers. Bytes and decoded values are
//! equal to the bit: sums are in f32 in the order of the elements, without fused multiply-adds.
//! `goldens/codec.bin` holds blocks of llama.cpp's library.

mod blocks32;
mod k_quants;
mod lanes;
mod search;
mod table4;

use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::{Error, GgmlType};

/// Elements of a piece of work for a thread.
const PIECE: usize = 1 << 16;

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn put_f16(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

impl GgmlType {
    /// All types that [`quantize`](Self::quantize) and [`decode`](Self::decode) support.
    pub const SUPPORTED: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::MXFP4,
    ];

    /// Encodes rows of `columns` values each, on all cores.
    ///
    /// `importance` is a weight ≥ 0 for each column, the mean square of the activations that it is multiplied with (an
    /// importance matrix of llama.cpp). The types F32, F16, BF16, Q8_0 and MXFP4 ignore it.
    ///
    /// # Errors
    /// [`Error::Codec`] for a type without a quantizer, for a row that does not consist of whole blocks, for another
    /// number of values or importances than the columns require, and for values or importances that are not finite.
    pub fn quantize(self, values: &[f32], columns: usize, importance: Option<&[f32]>) -> Result<Vec<u8>, Error> {
        self.check_supported("quantized")?;
        let block = self.block_size();
        if columns == 0 || !columns.is_multiple_of(block) || !values.len().is_multiple_of(columns) {
            let length = values.len();
            return Err(self.error(format!("{length} values in rows of {columns} do not consist of blocks of {block}")));
        }
        let is_finite = |values: &[f32]| values.iter().fold(true, |all, value| all & value.is_finite());
        if !values.par_chunks(PIECE).all(is_finite) {
            let at = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
            return Err(self.error(format!(
                "value {} in row {}, column {} is not finite",
                values[at],
                at / columns,
                at % columns
            )));
        }
        if let Some(importance) = importance {
            if importance.len() != columns {
                return Err(self.error(format!("{} importances were given for {columns} columns", importance.len())));
            }
            if let Some(at) = importance.iter().position(|value| !(value.is_finite() && *value >= 0.0)) {
                return Err(self.error(format!("the importance of column {at} is {}", importance[at])));
            }
        }
        let row_bytes = columns / block * self.block_bytes();
        let mut out = vec![0; values.len() / columns * row_bytes];
        let rows = (PIECE / columns).max(1);
        let pieces = values.par_chunks(rows * columns).zip(out.par_chunks_mut(rows * row_bytes));
        pieces.for_each(|(values, out)| {
            Arch::new().dispatch(QuantizeRows { kind: self, values, columns, importance, out });
        });
        Ok(out)
    }

    /// Decodes whole blocks to f32, on all cores.
    ///
    /// # Errors
    /// [`Error::Codec`] for a type without a decoder, and for bytes that are not whole blocks.
    pub fn decode(self, bytes: &[u8]) -> Result<Vec<f32>, Error> {
        self.check_supported("decoded")?;
        let (block, block_bytes) = (self.block_size(), self.block_bytes());
        if !bytes.len().is_multiple_of(block_bytes) {
            return Err(self.error(format!("{} bytes are not whole blocks of {block_bytes}", bytes.len())));
        }
        let blocks = bytes.len() / block_bytes;
        let mut out = vec![0.0; blocks * block];
        self.decode_blocks(bytes, &mut out);
        Ok(out)
    }

    /// Decodes whole blocks of a supported type, on all cores.
    pub(crate) fn decode_blocks(self, bytes: &[u8], out: &mut [f32]) {
        let (block, block_bytes) = (self.block_size(), self.block_bytes());
        let piece = PIECE / block;
        let pieces = bytes.par_chunks(piece * block_bytes).zip(out.par_chunks_mut(piece * block));
        pieces.for_each(|(bytes, out)| {
            Arch::new().dispatch(DecodeBlocks { kind: self, bytes, out });
        });
    }

    fn check_supported(self, what: &str) -> Result<(), Error> {
        if Self::SUPPORTED.contains(&self) {
            return Ok(());
        }
        let names = Self::SUPPORTED.map(Self::name).join(", ");
        Err(self.error(format!("this type cannot be {what}; supported: {names}")))
    }

    fn error(self, reason: String) -> Error {
        Error::Codec { kind: self, reason }
    }
}

/// Quantization of whole rows. All functions below are inlined, so that they are compiled for each instruction set; none
/// of them fuses a multiplication and an addition.
struct QuantizeRows<'a> {
    kind: GgmlType,
    values: &'a [f32],
    columns: usize,
    importance: Option<&'a [f32]>,
    out: &'a mut [u8],
}

impl QuantizeRows<'_> {
    /// Quantizes blocks that do not depend on their row.
    #[inline(always)]
    fn each(self, quantize: impl Fn(&[f32], Option<&[f32]>, &mut [u8])) {
        let (block, bytes) = (self.kind.block_size(), self.kind.block_bytes());
        let blocks = self.values.chunks_exact(block).zip(self.out.chunks_exact_mut(bytes));
        for (at, (x, out)) in blocks.enumerate() {
            let column = at * block % self.columns;
            quantize(x, self.importance.map(|weights| &weights[column..][..block]), out);
        }
    }

    /// Quantizes blocks of 32, whose importances depend on the mean square of their row.
    #[inline(always)]
    fn each_with_mean(self, quantize: impl Fn(&[f32], Option<(&[f32], f32)>, &mut [u8])) {
        let Some(importance) = self.importance else { return self.each(|x, _, out| quantize(x, None, out)) };
        let row_bytes = self.columns / self.kind.block_size() * self.kind.block_bytes();
        for (row, out) in self.values.chunks_exact(self.columns).zip(self.out.chunks_exact_mut(row_bytes)) {
            let mean = row.iter().fold(0.0_f32, |sum, x| sum + x * x) / row.len() as f32;
            let one = QuantizeRows { values: row, importance: Some(importance), out, ..self };
            one.each(|x, weights, out| quantize(x, weights.map(|weights| (weights, mean)), out));
        }
    }
}

impl WithSimd for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.kind {
            GgmlType::F32 => self.each(|x, _, out| out.copy_from_slice(&x[0].to_le_bytes())),
            GgmlType::F16 => self.each(|x, _, out| put_f16(out, 0, x[0])),
            GgmlType::BF16 => self.each(|x, _, out| out.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes())),
            GgmlType::Q8_0 => self.each(|x, _, out| blocks32::quantize_q8_0(x, out)),
            GgmlType::Q4_0 => self.each_with_mean(blocks32::quantize_q4_0),
            GgmlType::Q4_1 => self.each_with_mean(blocks32::quantize_q4_1),
            GgmlType::Q5_0 => self.each_with_mean(blocks32::quantize_q5_0),
            GgmlType::Q5_1 => self.each_with_mean(blocks32::quantize_q5_1),
            GgmlType::Q2_K => self.each(k_quants::quantize_q2_k),
            GgmlType::Q3_K => self.each(k_quants::quantize_q3_k),
            GgmlType::Q4_K => self.each(k_quants::quantize_q4_k),
            GgmlType::Q5_K => self.each(k_quants::quantize_q5_k),
            GgmlType::Q6_K => self.each(k_quants::quantize_q6_k),
            GgmlType::IQ4_NL => self.each(table4::quantize_iq4_nl),
            GgmlType::MXFP4 => self.each(|x, _, out| table4::quantize_mxfp4(x, out)),
            _ => unreachable!("checked by quantize"),
        }
    }
}

/// Decoding of whole blocks.
struct DecodeBlocks<'a> {
    kind: GgmlType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl DecodeBlocks<'_> {
    #[inline(always)]
    fn each(self, decode: impl Fn(&[u8], &mut [f32])) {
        let (block, bytes) = (self.kind.block_size(), self.kind.block_bytes());
        for (bytes, out) in self.bytes.chunks_exact(bytes).zip(self.out.chunks_exact_mut(block)) {
            decode(bytes, out);
        }
    }
}

impl WithSimd for DecodeBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.kind {
            GgmlType::F32 => {
                self.each(|bytes, out| out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            GgmlType::F16 => self.each(|bytes, out| out[0] = f16_at(bytes, 0)),
            GgmlType::BF16 => self.each(|bytes, out| out[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
            GgmlType::Q8_0 => self.each(blocks32::decode_q8_0),
            GgmlType::Q4_0 => self.each(blocks32::decode_q4_0),
            GgmlType::Q4_1 => self.each(blocks32::decode_q4_1),
            GgmlType::Q5_0 => self.each(blocks32::decode_q5_0),
            GgmlType::Q5_1 => self.each(blocks32::decode_q5_1),
            GgmlType::Q2_K => self.each(k_quants::decode_q2_k),
            GgmlType::Q3_K => self.each(k_quants::decode_q3_k),
            GgmlType::Q4_K => self.each(k_quants::decode_q4_k),
            GgmlType::Q5_K => self.each(k_quants::decode_q5_k),
            GgmlType::Q6_K => self.each(k_quants::decode_q6_k),
            GgmlType::IQ4_NL => self.each(table4::decode_iq4_nl),
            GgmlType::MXFP4 => self.each(table4::decode_mxfp4),
            _ => unreachable!("checked by decode"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inconsistent_arguments_are_errors() {
        type Case = (GgmlType, Vec<f32>, usize, Option<Vec<f32>>, &'static str);
        let cases: [Case; 8] = [
            (GgmlType::Q4_K, vec![0.0; 128], 128, None, "blocks of 256"),
            (GgmlType::Q8_0, vec![0.0; 48], 32, None, "blocks of 32"),
            (GgmlType::F32, vec![0.0; 3], 0, None, "rows of 0"),
            (GgmlType::Q8_0, vec![f32::NAN; 32], 32, None, "row 0, column 0 is not finite"),
            (GgmlType::Q4_0, vec![0.0; 32], 32, Some(vec![1.0; 31]), "31 importances"),
            (GgmlType::Q4_0, vec![0.0; 32], 32, Some(vec![-1.0; 32]), "importance of column 0 is -1"),
            (GgmlType::IQ2_S, vec![0.0; 256], 256, None, "cannot be quantized; supported: F32, F16"),
            (GgmlType::I32, vec![0.0; 1], 1, None, "cannot be quantized"),
        ];
        for (kind, values, columns, importance, expected) in cases {
            let error = kind.quantize(&values, columns, importance.as_deref()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(GgmlType::Q8_0.decode(&[0; 33]).unwrap_err().to_string().contains("whole blocks of 34"));
        assert!(GgmlType::IQ1_S.decode(&[0; 50]).unwrap_err().to_string().contains("cannot be decoded"));
    }

    #[test]
    fn zeros_stay_zeros() {
        for kind in GgmlType::SUPPORTED {
            let bytes = kind.quantize(&[0.0; 512], 256, None).unwrap();
            assert_eq!(bytes.len(), 512 / kind.block_size() * kind.block_bytes());
            assert!(kind.decode(&bytes).unwrap().iter().all(|value| *value == 0.0), "{kind}");
        }
    }
}

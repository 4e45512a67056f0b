//! The bytes of a quantized weight apart from what all ranks keep of it.

use crate::params::quantized::{Absmax, PlannedQuantized, QuantizedData, QuantizedFormat};
use crate::{Device, QuantizedWeight, Weight};

/// A quantized weight without its codes and scales: tables, factors and offsets.
#[derive(Debug)]
pub(super) struct QuantizedLayout {
    /// The weight with empty codes and scales; `None` without values.
    rest: Option<QuantizedData>,
    /// Codes, scales, and scales of scales.
    lengths: [usize; 3],
    /// The description of a weight without values.
    planned: Option<PlannedQuantized>,
}

impl QuantizedLayout {
    /// Splits a weight into the part that every rank keeps and the bytes that are divided.
    pub(super) fn split(data: &QuantizedData) -> (Self, Vec<u8>) {
        let bytes = data.to_bytes();
        let mut rest = data.clone();
        let lengths = match &mut rest.format {
            QuantizedFormat::FourBit { codes, absmax: Absmax::Single(absmax), .. } => {
                [core::mem::take(codes).len(), core::mem::take(absmax).len(), 0]
            }
            QuantizedFormat::FourBit { codes, absmax: Absmax::Double { codes: scales, nested, .. }, .. } => {
                [core::mem::take(codes).len(), core::mem::take(scales).len(), core::mem::take(nested).len()]
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                [core::mem::take(codes).len(), core::mem::take(scales).len(), 0]
            }
            QuantizedFormat::Fp8 { codes, scales, .. } => {
                [core::mem::take(codes).len(), core::mem::take(scales).len(), 0]
            }
            QuantizedFormat::Blocks { bytes, .. } => [core::mem::take(bytes).len(), 0, 0],
        };
        (Self { rest: Some(rest), lengths, planned: None }, bytes)
    }

    /// The layout of a weight without values.
    pub(super) fn planned(weight: &QuantizedWeight) -> Self {
        Self { rest: None, lengths: [0; 3], planned: Some(PlannedQuantized::of(weight)) }
    }

    /// Returns the weight with these bytes, those that [`split`](Self::split) gave.
    pub(super) fn join(&self, bytes: Vec<u8>) -> QuantizedData {
        let mut whole = self.rest.clone().expect("a weight with values");
        let [codes_length, scales_length, nested_length] = self.lengths;
        match &mut whole.format {
            QuantizedFormat::FourBit { codes, absmax: Absmax::Single(absmax), .. } => {
                (*codes, *absmax) = (vec![0; codes_length], vec![0.0; scales_length]);
            }
            QuantizedFormat::FourBit { codes, absmax: Absmax::Double { codes: scales, nested, .. }, .. } => {
                (*codes, *scales, *nested) = (vec![0; codes_length], vec![0; scales_length], vec![0.0; nested_length]);
            }
            QuantizedFormat::Int8 { codes, scales, .. } => {
                (*codes, *scales) = (vec![0; codes_length], vec![0.0; scales_length]);
            }
            QuantizedFormat::Fp8 { codes, scales, .. } => {
                (*codes, *scales) = (vec![0; codes_length], vec![0.0; scales_length]);
            }
            QuantizedFormat::Blocks { bytes: blocks, .. } => *blocks = vec![0; codes_length],
        }
        whole.with_values(&bytes).expect("the bytes of this weight")
    }

    /// Returns a weight of zeros, or without values on a device that has none; the whole has so many bytes.
    pub(super) fn zeros(&self, bytes: usize, device: &Device) -> Weight {
        Weight::Quantized(match &self.planned {
            Some(planned) => planned.make(device),
            None => QuantizedWeight::new(self.join(vec![0; bytes]), device),
        })
    }
}

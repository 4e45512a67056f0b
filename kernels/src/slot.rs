//! A trainable parameter that is kept in as few bits as it computes with, without an f32 master beside it.

use std::sync::Arc;

use burn::tensor::DType;

use crate::cuda::{self, Array, ops};
use crate::stochastic::Draw;
use crate::tensor::cuda_dtype;
use crate::{Device, PackedWeight, Tensor, cpu, from_f32, to_f32};

/// The label of values that are decoded for a while.
const SCRATCH: &str = "decoded weight";

/// Where and how one parameter's values lie.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    dims: [usize; 2],
    device: Device,
    kept: Kept,
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each parameter")]
enum Kept {
    /// As they are: vectors, which are few.
    F32(Tensor<2>),
    /// The bits of bf16 on the host.
    Bf16(Arc<[u16]>),
    /// bf16 on CUDA, which products read as it is.
    Bf16Cuda(Array),
    /// Codes.
    Packed(PackedWeight),
}

impl Slot {
    /// Keeps f32 values.
    pub(crate) fn f32(values: &[f32], dims: [usize; 2], device: &Device) -> Self {
        let kept = Kept::F32(from_f32(values.to_vec(), dims, device, DType::F32));
        Self { dims, device: device.clone(), kept }
    }

    /// Keeps bf16 values, given as their bits in little-endian order.
    pub(crate) fn bf16(bytes: &[u8], dims: [usize; 2], device: &Device) -> Self {
        let kept = match device {
            Device::Cuda(cuda) => {
                Kept::Bf16Cuda(Array::from_bytes(cuda, bytes, dims, cuda::DType::Bf16, "trained weights"))
            }
            Device::Burn(_) => {
                Kept::Bf16(bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect())
            }
        };
        Self { dims, device: device.clone(), kept }
    }

    /// Keeps codes.
    pub(crate) fn packed(weight: PackedWeight, device: &Device) -> Self {
        Self { dims: weight.dims(), device: device.clone(), kept: Kept::Packed(weight) }
    }

    /// The codes, if it is kept so.
    pub(crate) fn codes(&self) -> Option<&PackedWeight> {
        match &self.kept {
            Kept::Packed(packed) => Some(packed),
            _ => None,
        }
    }

    /// The values as a matrix of `dtype`; the same memory where they are kept so.
    pub(crate) fn matrix(&self, dtype: DType) -> Tensor<2> {
        match &self.kept {
            Kept::F32(Tensor::Burn(values)) => values.clone().cast(dtype).into(),
            Kept::F32(Tensor::Cuda(values)) => ops::elementwise::cast(values, cuda_dtype(dtype), SCRATCH).into(),
            Kept::Bf16(bits) => from_f32(widen(bits), self.dims, &self.device, dtype),
            Kept::Bf16Cuda(values) => ops::elementwise::cast(values, cuda_dtype(dtype), SCRATCH).into(),
            Kept::Packed(packed) => packed.decode(dtype),
        }
    }

    /// The values in f32, in a flat tensor that nothing else reaches and nothing lies between.
    pub(crate) fn flat(&self) -> Tensor<1> {
        let n = self.dims[0] * self.dims[1];
        match self.matrix(DType::F32) {
            Tensor::Burn(values) => values.reshape([n]).into(),
            Tensor::Cuda(values) => {
                let values = if matches!(self.kept, Kept::F32(_)) { ops::elementwise::copy(&values) } else { values };
                let values = values.contiguous();
                values.flattened().into()
            }
        }
    }

    /// The values on the host.
    pub(crate) fn values(&self) -> Vec<f32> {
        to_f32(self.matrix(DType::F32))
    }

    /// Replaces the values by those of `flat`, f32, rounded stochastically where they do not fit.
    pub(crate) fn store(&mut self, flat: Tensor<1>, draw: Draw) {
        let dims = self.dims;
        match (&mut self.kept, flat) {
            (Kept::F32(values), Tensor::Burn(flat)) => *values = flat.reshape(dims).into(),
            (Kept::F32(values), Tensor::Cuda(flat)) => {
                ops::elementwise::copy_into(&flat.part(0, dims), values.cuda());
            }
            (Kept::Bf16(bits), Tensor::Burn(flat)) => {
                let view = cpu::View::of(&flat);
                cpu::stochastic::bf16(view.as_slice(), Arc::make_mut(bits), draw);
            }
            (Kept::Bf16Cuda(values), Tensor::Cuda(flat)) => {
                ops::stochastic::bf16(&flat.part(0, dims), values, draw);
            }
            (Kept::Packed(packed), flat) => packed.store(flat, draw),
            _ => panic!("the operands of one operation lie on one device"),
        }
    }

    /// The bytes that stand for the values, bit for bit: what [`restore`](Self::restore) takes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        match &self.kept {
            Kept::F32(values) => floats(&to_f32(values.clone())),
            Kept::Bf16(bits) => bits.iter().flat_map(|bits| bits.to_le_bytes()).collect(),
            // Every bf16 is an f32 whose lower half is zero.
            Kept::Bf16Cuda(_) => {
                self.values().iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
            }
            Kept::Packed(packed) => packed.codes().to_bytes(),
        }
    }

    /// Puts back what [`bytes`](Self::bytes) gave; `false` when there are not as many.
    pub(crate) fn restore(&mut self, bytes: &[u8]) -> bool {
        let dims = self.dims;
        let n = dims[0] * dims[1];
        match &mut self.kept {
            Kept::F32(_) if bytes.len() == 4 * n => {
                let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                *self = Self::f32(&values, dims, &self.device);
            }
            Kept::Bf16(_) | Kept::Bf16Cuda(_) if bytes.len() == 2 * n => {
                *self = Self::bf16(bytes, dims, &self.device);
            }
            Kept::Packed(packed) => {
                let Some(codes) = packed.codes().with_values(bytes) else { return false };
                *packed = PackedWeight::new(codes, &self.device);
            }
            _ => return false,
        }
        true
    }

    /// Bytes that the values take.
    pub(crate) fn size(&self) -> usize {
        let n = self.dims[0] * self.dims[1];
        match &self.kept {
            Kept::F32(_) => 4 * n,
            Kept::Bf16(_) | Kept::Bf16Cuda(_) => 2 * n,
            Kept::Packed(packed) => {
                let (codes, scales) = packed.bytes();
                codes + scales
            }
        }
    }
}

fn widen(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::tests::noise;

    #[test]
    fn what_is_kept_comes_back_bit_for_bit() {
        let device = Device::cpu();
        let values = noise(1, 6 * 64);
        let bits: Vec<u8> = values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let draw = Draw { seed: 1, step: 1, site: 0 };
        let codes = crate::packed::Codes {
            dims: [6, 64],
            format: crate::packed::Format::Int8 { codes: vec![0; 384], scales: vec![0.0; 6], factor: 1.0 / 127.0 },
        };
        let mut packed = Slot::packed(PackedWeight::new(codes, &device), &device);
        packed.store(from_f32(values.clone(), [384], &device, DType::F32), draw);
        for slot in [Slot::f32(&values, [6, 64], &device), Slot::bf16(&bits, [6, 64], &device), packed] {
            let bytes = slot.bytes();
            let mut other = slot.clone();
            other.store(from_f32(noise(2, 384), [384], &device, DType::F32), draw);
            assert_ne!(other.bytes(), bytes);
            assert!(!other.restore(&bytes[1..]) && other.restore(&bytes));
            assert_eq!((other.bytes(), other.values()), (bytes, slot.values()));
            let flat = slot.flat();
            other.store(flat, Draw { step: 9, ..draw });
            // The scale of 8-bit codes comes back through (127 · scale) / 127, two roundings.
            let same = |(a, b): (f32, f32)| (a - b).abs() <= 2.0 * f32::EPSILON * b.abs();
            assert!(other.values().into_iter().zip(slot.values()).all(same), "nothing changed");
        }
    }
}

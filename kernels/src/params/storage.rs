//! The storage of a parameter that is trained in place: as few bits as it computes with, without an f32 master copy.

use std::sync::Arc;

use burn::tensor::DType;

use crate::params::stochastic::{self, RoundingRng};
use crate::runtime::{self, Array, MemoryUse, elementwise};
use crate::tensor::{MetaTensor, cuda_dtype};
use crate::{Device, QuantizedWeight, Tensor, from_f32, host, to_f32};

/// The values of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct ParamStorage {
    dims: [usize; 2],
    device: Device,
    repr: Repr,
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each parameter")]
enum Repr {
    /// Values in f32: vectors, which are few.
    F32(Tensor<2>),
    /// The bits of bf16 on the host.
    Bf16(Arc<[u16]>),
    /// bf16 on CUDA, which products read as it is.
    Bf16Cuda(Array),
    /// bf16 without values.
    Bf16Meta(MetaTensor),
    /// Codes.
    Quantized(QuantizedWeight),
}

impl ParamStorage {
    /// Keeps f32 values.
    pub(crate) fn f32(values: &[f32], dims: [usize; 2], device: &Device) -> Self {
        let repr = Repr::F32(match device {
            Device::Meta(meta) => MetaTensor::new(meta, dims, DType::F32, MemoryUse::Parameters).into(),
            Device::Burn(_) | Device::Cuda(_) => from_f32(values.to_vec(), dims, device, DType::F32),
        });
        Self { dims, device: device.clone(), repr }
    }

    /// Keeps bf16 values, given as their bits in little-endian order.
    pub(crate) fn bf16(bytes: &[u8], dims: [usize; 2], device: &Device) -> Self {
        let repr = match device {
            Device::Cuda(cuda) => {
                Repr::Bf16Cuda(Array::from_bytes(cuda, bytes, dims, runtime::DType::Bf16, MemoryUse::Parameters))
            }
            Device::Meta(meta) => Repr::Bf16Meta(MetaTensor::new(meta, dims, DType::BF16, MemoryUse::Parameters)),
            Device::Burn(_) => {
                Repr::Bf16(bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect())
            }
        };
        Self { dims, device: device.clone(), repr }
    }

    /// Keeps codes.
    pub(crate) fn quantized(weight: QuantizedWeight, device: &Device) -> Self {
        Self { dims: weight.dims(), device: device.clone(), repr: Repr::Quantized(weight) }
    }

    /// Returns the quantized weight, if it is one.
    pub(crate) fn as_quantized(&self) -> Option<&QuantizedWeight> {
        match &self.repr {
            Repr::Quantized(packed) => Some(packed),
            _ => None,
        }
    }

    /// The values as a matrix of `dtype`; the same memory where they are kept so.
    pub(crate) fn matrix(&self, dtype: DType) -> Tensor<2> {
        match &self.repr {
            Repr::F32(Tensor::Burn(values)) => values.clone().cast(dtype).into(),
            Repr::F32(Tensor::Meta(values)) => values.clone().cast(dtype).into(),
            Repr::Bf16Meta(values) => {
                MetaTensor::new(values.device(), self.dims, dtype, MemoryUse::DecodedWeights).into()
            }
            Repr::F32(Tensor::Cuda(values)) => {
                elementwise::cast(values, cuda_dtype(dtype), MemoryUse::DecodedWeights).into()
            }
            Repr::Bf16(bits) => from_f32(bf16_to_f32(bits), self.dims, &self.device, dtype),
            Repr::Bf16Cuda(values) => elementwise::cast(values, cuda_dtype(dtype), MemoryUse::DecodedWeights).into(),
            Repr::Quantized(packed) => packed.decode(dtype),
        }
    }

    /// The values in f32, in a flat tensor that nothing else reaches and nothing lies between.
    pub(crate) fn flat(&self) -> Tensor<1> {
        let n = self.dims[0] * self.dims[1];
        match self.matrix(DType::F32) {
            Tensor::Burn(values) => values.reshape([n]).into(),
            Tensor::Meta(values) => values.reshaped([1, n]).into(),
            Tensor::Cuda(values) => {
                let values = if matches!(self.repr, Repr::F32(_)) { elementwise::copy(&values) } else { values };
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
    pub(crate) fn store(&mut self, flat: Tensor<1>, rng: RoundingRng) {
        let dims = self.dims;
        match &mut self.repr {
            Repr::F32(values) => match flat {
                Tensor::Burn(flat) => *values = flat.reshape(dims).into(),
                Tensor::Cuda(flat) => elementwise::copy_into(&flat.part(0, dims), values.cuda()),
                Tensor::Meta(flat) => *values = flat.reshaped(dims).into(),
            },
            Repr::Bf16(bits) => {
                let view = host::View::of(flat.burn());
                stochastic::cpu::bf16(view.as_slice(), Arc::make_mut(bits), rng);
            }
            Repr::Bf16Meta(_) => {}
            Repr::Bf16Cuda(values) => stochastic::cuda::bf16(&flat.cuda().part(0, dims), values, rng),
            Repr::Quantized(packed) => packed.store(flat, rng),
        }
    }

    /// The bytes that stand for the values, bit for bit: what [`restore`](Self::restore) takes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        match &self.repr {
            Repr::F32(values) => floats(&to_f32(values.clone())),
            Repr::Bf16(bits) => bits.iter().flat_map(|bits| bits.to_le_bytes()).collect(),
            // Every bf16 is an f32 whose lower half is zero.
            Repr::Bf16Cuda(_) | Repr::Bf16Meta(_) => {
                self.values().iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
            }
            Repr::Quantized(packed) => packed.data().to_bytes(),
        }
    }

    /// Puts back what [`bytes`](Self::bytes) gave; `false` when there are not as many.
    pub(crate) fn restore(&mut self, bytes: &[u8]) -> bool {
        let dims = self.dims;
        let n = dims[0] * dims[1];
        match &mut self.repr {
            Repr::F32(_) if bytes.len() == 4 * n => {
                let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                *self = Self::f32(&values, dims, &self.device);
            }
            Repr::Bf16(_) | Repr::Bf16Cuda(_) | Repr::Bf16Meta(_) if bytes.len() == 2 * n => {
                *self = Self::bf16(bytes, dims, &self.device);
            }
            Repr::Quantized(packed) => {
                let Some(codes) = packed.data().with_values(bytes) else { return false };
                *packed = QuantizedWeight::new(codes, &self.device);
            }
            _ => return false,
        }
        true
    }

    /// Bytes that the values take.
    pub(crate) fn size(&self) -> usize {
        let n = self.dims[0] * self.dims[1];
        match &self.repr {
            Repr::F32(_) => 4 * n,
            Repr::Bf16(_) | Repr::Bf16Cuda(_) | Repr::Bf16Meta(_) => 2 * n,
            Repr::Quantized(packed) => {
                let (codes, scales) = packed.bytes();
                codes + scales
            }
        }
    }
}

fn bf16_to_f32(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RngKey;
    use crate::host::tests::noise;

    #[test]
    fn what_is_kept_comes_back_bit_for_bit() {
        let device = Device::cpu();
        let values = noise(1, 6 * 64);
        let bits: Vec<u8> = values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let rng = |step| RoundingRng { key: RngKey { seed: 1, step }, param: 0 };
        let codes = crate::params::quantized::QuantizedData {
            dims: [6, 64],
            format: crate::params::quantized::QuantizedFormat::Int8 {
                codes: vec![0; 384],
                scales: vec![0.0; 6],
                factor: 1.0 / 127.0,
            },
        };
        let mut packed = ParamStorage::quantized(QuantizedWeight::new(codes, &device), &device);
        packed.store(from_f32(values.clone(), [384], &device, DType::F32), rng(1));
        for storage in
            [ParamStorage::f32(&values, [6, 64], &device), ParamStorage::bf16(&bits, [6, 64], &device), packed]
        {
            let bytes = storage.bytes();
            let mut other = storage.clone();
            other.store(from_f32(noise(2, 384), [384], &device, DType::F32), rng(1));
            assert_ne!(other.bytes(), bytes);
            assert!(!other.restore(&bytes[1..]) && other.restore(&bytes));
            assert_eq!((other.bytes(), other.values()), (bytes, storage.values()));
            let flat = storage.flat();
            other.store(flat, rng(9));
            // The scale of 8-bit codes comes back through (127 · scale) / 127, two roundings.
            let same = |(a, b): (f32, f32)| (a - b).abs() <= 2.0 * f32::EPSILON * b.abs();
            assert!(other.values().into_iter().zip(storage.values()).all(same), "nothing changed");
        }
    }
}

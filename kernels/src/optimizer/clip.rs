//! Norms of gradients and gradient clipping.

use core::ops::Range;

use rayon::prelude::*;

use super::cuda;
use crate::runtime::{Array, DType, MemoryUse, NcclComm};
use crate::tensor::two_devices;
use crate::{Backend, Device, Grads, Tensor, host};

/// The factor of a step's gradients: g ← g · grad_scale · min(1, max_norm / (norm + 1e-6)), as PyTorch
/// clips, where norm is that of g · grad_scale; `max_norm` 0 is no clipping.
///
/// A step with a norm that is not finite changes nothing.
#[derive(Debug)]
pub struct Clip(Factor);

#[derive(Debug)]
enum Factor {
    Host { norm: f64, factor: f64 },
    Cuda(cuda::Clip),
}

impl Clip {
    /// Clips by the global norm of all gradients. On CUDA, the host does not wait for it.
    pub fn of(grads: &Grads, grad_scale: f64, max_norm: f64) -> Self {
        Self::of_values(grads.flat(), grad_scale, max_norm)
    }

    /// Clips by the norm of some of the gradients. On CUDA, the host does not wait for it.
    pub fn of_values(grads: &Tensor<1>, grad_scale: f64, max_norm: f64) -> Self {
        match grads {
            Tensor::Cuda(g) => Self(Factor::Cuda(cuda::norm(g, max_norm as f32, grad_scale as f32))),
            Tensor::Burn(_) | Tensor::Meta(_) => Self::host(norm(grads) * grad_scale, grad_scale, max_norm),
        }
    }

    /// Clips by a known norm of g · grad_scale, for example of gradients that never exist all at once.
    pub fn of_norm(norm: f64, grad_scale: f64, max_norm: f64, device: &Device) -> Self {
        let host = Self::host(norm, grad_scale, max_norm);
        match device {
            Device::Burn(_) | Device::Meta(_) => host,
            Device::Cuda(cuda) => Self(Factor::Cuda(cuda::Clip::new(cuda, norm, host.factor()))),
        }
    }

    /// Clips by the norm of all gradients, of which this rank of `ranks` has the sums of `range`. All ranks call it. On CUDA,
    /// the host does not wait for it.
    ///
    /// # Panics
    /// If the gradients are not on the device of `ranks`.
    pub fn of_shards(grads: &Grads, range: Range<usize>, max_norm: f64, ranks: &NcclComm) -> Self {
        let own = grads.of(range);
        let own = cuda::norm(own.cuda(), 0.0, 1.0);
        let norms = Array::dense(own.cuda(), [1, ranks.size()], DType::F32, MemoryUse::Scratch);
        ranks.gather_scalar(own.ptr(), &norms);
        // The norm of the shards' norms is that of all gradients.
        Self(Factor::Cuda(cuda::norm(&norms, max_norm as f32, 1.0)))
    }

    /// Returns the norm before clipping. Waits for the device; after a device error it is NaN.
    pub fn norm(&self) -> f64 {
        match &self.0 {
            Factor::Host { norm, .. } => *norm,
            Factor::Cuda(clip) => clip.read().map_or(f64::NAN, |norm| norm.norm.into()),
        }
    }

    /// Returns whether a step changes nothing because the norm is known not to be finite.
    pub(super) fn skips(&self) -> bool {
        matches!(self.0, Factor::Host { norm, .. } if !norm.is_finite())
    }

    /// The factor on the host.
    pub(super) fn factor(&self) -> f64 {
        match &self.0 {
            Factor::Host { factor, .. } => *factor,
            Factor::Cuda(_) => two_devices(),
        }
    }

    /// The factor on a CUDA device.
    pub(super) fn cuda(&self) -> &cuda::Clip {
        match &self.0 {
            Factor::Host { .. } => two_devices(),
            Factor::Cuda(clip) => clip,
        }
    }

    fn host(norm: f64, grad_scale: f64, max_norm: f64) -> Self {
        let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Self(Factor::Host { norm, factor: grad_scale * clip })
    }
}

impl Grads {
    /// [`norm`](Self::norm) of the gradients of some elements.
    pub fn norm_of(&self, range: Range<usize>) -> f64 {
        norm(&self.of(range))
    }

    /// √Σ g²; on [`Backend::Cpu`] summed in `f64` over chunks of fixed size. Waits for the device.
    pub fn norm(&self) -> f64 {
        let mut flats = self.flats();
        match (flats.len(), flats.next()) {
            (1, Some(one)) => norm(one),
            _ => self.flats().map(|flat| norm(flat).powi(2)).sum::<f64>().sqrt(),
        }
    }
}

/// √Σ g²; on [`Backend::Cpu`] summed in `f64` over chunks of fixed size. Waits for the device.
fn norm(grads: &Tensor<1>) -> f64 {
    match Backend::of(grads) {
        Backend::Cpu => {
            let flat = host::View::of(grads.burn());
            let flat = flat.as_slice();
            let parts: Vec<f64> = flat
                .par_chunks(host::CHUNK)
                .map(|chunk| {
                    host::simd(
                        #[inline(always)]
                        || chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum(),
                    )
                })
                .collect();
            parts.iter().sum::<f64>().sqrt()
        }
        Backend::Portable if grads.dims()[0] == 0 => 0.0,
        Backend::Portable => {
            let flat = grads.burn();
            let squares = flat.clone() * flat.clone();
            f64::from(squares.sum().into_scalar::<f32>()).sqrt()
        }
        Backend::Meta => 0.0,
        Backend::Cuda => cuda::norm(grads.cuda(), 0.0, 1.0).read().map_or(f64::NAN, |n| n.norm.into()),
    }
}

//! Norms of gradients, and what gradients are multiplied with before a step.

use rayon::prelude::*;

use crate::cuda::ops;
use crate::{Device, Grads, Path, Tensor, cpu};

/// What the gradients of a step are multiplied with: g ← g · grad_scale · min(1, max_norm / (norm + 1e-6)), as PyTorch
/// clips, where norm is that of g · grad_scale; `max_norm` 0 is no clipping.
///
/// Where the norm is not finite, a step that is given this does nothing.
#[derive(Debug)]
pub struct Clip(pub(super) Where);

#[derive(Debug)]
pub(super) enum Where {
    Host { norm: f64, factor: f64 },
    Cuda(ops::optimizer::Clip),
}

impl Clip {
    /// By the global norm of all gradients. On CUDA the host does not wait for it.
    pub fn of(grads: &Grads, grad_scale: f64, max_norm: f64) -> Self {
        Self::of_values(grads.flat(), grad_scale, max_norm)
    }

    /// By the norm of some gradients alone. On CUDA the host does not wait for it.
    pub fn of_values(grads: &Tensor<1>, grad_scale: f64, max_norm: f64) -> Self {
        match grads {
            Tensor::Cuda(g) => Self(Where::Cuda(ops::optimizer::norm(g, max_norm as f32, grad_scale as f32))),
            Tensor::Burn(_) => Self::host(norm(grads) * grad_scale, grad_scale, max_norm),
        }
    }

    /// By a norm that is known: that of gradients that do not exist all at once, say. It is the norm of g · grad_scale.
    pub fn of_norm(norm: f64, grad_scale: f64, max_norm: f64, device: &Device) -> Self {
        let host = Self::host(norm, grad_scale, max_norm);
        match (device, &host.0) {
            (Device::Cuda(cuda), &Where::Host { norm, factor }) => {
                Self(Where::Cuda(ops::optimizer::Clip::new(cuda, norm, factor)))
            }
            _ => host,
        }
    }

    /// The norm before clipping. Waits for the device; after an error of the device it is NaN.
    pub fn norm(&self) -> f64 {
        match &self.0 {
            Where::Host { norm, .. } => *norm,
            Where::Cuda(clip) => clip.read().map_or(f64::NAN, |norm| norm.norm.into()),
        }
    }

    fn host(norm: f64, grad_scale: f64, max_norm: f64) -> Self {
        let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Self(Where::Host { norm, factor: grad_scale * clip })
    }
}

/// √Σ g²; on [`Path::Cpu`] summed in `f64` over chunks of fixed size. Waits for the device.
pub(crate) fn norm(grads: &Tensor<1>) -> f64 {
    let flat = match grads {
        Tensor::Cuda(flat) => return ops::optimizer::norm(flat, 0.0, 1.0).read().map_or(f64::NAN, |n| n.norm.into()),
        Tensor::Burn(flat) => flat,
    };
    let sum: f64 = if Path::of_burn(flat) == Path::Cpu {
        let flat = cpu::View::of(flat);
        let flat = flat.as_slice();
        let parts: Vec<f64> = flat
            .par_chunks(cpu::CHUNK)
            .map(|chunk| {
                cpu::simd(
                    #[inline(always)]
                    || chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum(),
                )
            })
            .collect();
        parts.iter().sum()
    } else if flat.dims()[0] == 0 {
        0.0
    } else {
        let squares = flat.clone() * flat.clone();
        f64::from(squares.sum().into_scalar::<f32>())
    };
    sum.sqrt()
}

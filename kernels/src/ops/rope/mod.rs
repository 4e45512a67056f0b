//! Rotary position embedding, with the per-head RMSNorm that Qwen3 puts before it.
//!
//! Each head is a row of `head_dim` channels, and two of them are rotated together by the angle of the token's position
//! (Su et al., arXiv:2104.09864): y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. They are channel i of the first half and
//! channel i of the second half (the "rotate half" layout of transformers), or channels 2i and 2i + 1 (interleaved: GLM,
//! Cohere). Channels beyond twice the tables' width pass through (partial rotary). The backward rotates by the negative
//! angle. Without a [`Rotation`] there is only the norm.
//!
//! # Shapes
//! x, y `[tokens, heads · head_dim]`; cos, sin `[tokens, rotary_dim / 2]`; norm weight `[head_dim]`.
//!
//! # Gradients
//! To x and to the norm's weight. Saved: x and rstd if there is a norm, nothing otherwise.

mod cpu;
mod cuda;
mod meta;
mod portable;
#[cfg(feature = "wgpu")]
mod wgpu;

use std::sync::Arc;

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::ops::rms_norm::{self, Gain};
use crate::runtime::{Array, Ints, MemoryUse};
use crate::tensor::{MetaMemory, MetaTensor, on_wgpu, two_devices};
use crate::{Backend, Device, Tensor, from_f32};

/// Cosines and sines of every position up to the longest document, made once for a model.
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Cosines and sines, `[positions, half]`, row-major.
    host: [Vec<f32>; 2],
    half: usize,
    device: Device,
    cuda: Option<[Array; 2]>,
    /// The tables' memory, on a device that counts it.
    _counted: Option<Arc<MetaMemory>>,
}

impl RopeTables {
    /// Makes tables of `half` angles for each position; `cos` and `sin` are row-major.
    ///
    /// # Panics
    /// If they differ in length or are no whole number of rows.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, half: usize, device: &Device) -> Self {
        assert_eq!(cos.len(), sin.len(), "a cosine and a sine for every angle");
        let positions = cos.len() / half.max(1);
        assert_eq!(positions * half, cos.len(), "rows of {half} angles");
        let host = [cos, sin];
        // Kernels read rows that touch, which a matrix of any width does not have.
        let upload = |values: &Vec<f32>| {
            let flat = from_f32(values.clone(), [values.len()], device, DType::F32);
            flat.into_cuda().part(0, [positions, half])
        };
        let cuda = match device {
            Device::Burn(_) | Device::Meta(_) => None,
            Device::Cuda(_) => Some(host.each_ref().map(upload)),
        };
        let counted = match device {
            Device::Burn(_) | Device::Cuda(_) => None,
            Device::Meta(device) => {
                let bytes = 2 * size_of::<f32>() * host[0].len();
                Some(Arc::new(device.charge(MemoryUse::Weights, bytes)))
            }
        };
        Self { host, half, device: device.clone(), cuda, _counted: counted }
    }

    /// Returns the length of the longest document.
    pub fn positions(&self) -> usize {
        self.host[0].len() / self.half.max(1)
    }

    /// Returns the angles of tokens at these positions.
    pub fn angles(&self, positions: &[u32]) -> Angles {
        if let Device::Cuda(cuda) = &self.device {
            return self.angles_at(Ints::from_slice(cuda, positions, MemoryUse::Inputs));
        }
        let rows = |table: &[f32]| -> Tensor<2> {
            let row = |&position: &u32| &table[position as usize * self.half..][..self.half];
            let values = positions.iter().flat_map(row).copied().collect();
            from_f32(values, [positions.len(), self.half], &self.device, DType::F32)
        };
        Angles(match self.host.each_ref().map(|table| rows(table)) {
            [Tensor::Burn(cos), Tensor::Burn(sin)] => AnglesIn::Burn(CosSin { cos, sin }),
            tables => AnglesIn::Meta(tables.map(Tensor::into_meta)),
        })
    }
}

impl RopeTables {
    /// Returns the angles of tokens at positions that are on the tables' GPU.
    pub(crate) fn angles_at(&self, positions: Ints) -> Angles {
        let [cos, sin] = self.cuda.clone().unwrap_or_else(|| two_devices());
        Angles(AnglesIn::Cuda(cuda::Angles { cos, sin, positions }))
    }
}

/// Cosines and sines of the angles of every token of a batch.
#[derive(Clone, Debug)]
pub struct Angles(AnglesIn);

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a batch")]
enum AnglesIn {
    Burn(CosSin),
    Cuda(cuda::Angles),
    Meta(#[allow(dead_code, reason = "held, not read")] [MetaTensor; 2]),
}

/// `[tokens, rotary_dim / 2]` each, in `f32`.
#[derive(Clone, Debug)]
pub(crate) struct CosSin {
    pub(crate) cos: BurnTensor<2>,
    pub(crate) sin: BurnTensor<2>,
}

impl Angles {
    fn burn(&self) -> &CosSin {
        match &self.0 {
            AnglesIn::Burn(angles) => angles,
            AnglesIn::Cuda(_) | AnglesIn::Meta(_) => two_devices(),
        }
    }

    fn cuda(&self) -> &cuda::Angles {
        match &self.0 {
            AnglesIn::Burn(_) | AnglesIn::Meta(_) => two_devices(),
            AnglesIn::Cuda(angles) => angles,
        }
    }
}

/// The norm of each head, before the rotation.
#[derive(Clone, Debug)]
pub struct HeadNorm {
    /// The factor, `[head_dim]`; on CUDA it has a weight.
    pub gain: Gain,
    /// Added to the mean square.
    pub eps: f64,
}

/// The rotation of every head.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Each token's angles.
    pub angles: &'a Angles,
    /// True if channels 2i and 2i + 1 are rotated together instead of i and i + half.
    pub interleaved: bool,
}

impl<'a> Rotation<'a> {
    fn cuda(self) -> cuda::Rotation<'a> {
        cuda::Rotation { angles: self.angles.cuda(), interleaved: self.interleaved }
    }
}

impl HeadNorm {
    fn cuda(&self) -> cuda::HeadNorm<'_> {
        let weight = self.gain.weight().expect("the norm of a head has a weight").cuda();
        cuda::HeadNorm { weight, form: self.gain.form(), eps: self.eps as f32 }
    }
}

/// Rotated queries or keys with the rstd of their norm, if there was one; in a backward, their gradient with the gradient
/// to the norm's weight, if it was requested.
pub type Rotated = (Tensor<2>, Option<Tensor<1>>);

/// The norm of a head, the x that it normalized, and its rstd.
pub type SavedNorm<'a> = (&'a HeadNorm, Tensor<2>, &'a Tensor<1>);

/// Normalizes (if there is a norm) and rotates every head: `(y, rstd)`, rstd `[tokens · heads]`.
pub fn forward(x: Tensor<2>, head_dim: usize, norm: Option<&HeadNorm>, rotation: Option<Rotation<'_>>) -> Rotated {
    on_wgpu!(wgpu::forward(&x, head_dim, norm, rotation));
    match Backend::of(&x) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let [_, width] = x.dims();
            let (x, rstd) = match norm {
                None => (x, None),
                Some(norm) => {
                    let (y, rstd) = rms_norm::forward(&in_rows_of(x, head_dim), &norm.gain, norm.eps, 0);
                    (in_rows_of(y, width), Some(rstd))
                }
            };
            (rotate(x, head_dim, rotation, Direction::Forward), rstd)
        }
        Backend::Cuda => {
            let (y, rstd) = cuda::forward(x.cuda(), head_dim, norm.map(HeadNorm::cuda), rotation.map(Rotation::cuda));
            (y.into(), rstd.map(Into::into))
        }
    }
}

/// Returns the gradient to x, and to the norm's weight if `weight_grad`.
///
/// `saved` is x and rstd if [`forward`] had a norm.
pub fn backward(
    dy: Tensor<2>,
    head_dim: usize,
    saved: Option<SavedNorm<'_>>,
    rotation: Option<Rotation<'_>>,
    weight_grad: bool,
) -> Rotated {
    if !weight_grad {
        on_wgpu!(wgpu::backward(&dy, head_dim, saved.as_ref(), rotation).map(|dx| (dx, None)));
    }
    match Backend::of(&dy) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let [_, width] = dy.dims();
            let dx = rotate(dy, head_dim, rotation, Direction::Backward);
            let Some((norm, x, rstd)) = saved else { return (dx, None) };
            let (dy, x) = (in_rows_of(dx, head_dim), in_rows_of(x, head_dim));
            let dw = weight_grad.then(|| rms_norm::weight_grad(&dy, &x, rstd));
            let dx = rms_norm::backward(&dy, &x, &norm.gain, rstd, None, 0);
            (in_rows_of(dx, width), dw)
        }
        Backend::Cuda => {
            let norm = saved.as_ref().map(cuda_norm);
            let rotation = rotation.map(Rotation::cuda);
            let (dx, dw) = cuda::backward(dy.into_cuda(), head_dim, norm, rotation, weight_grad);
            (dx.into(), dw.map(Into::into))
        }
    }
}

/// [`forward`] of queries and keys together, which is one launch on CUDA. Without norms they are rotated in place if
/// nothing refers to their memory but them and `v`, which may be columns of the same matrix.
pub fn forward_qk(
    q: Tensor<2>,
    k: Tensor<2>,
    v: &Tensor<2>,
    head_dim: usize,
    norms: Option<&[HeadNorm; 2]>,
    rotation: Option<Rotation<'_>>,
) -> [Rotated; 2] {
    match Backend::of(&q) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let [norm_q, norm_k] = norms.map_or([None, None], |[q, k]| [Some(q), Some(k)]);
            [forward(q, head_dim, norm_q, rotation), forward(k, head_dim, norm_k, rotation)]
        }
        Backend::Cuda => {
            let (norms, rotation) =
                (norms.map(|norms| norms.each_ref().map(HeadNorm::cuda)), rotation.map(Rotation::cuda));
            let (q, k, rstd) = cuda::forward_qk([q.cuda(), k.cuda(), v.cuda()], head_dim, norms, rotation);
            let (rstd_q, rstd_k) = rstd.map_or((None, None), |(q, k)| (Some(q.into()), Some(k.into())));
            [(q.into(), rstd_q), (k.into(), rstd_k)]
        }
    }
}

/// [`backward`] of queries and keys together, in place if nothing refers to their memory but them and `dv`. `saved` is x
/// and rstd of each if there were norms.
pub fn backward_qk(
    [dq, dk]: [Tensor<2>; 2],
    dv: &Tensor<2>,
    head_dim: usize,
    saved: Option<[SavedNorm<'_>; 2]>,
    rotation: Option<Rotation<'_>>,
    weight_grads: bool,
) -> [Rotated; 2] {
    match Backend::of(&dq) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let [saved_q, saved_k] = saved.map_or([None, None], |[q, k]| [Some(q), Some(k)]);
            let dq = backward(dq, head_dim, saved_q, rotation, weight_grads);
            [dq, backward(dk, head_dim, saved_k, rotation, weight_grads)]
        }
        Backend::Cuda => {
            // By value: the gradients are rotated in place if nothing else refers to them.
            let (dq, dk) = (dq.into_cuda(), dk.into_cuda());
            let norms = saved.as_ref().map(|saved| saved.each_ref().map(cuda_norm));
            let rotation = rotation.map(Rotation::cuda);
            let (dq, dk, dw) = cuda::backward_qk(dq, dk, dv.cuda(), head_dim, norms, rotation, weight_grads);
            let (dw_q, dw_k) = dw.map_or((None, None), |(q, k)| (Some(q.into()), Some(k.into())));
            [(dq.into(), dw_q), (dk.into(), dw_k)]
        }
    }
}

fn cuda_norm<'a>((norm, x, rstd): &'a SavedNorm<'_>) -> cuda::SavedNorm<'a> {
    cuda::SavedNorm { norm: norm.cuda(), x: x.cuda(), rstd: rstd.cuda() }
}

/// The same values in rows of `width`, where the norm is an operation of its own.
fn in_rows_of(x: Tensor<2>, width: usize) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let dims = [rows * cols / width, width];
    match x {
        Tensor::Burn(x) => x.reshape(dims).into(),
        Tensor::Cuda(_) => two_devices(),
        Tensor::Meta(x) => x.reshaped(dims).into(),
    }
}

/// The sign of the angle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

fn rotate(x: Tensor<2>, head_dim: usize, rotation: Option<Rotation<'_>>, direction: Direction) -> Tensor<2> {
    let Some(Rotation { angles, interleaved }) = rotation else { return x };
    match Backend::of(&x) {
        Backend::Cpu => cpu::rotate(x.into_burn(), head_dim, angles.burn(), interleaved, direction).into(),
        Backend::Portable => portable::rotate(x.into_burn(), head_dim, angles.burn(), interleaved, direction).into(),
        Backend::Cuda => two_devices(),
        Backend::Meta => meta::rotate(x.into_meta()).into(),
    }
}

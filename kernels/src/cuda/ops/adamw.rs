//! AdamW over flat buffers, the norm of the gradients, and clipping without the host in between.

use std::sync::Arc;

use super::{blocks, int, kernel};
use crate::cuda::{Array, Buffer, CudaError, DType, args};

/// Values that a block of the sum of squares takes at a time; fixed, so that the sum has the same bits on every card.
const PIECE: usize = 4096;

/// Blocks of the sum of squares, at most.
const PARTS: usize = 1024;

/// One step's numbers, as the kernel takes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// 1 − lr · weight_decay.
    pub(crate) keep: f32,
    /// lr / (1 − β₁ᵗ).
    pub(crate) step_size: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub(crate) root_correction: f32,
    /// β₁ and 1 − β₁.
    pub(crate) beta1: [f32; 2],
    /// β₂ and 1 − β₂.
    pub(crate) beta2: [f32; 2],
    /// Added to the root of the second moment.
    pub(crate) eps: f32,
}

/// What gradients are multiplied with before a step, on the device.
#[derive(Clone, Debug)]
pub(crate) struct Clip(Arc<Buffer>);

/// What a [`Clip`] holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Norm {
    /// The norm of all gradients, after `inv_scale`.
    pub(crate) norm: f32,
    /// What they are multiplied with.
    pub(crate) factor: f32,
    /// Whether one was infinite or not a number; a step then changes nothing.
    pub(crate) not_finite: bool,
}

/// Changes parameters `p` and moments `m`, `v` by one step with gradients `g`: f32 `[1, n]`, parts of four flat buffers
/// that begin equally far from 16 bytes.
pub(crate) fn step(p: &Array, g: &Array, m: &Array, v: &Array, step: &Step, clip: &Clip) {
    let n = flat(p);
    assert!([g, m, v].iter().all(|x| flat(x) == n), "as many gradients and moments as parameters");
    assert!([g, m, v].iter().all(|x| x.ptr() % 16 == p.ptr() % 16), "parts begin equally far from 16 bytes");
    let Step { keep, step_size, root_correction, beta1, beta2, eps } = *step;
    kernel(p.cuda(), "adamw.cu", "adamw", DType::F32).launch(
        [blocks((n + 3).div_ceil(1024)), 1, 1],
        [256, 1, 1],
        0,
        args![
            p.ptr(),
            g.ptr(),
            m.ptr(),
            v.ptr(),
            clip.0.ptr(),
            n as i64,
            keep,
            step_size,
            root_correction,
            beta1[0],
            beta1[1],
            beta2[0],
            beta2[1],
            eps
        ],
    );
}

/// The norm of `inv_scale · g`, and the factor that brings g to that scale and to no more than `max_norm`, if that is
/// above 0.
pub(crate) fn norm(g: &Array, max_norm: f32, inv_scale: f32) -> Clip {
    let (cuda, n) = (g.cuda(), flat(g));
    let parts = n.div_ceil(PIECE).min(PARTS);
    let partial = cuda.alloc(8 * parts, "partial sums");
    let clip = cuda.alloc(12, "gradient norm");
    kernel(cuda, "adamw.cu", "sum_squares", DType::F32).launch(
        [blocks(parts), 1, 1],
        [256, 1, 1],
        0,
        args![g.ptr(), partial.ptr(), n as i64],
    );
    kernel(cuda, "adamw.cu", "sum_squares_finish", DType::F32).launch(
        [1, 1, 1],
        [256, 1, 1],
        0,
        args![partial.ptr(), clip.ptr(), int(parts), max_norm, inv_scale],
    );
    Clip(Arc::new(clip))
}

impl Clip {
    /// The values, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The first error of the device since the last one that was taken.
    pub(crate) fn read(&self) -> Result<Norm, CudaError> {
        let mut bytes = [0; 12];
        self.0.cuda().download(&self.0, &mut bytes)?;
        let [norm, factor, flag] = [0, 4, 8].map(|at| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let [norm, factor] = [norm, factor].map(f32::from_le_bytes);
        Ok(Norm { norm, factor, not_finite: flag != [0; 4] })
    }
}

/// How many values a flat f32 array has.
fn flat(x: &Array) -> usize {
    assert!(x.is_contiguous() && x.dtype() == DType::F32, "flat f32 values, not {:?} {}", x.dims(), x.dtype().name());
    x.rows() * x.cols()
}

//! Optimizer steps over flat buffers, the norm of the gradients, and clipping without the host in between.

use std::sync::Arc;

use super::StepCoefficients;
use crate::runtime::op::{blocks, int, kernel};
use crate::runtime::{Array, Buffer, Cuda, CudaError, DType, MemoryUse, args, entry};

/// Values that a block of the sum of squares takes at a time; fixed, so that the sum has the same bits on every card.
const PIECE: usize = 4096;

/// Blocks of the sum of squares, at most.
const PARTS: usize = 1024;

/// The factor of gradients before a step, on the device.
#[derive(Clone, Debug)]
pub(crate) struct Clip(Arc<Buffer>);

/// The values of a [`Clip`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Norm {
    /// The norm of all gradients, after `inv_scale`.
    pub(crate) norm: f32,
    /// The factor of the gradients.
    pub(crate) factor: f32,
    /// True if a gradient was infinite or NaN; a step then changes nothing.
    pub(crate) not_finite: bool,
}

/// Changes parameters `p` and their moments by one step with gradients `g`: f32 `[1, n]`; fast where all begin equally
/// far from 16 bytes.
pub(crate) fn step(p: &Array, g: &Array, moments: &[Array], coefficients: &StepCoefficients, clip: &Clip) {
    let n = flat(p);
    assert!(moments.iter().chain([g]).all(|x| flat(x) == n), "as many gradients and moments as parameters");
    let (entry, a, r, beta1, beta2, eps, root_correction) = match *coefficients {
        StepCoefficients::AdamW { keep, step_size, root_correction, beta1, beta2, eps } => {
            (entry!("optimizer.cu", "adamw"), keep, step_size, beta1, beta2, eps, root_correction)
        }
        StepCoefficients::Lion { keep, lr, beta1, beta2 } => {
            (entry!("optimizer.cu", "lion"), keep, lr, beta1, beta2, 0.0, 0.0)
        }
        StepCoefficients::Sgd { weight_decay, lr, momentum } => {
            (entry!("optimizer.cu", "sgd"), weight_decay, lr, momentum, 0.0, 0.0, 0.0)
        }
    };
    let moment = |i: usize| moments.get(i).map_or(0, Array::ptr);
    kernel(p.cuda(), entry, DType::F32).launch(
        [blocks((n + 3).div_ceil(1024)), 1, 1],
        [256, 1, 1],
        0,
        args![
            p.ptr(),
            g.ptr(),
            moment(0),
            moment(1),
            clip.ptr(),
            n as i64,
            a as f32,
            r as f32,
            root_correction as f32,
            beta1 as f32,
            (1.0 - beta1) as f32,
            beta2 as f32,
            (1.0 - beta2) as f32,
            eps as f32
        ],
    );
}

/// The norm of `inv_scale · g`, and the factor that brings g to that scale and to no more than `max_norm`, if that is
/// above 0.
pub(crate) fn norm(g: &Array, max_norm: f32, inv_scale: f32) -> Clip {
    let (cuda, n) = (g.cuda(), flat(g));
    let parts = n.div_ceil(PIECE).min(PARTS);
    let partial = cuda.alloc(8 * parts, MemoryUse::Scratch);
    let clip = cuda.alloc(12, MemoryUse::Scratch);
    kernel(cuda, entry!("optimizer.cu", "sum_squares"), DType::F32).launch(
        [blocks(parts), 1, 1],
        [256, 1, 1],
        0,
        args![g.ptr(), partial.ptr(), n as i64],
    );
    kernel(cuda, entry!("optimizer.cu", "sum_squares_finish"), DType::F32).launch(
        [1, 1, 1],
        [256, 1, 1],
        0,
        args![partial.ptr(), clip.ptr(), int(parts), max_norm, inv_scale],
    );
    Clip(Arc::new(clip))
}

impl Clip {
    /// Makes one from numbers of the host.
    pub(crate) fn new(cuda: &Cuda, norm: f64, factor: f64) -> Self {
        let flag = u32::from(!norm.is_finite());
        let bytes = [(norm as f32).to_le_bytes(), (factor as f32).to_le_bytes(), flag.to_le_bytes()].concat();
        Self(Arc::new(cuda.uploaded(&bytes, MemoryUse::Scratch)))
    }

    /// Returns the device.
    pub(super) fn cuda(&self) -> &Cuda {
        self.0.cuda()
    }

    /// Its place, which begins with the norm.
    pub(super) fn ptr(&self) -> u64 {
        self.0.ptr()
    }

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

/// Returns the number of values of a flat f32 array.
fn flat(x: &Array) -> usize {
    assert!(x.is_contiguous() && x.dtype() == DType::F32, "flat f32 values, not {:?} {}", x.dims(), x.dtype().name());
    x.rows() * x.cols()
}

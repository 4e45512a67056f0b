//! States in 8-bit blocks, as bitsandbytes keeps them (Dettmers et al., arXiv:2110.02861).
//!
//! A moment m of a parameter is flattened and cut into blocks of 256, the last one short; code = the value of a
//! [map](super::dynamic_map) nearest to m · (1/absmax), absmax = max |m| of the block; decoded, m = value · absmax. A first
//! moment keeps its sign: what is negative does not become zero. A step decodes, changes and encodes block by block:
//!
//! - AdamW: m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²; p ← (p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m/(√v + eps·√(1 − β₂ᵗ))) ·
//!   (1 − lr·wd)
//! - Lion and SGD as in `f32`
//!
//! with 1 − β in `f32` and its product fused with the sum, as bitsandbytes' kernels are compiled, and all else rounded to
//! nearest: the same bits on the CPU and on CUDA. bitsandbytes divides and takes roots approximately, which leaves its
//! moments the same but for a code on the edge between two; and its rule for signs makes a moment of negative zero a small
//! negative one, which moves a parameter that has no gradient: here it stays zero. Subnormal moments are zero. Devices without a path
//! of their own keep the blocks on the host and compute there.
//!
//! # Dtypes
//! Codes `u8`, absmax `f32`, arithmetic `f32`.

pub(crate) mod cpu;
pub(crate) mod cuda;

use core::ops::Range;

use super::dynamic_map;
use super::{UpdateRule, UpdateStep};
use crate::Group;

/// Elements of a block.
pub(crate) const BLOCK: usize = 256;

/// Parameters with fewer elements keep an `f32` state.
pub(crate) const SMALLEST: usize = 4096;

/// Blocks that one tile of the CUDA kernel has at most.
const TILE: usize = 8;

/// The coefficients of a step for parameters that move alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BlockwiseCoefficients {
    /// 1 − lr·wd; for SGD, wd.
    pub(crate) decay: f32,
    /// lr, for AdamW lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ).
    pub(crate) rate: f32,
    /// β₁ and 1 − β₁; the momentum of SGD.
    pub(crate) beta1: [f32; 2],
    /// β₂ and 1 − β₂.
    pub(crate) beta2: [f32; 2],
    /// eps·√(1 − β₂ᵗ).
    pub(crate) eps: f32,
}

impl BlockwiseCoefficients {
    pub(crate) fn of(rule: UpdateRule, step: &UpdateStep, decays: bool, group: Group) -> Self {
        let (lr, decay) = step.of(decays, group);
        let keep = (1.0 - lr * decay) as f32;
        let pair = |beta: f64| [beta as f32, 1.0 - beta as f32];
        match rule {
            UpdateRule::AdamW { beta1, beta2, eps } => {
                let correct = |beta: f64| 1.0 - beta.powf(step.t as f64);
                let root = correct(beta2).sqrt();
                let (rate, eps) = ((lr * root / correct(beta1)) as f32, (eps * root) as f32);
                Self { decay: keep, rate, beta1: pair(beta1), beta2: pair(beta2), eps }
            }
            UpdateRule::Lion { beta1, beta2 } => {
                Self { decay: keep, rate: lr as f32, beta1: pair(beta1), beta2: pair(beta2), eps: 0.0 }
            }
            UpdateRule::Sgd { momentum } => {
                Self { decay: decay as f32, rate: lr as f32, beta1: pair(momentum), beta2: [0.0; 2], eps: 0.0 }
            }
        }
    }
}

/// Blocks of one moment.
pub(crate) struct Blocks<'a> {
    /// Codes, [`BLOCK`] for each of `absmax`.
    pub(crate) codes: &'a mut [u8],
    pub(crate) absmax: &'a mut [f32],
}

impl<'a> Blocks<'a> {
    /// Parts of `blocks` blocks.
    #[inline(always)]
    pub(crate) fn split(self, blocks: usize) -> impl Iterator<Item = Blocks<'a>> {
        let parts = self.codes.chunks_mut(blocks * BLOCK).zip(self.absmax.chunks_mut(blocks));
        parts.map(|(codes, absmax)| Blocks { codes, absmax })
    }
}

/// A moment's blocks in host memory.
#[derive(Clone, Debug)]
pub(crate) struct HostBlocks {
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
}

impl HostBlocks {
    /// Zeros.
    pub(crate) fn new(blocks: usize) -> Self {
        Self { codes: vec![0; blocks * BLOCK], absmax: vec![0.0; blocks] }
    }

    /// Some of them.
    pub(crate) fn part(&mut self, blocks: Range<usize>) -> Blocks<'_> {
        let codes = blocks.start * BLOCK..blocks.end * BLOCK;
        Blocks { codes: &mut self.codes[codes], absmax: &mut self.absmax[blocks] }
    }
}

/// The tiles of a parameter with these elements and blocks from `first_block` on, as optimizer_8bit.cu takes them.
pub(super) fn tiles(
    range: &Range<usize>,
    first_block: usize,
    decays: bool,
    group: Group,
) -> impl Iterator<Item = [u32; 4]> + use<> {
    let kind = u32::from(decays) + 2 * u32::from(group == Group::Embedding);
    let end = range.end;
    range.clone().step_by(TILE * BLOCK).enumerate().map(move |(i, first)| {
        let block = u32::try_from(first_block + TILE * i).expect("fewer than 2³² blocks");
        let elements = (end - first).min(TILE * BLOCK) as u32;
        [first as u32, (first as u64 >> 32) as u32, block, elements | kind << 16]
    })
}

/// The maps that codes stand for: of first moments, and of second moments.
pub fn maps() -> [&'static [f32; 256]; 2] {
    [&dynamic_map::signed().values, &dynamic_map::unsigned().values]
}

//! Optimizer steps whose state is kept in 8-bit blocks.

use super::{BLOCK, BlockwiseCoefficients};
use crate::optimizer::UpdateRule;
use crate::optimizer::cuda::Clip;
use crate::runtime::op::{blocks, int, kernel};
use crate::runtime::{Array, Buffer, Cuda, CudaError, DType, Ints, MemoryUse, PinnedBuffer, args, entry};

/// The blocks of a device and their tiles.
#[derive(Debug)]
pub(crate) struct Blocks {
    cuda: Cuda,
    /// Codes and scales of each moment.
    moments: Vec<[Memory; 2]>,
    tiles: Ints,
    tables: Buffer,
}

/// Memory that kernels reach.
#[derive(Debug)]
enum Memory {
    Device(Buffer),
    Host(PinnedBuffer),
}

impl Blocks {
    /// Zeros for `moments` moments of `count` blocks; `host` puts them into pinned host memory.
    pub(crate) fn new(
        cuda: &Cuda,
        moments: usize,
        count: usize,
        host: bool,
        tiles: &[[u32; 4]],
        tables: &[u8],
    ) -> Self {
        let memory = |bytes: usize| {
            if host {
                Memory::zeros_on_host(cuda, bytes)
            } else {
                Memory::Device(cuda.zeros(bytes, MemoryUse::OptimizerState))
            }
        };
        let moments = (0..moments).map(|_| [memory(count * BLOCK), memory(count * 4)]).collect();
        let tiles = Ints::from_slice(cuda, tiles.as_flattened(), MemoryUse::OptimizerState);
        Self { cuda: cuda.clone(), moments, tiles, tables: cuda.uploaded(tables, MemoryUse::OptimizerState) }
    }

    /// Changes values `p`, which begin with element `first`, and the blocks of the tiles from `tile` on by one step.
    /// `coefficients` are those of each kind of parameters.
    pub(crate) fn step(
        &self,
        rule: UpdateRule,
        [p, g]: [&Array; 2],
        first: usize,
        tiles: core::ops::Range<usize>,
        coefficients: [BlockwiseCoefficients; 4],
        clip: &Clip,
    ) {
        let entry = match rule {
            UpdateRule::AdamW { .. } => entry!("optimizer_8bit.cu", "adamw_8bit"),
            UpdateRule::Lion { .. } => entry!("optimizer_8bit.cu", "lion_8bit"),
            UpdateRule::Sgd { .. } => entry!("optimizer_8bit.cu", "sgd_8bit"),
        };
        let address = |moment: usize, which: usize| self.moments.get(moment).map_or(0, |memory| memory[which].ptr());
        let BlockwiseCoefficients { beta1, beta2, eps, .. } = coefficients[0];
        let [a0, a1, a2, a3] = coefficients.map(|c| c.decay);
        kernel(&self.cuda, entry, DType::F32).launch(
            [blocks(tiles.len().min(BLOCKS_PER_SM * self.cuda.props().sm_count as usize)), 1, 1],
            [256, 1, 1],
            0,
            args![
                p.ptr(),
                g.ptr(),
                first as i64,
                clip.ptr(),
                self.tiles.ptr_at(4 * tiles.start),
                int(tiles.len()),
                address(0, 0),
                address(0, 1),
                address(1, 0),
                address(1, 1),
                self.tables.ptr(),
                a0,
                a1,
                a2,
                a3,
                coefficients[0].rate,
                coefficients[2].rate,
                beta1[0],
                beta1[1],
                beta2[0],
                beta2[1],
                eps
            ],
        );
    }

    /// Bytes of the codes (`which` 0) or scales (1) of a moment, from a byte on, after waiting for the device.
    pub(crate) fn read(&self, moment: usize, which: usize, from: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        match &self.moments[moment][which] {
            Memory::Device(buffer) => self.cuda.download_at(buffer, from, bytes),
            Memory::Host(pinned) => {
                self.cuda.synchronize()?;
                pinned.read_at(from, bytes)
            }
        }
    }

    /// Replaces what [`read`](Self::read) reads.
    pub(crate) fn write(&mut self, moment: usize, which: usize, from: usize, bytes: &[u8]) -> Result<(), CudaError> {
        match &mut self.moments[moment][which] {
            Memory::Device(buffer) => {
                self.cuda.upload_at(buffer, from, bytes);
                Ok(())
            }
            Memory::Host(pinned) => {
                self.cuda.synchronize()?;
                pinned.write_at(from, bytes)
            }
        }
    }
}

impl Memory {
    fn zeros_on_host(cuda: &Cuda, bytes: usize) -> Self {
        let mut pinned = cuda.pinned(bytes);
        // An error sticks.
        let _ = pinned.write(&vec![0; bytes]);
        Self::Host(pinned)
    }

    fn ptr(&self) -> u64 {
        match self {
            Self::Device(buffer) => buffer.ptr(),
            Self::Host(pinned) => pinned.device_ptr(),
        }
    }
}

/// Blocks of a grid for each multiprocessor, at most; each copies the tables once.
const BLOCKS_PER_SM: usize = 8;

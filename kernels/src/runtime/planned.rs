//! A device without a card: what memory work takes is known before there is any.
//!
//! Everything above runs as it does on a card, and nothing is computed: the arena gives out addresses and maps nothing;
//! launches, products, fills and copies do nothing; what is read is zero. So the arena's account of a step is that of
//! the same step on a card with the same [`DeviceProps`], by construction.

use super::arena::Arena;
use super::blaslt::WORKSPACE;
use super::context::Inner;
use super::driver::lock;
use super::gemm::check;
use super::{Cuda, DeviceProps, Gemm, MemoryUse};

impl Cuda {
    /// A device that keeps an account of its memory and computes nothing. Memory never ends: what is more than
    /// [`DeviceProps::total_memory`] shows in [`Cuda::memory`].
    pub fn planned(props: DeviceProps) -> Self {
        Self(Inner::new(props, Arena::unmapped()).into())
    }

    /// Returns whether nothing is computed and only memory is counted.
    pub fn is_planned(&self) -> bool {
        self.0.card.is_none()
    }

    /// Counts what a product takes on a card: the scratch memory that all of them share.
    pub(super) fn plan_product(&self, gemm: &Gemm) {
        if let Err(error) = check(gemm) {
            self.fail(error);
        }
        self.0.workspace.get_or_init(|| {
            // Addresses do not end before memory does.
            let _ = lock(&self.0.arena).alloc(WORKSPACE, MemoryUse::Workspace);
        });
    }
}

impl DeviceProps {
    /// A card to plan for where there is none: an H100, with this much memory.
    pub fn hopper(total_memory: usize) -> Self {
        Self {
            name: "a card of compute capability 9.0".to_owned(),
            major: 9,
            minor: 0,
            sm_count: 132,
            shared_per_block: 227 << 10,
            total_memory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Array, DType, Form};

    #[test]
    fn memory_is_accounted_for_and_nothing_else_happens() {
        let cuda = Cuda::planned(DeviceProps::hopper(1 << 30));
        let a = Array::zeros(&cuda, [1024, 512], DType::Bf16, MemoryUse::Weights);
        let b = Array::from_f32(&cuda, &[1.0; 64 * 512], [64, 512], DType::Bf16, MemoryUse::QuantizedWeights);
        assert_eq!(
            cuda.memory().by_use,
            [(MemoryUse::Weights, 1 << 20), (MemoryUse::QuantizedWeights, 64 << 10)],
            "the staging in f32 is gone"
        );
        let y = Array::empty(&cuda, [1024, 64], DType::Bf16, MemoryUse::Activations);
        cuda.gemm(&Gemm::new(Form::Nt, [1024, 64, 512], a.operand(), b.operand(), y.operand()));
        assert_eq!(y.dims(), [1024, 64]);
        assert_eq!(y.to_f32().expect("zeros are read"), vec![0.0; 1024 * 64]);
        drop(y);
        let memory = cuda.memory();
        assert_eq!(memory.in_use, WORKSPACE + (1 << 20) + (64 << 10));
        let download = 1024 * 64 * 4;
        assert_eq!(memory.high_water, memory.in_use + 1024 * 64 * 2 + download);
        assert_eq!(memory.at_high_water[0], (MemoryUse::Workspace, WORKSPACE));
        assert!(memory.extent >= memory.high_water && memory.extent <= memory.mapped, "{memory:?}");
        assert!(cuda.check().is_ok());
        assert!(cuda.synchronize().is_ok());
    }

    #[test]
    fn what_goes_to_the_host_is_counted_once() {
        let cuda = Cuda::planned(DeviceProps::hopper(1 << 30));
        for _ in 0..3 {
            let host = cuda.pinned(5000);
            cuda.copy_out(cuda.alloc(5000, MemoryUse::Weights), &host).finish();
            assert_eq!(cuda.pinned_bytes(), 5000);
        }
        assert_eq!(cuda.memory().in_use, 0);
        cuda.trim();
        assert_eq!(cuda.pinned_bytes(), 0);
    }

    #[test]
    fn more_than_a_card_has_is_no_error() {
        let cuda = Cuda::planned(DeviceProps::hopper(1 << 20));
        let buffer = cuda.alloc(1 << 36, MemoryUse::Activations);
        assert_ne!(buffer.ptr(), 0);
        assert_eq!(cuda.memory().extent, 1 << 36);
        assert_eq!(cuda.device_memory(), (0, 1 << 20));
    }
}

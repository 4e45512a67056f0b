//! The implementations of an operation, and the choice between them.

use core::cell::Cell;

use burn::tensor::{DType, Device, Tensor as BurnTensor};

use crate::Tensor;

/// An implementation of the operations of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Loops over `f32` slices of the CPU backend, with runtime SIMD dispatch.
    Cpu,
    /// Plain Burn operations: any device of Burn, any float dtype, and autodiff.
    Portable,
    /// Kernels and cuBLASLt on an NVIDIA GPU.
    Cuda,
    /// Nothing but the memory that [`Backend::Cpu`] takes ([`Device::Meta`](crate::Device::Meta)).
    Meta,
}

thread_local! {
    static PORTABLE_ONLY: Cell<bool> = const { Cell::new(false) };
}

impl Backend {
    /// The path of `tensor`: [`Backend::Cuda`] for arrays, [`Backend::Cpu`] for plain `f32` tensors of the CPU backend.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        match tensor {
            Tensor::Burn(tensor) => Self::of_burn(tensor),
            Tensor::Cuda(_) => Self::Cuda,
            Tensor::Meta(_) => Self::Meta,
        }
    }

    /// The path of a tensor of Burn.
    pub(crate) fn of_burn<const D: usize>(tensor: &BurnTensor<D>) -> Self {
        // Devices compare equal with and without autodiff.
        let plain = tensor.dtype() == DType::F32 && tensor.device() == Device::flex() && !tensor.is_autodiff();
        if plain && !Self::is_portable_only() { Self::Cpu } else { Self::Portable }
    }

    /// Returns whether this is inside of [`portable_only`](Self::portable_only).
    pub(crate) fn is_portable_only() -> bool {
        PORTABLE_ONLY.get()
    }

    /// Runs `f` with [`Backend::Portable`] for every operation that it calls on this thread.
    ///
    /// A number that is wrong outside and right inside points at the other path.
    pub fn portable_only<R>(f: impl FnOnce() -> R) -> R {
        /// Puts the switch back on the way out, also out of a panic.
        struct Restore(bool);
        impl Drop for Restore {
            fn drop(&mut self) {
                PORTABLE_ONLY.set(self.0);
            }
        }
        let _restore = Restore(PORTABLE_ONLY.replace(true));
        f()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_holds_for_its_scope_and_survives_panics() {
        let x = Tensor::from(BurnTensor::<1>::zeros([1], (&Device::flex(), DType::F32)));
        assert_eq!(Backend::of(&x), Backend::Cpu);
        Backend::portable_only(|| {
            Backend::portable_only(|| assert_eq!(Backend::of(&x), Backend::Portable));
            assert_eq!(Backend::of(&x), Backend::Portable, "the inner scope does not end the outer one");
        });
        let _ = std::panic::catch_unwind(|| Backend::portable_only(|| panic!("on purpose")));
        assert_eq!(Backend::of(&x), Backend::Cpu);
    }
}

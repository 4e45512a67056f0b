use pulp::{Arch, Simd, WithSimd};

/// Runs `work`, compiled for the widest vectors of this machine; everything below it must be inlined.
///
/// A closure given to [`Arch::dispatch`] itself is called by way of `FnOnce`, through a function that the compiler
/// makes and does not inline: the loops would be compiled for the oldest machine.
#[inline(always)]
pub(crate) fn dispatch(work: impl FnMut()) {
    Arch::new().dispatch(Work(work));
}

struct Work<F>(F);

impl<F: FnMut()> WithSimd for Work<F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        (self.0)();
    }
}

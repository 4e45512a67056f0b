use pulp::{Arch, Simd, WithSimd};

/// Runs `work` compiled for the widest vectors of this machine; everything it calls must be inlined.
///
/// Passing a closure to [`Arch::dispatch`] directly would call it through a compiler-generated `FnOnce` shim that is
/// not inlined, so the loops would be compiled for the baseline instruction set.
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

//! What stays of a block between its forward and its backward when most of it is computed again.

use rekindle_kernels::{Offloaded, Tensor};
use rekindle_lora::GradientCheckpointing;

use super::{Front, Saved};

/// A block's input, and what spares the costliest parts of the second forward.
pub(crate) struct Kept {
    x: Offloaded,
    middle: Option<Middle<Offloaded>>,
    down: Option<rekindle_lora::Saved>,
}

/// From attention's result to the middle of the residual stream. Where it is kept, neither attention nor the linear
/// after it runs again.
pub(super) struct Middle<T> {
    pub(super) o: T,
    pub(super) lse: Tensor<2>,
    pub(super) saved_o: rekindle_lora::Saved,
    pub(super) h2: T,
}

impl Kept {
    /// The part that stays. In host memory there is place for more of it, but what is needed again `soon` stays where it
    /// is.
    pub(crate) fn of(saved: Saved, checkpointing: GradientCheckpointing, soon: bool) -> Self {
        let Saved { front, down } = saved;
        // Everything else goes, so that nothing but this reaches the memory of what stays.
        let Front { x, o: saved_o, h2, attention, .. } = front;
        let (o, lse) = (attention.o, attention.lse);
        let put = |tensor| if soon { Offloaded::here(tensor) } else { Offloaded::begin(tensor) };
        let down = down.is_small().then(|| down.detached());
        // Where nothing can go anywhere, keeping more would only take more.
        if checkpointing != GradientCheckpointing::Host || !Offloaded::frees(&x) {
            return Self { x: Offloaded::here(x), middle: None, down };
        }
        let middle = saved_o.is_small().then(|| saved_o.detached());
        let middle = middle.map(|saved_o| Middle { o: put(o), lse, saved_o, h2: put(h2) });
        Self { x: put(x), middle, down }
    }

    /// Gives the device's memory of what goes to the host back; what is queued from here on waits for the copies.
    pub(crate) fn settled(self) -> Self {
        self.map(Offloaded::settled)
    }

    /// Begins to bring everything back, beside what is queued from here on.
    pub(crate) fn coming(self) -> Self {
        self.map(Offloaded::coming)
    }

    /// `(x, middle, down)`, on the device.
    pub(super) fn take(self) -> (Tensor<2>, Option<Middle<Tensor<2>>>, Option<rekindle_lora::Saved>) {
        (self.x.take(), self.middle.map(|middle| middle.map(Offloaded::take)), self.down)
    }

    fn map(self, f: fn(Offloaded) -> Offloaded) -> Self {
        Self { x: f(self.x), middle: self.middle.map(|middle| middle.map(f)), down: self.down }
    }
}

impl<T> Middle<T> {
    fn map<U>(self, f: fn(T) -> U) -> Middle<U> {
        let Self { o, lse, saved_o, h2 } = self;
        Middle { o: f(o), lse, saved_o, h2: f(h2) }
    }
}

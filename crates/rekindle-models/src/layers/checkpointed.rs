//! What stays of a layer between its forward and its backward when most of it is recomputed.

use rekindle_kernels::{Offloaded, Tensor};
use rekindle_lora::{GradientCheckpointing, LinearSaved};

use super::BlockSaved;

/// A layer's input, and what spares the costliest parts of the second forward.
#[derive(Debug)]
pub struct Checkpointed {
    x: Offloaded,
    /// The checkpoint of attention, and the middle of the residual stream.
    middle: Option<(AttentionCheckpoint<Offloaded>, Offloaded)>,
    down: Option<LinearSaved>,
}

/// The result of attention. Where it is kept, neither attention nor the linear after it runs again.
#[derive(Debug)]
pub struct AttentionCheckpoint<T> {
    pub(super) o: T,
    pub(super) lse: Tensor<2>,
    pub(super) saved_o: LinearSaved,
}

impl Checkpointed {
    /// Keeps a part of `saved`. Host memory has space for more of it, but what is needed again `soon` stays on the device.
    pub fn new(saved: BlockSaved, checkpointing: GradientCheckpointing, soon: bool) -> Self {
        // Everything else is dropped here, so that nothing but the part that stays reaches its memory.
        let BlockSaved { x, attention, h, feed_forward, .. } = saved;
        let (o, lse, saved_o) = attention.into_checkpoint();
        let down = feed_forward.into_checkpoint();
        let put = |tensor| if soon { Offloaded::here(tensor) } else { Offloaded::begin(tensor) };
        let down = down.is_small().then(|| down.detached());
        // Where nothing can go anywhere, keeping more would only take more.
        if checkpointing != GradientCheckpointing::Host || !Offloaded::frees(&x) {
            return Self { x: Offloaded::here(x), middle: None, down };
        }
        let saved_o = saved_o.is_small().then(|| saved_o.detached());
        let middle = saved_o.map(|saved_o| (AttentionCheckpoint { o: put(o), lse, saved_o }, put(h)));
        Self { x: put(x), middle, down }
    }

    /// Frees the device memory of what goes to the host; later work on the stream waits for the copies.
    #[must_use]
    pub fn settled(self) -> Self {
        self.map(Offloaded::settled)
    }

    /// Begins to copy everything back, beside later work on the stream.
    #[must_use]
    pub fn coming(self) -> Self {
        self.map(Offloaded::coming)
    }

    /// `(x, (attention, h), down)`, on the device.
    #[allow(clippy::type_complexity, reason = "three optional parts, taken apart at once")]
    pub(super) fn take(self) -> (Tensor<2>, Option<(AttentionCheckpoint<Tensor<2>>, Tensor<2>)>, Option<LinearSaved>) {
        let x = self.x.take();
        let middle = self.middle.map(|(attention, h)| (attention.map(Offloaded::take), h.take()));
        (x, middle, self.down)
    }

    fn map(self, f: fn(Offloaded) -> Offloaded) -> Self {
        Self { x: f(self.x), middle: self.middle.map(|(attention, h)| (attention.map(f), f(h))), down: self.down }
    }
}

impl<T> AttentionCheckpoint<T> {
    fn map<U>(self, f: fn(T) -> U) -> AttentionCheckpoint<U> {
        let Self { o, lse, saved_o } = self;
        AttentionCheckpoint { o: f(o), lse, saved_o }
    }
}

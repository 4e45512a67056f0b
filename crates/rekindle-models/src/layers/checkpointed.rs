//! The activations of a layer that are kept when most of it is recomputed in the backward.

use rekindle_kernels::{Offloaded, Tensor};

use super::feed_forward::FeedForwardCheckpoint;
use super::{BlockSaved, MixerCheckpoint};
use crate::GradientCheckpointing;

/// A layer's input, and what spares the costliest parts of the second forward.
#[derive(Debug)]
pub struct Checkpointed {
    x: Offloaded,
    /// The checkpoint of the mixer, and the middle of the residual stream unless a norm stands between the two, whose
    /// backward needs the result of attention's last linear, or the stream is f32. The middle follows from that result.
    middle: Option<(MixerCheckpoint<Offloaded>, Option<Offloaded>)>,
    feed_forward: Option<FeedForwardCheckpoint>,
    /// The rstd of the norm after the feed-forward half, whose last linear runs again.
    post_feed_forward: Option<Tensor<1>>,
}

/// The parts of a [`Checkpointed`], on the device.
pub(super) struct CheckpointParts {
    pub(super) x: Tensor<2>,
    pub(super) middle: Option<(MixerCheckpoint<Tensor<2>>, Option<Tensor<2>>)>,
    pub(super) feed_forward: Option<FeedForwardCheckpoint>,
    pub(super) post_feed_forward: Option<Tensor<1>>,
}

impl Checkpointed {
    /// Keeps a part of `saved`. Host memory has space for more of it, but what is needed again `soon` stays on the device.
    pub fn new(saved: BlockSaved, checkpointing: GradientCheckpointing, soon: bool) -> Self {
        // Everything else is dropped here, so that nothing but the part that stays reaches its memory.
        let BlockSaved { x, mixer, post_attention, h, feed_forward, post_feed_forward, .. } = saved;
        let post_feed_forward = post_feed_forward.map(|normalized| normalized.rstd);
        let MixerCheckpoint { o, lse, saved_o } = mixer.into_checkpoint();
        let feed_forward = feed_forward.into_checkpoint();
        let put = |tensor| if soon { Offloaded::here(tensor) } else { Offloaded::begin(tensor) };
        let keeps = post_feed_forward.is_none() && feed_forward.is_small();
        let feed_forward = keeps.then(|| feed_forward.detached());
        // Where nothing can go anywhere, keeping more would only take more.
        if checkpointing != GradientCheckpointing::Host || !Offloaded::frees(&x) {
            return Self { x: Offloaded::here(x), middle: None, feed_forward, post_feed_forward };
        }
        let saved_o = saved_o.is_small().then(|| saved_o.detached());
        // In f32, the middle takes longer to the host and back than attention's last linear takes to make it again.
        let h = Some(h).filter(|h| post_attention.is_none() && h.dtype() == o.dtype());
        let middle = saved_o.map(|saved_o| (MixerCheckpoint { o: put(o), lse, saved_o }, h.map(put)));
        Self { x: put(x), middle, feed_forward, post_feed_forward }
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

    /// Returns the parts, on the device.
    pub(super) fn take(self) -> CheckpointParts {
        let Self { x, middle, feed_forward, post_feed_forward } = self;
        let middle = middle.map(|(mixer, h)| (mixer.map(Offloaded::take), h.map(Offloaded::take)));
        CheckpointParts { x: x.take(), middle, feed_forward, post_feed_forward }
    }

    fn map(self, f: fn(Offloaded) -> Offloaded) -> Self {
        let middle = self.middle.map(|(mixer, h)| (mixer.map(f), h.map(f)));
        Self { x: f(self.x), middle, ..self }
    }
}

//! DoRA (arXiv:2402.09353): the layer, and the norms that it divides by.

pub(crate) mod layer;
pub(crate) mod norm;

pub use norm::initial_magnitude;

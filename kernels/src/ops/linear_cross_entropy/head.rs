//! The output layer.

use crate::{Tensor, matmul, to_f32};

/// The output layer: logits = x or, with a softcap c, c·tanh(x / c), where x = multiplier · h·Wᵀ.
///
/// Granite divides logits by `logits_scaling`, Cohere multiplies them with `logit_scale`, and Gemma 2 caps them with
/// `final_logit_softcapping`.
#[derive(Clone, Debug)]
pub struct LmHead {
    /// W, `[vocab, hidden]`.
    pub weight: Tensor<2>,
    /// The factor on h·Wᵀ.
    pub multiplier: f32,
    /// The cap c on the magnitude of logits, above 0.
    pub softcap: Option<f32>,
}

impl LmHead {
    /// Returns the layer without multiplier and cap.
    pub fn new(weight: Tensor<2>) -> Self {
        Self { weight, multiplier: 1.0, softcap: None }
    }

    /// Returns the layer whose logits are divided by `temperature`, which is above 0.
    #[must_use]
    pub fn at_temperature(self, temperature: f32) -> Self {
        let Self { weight, multiplier, softcap } = self;
        // c·tanh(x / c) / T = (c / T)·tanh((x / T) / (c / T)).
        Self { weight, multiplier: multiplier / temperature, softcap: softcap.map(|cap| cap / temperature) }
    }

    /// Returns the logits of every row of `h` on the host, `[rows · vocab]`. For a few rows, as in generation: all
    /// logits exist at once.
    pub fn logits(&self, h: &Tensor<2>) -> Vec<f32> {
        let mut logits = to_f32(matmul::nt(h, &self.weight));
        if self.multiplier != 1.0 {
            logits.iter_mut().for_each(|x| *x *= self.multiplier);
        }
        if let Some(cap) = self.softcap {
            logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        logits
    }

    /// Number of token ids.
    pub(super) fn vocab(&self) -> usize {
        self.weight.dims()[0]
    }
}

//! The auxiliary loss that balances the experts of mixtures.
//!
//! With N the tokens of a batch times its mixtures, p their routers' softmax over all E experts, f_e = (selections of e)/N
//! and P_e = Σ p_e / N: loss = E·Σ_e f_e·P_e. It is top_k if all experts are used alike. Selections and sums are over the
//! tokens of all layers together, and p is the softmax of the logits whatever the weights of the experts are.
//!
//! Equal to transformers' `load_balancing_loss_func` without an attention mask. f has no gradient.

use rekindle_kernels::routing::Dispatch;
use rekindle_kernels::{Tensor, router_probabilities};

use crate::objective::Metric;

/// The name of the metric, as transformers returns it.
pub(crate) const AUX_LOSS: &str = "aux_loss";

/// A pass's part in the auxiliary loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterPass<'a> {
    /// It has none.
    Off,
    /// Routers save their logits.
    Save,
    /// Routers saved their logits, and these are the gradients of the loss to the probabilities of the experts.
    Backward(&'a [f32]),
}

/// The selections and probabilities of the experts, summed over tokens and layers.
#[derive(Clone, Debug, Default)]
pub(crate) struct RouterLoad {
    selections: Vec<f64>,
    probabilities: Vec<f64>,
    tokens: usize,
    layers: usize,
}

/// The auxiliary loss of a batch.
#[derive(Clone, Debug)]
pub(crate) struct RouterLoss {
    loss: f64,
    tokens: usize,
    gradient: Vec<f32>,
}

impl RouterLoad {
    /// Adds a layer.
    pub(crate) fn add(&mut self, logits: &Tensor<2>, dispatch: &Dispatch) {
        let counts = dispatch.to_host().offsets.windows(2).map(|ends| f64::from(ends[1] - ends[0])).collect::<Vec<_>>();
        add(&mut self.selections, counts);
        add(&mut self.probabilities, router_probabilities::forward(logits));
        self.tokens = dispatch.tokens();
        self.layers += 1;
    }

    /// Returns the loss; its gradient is that of `per_token` · tokens · loss. `None` without a layer.
    pub(crate) fn loss(&self, per_token: f32) -> Option<RouterLoss> {
        let Self { selections, probabilities, tokens, layers } = self;
        let (experts, rows) = (selections.len() as f64, (tokens * layers).max(1) as f64);
        let products = selections.iter().zip(probabilities).map(|(f, p)| f / rows * (p / rows));
        let each = f64::from(per_token) * *tokens as f64 * experts / (rows * rows);
        (*layers > 0).then(|| RouterLoss {
            loss: experts * products.sum::<f64>(),
            tokens: *tokens,
            gradient: selections.iter().map(|f| (each * f) as f32).collect(),
        })
    }
}

impl RouterLoss {
    /// The pass in which the gradient goes to the logits.
    pub(crate) fn pass(of: Option<&Self>) -> RouterPass<'_> {
        of.map_or(RouterPass::Off, |loss| RouterPass::Backward(&loss.gradient))
    }

    /// The mean over tokens, as a metric.
    pub(crate) fn metric(&self) -> Metric {
        Metric::new(AUX_LOSS, self.loss * self.tokens as f64, self.tokens)
    }
}

fn add(sums: &mut Vec<f64>, more: Vec<f64>) {
    sums.resize(more.len().max(sums.len()), 0.0);
    sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

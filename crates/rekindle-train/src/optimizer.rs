//! One optimizer step over given micro-batches.

use burn::tensor::DType;
use rekindle_kernels::adamw;
use rekindle_kernels::linear_cross_entropy::Losses;
use rekindle_models::{Batch, CausalLm, StepKey};

use crate::{Error, SftConfig};

/// AdamW's constants and the clipping threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// The global norm is clipped to this; 0 for no clipping.
    pub max_grad_norm: f64,
}

impl From<&SftConfig> for AdamW {
    fn from(config: &SftConfig) -> Self {
        Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            eps: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Σ nll ÷ counted tokens of the step, before the parameters moved.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that counted in the loss.
    pub counted: usize,
    /// Tokens that went through the model.
    pub tokens: usize,
}

/// AdamW with its state.
#[derive(Debug)]
pub struct Optimizer {
    config: AdamW,
    state: adamw::State,
    t: u64,
    seed: u64,
}

impl Optimizer {
    /// Zero moments for the parameters of `model`. `seed` is that of dropout.
    ///
    /// # Errors
    /// [`Error::NothingToTrain`], and [`Error::Config`] for a model in f16.
    pub fn new(model: &CausalLm, config: AdamW, seed: u64) -> Result<Self, Error> {
        let numel = model.params().numel();
        if numel == 0 {
            return Err(Error::NothingToTrain);
        }
        if model.dtype() == DType::F16 {
            let problem = "dtype \"f16\" is not trained in: its smallest value is 6e-8, and the loss is not scaled to keep \
                           gradients above that; use \"bf16\" or \"f32\"";
            return Err(Error::Config(vec![problem.to_owned()]));
        }
        Ok(Self { config, state: adamw::State::new(numel, model.device()), t: 0, seed })
    }

    /// Accumulates the gradient of the mean loss over all of `batches`, clips it by its global norm
    /// (times min(1, max_grad_norm / (norm + 1e-6)), as PyTorch), and moves the parameters.
    ///
    /// When the norm is not finite, as after a loss that is not, the parameters stay as they are; the caller sees it in
    /// the result.
    ///
    /// # Errors
    /// [`Error::Model`] when a batch does not fit the model, or the device fails.
    pub fn step(&mut self, model: &mut CausalLm, batches: &[Batch], lr: f64) -> Result<StepResult, Error> {
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let tokens = batches.iter().map(Batch::tokens).sum();
        let scale = 1.0 / counted.max(1) as f64;
        let key = StepKey { seed: self.seed, step: self.t as u32 };
        let mut grads = model.params().zero_grads();
        let mut losses = Vec::with_capacity(batches.len());
        for batch in batches {
            losses.push(model.forward_backward(batch, scale as f32, &mut grads, Some(key))?);
        }
        let AdamW { beta1, beta2, eps, weight_decay, max_grad_norm } = self.config;
        let step = adamw::Step { t: self.t + 1, lr, beta1, beta2, eps, weight_decay, grad_scale: 1.0 };
        let norm = adamw::clipped_step(model.params_mut(), &grads, &mut self.state, &step, max_grad_norm);
        // Everything is queued; from here on the host waits.
        let loss = losses.into_iter().map(Losses::sum).sum::<f64>() * scale;
        let result = StepResult { loss, grad_norm: norm.value(), counted, tokens };
        model.device().check().map_err(rekindle_models::Error::from)?;
        if result.grad_norm.is_finite() {
            self.t += 1;
        }
        Ok(result)
    }
}

//! Root-mean-square normalization.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use rekindle_kernels::rms_norm::{self, Gain};

use crate::device::{burn, rows, unrows, vector};
use crate::node::record;

/// Configuration of [`RmsNorm`].
#[derive(Config, Debug)]
pub struct RmsNormConfig {
    /// The size of the last axis.
    pub d_model: usize,
    /// Added to the mean square.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// True if the factor is 1 + gamma and gamma starts at 0, as in Gemma and Qwen3-Next.
    #[config(default = false)]
    pub one_plus: bool,
}

impl RmsNormConfig {
    /// Creates the layer; its factor is 1.
    pub fn init(&self, device: &Device) -> RmsNorm {
        let shape = [self.d_model];
        let gamma = if self.one_plus { Tensor::zeros(shape, device) } else { Tensor::ones(shape, device) };
        RmsNorm { gamma: Param::from_tensor(gamma), epsilon: self.epsilon, one_plus: self.one_plus }
    }
}

/// Root-mean-square normalization of the last axis (Zhang & Sennrich, arXiv:1910.07467):
/// y = g ∘ x / √(mean(x²) + ε), with g = gamma or 1 + gamma.
///
/// Records of `burn::nn::RmsNorm` load into it.
///
/// # Shapes
/// x, y `[.., d_model]`; gamma `[d_model]`.
///
/// # Dtypes
/// Statistics in `f32` for any dtype of x.
///
/// # Gradients
/// To x and gamma. Saved: x and one number a row. A frozen gamma gets no gradient.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The learned factor, `[d_model]`.
    pub gamma: Param<Tensor<1>>,
    /// Added to the mean square.
    pub epsilon: f64,
    /// True if the factor is 1 + gamma.
    pub one_plus: bool,
}

impl RmsNorm {
    /// Returns y for x.
    ///
    /// # Panics
    /// If the last axis of x is not `d_model`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (shape, gamma, eps, one_plus) = (x.dims(), self.gamma.val(), self.epsilon, self.one_plus);
        let [d_model] = gamma.dims();
        assert_eq!(shape[D - 1], d_model, "the last axis of x {shape:?} is d_model = {d_model}");
        let inputs = [Some(x.into_dispatch()), Some(gamma.into_dispatch())];
        Tensor::from_dispatch(record(inputs, move |inputs, [want_x, want_gamma]| {
            let [Some(x), Some(gamma)] = inputs else { unreachable!("both inputs were given") };
            let (x, gamma) = (rows::<D>(x), vector(gamma));
            let (stored, gamma) = (gamma.dtype(), gamma.cast(x.dtype()));
            let gain = if one_plus { Gain::OnePlus(gamma) } else { Gain::Plain(gamma) };
            let (y, rstd) = rms_norm::forward(&x, &gain, eps, 0);
            let pullback = move |dy| {
                let dy = rows::<D>(dy);
                let dgamma = || burn(rms_norm::weight_grad(&dy, &x, &rstd).cast(stored)).into_dispatch();
                let dgamma = want_gamma.then(dgamma);
                let dx = want_x.then(|| unrows(rms_norm::backward(&dy, &x, &gain, &rstd, None, 0), shape));
                [dx, dgamma]
            };
            (unrows(y, shape), Box::new(pullback))
        }))
    }
}

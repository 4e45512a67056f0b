//! The output layer and the cross-entropy together.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rekindle_kernels::linear_cross_entropy::{self, IGNORED, LmHead};
use rekindle_kernels::{Grads, Tensor as Matrix};

use crate::device::{burn, rows};
use crate::node::record;

/// Configuration of [`LinearCrossEntropy`].
#[derive(Config, Debug)]
pub struct LinearCrossEntropyConfig {
    /// The factor of the logits.
    #[config(default = 1.0)]
    pub multiplier: f32,
    /// c in logits of c·tanh(x / c); none by default.
    pub softcap: Option<f32>,
}

impl LinearCrossEntropyConfig {
    /// Creates the loss.
    pub fn init(&self) -> LinearCrossEntropy {
        LinearCrossEntropy { multiplier: self.multiplier, softcap: self.softcap }
    }
}

/// The mean cross-entropy of logits multiplier · h·Wᵀ, which never exist in full:
/// L = (1/n) Σ_t −log softmax(logits_t)\[target_t\] over the n rows with a target (the idea of Wijmans et al.,
/// arXiv:2411.09009). Target −100 means none.
///
/// W is an input, because models share it with their embedding table: `embedding.weight.val()`, or
/// `lm_head.weight.val().transpose()` of a `burn::nn::Linear`.
///
/// # Shapes
/// h `[.., hidden]`; W `[vocab, hidden]`; targets: one for each row of h, any number of axes; L `[1]`.
///
/// # Dtypes
/// Logits and everything after them in `f32`; L in `f32`; the gradients in the dtypes of h and W.
///
/// # Gradients
/// To h, and to W if it is tracked. The forward computes them, because the weight 1/n of every row is known; they are
/// saved instead of h and W, and the backward multiplies them with the gradient of L. Without gradients the forward
/// computes the loss alone.
#[derive(Module, Debug)]
pub struct LinearCrossEntropy {
    multiplier: f32,
    #[module(skip)]
    softcap: Option<f32>,
}

impl LinearCrossEntropy {
    /// Returns L, or 0 if no row has a target. Reads the targets on the host.
    ///
    /// # Panics
    /// If the shapes are not those of [`LinearCrossEntropy`], or a target is neither −100 nor below the vocabulary's size.
    pub fn forward<const D: usize, const T: usize>(
        &self,
        hidden: Tensor<D>,
        weight: Tensor<2>,
        targets: Tensor<T, Int>,
    ) -> Tensor<1> {
        let ([vocab, width], shape) = (weight.dims(), hidden.dims());
        assert_eq!(shape[D - 1], width, "h {shape:?} is as wide as W [{vocab}, {width}]");
        let targets: Vec<i32> = targets.into_data_as::<i32>().try_into_vec().expect("cast to i32 just before");
        let tokens = shape[..D - 1].iter().product::<usize>();
        assert_eq!(targets.len(), tokens, "h {shape:?} has a target for each row");
        let wrong = targets.iter().find(|&&t| t != IGNORED && !(0..vocab as i64).contains(&i64::from(t)));
        assert_eq!(wrong, None, "targets are {IGNORED} or below the vocabulary's size {vocab}");
        let (multiplier, softcap) = (self.multiplier, self.softcap);
        let on = hidden.device().without_autodiff();
        let inputs = [Some(hidden.into_dispatch()), Some(weight.into_dispatch())];
        Tensor::from_dispatch(record(inputs, move |inputs, [want_hidden, want_weight]| {
            let [Some(hidden), Some(weight)] = inputs else { unreachable!("both inputs were given") };
            let (hidden, weight) = (rows::<D>(hidden), rows::<2>(weight));
            let (device, weight_dtype) = (hidden.device(), weight.dtype());
            let head = LmHead { weight, multiplier, softcap };
            let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
            if !(want_hidden || want_weight) {
                let sum = linear_cross_entropy::forward(&hidden, &head, &targets).sum();
                return (scalar(sum / counted as f64, &on), Box::new(|_| [None, None]));
            }
            let mut dweight = want_weight.then(|| Grads::of_matrix(head.weight.dims(), &device));
            let into = dweight.as_mut().map(|(grads, at)| (grads, *at));
            let each = 1.0 / counted as f32;
            let (losses, dhidden) = linear_cross_entropy::forward_backward(&hidden, &head, &targets, each.into(), into);
            let pullback = move |dloss| {
                let dloss = Tensor::<1>::from_dispatch(dloss);
                let times = |grad: Matrix<2>, dtype: DType| {
                    let grad = burn(grad);
                    let dloss = dloss.clone().cast(grad.dtype());
                    (grad * dloss.unsqueeze::<2>()).cast(dtype)
                };
                let dtype = dhidden.dtype();
                let dhidden = want_hidden.then(|| times(dhidden, dtype).reshape(shape).into_dispatch());
                let dweight = dweight.map(|(grads, at)| times(grads.matrix(at), weight_dtype).into_dispatch());
                [dhidden, dweight]
            };
            (scalar(losses.sum() / counted as f64, &on), Box::new(pullback))
        }))
    }
}

fn scalar(value: f64, device: &Device) -> burn::backend::DispatchTensor {
    Tensor::<1>::from_data(TensorData::from([value as f32]), (device, DType::F32)).into_dispatch()
}

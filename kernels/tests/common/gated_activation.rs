//! Gated activations.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::gated_activation::{self, Activation};

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

/// SwiGLU, GeGLU, and a clamped SwiGLU whose bound cuts off a part of the gates and of up.
pub(crate) const ACTIVATIONS: [Activation; 3] =
    [Activation::Silu, Activation::GeluTanh, Activation::ClampedSwiglu { alpha: 1.702, limit: 3.3 }];

pub(crate) struct GatedActivation {
    activation: Activation,
    shape: [usize; 2],
    gate: Vec<f32>,
    up: Vec<f32>,
    dact: Vec<f32>,
}

impl GatedActivation {
    /// Gates in (−8, 8), where the sigmoid both bends and saturates; up in (−5, 5).
    pub(crate) fn new(activation: Activation, shape @ [tokens, width]: [usize; 2], dtype: DType) -> Self {
        let input = |seed, by: f32| rounded(noise(seed, tokens * width).iter().map(|x| x * by).collect(), dtype);
        Self { activation, shape, gate: input(1, 8.0), up: input(2, 5.0), dact: input(3, 1.0) }
    }

    fn graph(&self, dtype: DType, act: impl Fn(&BurnTensor<2>, &BurnTensor<2>) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (gate, up) = (oracle.leaf(&self.gate, self.shape), oracle.leaf(&self.up, self.shape));
        let act = act(&gate, &up);
        let grads = (act.clone() * oracle.constant(&self.dact, self.shape)).sum().backward();
        vec![("act", values(act)), ("dgate", grad(&gate, &grads)), ("dup", grad(&up, &grads))]
    }
}

/// As transformers writes it.
fn plain(activation: Activation, gate: &BurnTensor<2>, up: &BurnTensor<2>) -> BurnTensor<2> {
    let gate = gate.clone();
    match activation {
        Activation::Silu => gate.clone() / (gate.neg().exp() + 1.0) * up.clone(),
        Activation::GeluTanh => {
            let inner = (gate.clone() + gate.clone().powi_scalar(3) * 0.044715) * core::f64::consts::FRAC_2_PI.sqrt();
            gate * (inner.tanh() + 1.0) * 0.5 * up.clone()
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let gate = gate.clamp_max(limit);
            gate.clone() / ((gate * alpha).neg().exp() + 1.0) * (up.clone().clamp(-limit, limit) + 1.0)
        }
    }
}

impl Case for GatedActivation {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |gate, up| plain(self.activation, gate, up))
    }

    fn ours(&self, place: &Place) -> Results {
        let (gate, up) = (place.matrix(&self.gate, self.shape), place.matrix(&self.up, self.shape));
        let act = gated_activation::forward(self.activation, &gate, &up, ROOM);
        let dact = place.matrix(&self.dact, self.shape);
        let (dgate, dup, again) = gated_activation::backward(self.activation, dact, gate, up);
        vec![("act", values(act)), ("act", values(again)), ("dgate", values(dgate)), ("dup", values(dup))]
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |gate, up| {
            gated_activation::forward(self.activation, &gate.clone().into(), &up.clone().into(), 0).into()
        }))
    }
}

impl std::fmt::Debug for GatedActivation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gated_activation {:?} {:?}", self.activation, self.shape)
    }
}

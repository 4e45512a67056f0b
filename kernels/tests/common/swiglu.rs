//! SwiGLU.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::swiglu;

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

pub(crate) struct SwiGlu {
    shape: [usize; 2],
    gate: Vec<f32>,
    up: Vec<f32>,
    dact: Vec<f32>,
}

impl SwiGlu {
    /// Gates in (−8, 8), where the sigmoid both bends and saturates.
    pub(crate) fn new(shape @ [tokens, width]: [usize; 2], dtype: DType) -> Self {
        let input = |seed, by: f32| rounded(noise(seed, tokens * width).iter().map(|x| x * by).collect(), dtype);
        Self { shape, gate: input(1, 8.0), up: input(2, 1.0), dact: input(3, 1.0) }
    }

    fn graph(&self, dtype: DType, act: impl Fn(&BurnTensor<2>, &BurnTensor<2>) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (gate, up) = (oracle.leaf(&self.gate, self.shape), oracle.leaf(&self.up, self.shape));
        let act = act(&gate, &up);
        let grads = (act.clone() * oracle.constant(&self.dact, self.shape)).sum().backward();
        vec![("act", values(act)), ("dgate", grad(&gate, &grads)), ("dup", grad(&up, &grads))]
    }
}

impl Case for SwiGlu {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |gate, up| gate.clone() / (gate.clone().neg().exp() + 1.0) * up.clone())
    }

    fn ours(&self, place: &Place) -> Results {
        let (gate, up) = (place.matrix(&self.gate, self.shape), place.matrix(&self.up, self.shape));
        let act = swiglu::forward(&gate, &up, ROOM);
        let (dgate, dup, again) = swiglu::backward(place.matrix(&self.dact, self.shape), gate, up);
        vec![("act", values(act)), ("act", values(again)), ("dgate", values(dgate)), ("dup", values(dup))]
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |gate, up| swiglu::forward(&gate.clone().into(), &up.clone().into(), 0).into()))
    }
}

impl std::fmt::Debug for SwiGlu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "swiglu {:?}", self.shape)
    }
}

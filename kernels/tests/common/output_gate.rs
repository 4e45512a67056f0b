//! The gate on the result of attention.

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::output_gate;

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

pub(crate) struct OutputGate {
    tokens: usize,
    heads: usize,
    head_dim: usize,
    qg: Vec<f32>,
    o: Vec<f32>,
    dq: Vec<f32>,
    dy: Vec<f32>,
}

impl OutputGate {
    pub(crate) fn new([tokens, heads, head_dim]: [usize; 3], dtype: DType) -> Self {
        let n = tokens * heads * head_dim;
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        let (qg, o, dq, dy) = (input(1, 2 * n, 6.0), input(2, n, 1.0), input(3, n, 1.0), input(4, n, 1.0));
        Self { tokens, heads, head_dim, qg, o, dq, dy }
    }

    fn shape(&self) -> [usize; 2] {
        [self.tokens, self.heads * self.head_dim]
    }
}

impl Case for OutputGate {
    fn naive(&self, dtype: DType) -> Results {
        let oracle = Oracle::new(dtype);
        let shape @ [tokens, width] = self.shape();
        let (qg, o) = (oracle.leaf(&self.qg, [tokens, 2 * width]), oracle.leaf(&self.o, shape));
        let pairs: BurnTensor<4> = qg.clone().reshape([tokens, self.heads, 2, self.head_dim]);
        let part = |i| pairs.clone().narrow(2, i, 1).reshape(shape);
        let (q, y) = (part(0), o.clone() * sigmoid(part(1)));
        let loss = (q.clone() * oracle.constant(&self.dq, shape)) + (y.clone() * oracle.constant(&self.dy, shape));
        let grads = loss.sum().backward();
        vec![("q", values(q)), ("y", values(y)), ("do", grad(&o, &grads)), ("dqg", grad(&qg, &grads))]
    }

    fn ours(&self, place: &Place) -> Results {
        let (shape @ [tokens, width], dim) = (self.shape(), self.head_dim);
        let (qg, o) = (place.matrix(&self.qg, [tokens, 2 * width]), place.matrix(&self.o, shape));
        let (dq, dy) = (place.matrix(&self.dq, shape), place.matrix(&self.dy, shape));
        vec![
            ("q", values(output_gate::queries(&qg, dim))),
            ("y", values(output_gate::forward(&o, &qg, dim, ROOM))),
            ("do", values(output_gate::backward(&dy, &qg, dim))),
            ("dqg", values(output_gate::join(&dq, &dy, &o, &qg, dim))),
        ]
    }
}

impl std::fmt::Debug for OutputGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "output gate of {} tokens, {} heads of {}", self.tokens, self.heads, self.head_dim)
    }
}

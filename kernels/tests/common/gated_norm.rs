//! The gated norm of heads.

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::gated_norm;

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

const EPS: f64 = 1e-6;

pub(crate) struct GatedNorm {
    shape: [usize; 2],
    width: usize,
    x: Vec<f32>,
    z: Vec<f32>,
    weight: Vec<f32>,
    dy: Vec<f32>,
}

impl GatedNorm {
    pub(crate) fn new([tokens, heads, width]: [usize; 3], dtype: DType) -> Self {
        let input = |seed, n, by: f32| rounded(noise(seed, n).iter().map(|x| x * by).collect(), dtype);
        let n = tokens * heads * width;
        let (x, z, weight, dy) = (input(1, n, 1.0), input(2, n, 6.0), input(3, width, 1.0), input(4, n, 1.0));
        Self { shape: [tokens, heads * width], width, x, z, weight, dy }
    }

    fn graph(
        &self,
        dtype: DType,
        norm: impl Fn(&BurnTensor<2>, &BurnTensor<2>, &BurnTensor<1>) -> BurnTensor<2>,
    ) -> Results {
        let oracle = Oracle::new(dtype);
        let (x, z) = (oracle.leaf(&self.x, self.shape), oracle.leaf(&self.z, self.shape));
        let weight = oracle.leaf(&self.weight, [self.width]);
        let y = norm(&x, &z, &weight);
        let grads = (y.clone() * oracle.constant(&self.dy, self.shape)).sum().backward();
        vec![("y", values(y)), ("dx", grad(&x, &grads)), ("dz", grad(&z, &grads)), ("dw", grad(&weight, &grads))]
    }

    fn plain(&self, x: &BurnTensor<2>, z: &BurnTensor<2>, weight: &BurnTensor<1>) -> BurnTensor<2> {
        let heads = |t: &BurnTensor<2>| t.clone().reshape([self.shape[0] * self.shape[1] / self.width, self.width]);
        let (x, z) = (heads(x), heads(z));
        let n = x.clone() / ((x.clone() * x).mean_dim(1) + EPS).sqrt();
        (n * weight.clone().unsqueeze::<2>() * (z.clone() * sigmoid(z))).reshape(self.shape)
    }
}

impl Case for GatedNorm {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |x, z, weight| self.plain(x, z, weight))
    }

    fn ours(&self, place: &Place) -> Results {
        let (x, z) = (place.matrix(&self.x, self.shape), place.matrix(&self.z, self.shape));
        let (dy, weight) = (place.matrix(&self.dy, self.shape), place.vector(&self.weight));
        let y = gated_norm::forward(&x, &z, &weight, EPS, ROOM);
        let (dx, dz) = gated_norm::backward(&dy, &x, &z, &weight, EPS);
        let dw = gated_norm::weight_grad(&dy, &x, &z, &weight, EPS);
        vec![("y", values(y)), ("dx", values(dx)), ("dz", values(dz)), ("dw", values(dw))]
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |x, z, weight| {
            gated_norm::forward(&x.clone().into(), &z.clone().into(), &weight.clone().into(), EPS, 0).into()
        }))
    }
}

impl std::fmt::Debug for GatedNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gated norm {:?}, heads of {}", self.shape, self.width)
    }
}

//! RMSNorm, with and without the residual stream around it.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::rms_norm;

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

pub(crate) struct RmsNorm {
    shape: [usize; 2],
    x: Vec<f32>,
    weight: Vec<f32>,
    dy: Vec<f32>,
    /// What is added before the norm, and the gradient that reaches the sum beside it.
    residual: Option<(Vec<f32>, Vec<f32>)>,
}

const EPS: f64 = 1e-6;

impl RmsNorm {
    pub(crate) fn new(shape @ [tokens, hidden]: [usize; 2], residual: bool, dtype: DType) -> Self {
        let input = |seed, n| rounded(noise(seed, n), dtype);
        let n = tokens * hidden;
        Self {
            shape,
            x: input(1, n),
            weight: input(2, hidden),
            dy: input(3, n),
            residual: residual.then(|| (input(4, n), input(5, n))),
        }
    }

    fn graph(&self, dtype: DType, norm: impl Fn(&BurnTensor<2>, &BurnTensor<1>) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (x, weight) = (oracle.leaf(&self.x, self.shape), oracle.leaf(&self.weight, [self.shape[1]]));
        let dy = oracle.constant(&self.dy, self.shape);
        let (sum, y, loss) = match &self.residual {
            None => {
                let y = norm(&x, &weight);
                (x.clone(), y.clone(), (y * dy).sum())
            }
            Some((delta, beside)) => {
                let sum = x.clone() + oracle.constant(delta, self.shape);
                let y = norm(&sum, &weight);
                let beside = (sum.clone() * oracle.constant(beside, self.shape)).sum();
                (sum, y.clone(), (y * dy).sum() + beside)
            }
        };
        let grads = loss.backward();
        vec![("sum", values(sum)), ("y", values(y)), ("dx", grad(&x, &grads)), ("dw", grad(&weight, &grads))]
    }
}

/// x / √(mean(x²) + eps) ∘ w, as it is written.
pub(super) fn plain(x: &BurnTensor<2>, weight: &BurnTensor<1>, eps: f64) -> BurnTensor<2> {
    let rms = (x.clone().powi_scalar(2).mean_dim(1) + eps).sqrt();
    x.clone() / rms * weight.clone().unsqueeze::<2>()
}

impl Case for RmsNorm {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |x, weight| plain(x, weight, EPS))
    }

    fn ours(&self, place: &Place) -> Results {
        let (x, weight) = (place.matrix(&self.x, self.shape), place.vector(&self.weight));
        let dy = place.matrix(&self.dy, self.shape);
        let (sum, y, rstd) = match &self.residual {
            None => {
                let (y, rstd) = rms_norm::forward(&x, &weight, EPS, ROOM);
                (x, y, rstd)
            }
            Some((delta, _)) => rms_norm::add_forward(&x, place.matrix(delta, self.shape), &weight, EPS, ROOM),
        };
        let again = rms_norm::recompute(&sum, &weight, &rstd);
        let beside = self.residual.as_ref().map(|(_, beside)| place.matrix(beside, self.shape));
        let dx = rms_norm::backward(&dy, &sum, &weight, &rstd, beside, ROOM);
        let dw = rms_norm::weight_grad(&dy, &sum, &rstd);
        assert_eq!(values(y.clone()), values(again), "recomputing gives the same bits");
        vec![("sum", values(sum)), ("y", values(y)), ("dx", values(dx)), ("dw", values(dw))]
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |x, weight| {
            rms_norm::forward(&x.clone().into(), &weight.clone().into(), EPS, 0).0.into()
        }))
    }
}

impl std::fmt::Debug for RmsNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rms_norm {:?}, residual {}", self.shape, self.residual.is_some())
    }
}

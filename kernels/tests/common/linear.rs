//! Matrix products in their use: a linear layer with bias, forward and backward, with every `_add` form.

use burn::tensor::DType;
use rekindle_kernels::{ParamsBuilder, matmul};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values, widened};

/// y = x · Wᵀ + bias and out = start + α · y's product, with x `[m, k]` and W `[n, k]`.
pub(crate) struct Linear {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    dy: Vec<f32>,
    start: Vec<f32>,
    beside: Vec<f32>,
}

const ALPHA: f32 = 0.375;

impl Linear {
    pub(crate) fn new([m, n, k]: [usize; 3], dtype: DType) -> Self {
        let input = |seed, n| rounded(noise(seed, n), dtype);
        Self {
            m,
            n,
            k,
            x: input(1, m * k),
            w: input(2, n * k),
            bias: input(3, n),
            dy: input(4, m * n),
            start: input(5, m * n),
            beside: input(6, m * k),
        }
    }
}

impl Case for Linear {
    fn naive(&self, dtype: DType) -> Results {
        let &Self { m, n, k, .. } = self;
        let oracle = Oracle::new(dtype);
        let (x, w, bias) = (oracle.leaf(&self.x, [m, k]), oracle.leaf(&self.w, [n, k]), oracle.leaf(&self.bias, [n]));
        let dy = oracle.constant(&self.dy, [m, n]);
        let product = x.clone().matmul(w.clone().transpose());
        let y = product.clone() + bias.clone().unsqueeze::<2>();
        let added = oracle.constant(&self.start, [m, n]) + product.clone() * ALPHA;
        let grads = (y.clone() * dy.clone()).sum().backward();
        // The same product in a loss of its own, with a second way from the loss to x.
        let x2 = oracle.leaf(&self.x, [m, k]);
        let product2 = x2.clone().matmul(w.clone().transpose()) * ALPHA;
        let beside = (x2.clone() * oracle.constant(&self.beside, [m, k])).sum();
        let grads2 = ((product2 * dy).sum() + beside).backward();
        vec![
            ("product", values(product)),
            ("y", values(y)),
            ("added", values(added)),
            ("dx", grad(&x, &grads)),
            ("dx added", grad(&x2, &grads2)),
            ("dw", grad(&w, &grads)),
            ("dbias", grad(&bias, &grads)),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let &Self { m, n, k, .. } = self;
        let (x, w, dy) = (place.matrix(&self.x, [m, k]), place.matrix(&self.w, [n, k]), place.matrix(&self.dy, [m, n]));
        let bias = place.vector(&self.bias);
        let added = matmul::nt_add(place.matrix(&self.start, [m, n]), ALPHA, &x, &w);
        let dx_added = matmul::nn_add(place.matrix(&self.beside, [m, k]), ALPHA, &dy, &w);
        // Gradients lie between those of neighbours, which must stay untouched.
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        let before = builder.push("before", &[5], true, &[0.0; 5]);
        let w_at = builder.push("w", &[n, k], true, &self.w);
        let bias_at = builder.push("bias", &[n], false, &self.bias);
        let after = builder.push("after", &[3], true, &[0.0; 3]);
        let mut grads = builder.build().zero_grads();
        // In two parts, since gradients add up.
        grads.add_tn(w_at, 0.25, &dy, &x);
        grads.add_tn(w_at, 0.75, &dy, &x);
        grads.add_row_sum(bias_at, &dy);
        assert_eq!((grads.values(before), grads.values(after)), (vec![0.0; 5], vec![0.0; 3]));
        vec![
            ("product", values(matmul::nt(&x, &w))),
            ("y", values(matmul::nt_bias(&x, &w, &bias))),
            ("added", values(added)),
            ("dx", values(matmul::nn(&dy, &w))),
            ("dx added", values(dx_added)),
            ("dw", values(matmul::tn(&dy, &x))),
            ("dw", widened(grads.values(w_at))),
            ("dbias", widened(grads.values(bias_at))),
        ]
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "linear {} × {} × {}", self.m, self.n, self.k)
    }
}

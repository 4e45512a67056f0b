//! Rows without their mean.

use burn::tensor::DType;
use rekindle_kernels::center;

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

pub(crate) struct Center {
    shape: [usize; 2],
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Center {
    pub(crate) fn new(shape: [usize; 2], dtype: DType) -> Self {
        let n = shape[0] * shape[1];
        // A mean as large as the deviations from it.
        let x = rounded(noise(1, n).iter().map(|x| x + 1.0).collect(), dtype);
        Self { shape, x, dy: rounded(noise(2, n), dtype) }
    }
}

impl Case for Center {
    fn naive(&self, dtype: DType) -> Results {
        let oracle = Oracle::new(dtype);
        let x = oracle.leaf(&self.x, self.shape);
        let y = x.clone() - x.clone().mean_dim(1);
        let grads = (y.clone() * oracle.constant(&self.dy, self.shape)).sum().backward();
        vec![("y", values(y)), ("dx", grad(&x, &grads))]
    }

    fn ours(&self, place: &Place) -> Results {
        let (x, dy) = (place.matrix(&self.x, self.shape), place.matrix(&self.dy, self.shape));
        vec![("y", values(center::forward(&x))), ("dx", values(center::backward(&dy)))]
    }
}

impl std::fmt::Debug for Center {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} without the mean of each row", self.shape)
    }
}

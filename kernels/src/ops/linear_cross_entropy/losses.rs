//! Losses of tokens.

use super::counted;
use crate::Tensor;
use crate::runtime::Array;

/// The negative log-likelihood of every target, 0 where there is none. On CUDA they may still be on their way.
#[derive(Clone, Debug)]
pub struct Losses(pub(super) Storage);

#[derive(Clone, Debug)]
pub(super) enum Storage {
    Host(Vec<f32>),
    Cuda(Array),
}

impl Losses {
    /// The losses of the rows that have a target, in the places of all.
    pub(super) fn scattered(targets: &[i32], counted_nll: Vec<f32>) -> Self {
        let mut nll = vec![0.0; targets.len()];
        for (row, loss) in counted(targets).into_iter().zip(counted_nll) {
            nll[row] = loss;
        }
        Self(Storage::Host(nll))
    }

    /// The losses of rows that are not computed.
    pub(super) fn zeros(targets: &[i32]) -> Self {
        Self(Storage::Host(vec![0.0; targets.len()]))
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        match &self.0 {
            Storage::Host(nll) => nll.len(),
            Storage::Cuda(nll) => nll.cols(),
        }
    }

    /// Returns one number for every token. Waits for the device; after an error of the device they are NaN.
    pub fn values(self) -> Vec<f32> {
        match self.0 {
            Storage::Host(nll) => nll,
            Storage::Cuda(nll) => crate::to_f32(Tensor::<1>::Cuda(nll)),
        }
    }

    /// Returns their sum, in `f64`.
    pub fn sum(self) -> f64 {
        self.values().iter().map(|&x| f64::from(x)).sum()
    }
}

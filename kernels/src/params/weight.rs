//! A weight of a layer: frozen, quantized, sharded or trained.

use super::sharded::ShardedWeight;
use crate::{ParamRef, Params, QuantizedWeight, Tensor, to_f32};

/// Elements on the host at a time.
const ROWS_AT_ONCE: usize = 4 << 20;

/// A weight of a layer, `[out, in]`; a vector has one row.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a few hundred of them, each read once a step")]
pub enum Weight {
    /// Read only, in the compute dtype.
    Frozen(Tensor<2>),
    /// Read only, as codes that are decoded where they are used.
    Quantized(QuantizedWeight),
    /// Read only, and held by several ranks together.
    Sharded(ShardedWeight),
    /// One of the trainable parameters.
    Trained(ParamRef),
}

impl Weight {
    /// The weight as a matrix in the compute dtype. Of codes this is the whole decoded matrix: for a product use
    /// [`nt`](Self::nt) and [`nn`](Self::nn), which hold no more of it than they must.
    pub fn matrix(&self, params: &Params) -> Tensor<2> {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Quantized(packed) => packed.decode(params.dtype()),
            Self::Sharded(weight) => weight.gather().matrix(params),
            Self::Trained(at) => params.matrix(*at),
        }
    }

    /// A weight with one row as a vector in the compute dtype.
    pub fn vector(&self, params: &Params) -> Tensor<1> {
        self.matrix(params).row_vector()
    }

    /// Rows and columns; a vector has one row.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Frozen(tensor) => tensor.dims(),
            Self::Quantized(packed) => packed.dims(),
            Self::Sharded(weight) => weight.dims(),
            Self::Trained(at) => at.dims(),
        }
    }

    /// ‖w‖² of every row of a frozen weight, in `f32` from `f64` sums. Some rows at a time are decoded or copied.
    ///
    /// # Panics
    /// For a trained weight, whose rows change.
    pub fn row_norms_squared(&self) -> Vec<f32> {
        let [rows, cols] = self.dims();
        if self.is_planned() {
            return vec![0.0; rows];
        }
        let step = (ROWS_AT_ONCE / cols.max(1)).max(1);
        let whole = self.whole();
        let part = |first: usize| {
            let count = step.min(rows - first);
            to_f32(match &*whole {
                Self::Frozen(tensor) => tensor.rows(first, count),
                Self::Quantized(packed) => packed.decode_rows(first, count),
                Self::Sharded(_) => unreachable!("a whole weight"),
                Self::Trained(_) => panic!("the rows of a trained weight change"),
            })
        };
        let norm = |row: &[f32]| row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>() as f32;
        (0..rows).step_by(step).flat_map(|first| part(first).chunks_exact(cols).map(norm).collect::<Vec<_>>()).collect()
    }

    /// Returns whether it holds no values.
    fn is_planned(&self) -> bool {
        match self {
            Self::Frozen(tensor) => tensor.device().is_planned(),
            Self::Quantized(weight) => weight.is_planned(),
            Self::Sharded(weight) => weight.is_planned(),
            Self::Trained(_) => false,
        }
    }

    /// Returns the place of its gradient, if it is trained.
    pub fn trained(&self) -> Option<ParamRef> {
        match self {
            Self::Frozen(_) | Self::Quantized(_) | Self::Sharded(_) => None,
            Self::Trained(at) => Some(*at),
        }
    }

    /// Returns true if it is frozen and quantized.
    pub fn is_quantized(&self) -> bool {
        match self {
            Self::Quantized(_) => true,
            Self::Sharded(weight) => weight.is_quantized(),
            Self::Frozen(_) | Self::Trained(_) => false,
        }
    }

    /// The codes that the weight is kept in, if it is.
    pub(crate) fn quantized<'a>(&'a self, params: &'a Params) -> Option<&'a QuantizedWeight> {
        match self {
            Self::Frozen(_) | Self::Sharded(_) => None,
            Self::Quantized(packed) => Some(packed),
            Self::Trained(at) => params.quantized(*at),
        }
    }
}

//! The rotation in Burn ops; the formulas stand in [`super`].

use burn::tensor::{DType, Tensor};

use super::{CosSin, Direction};

pub(crate) fn rotate(x: Tensor<2>, head_dim: usize, angles: &CosSin, direction: Direction) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let [_, half] = angles.cos.dims();
    let dtype = x.dtype();
    let cos = angles.cos.clone().reshape([tokens, 1, half]);
    let sin = angles.sin.clone().reshape([tokens, 1, half]);
    let sin = if direction == Direction::Backward { sin.neg() } else { sin };
    let x = x.cast(DType::F32).reshape([tokens, width / head_dim, head_dim]);
    let first = x.clone().narrow(2, 0, half);
    let second = x.clone().narrow(2, half, half);
    let mut parts = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([tokens, width]).cast(dtype)
}

//! The rotation in Burn ops; the formulas stand in [`super`].

use burn::tensor::{DType, Tensor};

use super::{CosSin, Direction};

pub(crate) fn rotate(
    x: Tensor<2>,
    head_dim: usize,
    angles: &CosSin,
    interleaved: bool,
    direction: Direction,
) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let [_, half] = angles.cos.dims();
    let (dtype, heads) = (x.dtype(), width / head_dim);
    let cos = angles.cos.clone().reshape([tokens, 1, half]);
    let sin = angles.sin.clone().reshape([tokens, 1, half]);
    let sin = if direction == Direction::Backward { sin.neg() } else { sin };
    let x = x.cast(DType::F32).reshape([tokens, heads, head_dim]);
    let turned = x.clone().narrow(2, 0, 2 * half);
    // The two channels of a pair along an axis of their own.
    let (pairs, axis) = if interleaved {
        (turned.reshape([tokens, heads, half, 2]), 3)
    } else {
        (turned.reshape([tokens, heads, 2, half]), 2)
    };
    let member = |i| pairs.clone().narrow(axis, i, 1).reshape([tokens, heads, half]);
    let (first, second) = (member(0), member(1));
    let rotated = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
    let rotated: Tensor<4> = Tensor::stack(rotated, axis);
    let mut parts = vec![rotated.reshape([tokens, heads, 2 * half])];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([tokens, width]).cast(dtype)
}

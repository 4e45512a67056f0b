//! Rotary position embedding, with the per-head RMSNorm that Qwen3 puts before it.
//!
//! Each head is a row of `head_dim` channels; channel i of the first half and channel i of the second
//! half turn together by the angle of the token's position (Su et al., arXiv:2104.09864, in the
//! "rotate half" layout of transformers):
//! y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. Channels beyond twice the tables' width pass through.
//! The backward turns the other way.
//!
//! # Shapes
//! x, y `[tokens, heads · head_dim]`; cos, sin `[tokens, rotary_dim / 2]`; norm weight `[head_dim]`.
//!
//! # Gradients
//! To x and to the norm's weight. Saved: x and rstd if there is a norm, nothing otherwise.

use burn::tensor::Tensor;

use crate::{Path, cpu, portable};

/// Cosines and sines of the angles of every token of a batch, `[tokens, rotary_dim / 2]` in `f32`.
#[derive(Clone, Debug)]
pub struct Angles {
    /// Cosines.
    pub cos: Tensor<2>,
    /// Sines.
    pub sin: Tensor<2>,
}

/// The norm before the rotation.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[head_dim]`.
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub eps: f64,
}

/// Normalizes (if asked) and turns every head: `(y, rstd)`, rstd `[tokens · heads]`.
pub fn forward(x: Tensor<2>, head_dim: usize, norm: Option<&Norm>, angles: &Angles) -> (Tensor<2>, Option<Tensor<1>>) {
    let [tokens, width] = x.dims();
    let (x, rstd) = match norm {
        None => (x, None),
        Some(norm) => {
            let rows = x.reshape([tokens * width / head_dim, head_dim]);
            let (y, rstd) = crate::rms_norm::forward(&rows, &norm.weight, norm.eps);
            (y.reshape([tokens, width]), Some(rstd))
        }
    };
    (turn(x, head_dim, angles, Direction::Forward), rstd)
}

/// The gradient to x, and to the norm's weight when `weight_grad`.
///
/// `saved` is x and rstd when [`forward`] had a norm.
pub fn backward(
    dy: Tensor<2>,
    head_dim: usize,
    saved: Option<(&Norm, Tensor<2>, &Tensor<1>)>,
    angles: &Angles,
    weight_grad: bool,
) -> (Tensor<2>, Option<Tensor<1>>) {
    let [tokens, width] = dy.dims();
    let dx = turn(dy, head_dim, angles, Direction::Backward);
    let Some((norm, x, rstd)) = saved else { return (dx, None) };
    let heads = [tokens * width / head_dim, head_dim];
    let (dy, x) = (dx.reshape(heads), x.reshape(heads));
    let dw = weight_grad.then(|| crate::rms_norm::weight_grad(&dy, &x, rstd));
    let dx = crate::rms_norm::backward(&dy, &x, &norm.weight, rstd, None);
    (dx.reshape([tokens, width]), dw)
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

fn turn(x: Tensor<2>, head_dim: usize, angles: &Angles, direction: Direction) -> Tensor<2> {
    match Path::of(&x) {
        Path::Cpu => cpu::rope::turn(x, head_dim, angles, direction),
        Path::Portable => portable::rope::turn(x, head_dim, angles, direction),
    }
}

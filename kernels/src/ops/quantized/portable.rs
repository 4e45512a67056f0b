//! Products in Burn's operations: some rows of the weight are decoded, multiplied and dropped.

use core::ops::Range;

use burn::tensor::Tensor;

use crate::ops::matmul::portable::product;
use crate::ops::matmul::{Form, broadcast_rows};

/// Elements of W decoded at a time: 16 MiB of `f32`.
const SCRATCH: usize = 4 << 20;

/// `x · Wᵀ + bias`, with the rows of W that `decode` makes.
pub(crate) fn nt(
    [out, input]: [usize; 2],
    decode: impl Fn(Range<usize>) -> Tensor<2>,
    x: &Tensor<2>,
    bias: Option<&Tensor<1>>,
) -> Tensor<2> {
    let parts: Vec<_> = chunks(out, input).map(|rows| product(x, &decode(rows), Form::Nt)).collect();
    let y = Tensor::cat(parts, 1); // [tokens, out]
    match bias {
        None => y,
        Some(bias) => y + broadcast_rows(bias, x.dims()[0]),
    }
}

/// `dy · W`, added to `dx` if there is one, with the rows of W that `decode` makes.
pub(crate) fn nn(
    [out, input]: [usize; 2],
    decode: impl Fn(Range<usize>) -> Tensor<2>,
    dy: &Tensor<2>,
    dx: Option<Tensor<2>>,
) -> Tensor<2> {
    let add = |sum: Option<Tensor<2>>, rows: Range<usize>| {
        let part = product(&dy.clone().narrow(1, rows.start, rows.len()), &decode(rows), Form::Nn);
        Some(match sum {
            None => part,
            Some(sum) => sum + part,
        })
    };
    chunks(out, input).fold(dx, add).expect("a weight has rows")
}

fn chunks(out: usize, input: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (SCRATCH / input.max(1)).clamp(1, out.max(1));
    (0..out).step_by(rows).map(move |first| first..out.min(first + rows))
}

//! The rotation over slices, in place; the formulas stand in [`super`].

use burn::tensor::Tensor;

use super::{CosSin, Direction};
use crate::host::{View, for_rows, from_vec, into_vec};

pub(crate) fn rotate(
    x: Tensor<2>,
    head_dim: usize,
    angles: &CosSin,
    interleaved: bool,
    direction: Direction,
) -> Tensor<2> {
    let shape @ [_, width] = x.dims();
    let [_, half] = angles.cos.dims();
    let (cos, sin) = (View::of(&angles.cos), View::of(&angles.sin));
    let (cos, sin) = (cos.as_slice(), sin.as_slice());
    let sign = if direction == Direction::Backward { -1.0 } else { 1.0 };
    let mut x = into_vec(x);
    for_rows(
        &mut x,
        width,
        #[inline(always)]
        |first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let at = (first + i) * half;
                let (cos, sin) = (&cos[at..][..half], &sin[at..][..half]);
                for head in row.chunks_exact_mut(head_dim) {
                    if interleaved {
                        for (j, pair) in head.chunks_exact_mut(2).take(half).enumerate() {
                            let (a, b, c, s) = (pair[0], pair[1], cos[j], sign * sin[j]);
                            (pair[0], pair[1]) = (a * c - b * s, b * c + a * s);
                        }
                        continue;
                    }
                    let (a, b) = head.split_at_mut(half);
                    for j in 0..half {
                        let (c, s) = (cos[j], sign * sin[j]);
                        (a[j], b[j]) = (a[j] * c - b[j] * s, b[j] * c + a[j] * s);
                    }
                }
            }
        },
    );
    from_vec(x, shape)
}

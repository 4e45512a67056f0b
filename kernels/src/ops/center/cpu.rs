//! Rows without their mean over slices.

use burn::tensor::Tensor as BurnTensor;

use crate::host::{View, for_rows, from_vec};

/// Partial sums of a row, which vectorize and keep the mean's error small.
const LANES: usize = 16;

pub(super) fn forward(x: &BurnTensor<2>) -> BurnTensor<2> {
    let [rows, width] = x.dims();
    let view = View::of(x);
    let x = view.as_slice();
    let mut y = vec![0.0; rows * width];
    for_rows(
        &mut y,
        width,
        #[inline(always)]
        |first, rows| {
            rows.copy_from_slice(&x[first * width..][..rows.len()]);
            for row in rows.chunks_exact_mut(width) {
                let mean = sum(row) / width as f32;
                row.iter_mut().for_each(|x| *x -= mean);
            }
        },
    );
    from_vec(y, [rows, width])
}

#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    lanes.iter().sum::<f32>() + rest
}

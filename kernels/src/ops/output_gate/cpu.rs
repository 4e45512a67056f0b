//! The output gate over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;

use crate::host::exp::sigmoid;
use crate::host::{View, for_rows, from_vec};

pub(super) fn gated(o: &Tensor<2>, qg: &Tensor<2>, head_dim: usize) -> Tensor<2> {
    let shape @ [tokens, width] = o.dims();
    let (o, qg) = (View::of(o), View::of(qg));
    let (o, qg) = (o.as_slice(), qg.as_slice());
    let mut y = vec![0.0; tokens * width];
    for_rows(
        &mut y,
        width,
        #[inline(always)]
        |first, rows| {
            let from = first * width;
            let heads = rows.chunks_exact_mut(head_dim).zip(o[from..].chunks_exact(head_dim));
            for ((y, o), qg) in heads.zip(qg[2 * from..].chunks_exact(2 * head_dim)) {
                for ((y, &o), &g) in y.iter_mut().zip(o).zip(&qg[head_dim..]) {
                    *y = o * sigmoid(g);
                }
            }
        },
    );
    from_vec(y, shape)
}

pub(super) fn join([dq, dy, o, qg]: [&Tensor<2>; 4], head_dim: usize) -> Tensor<2> {
    let shape @ [tokens, width] = qg.dims();
    let [dq, dy, o, qg] = [dq, dy, o, qg].map(View::of);
    let [dq, dy, o, qg] = [&dq, &dy, &o, &qg].map(View::as_slice);
    let mut dqg = vec![0.0; tokens * width];
    for_rows(
        &mut dqg,
        width,
        #[inline(always)]
        |first, rows| {
            let head = first * width / (2 * head_dim);
            for (head, dqg) in (head..).zip(rows.chunks_exact_mut(2 * head_dim)) {
                let at = head * head_dim;
                let (queries, logits) = dqg.split_at_mut(head_dim);
                queries.copy_from_slice(&dq[at..][..head_dim]);
                let g = &qg[2 * at + head_dim..][..head_dim];
                let gradients = dy[at..][..head_dim].iter().zip(&o[at..][..head_dim]);
                for ((dg, &g), (&dy, &o)) in logits.iter_mut().zip(g).zip(gradients) {
                    let s = sigmoid(g);
                    *dg = dy * o * (s * (1.0 - s));
                }
            }
        },
    );
    from_vec(dqg, shape)
}

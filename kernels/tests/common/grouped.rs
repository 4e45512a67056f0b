//! Grouped products, in their use: a linear layer of every expert, forward and backward, with every `_add` form.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::grouped::{self, GroupedRows};
use rekindle_kernels::routing::{Dispatch, HostDispatch};
use rekindle_kernels::{ParamsBuilder, Tensor};

use super::{Case, Oracle, Place, Results, grad, noise, rounded, values, widened};

/// y_e = x_e · W_eᵀ for rows x of `k` columns and matrices of `n` rows.
pub(crate) struct Grouped {
    /// The expert of each selection, `top_k` a token.
    chosen: Vec<u32>,
    experts: usize,
    top_k: usize,
    n: usize,
    k: usize,
    /// Operands have one row for each token, not for each selection.
    by_token: bool,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
    /// `[rows, n + LEFT + RIGHT]`.
    start: Vec<f32>,
    /// `[rows, k]`.
    beside: Vec<f32>,
}

const ALPHA: f32 = 0.375;

/// Columns of `start` before and behind those that a product is added to: views begin at 16 bytes.
const LEFT: usize = 8;
const RIGHT: usize = 3;

impl Grouped {
    /// Experts that have these numbers of tokens each, one expert a token; the tokens of different experts alternate.
    pub(crate) fn with_rows(rows: &[usize], [n, k]: [usize; 2], dtype: DType) -> Self {
        let most = rows.iter().max().copied().unwrap_or(0);
        let turns = (0..most).flat_map(|turn| (0_u32..).zip(rows).filter(move |(_, rows)| turn < **rows));
        let chosen = turns.map(|(expert, _)| expert).collect();
        Self::new(chosen, rows.len(), 1, [n, k], false, dtype)
    }

    /// Rows of tokens, each of which `top_k` of the experts read.
    pub(crate) fn of_tokens(tokens: usize, experts: usize, top_k: usize, sizes: [usize; 2], dtype: DType) -> Self {
        let chosen = (0..tokens * top_k).map(|s| ((s / top_k * 5 + s % top_k * 3) % experts) as u32).collect();
        Self::new(chosen, experts, top_k, sizes, true, dtype)
    }

    fn new(chosen: Vec<u32>, experts: usize, top_k: usize, [n, k]: [usize; 2], by_token: bool, dtype: DType) -> Self {
        let rows = chosen.len();
        let operand = if by_token { rows / top_k } else { rows };
        let input = |seed, n| rounded(noise(seed, n), dtype);
        Self {
            x: input(1, operand * k),
            w: input(2, experts * n * k),
            dy: input(3, operand * n),
            start: input(4, rows * (n + LEFT + RIGHT)),
            beside: input(5, rows * k),
            chosen,
            experts,
            top_k,
            n,
            k,
            by_token,
        }
    }

    fn host(&self) -> HostDispatch {
        HostDispatch::of(&self.chosen, self.experts)
    }

    /// Values of an operand of `width` columns as rows in the order of the dispatch.
    fn sorted(&self, values: &[f32], width: usize) -> Vec<f32> {
        let HostDispatch { sorted, .. } = self.host();
        if !self.by_token {
            return values.to_vec();
        }
        let tokens = sorted.iter().map(|&selection| selection as usize / self.top_k);
        tokens.flat_map(|token| values[token * width..][..width].to_vec()).collect()
    }

    /// Rows of the operands.
    fn operand_rows(&self) -> usize {
        if self.by_token { self.chosen.len() / self.top_k } else { self.chosen.len() }
    }

    fn rows<'a>(&self, tensor: &'a Tensor<2>) -> GroupedRows<'a> {
        if self.by_token { GroupedRows::Tokens(tensor) } else { GroupedRows::Sorted(tensor) }
    }
}

impl Case for Grouped {
    fn naive(&self, dtype: DType) -> Results {
        let (rows, n, k) = (self.chosen.len(), self.n, self.k);
        let oracle = Oracle::new(dtype);
        let (x, w) = (oracle.leaf(&self.sorted(&self.x, k), [rows, k]), oracle.leaf(&self.w, [self.experts * n, k]));
        let x2 = oracle.leaf(&self.sorted(&self.x, k), [rows, k]);
        let host = self.host();
        let product = |x: &BurnTensor<2>| -> BurnTensor<2> {
            let parts = (0..self.experts).filter(|&expert| !host.range(expert).is_empty()).map(|expert| {
                let w = w.clone().narrow(0, expert * n, n);
                x.clone().slice([host.range(expert)]).matmul(w.transpose())
            });
            BurnTensor::cat(parts.collect(), 0)
        };
        let y = product(&x);
        let start = oracle.constant(&self.start, [rows, n + LEFT + RIGHT]);
        let inner = start.clone().narrow(1, LEFT, n) + y.clone() * ALPHA;
        let added = BurnTensor::cat(vec![start.clone().narrow(1, 0, LEFT), inner, start.narrow(1, LEFT + n, RIGHT)], 1);
        let dy = oracle.constant(&self.sorted(&self.dy, n), [rows, n]);
        let grads = (y.clone() * dy.clone()).sum().backward();
        // The same product in a loss of its own, with a second way from the loss to x.
        let beside = (x2.clone() * oracle.constant(&self.beside, [rows, k])).sum();
        let grads2 = ((product(&x2) * ALPHA * dy).sum() + beside).backward();
        vec![
            ("y", values(y)),
            ("added", values(added)),
            ("dx", grad(&x, &grads)),
            ("dx added", grad(&x2, &grads2)),
            ("dw", grad(&w, &grads)),
        ]
    }

    fn ours(&self, place: &Place) -> Results {
        let (rows, operand, n, k) = (self.chosen.len(), self.operand_rows(), self.n, self.k);
        let dispatch = Dispatch::of(&self.chosen, self.experts, self.top_k, &place.device);
        let (x, dy) = (place.matrix(&self.x, [operand, k]), place.matrix(&self.dy, [operand, n]));
        let w = place.matrix(&self.w, [self.experts * n, k]);
        let start = place.matrix(&self.start, [rows, n + LEFT + RIGHT]);
        let added = grouped::nt_add(start, LEFT, ALPHA, self.rows(&x), &w, &dispatch);
        let beside = place.matrix(&self.beside, [rows, k]);
        let dx_added = grouped::nn_add(beside, ALPHA, self.rows(&dy), &w, &dispatch);
        // Gradients lie between those of neighbours, which must stay untouched.
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        let before = builder.push("before", &[5], true, &[0.0; 5]);
        let w_at = builder.push("w", &[self.experts * n, k], true, &self.w);
        let after = builder.push("after", &[3], true, &[0.0; 3]);
        let mut grads = builder.build().zero_grads();
        // In two parts, since gradients add up.
        grads.add_grouped_tn(w_at, 0.25, self.rows(&dy), self.rows(&x), &dispatch);
        grads.add_grouped_tn(w_at, 0.75, self.rows(&dy), self.rows(&x), &dispatch);
        assert_eq!((grads.values(before), grads.values(after)), (vec![0.0; 5], vec![0.0; 3]));
        vec![
            ("y", values(grouped::nt(self.rows(&x), &w, &dispatch))),
            ("added", values(added)),
            ("dx", values(grouped::nn(self.rows(&dy), &w, &dispatch))),
            ("dx added", values(dx_added)),
            ("dw", widened(grads.values(w_at))),
        ]
    }
}

impl std::fmt::Debug for Grouped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { experts, top_k, n, k, by_token, .. } = self;
        let operands = if *by_token { "tokens" } else { "rows" };
        write!(f, "grouped {} {operands} × {n} × {k}, {top_k} of {experts} experts", self.operand_rows())
    }
}

//! Forward and backward of a group.

use rekindle_kernels::stacked::{Stacked, Wanted};
use rekindle_kernels::{Grads, Params, Tensor, dropout, matmul};

use super::{Dropout, LinearGroup, Placed};
use crate::magnitude;

/// What [`LinearGroup::forward`] keeps.
#[derive(Clone, Debug)]
pub struct Saved {
    xa: Option<Tensor<2>>,
    /// One for each linear that has a magnitude, in order.
    magnitudes: Vec<magnitude::Saved>,
}

/// What the gradients of the parameters need of the way back to x.
#[derive(Debug)]
pub struct Pending {
    /// The gradient to x·Aᵀ.
    dxa: Option<Tensor<2>>,
    /// The gradients to the results before their magnitudes, where they have one.
    direct: Vec<Option<Tensor<2>>>,
}

impl Saved {
    /// Whether this is no more than x·Aᵀ.
    pub fn is_small(&self) -> bool {
        self.magnitudes.is_empty()
    }

    /// The same without a hold on x, beside which x·Aᵀ may lie.
    #[must_use]
    pub fn detached(self) -> Self {
        Self { xa: self.xa.map(Tensor::detached), ..self }
    }
}

impl LinearGroup {
    /// Whether what [`forward`](Self::forward) keeps lies beside x, so that x may as well be kept.
    pub fn keeps_input(&self) -> bool {
        self.stack.is_some()
    }

    /// The results of all linears for the same x.
    pub fn forward(&self, params: &Params, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> (Vec<Tensor<2>>, Saved) {
        self.run(params, x, dropout, None)
    }

    /// The result of a group of one, added to `onto`.
    ///
    /// # Panics
    /// For a group of several.
    pub fn forward_onto(
        &self,
        params: &Params,
        x: &Tensor<2>,
        dropout: Option<Dropout<'_>>,
        onto: &Tensor<2>,
    ) -> (Tensor<2>, Saved) {
        let (ys, saved) = self.run(params, x, dropout, Some(onto));
        let [y] = ys.try_into().expect("a group of one");
        (y, saved)
    }

    fn run(
        &self,
        params: &Params,
        x: &Tensor<2>,
        dropout: Option<Dropout<'_>>,
        onto: Option<&Tensor<2>>,
    ) -> (Vec<Tensor<2>>, Saved) {
        let dropped = self.dropped(x, dropout);
        if let Some(stack) = &self.stack {
            let (ys, xa) = stack.forward(x, dropout.map(|_| &dropped), onto.cloned());
            return (ys, Saved { xa: Some(xa), magnitudes: Vec::new() });
        }
        let xa = self.a.map(|a| matmul::nt(&dropped, &params.matrix(a))); // [tokens, Σ r]
        let (mut first, mut saved) = (0, Vec::new());
        let ys = self.linears.iter().map(|linear| {
            let bias = linear.bias(params);
            let (Some(adapter), Some(xa)) = (&linear.adapter, &xa) else {
                return linear.weight.nt(params, x, bias.as_ref());
            };
            let (part, b) = (adapter.columns(xa, &mut first), params.matrix(adapter.b));
            match &adapter.magnitude {
                None => {
                    let y = linear.weight.nt(params, x, bias.as_ref());
                    matmul::nt_add(y, adapter.scale, &part, &b)
                }
                Some(magnitude) => {
                    let gain = magnitude.gain(params, &linear.weight, adapter.a, adapter.b, adapter.scale);
                    let z = matmul::nt_add(linear.weight.nt(params, &dropped, None), adapter.scale, &part, &b);
                    let beside = dropout.map(|_| {
                        let difference = x.clone().plus(&dropped.clone().scale(-1.0));
                        linear.weight.nt(params, &difference, None)
                    });
                    let (y, kept) = magnitude::forward(z, beside, gain);
                    saved.push(kept);
                    match bias {
                        None => y,
                        Some(bias) => y.add_row(&bias),
                    }
                }
            }
        });
        let ys = ys.map(|y| if let Some(onto) = onto { y.plus(onto) } else { y }).collect();
        (ys, Saved { xa, magnitudes: saved })
    }

    /// The gradient to x if `want_dx`, and what [`backward_params`](Self::backward_params) needs of it. Adds the
    /// gradients of magnitudes.
    ///
    /// In two halves, so that x can be made between them out of the gradient to it.
    pub fn backward_input(
        &self,
        params: &Params,
        grads: &mut Grads,
        saved: &Saved,
        dys: &[Tensor<2>],
        dropout: Option<Dropout<'_>>,
        want_dx: bool,
    ) -> (Option<Tensor<2>>, Pending) {
        if let Some(stack) = &self.stack {
            return self.backward_stacked(stack, params, dys, dropout, want_dx);
        }
        let mut dx: Option<Tensor<2>> = None;
        // DoRA with dropout has two ways back to x on the base's side; this is the one through dropout(x).
        let mut d_dropped: Option<Tensor<2>> = None;
        let (mut dxa, mut directs) = (Vec::new(), Vec::new());
        let mut kept = saved.magnitudes.iter();
        for (linear, dy) in self.linears.iter().zip(dys) {
            // The gradient to x·Wᵀ, with a magnitude before it.
            let mut direct = None;
            if let Some(adapter) = &linear.adapter {
                if let Some(magnitude) = &adapter.magnitude {
                    let kept = kept.next().expect("the forward kept one for each magnitude");
                    direct = Some(kept.backward(dy, grads, magnitude.at));
                }
                let direct = direct.as_ref().unwrap_or(dy);
                dxa.push(matmul::nn(direct, &params.matrix(adapter.b)).scale(adapter.scale)); // [tokens, r]
            }
            if want_dx {
                let through = match (&direct, dropout) {
                    (Some(direct), Some(_)) => {
                        let rest = direct.clone().plus(&dy.clone().scale(-1.0));
                        d_dropped = Some(linear.weight.nn(params, &rest, d_dropped));
                        dy
                    }
                    (Some(direct), None) => direct,
                    (None, _) => dy,
                };
                dx = Some(linear.weight.nn(params, through, dx));
            }
            directs.push(direct);
        }
        let dxa = self.a.map(|_| Tensor::cat_columns(dxa)); // [tokens, Σ r]
        if let (Some(a), Some(dxa)) = (self.a, &dxa) {
            dx = dx.map(|dx| match dropout {
                None => matmul::nn_add(dx, 1.0, dxa, &params.matrix(a)),
                Some(key) => {
                    let through_a = matmul::nn(dxa, &params.matrix(a));
                    let all = d_dropped.map_or_else(|| through_a.clone(), |d| d.plus(&through_a));
                    dx.plus(&dropout::apply(&all, key, self.site))
                }
            });
        }
        (dx, Pending { dxa, direct: directs })
    }

    fn backward_stacked(
        &self,
        stack: &Stacked,
        params: &Params,
        dys: &[Tensor<2>],
        dropout: Option<Dropout<'_>>,
        want_dx: bool,
    ) -> (Option<Tensor<2>>, Pending) {
        let a = self.a.expect("what is stacked has an adapter");
        let wanted = match (want_dx, dropout) {
            (false, _) => Wanted::No,
            (true, None) => Wanted::Whole,
            (true, Some(_)) => Wanted::Base,
        };
        let (dxa, mut dx) = stack.backward(dys, wanted);
        // Without the zeros that fill up its rank.
        let dxa = dxa.columns(0, a.dims()[0]);
        if let (Some(base), Some(key)) = (&dx, dropout) {
            let through_a = matmul::nn(&dxa, &params.matrix(a));
            dx = Some(base.clone().plus(&dropout::apply(&through_a, key, self.site)));
        }
        (dx, Pending { dxa: Some(dxa), direct: dys.iter().map(|_| None).collect() })
    }

    /// Adds the gradients of what is trained, for the x that [`forward`](Self::forward) was given.
    #[allow(clippy::too_many_arguments, reason = "the backward's inputs, each a different thing")]
    pub fn backward_params(
        &self,
        grads: &mut Grads,
        x: &Tensor<2>,
        saved: &Saved,
        dys: &[Tensor<2>],
        pending: Pending,
        dropout: Option<Dropout<'_>>,
    ) {
        let mut first = 0;
        for ((linear, dy), direct) in self.linears.iter().zip(dys).zip(&pending.direct) {
            if let Some(at) = linear.weight.trained() {
                grads.add_tn(at, 1.0, dy, x);
            }
            if let Some(at) = linear.bias_grad() {
                grads.add_row_sum(at, dy);
            }
            if let (Some(adapter), Some(xa)) = (&linear.adapter, &saved.xa) {
                let direct = direct.as_ref().unwrap_or(dy);
                grads.add_tn(adapter.b, adapter.scale, direct, &adapter.columns(xa, &mut first));
            }
        }
        if let (Some(a), Some(dxa)) = (self.a, &pending.dxa) {
            grads.add_tn(a, 1.0, dxa, &self.dropped(x, dropout));
        }
    }

    /// Both halves at once: [`backward_input`](Self::backward_input) and [`backward_params`](Self::backward_params).
    #[allow(clippy::too_many_arguments, reason = "the backward's inputs, each a different thing")]
    pub fn backward(
        &self,
        params: &Params,
        grads: &mut Grads,
        x: &Tensor<2>,
        saved: &Saved,
        dys: &[Tensor<2>],
        dropout: Option<Dropout<'_>>,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let (dx, pending) = self.backward_input(params, grads, saved, dys, dropout, want_dx);
        self.backward_params(grads, x, saved, dys, pending, dropout);
        dx
    }

    fn dropped(&self, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> Tensor<2> {
        match dropout.filter(|_| self.a.is_some()) {
            None => x.clone(),
            Some(key) => dropout::apply(x, key, self.site),
        }
    }
}

impl Placed {
    /// This adapter's columns of x·Aᵀ, `[tokens, r]`; moves `first` past them.
    fn columns(&self, xa: &Tensor<2>, first: &mut usize) -> Tensor<2> {
        let [r, _] = self.a.dims();
        let part = xa.columns(*first, r);
        *first += r;
        part
    }
}

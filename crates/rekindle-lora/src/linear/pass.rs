//! Forward and backward of a group.

use rekindle_kernels::fp8::{self, Fp8Products};
use rekindle_kernels::stacked::{InputGradient, Stacked, StackedSaved};
use rekindle_kernels::{Grads, Params, QuantizedWeight, Tensor, Weight, dropout, matmul};

use super::{AdapterRows, Dropout, Linear, LinearGroup, Placed};
use crate::dora::layer as magnitude;

/// Everything a pass through linears shares.
#[derive(Clone, Copy, Debug)]
pub struct LinearContext<'a> {
    /// The trained parameters.
    pub params: &'a Params,
    /// Dropout before A; `None` outside training.
    pub dropout: Option<Dropout<'a>>,
    /// True if adapters take part. Without them y = x·Wᵀ + b of the base model, and nothing of an adapter gets a
    /// gradient; no weight is moved or copied.
    pub adapters: bool,
    /// Adapters of some rows each, in order and apart from each other; only in forward passes, and without `adapters`.
    pub rows: &'a [AdapterRows<'a>],
}

impl<'a> LinearContext<'a> {
    /// A pass with adapters and without dropout.
    pub fn new(params: &'a Params) -> Self {
        Self { params, dropout: None, adapters: true, rows: &[] }
    }

    /// The same pass with dropout before A.
    #[must_use]
    pub fn with_dropout(self, dropout: Option<Dropout<'a>>) -> Self {
        Self { dropout, ..self }
    }
}

/// Tensors that [`LinearGroup::forward`] saves for the backward.
#[derive(Clone, Debug)]
pub struct LinearSaved {
    xa: Option<Tensor<2>>,
    /// The results of a stack before their magnitudes.
    z: Option<Tensor<2>>,
    /// One for each linear that has a magnitude, in order.
    magnitudes: Vec<magnitude::MagnitudeSaved>,
}

/// Intermediate gradients that [`LinearGroup::backward_params`] needs from [`LinearGroup::backward_input`].
#[derive(Debug)]
pub struct LinearPending {
    /// The gradient to x·Aᵀ.
    dxa: Option<Tensor<2>>,
    /// The gradients to the results before their magnitudes, where they have one.
    direct: Vec<Option<Tensor<2>>>,
    /// One gradient a linear, where a fused one has several outputs.
    joined: Option<Vec<Tensor<2>>>,
}

impl LinearSaved {
    /// Returns true if this is no more than x·Aᵀ.
    pub fn is_small(&self) -> bool {
        self.magnitudes.is_empty() && self.z.is_none()
    }

    /// The same without a reference to the memory of x, which x·Aᵀ may share.
    #[must_use]
    pub fn detached(self) -> Self {
        Self { xa: self.xa.map(Tensor::detached), ..self }
    }
}

impl LinearGroup {
    /// Returns true if what [`forward`](Self::forward) keeps lies beside x, so that x may as well be kept.
    pub fn keeps_input(&self) -> bool {
        self.room() > 0
    }

    /// Returns the outputs of all linears for the same x.
    pub fn forward(&self, ctx: LinearContext<'_>, x: &Tensor<2>) -> (Vec<Tensor<2>>, LinearSaved) {
        self.run(ctx, x, None)
    }

    /// Returns the result of a group with a single output, added to `onto`.
    ///
    /// # Panics
    /// For a group with several outputs.
    pub fn forward_onto(&self, ctx: LinearContext<'_>, x: &Tensor<2>, onto: &Tensor<2>) -> (Tensor<2>, LinearSaved) {
        let (ys, saved) = self.run(ctx, x, Some(onto));
        let [y] = ys.try_into().expect("a group with one output");
        (y, saved)
    }

    fn run(&self, ctx: LinearContext<'_>, x: &Tensor<2>, onto: Option<&Tensor<2>>) -> (Vec<Tensor<2>>, LinearSaved) {
        let LinearContext { params, dropout, adapters, rows } = ctx;
        let none = || LinearSaved { xa: None, z: None, magnitudes: Vec::new() };
        if !rows.is_empty() {
            debug_assert!(!adapters, "rows have their own adapters");
            return (self.run_rows(params, rows, x, onto), none());
        }
        if !adapters {
            return (self.run_base(params, x, onto), none());
        }
        let dropped = self.dropped(x, dropout);
        if let Some(stack) = &self.stack {
            let (ys, StackedSaved { xa, z }) = stack.forward(x, dropout.map(|_| &dropped), onto.cloned());
            return (self.split(ys), LinearSaved { xa, z, magnitudes: Vec::new() });
        }
        let xa = self.a.map(|a| matmul::nt(&dropped, &params.matrix(a))); // [tokens, Σ r]
        let (mut first, mut saved) = (0, Vec::new());
        let ys = self.linears.iter().map(|linear| {
            let bias = linear.bias(params);
            let (Some(adapter), Some(xa)) = (&linear.adapter, &xa) else {
                return self.product(linear, params, x, bias.as_ref());
            };
            let (part, b) = (adapter.columns(xa, &mut first), params.matrix(adapter.b));
            match &adapter.magnitude {
                None => {
                    let y = self.product(linear, params, x, bias.as_ref());
                    matmul::nt_add(y, adapter.scale, &part, &b)
                }
                Some(magnitude) => {
                    let gain = magnitude.gain(params, &linear.weight, adapter.a, adapter.b, adapter.scale);
                    let z = matmul::nt_add(self.product(linear, params, &dropped, None), adapter.scale, &part, &b);
                    let beside = dropout.map(|_| {
                        let difference = x.clone().plus(&dropped.clone().scale(-1.0));
                        self.product(linear, params, &difference, None)
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
        let ys = ys.map(|y| sum(y, onto)).collect();
        (self.split(ys), LinearSaved { xa, z: None, magnitudes: saved })
    }

    /// The results of the base model's weights and biases alone.
    fn run_base(&self, params: &Params, x: &Tensor<2>, onto: Option<&Tensor<2>>) -> Vec<Tensor<2>> {
        if let Some(stack) = &self.stack {
            return self.split(stack.forward_base(x, onto.cloned()));
        }
        let ys = self.base_products(params, x).into_iter();
        self.split(ys.map(|y| sum(y, onto)).collect())
    }

    /// x·Wᵀ + b of each linear.
    pub(super) fn base_products(&self, params: &Params, x: &Tensor<2>) -> Vec<Tensor<2>> {
        if let Some(stack) = &self.stack {
            return stack.forward_base(x, None);
        }
        let product = |linear: &Linear| {
            let bias = linear.bias.as_ref().map(|bias| bias.vector(params));
            self.product(linear, params, x, bias.as_ref())
        };
        self.linears.iter().map(product).collect()
    }

    /// x·Wᵀ + bias.
    fn product(&self, linear: &Linear, params: &Params, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        match self.fp8.and_then(|_| quantized(linear)) {
            None => linear.weight.nt(params, x, bias),
            Some(weight) => fp8::nt(weight, x, bias),
        }
    }

    /// Σ_j dy_j·W_j in fp8, where it is in fp8.
    fn fp8_input_gradient(&self, dys: &[Tensor<2>]) -> Option<Tensor<2>> {
        self.fp8.filter(|products| *products == Fp8Products::ForwardAndBackward)?;
        let weights: Vec<_> = self.linears.iter().filter_map(quantized).collect();
        (weights.len() == dys.len()).then(|| fp8::input_gradient(&weights, dys))
    }

    /// The outputs of every linear, from one result each.
    pub(super) fn split(&self, ys: Vec<Tensor<2>>) -> Vec<Tensor<2>> {
        let outputs = |(linear, y): (&Linear, Tensor<2>)| {
            if linear.outputs.is_empty() {
                return vec![y];
            }
            let mut first = 0;
            let output = |&width: &usize| {
                first += width;
                y.columns(first - width, width)
            };
            linear.outputs.iter().map(output).collect()
        };
        self.linears.iter().zip(ys).flat_map(outputs).collect()
    }

    /// One gradient for each linear from one for each output; `None` where those are the same.
    fn joined(&self, dys: &[Tensor<2>]) -> Option<Vec<Tensor<2>>> {
        if self.linears.iter().all(|linear| linear.outputs.is_empty()) {
            return None;
        }
        let mut rest = dys;
        let join = |linear: &Linear| {
            let (own, others) = rest.split_at(linear.outputs.len().max(1));
            rest = others;
            Tensor::cat_columns(own.to_vec())
        };
        Some(self.linears.iter().map(join).collect())
    }

    /// Returns the gradient to x if `want_dx`, and what [`backward_params`](Self::backward_params) needs from this
    /// half. Adds the gradients of magnitudes.
    ///
    /// The backward has two halves so that x can be recomputed between them from the gradient to it.
    pub fn backward_input(
        &self,
        ctx: LinearContext<'_>,
        grads: &mut Grads,
        saved: &LinearSaved,
        dys: &[Tensor<2>],
        want_dx: bool,
    ) -> (Option<Tensor<2>>, LinearPending) {
        let LinearContext { params, dropout, adapters, .. } = ctx;
        if let Some(stack) = &self.stack {
            return self.backward_stacked(stack, ctx, grads, saved, dys, want_dx);
        }
        let joined = self.joined(dys);
        let dys = joined.as_deref().unwrap_or(dys);
        let in_fp8 = if want_dx && saved.magnitudes.is_empty() { self.fp8_input_gradient(dys) } else { None };
        let is_in_fp8 = in_fp8.is_some();
        let mut dx = in_fp8;
        // DoRA with dropout has two ways back to x on the base's side; this is the one through dropout(x).
        let mut d_dropped: Option<Tensor<2>> = None;
        let (mut dxa, mut directs) = (Vec::new(), Vec::new());
        let mut kept = saved.magnitudes.iter();
        for (linear, dy) in self.linears.iter().zip(dys) {
            // The gradient to x·Wᵀ, with a magnitude before it.
            let mut direct = None;
            if let Some(adapter) = linear.adapter.as_ref().filter(|_| adapters) {
                if let Some(magnitude) = &adapter.magnitude {
                    let kept = kept.next().expect("the forward kept one for each magnitude");
                    direct = Some(kept.backward(dy, grads, magnitude.at));
                }
                let direct = direct.as_ref().unwrap_or(dy);
                dxa.push(matmul::nn(direct, &params.matrix(adapter.b)).scale(adapter.scale)); // [tokens, r]
            }
            if want_dx && !is_in_fp8 {
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
        let a = self.a.filter(|_| adapters);
        let dxa = a.map(|_| Tensor::cat_columns(dxa)); // [tokens, Σ r]
        if let (Some(a), Some(dxa)) = (a, &dxa) {
            dx = dx.map(|dx| match dropout {
                None => matmul::nn_add(dx, 1.0, dxa, &params.matrix(a)),
                Some(key) => {
                    let through_a = matmul::nn(dxa, &params.matrix(a));
                    let all = d_dropped.map_or_else(|| through_a.clone(), |d| d.plus(&through_a));
                    dx.plus(&dropout::apply(&all, key, self.site))
                }
            });
        }
        (dx, LinearPending { dxa, direct: directs, joined })
    }

    fn backward_stacked(
        &self,
        stack: &Stacked,
        ctx: LinearContext<'_>,
        grads: &Grads,
        saved: &LinearSaved,
        dys: &[Tensor<2>],
        want_dx: bool,
    ) -> (Option<Tensor<2>>, LinearPending) {
        let none = || self.linears.iter().map(|_| None).collect();
        let Some(a) = self.a.filter(|_| ctx.adapters) else {
            let dx = want_dx.then(|| stack.backward_base(dys));
            return (dx, LinearPending { dxa: None, direct: none(), joined: self.joined(dys) });
        };
        let dzs = saved.z.as_ref().map(|z| stack.backward_magnitudes(dys, z, grads));
        let wanted = match (want_dx, ctx.dropout, &dzs) {
            (false, ..) => InputGradient::No,
            (true, Some(_), None) => InputGradient::Base,
            _ => InputGradient::Whole,
        };
        let (dxa, mut dx) = stack.backward(dzs.as_deref().unwrap_or(dys), wanted);
        // Without the zeros that fill up its rank.
        let dxa = dxa.columns(0, a.dims()[0]);
        if let (Some(found), Some(key)) = (&dx, ctx.dropout) {
            // What reaches x beside the mask, and what goes through it.
            let (beside, through) = match dzs {
                None => (found.clone(), matmul::nn(&dxa, &ctx.params.matrix(a))),
                Some(_) => {
                    let base = stack.backward_base(dys);
                    let through = found.clone().plus(&base.clone().scale(-1.0));
                    (base, through)
                }
            };
            dx = Some(beside.plus(&dropout::apply(&through, key, self.site)));
        }
        let direct = dzs.map_or_else(none, |dzs| dzs.into_iter().map(Some).collect());
        (dx, LinearPending { dxa: Some(dxa), direct, joined: self.joined(dys) })
    }

    /// Adds the gradients of what is trained, for the x that [`forward`](Self::forward) was given.
    pub fn backward_params(
        &self,
        ctx: LinearContext<'_>,
        grads: &mut Grads,
        x: &Tensor<2>,
        saved: &LinearSaved,
        dys: &[Tensor<2>],
        pending: LinearPending,
    ) {
        let LinearPending { dxa, direct, joined } = pending;
        let dys = joined.as_deref().unwrap_or(dys);
        let mut first = 0;
        for ((linear, dy), direct) in self.linears.iter().zip(dys).zip(&direct) {
            if let Some(at) = linear.weight.trained() {
                grads.add_tn(at, 1.0, dy, x);
            }
            if let Some(at) = linear.bias_grad().filter(|_| ctx.adapters || linear.trained_bias.is_none()) {
                grads.add_row_sum(at, dy);
            }
            if let (Some(adapter), Some(xa)) = (&linear.adapter, &saved.xa) {
                let direct = direct.as_ref().unwrap_or(dy);
                grads.add_tn(adapter.b, adapter.scale, direct, &adapter.columns(xa, &mut first));
            }
        }
        if let (Some(a), Some(dxa)) = (self.a, &dxa) {
            grads.add_tn(a, 1.0, dxa, &self.dropped(x, ctx.dropout));
        }
    }

    /// Both halves at once: [`backward_input`](Self::backward_input) and [`backward_params`](Self::backward_params).
    pub fn backward(
        &self,
        ctx: LinearContext<'_>,
        grads: &mut Grads,
        x: &Tensor<2>,
        saved: &LinearSaved,
        dys: &[Tensor<2>],
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let (dx, pending) = self.backward_input(ctx, grads, saved, dys, want_dx);
        self.backward_params(ctx, grads, x, saved, dys, pending);
        dx
    }

    fn dropped(&self, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> Tensor<2> {
        match dropout.filter(|_| self.a.is_some()) {
            None => x.clone(),
            Some(key) => dropout::apply(x, key, self.site),
        }
    }
}

/// `y + onto`, or y without one.
pub(super) fn sum(y: Tensor<2>, onto: Option<&Tensor<2>>) -> Tensor<2> {
    if let Some(onto) = onto { y.plus(onto) } else { y }
}

/// The weight of a linear that is quantized and frozen.
fn quantized(linear: &Linear) -> Option<&QuantizedWeight> {
    match &linear.weight {
        Weight::Quantized(weight) => Some(weight),
        Weight::Frozen(_) | Weight::Trained(_) | Weight::Sharded(_) => None,
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

#[cfg(test)]
mod tests;

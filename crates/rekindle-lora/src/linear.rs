//! Linears that read the same input, each with or without an adapter.

use burn::tensor::Tensor;
use rekindle_kernels::{Grads, ParamRef, Params, ParamsBuilder, Weight, dropout, matmul};

use crate::Factors;
use crate::peft::Factor;

/// A linear of the base model: y = x·Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// W, `[out, in]`.
    pub weight: Weight,
    /// b, one row of `out`.
    pub bias: Option<Weight>,
    adapter: Option<Placed>,
}

/// An adapter's place in the flat buffers.
#[derive(Clone, Copy, Debug)]
struct Placed {
    a: ParamRef,
    b: ParamRef,
    scale: f32,
}

/// Where dropout on the way to A takes its mask from.
pub type Dropout<'a> = dropout::Key<'a>;

/// Linears that read the same input, such as q, k and v.
///
/// y_j = x·W_jᵀ + b_j + s_j·(dropout(x)·A_jᵀ)·B_jᵀ
///
/// W_j is dense or in codes ([`Weight::Packed`]), which is QLoRA (arXiv:2305.14314).
///
/// The A's lie one after another in the flat buffer and are applied as one wide product; the dense
/// W + s·B·A is never formed, and no gradient of a frozen W is computed.
///
/// # Shapes
/// x `[tokens, in]`, y_j `[tokens, out_j]`, W_j `[out_j, in]`, A_j `[r_j, in]`, B_j `[out_j, r_j]`.
///
/// # Dtypes
/// A, B and all gradients of parameters in `f32`, read in the compute dtype, which x and W have.
///
/// # Gradients
/// dB_j = s_j·dy_jᵀ·(x·A_jᵀ); dA_j = s_j·(dy_j·B_j)ᵀ·x; dx = Σ_j dy_j·W_j + s_j·(dy_j·B_j)·A_j;
/// dW_j = dy_jᵀ·x and db_j = Σ_rows dy_j where those are trained.
/// Saved: x·A ᵀ, `[tokens, Σ r_j]`. x itself is handed in again.
///
/// Equal to PEFT's `lora.Linear`, except that linears of a group share one dropout mask.
#[derive(Clone, Debug)]
pub struct LinearGroup {
    linears: Vec<Linear>,
    /// All A's as one matrix `[Σ r, in]`.
    a: Option<ParamRef>,
    site: u32,
}

/// What [`LinearGroup::forward`] keeps.
#[derive(Clone, Debug)]
pub struct Saved {
    xa: Option<Tensor<2>>,
}

impl Linear {
    /// A linear without an adapter.
    pub fn new(name: impl Into<String>, weight: Weight, bias: Option<Weight>) -> Self {
        Self { name: name.into(), weight, bias, adapter: None }
    }
}

impl LinearGroup {
    /// A group without adapters. All weights have the same width.
    pub fn new(linears: Vec<Linear>) -> Self {
        Self { linears, a: None, site: 0 }
    }

    /// The linears, in order.
    pub fn linears(&self) -> &[Linear] {
        &self.linears
    }

    /// Gives each linear the adapter (factors and scale) that `factors` returns for it, replacing any it had.
    ///
    /// `site` tells this group's dropout masks from those of all other groups.
    pub fn adapt(
        &mut self,
        params: &mut ParamsBuilder,
        site: u32,
        mut factors: impl FnMut(&Linear) -> Option<(Factors, f64)>,
    ) {
        self.site = site;
        let found: Vec<_> = self.linears.iter().map(&mut factors).collect();
        let push = |params: &mut ParamsBuilder, linear: &Linear, factor: Factor, values: &[f32], shape: [usize; 2]| {
            params.push(format!("{}{}", linear.name, factor.suffix()), &shape, true, values)
        };
        let mut joined: Option<ParamRef> = None;
        let mut placed_a = Vec::new();
        for (linear, found) in self.linears.iter().zip(&found) {
            placed_a.push(found.as_ref().map(|(f, _)| {
                let a = push(params, linear, Factor::A, &f.a, [f.r, linear.weight.dims()[1]]);
                let all = joined.map_or(a, |all| all.join(a).expect("pushed one after another, equally wide"));
                joined = Some(all);
                a
            }));
        }
        for ((linear, found), a) in self.linears.iter_mut().zip(&found).zip(placed_a) {
            linear.adapter = found.as_ref().zip(a).map(|((f, scale), a)| {
                let b = push(params, linear, Factor::B, &f.b, [linear.weight.dims()[0], f.r]);
                Placed { a, b, scale: *scale as f32 }
            });
        }
        self.a = joined;
    }

    /// The factors of every adapted linear as they are now, by the linear's name.
    pub fn factors(&self, params: &Params) -> Vec<(String, Factors)> {
        let adapted = self.linears.iter().filter_map(|linear| Some((linear, linear.adapter?)));
        adapted
            .map(|(linear, Placed { a, b, .. })| {
                let factors = Factors { r: a.dims()[0], a: params.values(a), b: params.values(b) };
                (linear.name.clone(), factors)
            })
            .collect()
    }

    /// Whether anything in here is trained.
    pub fn is_trained(&self) -> bool {
        let trained = |w: &Weight| w.trained().is_some();
        self.a.is_some() || self.linears.iter().any(|l| trained(&l.weight) || l.bias.as_ref().is_some_and(trained))
    }

    /// The results of all linears for the same x.
    pub fn forward(&self, params: &Params, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> (Vec<Tensor<2>>, Saved) {
        let xa = self.a.map(|a| matmul::nt(&self.dropped(x, dropout), &params.matrix(a))); // [tokens, Σ r]
        let mut first = 0;
        let ys = self
            .linears
            .iter()
            .map(|linear| {
                let bias = linear.bias.as_ref().map(|bias| bias.vector(params));
                let y = linear.weight.nt(params, x, bias.as_ref());
                match (linear.adapter, &xa) {
                    (Some(adapter), Some(xa)) => {
                        let part = adapter.columns(xa, &mut first);
                        matmul::nt_add(y, adapter.scale, &part, &params.matrix(adapter.b))
                    }
                    _ => y,
                }
            })
            .collect();
        (ys, Saved { xa })
    }

    /// Adds the gradients of what is trained; returns the gradient to x if `want_dx`.
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
        let mut dx: Option<Tensor<2>> = None;
        let mut dxa = Vec::new();
        let mut first = 0;
        for (linear, dy) in self.linears.iter().zip(dys) {
            if let Some(at) = linear.weight.trained() {
                grads.add_tn(at, 1.0, dy, x);
            }
            if let Some(at) = linear.bias.as_ref().and_then(Weight::trained) {
                grads.add_row_sum(at, dy);
            }
            if let (Some(adapter), Some(xa)) = (linear.adapter, &saved.xa) {
                grads.add_tn(adapter.b, adapter.scale, dy, &adapter.columns(xa, &mut first));
                dxa.push(matmul::nn(dy, &params.matrix(adapter.b)) * adapter.scale); // [tokens, r]
            }
            if want_dx {
                dx = Some(linear.weight.nn(params, dy, dx));
            }
        }
        if let Some(a) = self.a {
            let dxa = if dxa.len() == 1 { dxa.remove(0) } else { Tensor::cat(dxa, 1) }; // [tokens, Σ r]
            grads.add_tn(a, 1.0, &dxa, &self.dropped(x, dropout));
            dx = dx.map(|dx| match dropout {
                None => matmul::nn_add(dx, 1.0, &dxa, &params.matrix(a)),
                Some(key) => dx + dropout::apply(&matmul::nn(&dxa, &params.matrix(a)), key, self.site),
            });
        }
        dx
    }

    fn dropped(&self, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> Tensor<2> {
        dropout.map_or_else(|| x.clone(), |key| dropout::apply(x, key, self.site))
    }
}

impl Placed {
    /// This adapter's columns of x·Aᵀ, `[tokens, r]`; moves `first` past them.
    fn columns(self, xa: &Tensor<2>, first: &mut usize) -> Tensor<2> {
        let [r, _] = self.a.dims();
        let part = xa.clone().narrow(1, *first, r);
        *first += r;
        part
    }
}

//! Linears that read the same input, each with or without an adapter.

use rekindle_kernels::{Grads, ParamRef, Params, ParamsBuilder, Tensor, Weight, dropout, matmul};

use crate::Factors;
use crate::magnitude::{self, Magnitude};
use crate::peft::Key;

/// A linear of the base model: y = x·Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// W, `[out, in]`.
    pub weight: Weight,
    /// b, one row of `out`.
    pub bias: Option<Weight>,
    /// b where it is trained beside an adapter.
    trained_bias: Option<ParamRef>,
    adapter: Option<Placed>,
}

/// What is trained of one linear besides its weight.
#[derive(Clone, Debug, Default)]
pub struct Adaptation {
    /// The factors and the scale s.
    pub factors: Option<(Factors, f64)>,
    /// The bias as it starts.
    pub bias: Option<Vec<f32>>,
}

/// An adapter's place in the flat buffers.
#[derive(Clone, Debug)]
struct Placed {
    a: ParamRef,
    b: ParamRef,
    scale: f32,
    magnitude: Option<Magnitude>,
}

/// Where dropout on the way to A takes its mask from.
pub type Dropout<'a> = dropout::Key<'a>;

/// Linears that read the same input, such as q, k and v.
///
/// y_j = x·W_jᵀ + b_j + s_j·(dropout(x)·A_jᵀ)·B_jᵀ
///
/// W_j is dense or in codes ([`Weight::Packed`]), which is QLoRA (arXiv:2305.14314). With a magnitude, DoRA, the rows
/// of W_j + s_j·B_j·A_j have trained lengths; the equation stands in `magnitude.rs`.
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
/// Saved: x·Aᵀ, `[tokens, Σ r_j]`, and with DoRA one `[tokens, out_j]`. x itself is handed in again.
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
    /// One for each linear that has a magnitude, in order.
    magnitudes: Vec<magnitude::Saved>,
}

impl Linear {
    /// A linear without an adapter.
    pub fn new(name: impl Into<String>, weight: Weight, bias: Option<Weight>) -> Self {
        Self { name: name.into(), weight, bias, trained_bias: None, adapter: None }
    }

    /// b in the compute dtype, trained or not.
    fn bias(&self, params: &Params) -> Option<Tensor<1>> {
        match self.trained_bias {
            Some(at) => Some(params.matrix(at).row_vector()),
            None => self.bias.as_ref().map(|bias| bias.vector(params)),
        }
    }

    /// Where the gradient of b goes, if it is trained.
    fn bias_grad(&self) -> Option<ParamRef> {
        self.trained_bias.or_else(|| self.bias.as_ref().and_then(Weight::trained))
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

    /// The linears, whose weights and biases may be replaced by others of the same shape.
    pub fn linears_mut(&mut self) -> &mut [Linear] {
        &mut self.linears
    }

    /// Gives each linear what `adaptation` returns for it, replacing what it had.
    ///
    /// `site` tells this group's dropout masks from those of all other groups. A magnitude needs the lengths of the
    /// rows of W, which are measured here.
    pub fn adapt(&mut self, params: &mut ParamsBuilder, site: u32, adaptation: impl FnMut(&Linear) -> Adaptation) {
        self.site = site;
        let found: Vec<Adaptation> = self.linears.iter().map(adaptation).collect();
        let mut joined: Option<ParamRef> = None;
        let mut placed_a = Vec::new();
        for (linear, found) in self.linears.iter().zip(&found) {
            placed_a.push(found.factors.as_ref().map(|(f, _)| {
                let shape = [f.r, linear.weight.dims()[1]];
                let a = params.push(format!("{}{}", linear.name, Key::A("").suffix()), &shape, true, &f.a);
                let all = joined.map_or(a, |all| all.join(a).expect("pushed one after another, equally wide"));
                joined = Some(all);
                a
            }));
        }
        for ((linear, found), a) in self.linears.iter_mut().zip(found).zip(placed_a) {
            let out = linear.weight.dims()[0];
            linear.adapter = found.factors.zip(a).map(|((f, scale), a)| {
                let b = params.push(format!("{}{}", linear.name, Key::B("").suffix()), &[out, f.r], true, &f.b);
                // As in transformers' Trainer, where all but biases and norms takes weight decay.
                let magnitude = f
                    .magnitude
                    .map(|m| params.push(format!("{}{}", linear.name, Key::Magnitude("").suffix()), &[out], true, &m));
                let magnitude = magnitude.map(|at| Magnitude::new(at, &linear.weight));
                Placed { a, b, scale: scale as f32, magnitude }
            });
            let name = format!("{}.bias", linear.name);
            linear.trained_bias = found.bias.map(|bias| params.push(name, &[out], false, &bias));
        }
        self.a = joined;
    }

    /// What is trained of every linear as it is now, by the linear's name.
    pub fn trained(&self, params: &Params) -> Vec<(String, Adaptation)> {
        let adaptation = |linear: &Linear| {
            let factors = linear.adapter.as_ref().map(|Placed { a, b, scale, magnitude }| {
                let magnitude = magnitude.as_ref().map(|magnitude| params.values(magnitude.at));
                let factors = Factors { r: a.dims()[0], a: params.values(*a), b: params.values(*b), magnitude };
                (factors, f64::from(*scale))
            });
            let bias = linear.trained_bias.map(|at| params.values(at));
            (factors.is_some() || bias.is_some()).then(|| (linear.name.clone(), Adaptation { factors, bias }))
        };
        self.linears.iter().filter_map(adaptation).collect()
    }

    /// Whether anything in here is trained.
    pub fn is_trained(&self) -> bool {
        self.a.is_some() || self.linears.iter().any(|l| l.weight.trained().is_some() || l.bias_grad().is_some())
    }

    /// The results of all linears for the same x.
    pub fn forward(&self, params: &Params, x: &Tensor<2>, dropout: Option<Dropout<'_>>) -> (Vec<Tensor<2>>, Saved) {
        let dropped = self.dropped(x, dropout);
        let xa = self.a.map(|a| matmul::nt(&dropped, &params.matrix(a))); // [tokens, Σ r]
        let (mut first, mut saved) = (0, Vec::new());
        let ys = self
            .linears
            .iter()
            .map(|linear| {
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
            })
            .collect();
        (ys, Saved { xa, magnitudes: saved })
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
        // DoRA with dropout has two ways back to x on the base's side; this is the one through dropout(x).
        let mut d_dropped: Option<Tensor<2>> = None;
        let mut dxa = Vec::new();
        let (mut first, mut kept) = (0, saved.magnitudes.iter());
        for (linear, dy) in self.linears.iter().zip(dys) {
            if let Some(at) = linear.weight.trained() {
                grads.add_tn(at, 1.0, dy, x);
            }
            if let Some(at) = linear.bias_grad() {
                grads.add_row_sum(at, dy);
            }
            // The gradient to x·Wᵀ.
            let mut direct = dy.clone();
            if let (Some(adapter), Some(xa)) = (&linear.adapter, &saved.xa) {
                if let Some(magnitude) = &adapter.magnitude {
                    let kept = kept.next().expect("the forward kept one for each magnitude");
                    direct = kept.backward(dy, grads, magnitude.at);
                }
                grads.add_tn(adapter.b, adapter.scale, &direct, &adapter.columns(xa, &mut first));
                dxa.push(matmul::nn(&direct, &params.matrix(adapter.b)).scale(adapter.scale)); // [tokens, r]
                if let (Some(_), Some(_), true) = (&adapter.magnitude, dropout, want_dx) {
                    let rest = direct.plus(&dy.clone().scale(-1.0));
                    d_dropped = Some(linear.weight.nn(params, &rest, d_dropped));
                    direct = dy.clone();
                }
            }
            if want_dx {
                dx = Some(linear.weight.nn(params, &direct, dx));
            }
        }
        if let Some(a) = self.a {
            let dxa = Tensor::cat_columns(dxa); // [tokens, Σ r]
            grads.add_tn(a, 1.0, &dxa, &self.dropped(x, dropout));
            dx = dx.map(|dx| match dropout {
                None => matmul::nn_add(dx, 1.0, &dxa, &params.matrix(a)),
                Some(key) => {
                    let through_a = matmul::nn(&dxa, &params.matrix(a));
                    let all = d_dropped.map_or_else(|| through_a.clone(), |d| d.plus(&through_a));
                    dx.plus(&dropout::apply(&all, key, self.site))
                }
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
    fn columns(&self, xa: &Tensor<2>, first: &mut usize) -> Tensor<2> {
        let [r, _] = self.a.dims();
        let part = xa.columns(*first, r);
        *first += r;
        part
    }
}

//! Linears that read the same input, each with or without an adapter.

mod pass;
mod rows;

pub use rekindle_kernels::dropout::Dropout;
use rekindle_kernels::fp8::{self, Fp8Products};
use rekindle_kernels::stacked::{Stacked, StackedFactors, StackedLinear};
use rekindle_kernels::{ParamRef, Params, ParamsBuilder, Tensor, Weight};

pub use pass::{LinearContext, LinearPending, LinearSaved};
pub use rows::{AdapterRows, RowAdapter};

use crate::LoraFactors;
use crate::dora::layer::Magnitude;
use crate::peft::TensorKey;

/// A linear of the base model: y = x·Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// W, `[out, in]`.
    pub weight: Weight,
    /// b, one row of `out`.
    pub bias: Option<Weight>,
    /// Widths of the outputs that y is split into, side by side; their sum is `out`. Empty for a single output.
    outputs: Vec<usize>,
    /// b where it is trained beside an adapter.
    trained_bias: Option<ParamRef>,
    adapter: Option<Placed>,
}

/// The trained parameters of one linear besides its weight.
#[derive(Clone, Debug, Default)]
pub struct LoraInit {
    /// The factors and the scale s.
    pub factors: Option<(LoraFactors, f64)>,
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

/// Linears that read the same input, such as q, k and v.
///
/// y_j = x·W_jᵀ + b_j + s_j·(dropout(x)·A_jᵀ)·B_jᵀ
///
/// W_j is dense or in codes ([`Weight::Quantized`]), which is QLoRA (arXiv:2305.14314). With a magnitude, DoRA, the rows
/// of W_j + s_j·B_j·A_j have trained lengths; the equation is in `dora/layer.rs`.
///
/// The A's lie one after another in the flat buffer and are applied as one wide product; the dense
/// W + s·B·A is never formed, and no gradient of a frozen W is computed. On CUDA frozen weights and their factors are
/// one matrix ([`Stacked`]): a group without adapters is one product, and a group with adapters one product more than
/// x·Aᵀ.
///
/// With [`multiply_in_fp8`](Self::multiply_in_fp8) the products with frozen fp8 weights are those of
/// [`rekindle_kernels::fp8`]; those with A and B stay in the compute dtype.
///
/// A fused linear ([`Linear::fused`], such as Phi-3's `qkv_proj`) is one weight and one adapter with several outputs:
/// the forward returns the outputs of all linears in order, and the backward takes a gradient for each.
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
/// Saved: x·Aᵀ, `[tokens, Σ r_j]`, and with DoRA one `[tokens, out_j]`. x itself is handed in again. On CUDA, DoRA's gains
/// and trained biases are part of the group's product ([`Stacked`]).
///
/// Equal to PEFT's `lora.Linear`, except that linears of a group share one dropout mask.
#[derive(Clone, Debug)]
pub struct LinearGroup {
    linears: Vec<Linear>,
    /// All A's as one matrix `[Σ r, in]`.
    a: Option<ParamRef>,
    site: u32,
    /// Weights and factors as one matrix, where there is such a product; each weight is then a part of it.
    stack: Option<Stacked>,
    /// The products that are in fp8.
    fp8: Option<Fp8Products>,
}

impl Linear {
    /// A linear without an adapter.
    pub fn new(name: impl Into<String>, weight: Weight, bias: Option<Weight>) -> Self {
        Self { name: name.into(), weight, bias, outputs: Vec::new(), trained_bias: None, adapter: None }
    }

    /// A linear without an adapter whose result is split into outputs of these widths.
    ///
    /// # Panics
    /// When the widths do not add up to the rows of the weight.
    pub fn fused(name: impl Into<String>, weight: Weight, bias: Option<Weight>, outputs: Vec<usize>) -> Self {
        assert_eq!(outputs.iter().sum::<usize>(), weight.dims()[0], "the outputs are the rows of the weight");
        Self { outputs, ..Self::new(name, weight, bias) }
    }

    /// Every trained parameter of this linear: weight, biases and adapter.
    fn trained_params(&self) -> impl Iterator<Item = ParamRef> + '_ {
        let adapter = self.adapter.iter().flat_map(|placed| {
            [Some(placed.a), Some(placed.b), placed.magnitude.as_ref().map(|magnitude| magnitude.at)]
        });
        let base = [self.weight.trained(), self.bias.as_ref().and_then(Weight::trained), self.trained_bias];
        base.into_iter().chain(adapter).flatten()
    }

    /// b in the compute dtype, trained or not.
    fn bias(&self, params: &Params) -> Option<Tensor<1>> {
        match self.trained_bias {
            Some(at) => Some(params.matrix(at).row_vector()),
            None => self.bias.as_ref().map(|bias| bias.vector(params)),
        }
    }

    /// Returns the target of the gradient of b, if b is trained.
    fn bias_grad(&self) -> Option<ParamRef> {
        self.trained_bias.or_else(|| self.bias.as_ref().and_then(Weight::trained))
    }
}

impl LinearGroup {
    /// A group without adapters. All weights have the same width.
    pub fn new(linears: Vec<Linear>) -> Self {
        let mut group = Self { linears, a: None, site: 0, stack: None, fp8: None };
        group.stack_weights();
        group
    }

    /// The linears, in order.
    pub fn linears(&self) -> &[Linear] {
        &self.linears
    }

    /// Replaces weights and biases by others of the same shape. `replace` returns true if it changed the linear.
    ///
    /// # Panics
    /// With an adapter.
    pub fn replace_weights(&mut self, mut replace: impl FnMut(&mut Linear) -> bool) {
        assert!(self.a.is_none(), "weights are replaced while there is no adapter");
        let mut changed = false;
        for linear in &mut self.linears {
            changed |= replace(linear);
        }
        if changed {
            self.stack_weights();
        }
    }

    /// Returns the weights, to be replaced by others of the same shape; products then read each by itself.
    pub fn weights_mut(&mut self) -> impl Iterator<Item = &mut Weight> {
        self.stack = None;
        self.linears.iter_mut().map(|linear| &mut linear.weight)
    }

    /// Multiplies with the frozen weights in fp8. Weights are stacked anew, so this comes before [`adapt`](Self::adapt).
    ///
    /// # Errors
    /// The name of a linear and the reason, when a weight cannot be multiplied so
    /// ([`refusal`](rekindle_kernels::fp8::refusal)).
    ///
    /// # Panics
    /// With an adapter.
    pub fn multiply_in_fp8(&mut self, products: Fp8Products) -> Result<(), (String, String)> {
        assert!(self.a.is_none(), "the products are chosen while there is no adapter");
        for linear in &self.linears {
            if let Some(reason) = fp8::refusal(&linear.weight) {
                return Err((linear.name.clone(), reason));
            }
        }
        let rows: usize = self.linears.iter().map(|linear| linear.weight.dims()[0]).sum();
        if rows > fp8::MAX_ROWS {
            let name = self.linears[0].name.clone();
            let most = fp8::MAX_ROWS;
            return Err((name, format!("and the linears beside it have {rows} rows; fp8 products take up to {most}")));
        }
        self.fp8 = Some(products);
        self.stack_weights();
        Ok(())
    }

    /// Returns the products that are in fp8.
    pub fn fp8(&self) -> Option<Fp8Products> {
        self.fp8
    }

    /// Columns that x and the gradients to the results should have room for, side by side as the linears are; without
    /// it they are copied ([`rekindle_kernels::stacked`]).
    pub fn room(&self) -> usize {
        self.stack.as_ref().map_or(0, Stacked::rank)
    }

    /// Gives each linear what `adaptation` returns for it, replacing what it had.
    ///
    /// `site` tells this group's dropout masks from those of all other groups.
    pub fn adapt(&mut self, params: &mut ParamsBuilder, site: u32, adaptation: impl FnMut(&Linear) -> LoraInit) {
        self.site = site;
        let found: Vec<LoraInit> = self.linears.iter().map(adaptation).collect();
        let mut joined: Option<ParamRef> = None;
        let mut placed_a = Vec::new();
        for (linear, found) in self.linears.iter().zip(&found) {
            placed_a.push(found.factors.as_ref().map(|(f, _)| {
                let shape = [f.r, linear.weight.dims()[1]];
                let a = params.push(format!("{}{}", linear.name, TensorKey::A("").suffix()), &shape, true, &f.a);
                let all = joined.map_or(a, |all| all.join(a).expect("pushed one after another, equally wide"));
                joined = Some(all);
                a
            }));
        }
        for ((linear, found), a) in self.linears.iter_mut().zip(found).zip(placed_a) {
            let out = linear.weight.dims()[0];
            linear.adapter = found.factors.zip(a).map(|((f, scale), a)| {
                let b = params.push(format!("{}{}", linear.name, TensorKey::B("").suffix()), &[out, f.r], true, &f.b);
                // As in transformers' Trainer, where all but biases and norms takes weight decay.
                let magnitude = f.magnitude.map(|m| {
                    params.push(format!("{}{}", linear.name, TensorKey::Magnitude("").suffix()), &[out], true, &m)
                });
                let magnitude = magnitude.map(Magnitude::new);
                Placed { a, b, scale: scale as f32, magnitude }
            });
            let name = format!("{}.bias", linear.name);
            linear.trained_bias = found.bias.map(|bias| params.push(name, &[out], false, &bias));
        }
        self.a = joined;
        self.stack(params);
    }

    /// Moves weights into one matrix where there is such a product.
    fn stack_weights(&mut self) {
        self.stack = None;
        let weights = self.linears.iter_mut().map(|linear| (&mut linear.weight, linear.bias.as_ref()));
        self.stack = Stacked::of_weights(weights.collect(), self.fp8);
    }

    /// Moves weights and factors into one matrix where there is such a product.
    fn stack(&mut self, params: &mut ParamsBuilder) {
        self.stack = None;
        let parts = self.linears.iter_mut().map(|linear| StackedLinear {
            factors: linear.adapter.as_ref().map(|&Placed { a, b, scale, ref magnitude }| {
                let magnitude = magnitude.as_ref().map(|magnitude| magnitude.at);
                StackedFactors { a, b, scale, magnitude }
            }),
            weight: &mut linear.weight,
            bias: linear.bias.as_ref(),
            trained_bias: linear.trained_bias,
        });
        self.stack = Stacked::new(parts.collect(), params, self.fp8);
    }

    /// Returns true if W, A and B of every linear are separate products. On CUDA this is slower, and so only where weights
    /// are trained, or some are quantized and others are not.
    pub fn has_separate_products(&self) -> bool {
        self.stack.is_none()
    }

    /// Returns the current trained parameters of every linear, by the linear's name.
    pub fn trained(&self, params: &Params) -> Vec<(String, LoraInit)> {
        let adaptation = |linear: &Linear| {
            let factors = linear.adapter.as_ref().map(|Placed { a, b, scale, magnitude }| {
                let magnitude = magnitude.as_ref().map(|magnitude| params.values(magnitude.at));
                let factors = LoraFactors { r: a.dims()[0], a: params.values(*a), b: params.values(*b), magnitude };
                (factors, f64::from(*scale))
            });
            let bias = linear.trained_bias.map(|at| params.values(at));
            (factors.is_some() || bias.is_some()).then(|| (linear.name.clone(), LoraInit { factors, bias }))
        };
        self.linears.iter().filter_map(adaptation).collect()
    }

    /// Every trained parameter of the group: weights, biases and adapters.
    pub fn trained_params(&self) -> impl Iterator<Item = ParamRef> + '_ {
        self.linears.iter().flat_map(Linear::trained_params)
    }

    /// Returns true if anything in here is trained.
    pub fn is_trained(&self) -> bool {
        self.trained_params().next().is_some()
    }
}

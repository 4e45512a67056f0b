//! A projection of all experts of a layer, with or without adapters.

use rekindle_kernels::grouped::{self, GroupedRows};
use rekindle_kernels::routing::Dispatch;
use rekindle_kernels::{Grads, ParamRef, Params, ParamsBuilder, Tensor, Weight};

use crate::peft::TensorKey;
use crate::{LinearContext, LoraFactors, LoraInit};

/// A linear of every expert: y_e = x_e·W_eᵀ for the rows of each expert e.
///
/// Projections that read the same rows, gate and up, are one weight with several outputs. Each output of each expert is a
/// linear with a name of its own, such as `model.layers.0.mlp.experts.7.gate_proj`, and has an adapter of its own; or all
/// outputs of an expert have one (`….experts.7.gate_up_proj`), as PEFT's `target_parameters` makes them:
///
/// y_e = x_e·W_eᵀ + s·(x_e·A_eᵀ)·B_eᵀ
///
/// The factors of all experts are one parameter each and are applied in one grouped product each; W + s·B·A is never
/// formed.
///
/// # Shapes
/// x `[rows, in]` or by token `[tokens, in]` ([`GroupedRows`]); W `[experts · Σ out, in]`, A `[experts · Σ r, in]`, both
/// expert by expert; B `[experts · out, r]` for each adapter; y `[rows, Σ out]`.
///
/// # Dtypes
/// A, B and all gradients of parameters in `f32`, read in the compute dtype, which x and W have.
///
/// # Gradients
/// dB_e = s·dy_eᵀ·(x_e·A_eᵀ); dA_e = s·(dy_e·B_e)ᵀ·x_e; dx_e = dy_e·W_e + s·(dy_e·B_e)·A_e; dW_e = dy_eᵀ·x_e where it is
/// trained. Saved: x·Aᵀ, `[rows, Σ r]`. x itself is handed in again.
///
/// Equal to PEFT's `lora.ParamWrapper` on transformers' stacked experts, and to `lora.Linear` on experts that are linears.
/// Dropout, DoRA and biases are not supported here, nor in PEFT's wrapper.
#[derive(Clone, Debug)]
pub struct ExpertLinear {
    /// The names of the outputs and of all of them together.
    names: ExpertNames,
    experts: usize,
    /// W, `[experts · Σ out, in]`.
    pub weight: Weight,
    adapters: Option<PlacedExperts>,
}

/// The names of a projection of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// The module that holds the experts, such as `model.layers.0.mlp.experts`.
    pub module: String,
    /// The last part of an expert's linear and its width, for each output.
    pub outputs: Vec<(&'static str, usize)>,
    /// The last part of the name of all outputs together; that of the output where there is one.
    pub joined: &'static str,
    /// The parameter with all outputs of all experts in transformers 5, such as
    /// `model.layers.0.mlp.experts.gate_up_proj`.
    pub parameter: String,
}

impl ExpertNames {
    /// The full name of a linear of an expert.
    pub fn linear(&self, expert: usize, output: &str) -> String {
        format!("{}.{expert}.{output}", self.module)
    }

    /// Width of all outputs.
    pub fn width(&self) -> usize {
        self.outputs.iter().map(|(_, width)| width).sum()
    }

    /// Every part that can have an adapter: its name, its first column and its width. The whole comes last, unless it is
    /// the only output.
    pub fn parts(&self) -> Vec<(&'static str, usize, usize)> {
        let mut first = 0;
        let output = |&(name, width): &(&'static str, usize)| {
            first += width;
            (name, first - width, width)
        };
        let mut parts: Vec<_> = self.outputs.iter().map(output).collect();
        if parts.len() > 1 {
            parts.push((self.joined, 0, self.width()));
        }
        parts
    }
}

/// The places of the adapters of all experts.
#[derive(Clone, Debug)]
struct PlacedExperts {
    /// The A's of every expert, `[experts · Σ r, in]`.
    a: ParamRef,
    parts: Vec<PlacedPart>,
}

/// The adapters of one output, or of all together.
#[derive(Clone, Debug)]
struct PlacedPart {
    name: &'static str,
    /// The columns of y.
    first: usize,
    width: usize,
    r: usize,
    /// `[experts · width, r]`.
    b: ParamRef,
    scale: f32,
}

/// Tensors that [`ExpertLinear::forward`] saves for the backward.
#[derive(Clone, Debug, Default)]
pub struct ExpertSaved {
    /// x·Aᵀ, `[rows, Σ r]`.
    xa: Option<Tensor<2>>,
}

/// The intermediate gradient that [`ExpertLinear::backward_params`] needs from [`ExpertLinear::backward_input`].
#[derive(Debug)]
pub struct ExpertPending {
    dxa: Option<Tensor<2>>,
}

impl ExpertLinear {
    /// Linears without adapters.
    ///
    /// # Panics
    /// If the weight does not have the rows of all experts.
    pub fn new(names: ExpertNames, experts: usize, weight: Weight) -> Self {
        assert_eq!(weight.dims()[0], experts * names.width(), "rows of {}", names.module);
        Self { names, experts, weight, adapters: None }
    }

    /// The names of its linears.
    pub fn names(&self) -> &ExpertNames {
        &self.names
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Gives every linear the factors that `adaptation` returns for its full name, replacing what it had. An output has
    /// adapters on all experts, of one rank and one scale, or on none.
    ///
    /// # Panics
    /// If only some experts have one, or ranks or scales differ;
    /// [`AdaptableModules::check_experts`](crate::AdaptableModules::check_experts) refuses such adapters.
    pub fn adapt(&mut self, params: &mut ParamsBuilder, mut adaptation: impl FnMut(&str) -> LoraInit) {
        let mut found = Vec::new();
        for (name, first, width) in self.names.parts() {
            let factors = (0..self.experts).filter_map(|e| adaptation(&self.names.linear(e, name)).factors);
            let factors: Vec<(LoraFactors, f64)> = factors.collect();
            if factors.is_empty() {
                continue;
            }
            assert_eq!(factors.len(), self.experts, "adapters on all experts of {} or on none", self.names.module);
            found.push(((name, first, width), factors));
        }
        self.adapters = (!found.is_empty()).then(|| self.place(params, &found));
    }

    fn place(&self, params: &mut ParamsBuilder, found: &[FoundPart]) -> PlacedExperts {
        let [_, input] = self.weight.dims();
        let ranks: usize = found.iter().map(|(_, factors)| factors[0].0.r).sum();
        let module = &self.names.module;
        let a = if params.is_planned() {
            vec![0.0; self.experts * ranks * input]
        } else {
            let of = |expert: usize| found.iter().flat_map(move |(_, factors)| &factors[expert].0.a);
            (0..self.experts).flat_map(of).copied().collect()
        };
        let name = format!("{module}.{}{}", self.names.joined, TensorKey::A("").suffix());
        let a = params.push(name, &[self.experts * ranks, input], true, &a);
        let parts = found.iter().map(|&((name, first, width), ref factors)| {
            let (r, scale) = (factors[0].0.r, factors[0].1);
            let is_same = |(f, s): &(LoraFactors, f64)| f.r == r && *s == scale;
            assert!(factors.iter().all(is_same), "one rank and one scale for all experts of {module}");
            let b = if params.is_planned() {
                vec![0.0; self.experts * width * r]
            } else {
                factors.iter().flat_map(|(f, _)| &f.b).copied().collect()
            };
            let full = format!("{module}.{name}{}", TensorKey::B("").suffix());
            let b = params.push(full, &[self.experts * width, r], true, &b);
            PlacedPart { name, first, width, r, b, scale: scale as f32 }
        });
        let parts = parts.collect();
        PlacedExperts { a, parts }
    }

    /// The factors of every linear as they are now, by the linear's full name.
    pub fn trained(&self, params: &Params) -> Vec<(String, LoraInit)> {
        let Some(PlacedExperts { a, parts }) = &self.adapters else { return Vec::new() };
        let ([rows, input], all_a) = (a.dims(), params.values(*a));
        let ranks = rows / self.experts;
        let (mut row, mut list) = (0, Vec::new());
        for PlacedPart { name, width, r, b, scale, .. } in parts {
            let all_b = params.values(*b);
            for expert in 0..self.experts {
                let a = all_a[(expert * ranks + row) * input..][..r * input].to_vec();
                let b = all_b[expert * width * r..][..width * r].to_vec();
                let factors = Some((LoraFactors { r: *r, a, b, magnitude: None }, f64::from(*scale)));
                list.push((self.names.linear(expert, name), LoraInit { factors, bias: None }));
            }
            row += r;
        }
        list
    }

    /// Every trained parameter: the weight, or the factors of adapters.
    pub fn trained_params(&self) -> impl Iterator<Item = ParamRef> + '_ {
        let adapters = self
            .adapters
            .iter()
            .flat_map(|placed| core::iter::once(placed.a).chain(placed.parts.iter().map(|part| part.b)));
        self.weight.trained().into_iter().chain(adapters)
    }

    /// Returns y, `[rows, Σ out]`.
    pub fn forward(&self, ctx: LinearContext<'_>, x: GroupedRows<'_>, dispatch: &Dispatch) -> (Tensor<2>, ExpertSaved) {
        let params = ctx.params;
        let mut y = self.weight.grouped_nt(params, x, dispatch);
        let Some(PlacedExperts { a, parts }) = self.adapters.as_ref().filter(|_| ctx.adapters) else {
            return (y, ExpertSaved::default());
        };
        let xa = grouped::nt(x, &params.matrix(*a), dispatch); // [rows, Σ r]
        let mut column = 0;
        for PlacedPart { first, r, b, scale, .. } in parts {
            let part = xa.columns(column, *r);
            column += r;
            y = grouped::nt_add(y, *first, *scale, GroupedRows::Sorted(&part), &params.matrix(*b), dispatch);
        }
        (y, ExpertSaved { xa: Some(xa) })
    }

    /// Returns the gradient to x, `[rows, in]`, and what [`backward_params`](Self::backward_params) needs from this half.
    pub fn backward_input(
        &self,
        ctx: LinearContext<'_>,
        dy: GroupedRows<'_>,
        dispatch: &Dispatch,
    ) -> (Tensor<2>, ExpertPending) {
        let params = ctx.params;
        let dx = self.weight.grouped_nn(params, dy, None, dispatch);
        let Some(PlacedExperts { a, parts }) = self.adapters.as_ref().filter(|_| ctx.adapters) else {
            return (dx, ExpertPending { dxa: None });
        };
        let part = |PlacedPart { first, width, b, scale, .. }: &PlacedPart| {
            let columns = dy.tensor().columns(*first, *width);
            grouped::nn(dy.with(&columns), &params.matrix(*b), dispatch).scale(*scale) // [rows, r]
        };
        let dxa = Tensor::cat_columns(parts.iter().map(part).collect());
        let dx = grouped::nn_add(dx, 1.0, GroupedRows::Sorted(&dxa), &params.matrix(*a), dispatch);
        (dx, ExpertPending { dxa: Some(dxa) })
    }

    /// Adds the gradients of what is trained, for the x that [`forward`](Self::forward) was given.
    pub fn backward_params(
        &self,
        grads: &mut Grads,
        x: GroupedRows<'_>,
        saved: &ExpertSaved,
        dy: GroupedRows<'_>,
        pending: &ExpertPending,
        dispatch: &Dispatch,
    ) {
        if let Some(at) = self.weight.trained() {
            grads.add_grouped_tn(at, 1.0, dy, x, dispatch);
        }
        let (Some(PlacedExperts { a, parts }), Some(xa), Some(dxa)) = (&self.adapters, &saved.xa, &pending.dxa) else {
            return;
        };
        let mut column = 0;
        for PlacedPart { first, width, r, b, scale, .. } in parts {
            let (dy_part, xa_part) = (dy.tensor().columns(*first, *width), xa.columns(column, *r));
            column += r;
            grads.add_grouped_tn(*b, *scale, dy.with(&dy_part), GroupedRows::Sorted(&xa_part), dispatch);
        }
        grads.add_grouped_tn(*a, 1.0, GroupedRows::Sorted(dxa), x, dispatch);
    }
}

/// The factors of every expert for one part of [`ExpertNames::parts`].
type FoundPart = ((&'static str, usize, usize), Vec<(LoraFactors, f64)>);

#[cfg(test)]
mod tests {
    use rekindle_kernels::DType;
    use rekindle_kernels::{Device, from_f32, to_f32};

    use super::*;

    const EXPERTS: usize = 3;

    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) % 1009) as f32 / 1009.0 - 0.5).collect()
    }

    fn matrix(seed: usize, dims: [usize; 2]) -> Tensor<2> {
        from_f32(numbers(seed, dims[0] * dims[1]), dims, &Device::cpu(), DType::F32)
    }

    fn names() -> ExpertNames {
        ExpertNames {
            module: "mlp.experts".into(),
            outputs: vec![("gate_proj", 4), ("up_proj", 4)],
            joined: "gate_up_proj",
            parameter: "mlp.experts.gate_up_proj".into(),
        }
    }

    fn factors(expert: usize, input: usize, out: usize, r: usize) -> LoraFactors {
        let (a, b) = (numbers(10 + expert, r * input), numbers(20 + expert, out * r));
        LoraFactors { r, a, b, magnitude: None }
    }

    fn adapted(weight: Weight, of: impl Fn(&str, usize) -> Option<(LoraFactors, f64)>) -> (ExpertLinear, Params) {
        let mut linear = ExpertLinear::new(names(), EXPERTS, weight);
        let mut params = ParamsBuilder::new(&Device::cpu(), DType::F32);
        linear.adapt(&mut params, |name| {
            let (rest, last) = name.rsplit_once('.').expect("a full name");
            let expert = rest.rsplit_once('.').expect("a full name").1.parse().expect("a number");
            LoraInit { factors: of(last, expert), bias: None }
        });
        (linear, params.build())
    }

    /// W + s·B·A of every expert in the place of W.
    fn merged(weight: &[f32], input: usize, factors: &[(usize, usize, LoraFactors, f64)]) -> Vec<f32> {
        let mut merged = weight.to_vec();
        for (expert, first, LoraFactors { r, a, b, .. }, scale) in factors {
            for (row, b) in b.chunks_exact(*r).enumerate() {
                for column in 0..input {
                    let sum: f32 = (0..*r).map(|i| b[i] * a[i * input + column]).sum();
                    merged[(expert * 8 + first + row) * input + column] += *scale as f32 * sum;
                }
            }
        }
        merged
    }

    #[test]
    fn adapters_are_the_merged_weights_and_come_back_as_they_went() {
        let input = 5;
        let weight = numbers(1, EXPERTS * 8 * input);
        let frozen = |values: &[f32]| {
            Weight::Frozen(from_f32(values.to_vec(), [EXPERTS * 8, input], &Device::cpu(), DType::F32))
        };
        let separate = |name: &str, expert: usize| match name {
            "gate_proj" => Some((factors(expert, input, 4, 2), 0.5)),
            "up_proj" => Some((factors(expert + 5, input, 4, 3), 2.0)),
            _ => None,
        };
        let joined = |name: &str, expert: usize| (name == "gate_up_proj").then(|| (factors(expert, input, 8, 2), 0.5));
        let only_up = |name: &str, expert: usize| (name == "up_proj").then(|| (factors(expert, input, 4, 1), 1.0));
        type FactorsOf<'a> = &'a dyn Fn(&str, usize) -> Option<(LoraFactors, f64)>;
        let all: [FactorsOf<'_>; 3] = [&separate, &joined, &only_up];
        let dispatch = Dispatch::of(&[2, 0, 0, 2, 2, 0], EXPERTS, 2, &Device::cpu());
        let (x, dy) = (matrix(3, [3, input]), matrix(4, [6, 8]));
        for of in all {
            let (linear, params) = adapted(frozen(&weight), of);
            let mut parts = Vec::new();
            for (name, first, _) in names().parts() {
                for expert in 0..EXPERTS {
                    parts.extend(of(name, expert).map(|(factors, scale)| (expert, first, factors, scale)));
                }
            }
            let trained = linear.trained(&params);
            assert_eq!(trained.len(), parts.len());
            for ((_, _, factors, scale), (_, trained)) in parts.iter().zip(&trained) {
                assert_eq!(trained.factors, Some((factors.clone(), *scale)));
            }
            let (whole, none) = adapted(frozen(&merged(&weight, input, &parts)), |_, _| None);
            let (ctx, plain) = (LinearContext::new(&params), LinearContext::new(&none));
            let (y, saved) = linear.forward(ctx, GroupedRows::Tokens(&x), &dispatch);
            let (want, _) = whole.forward(plain, GroupedRows::Tokens(&x), &dispatch);
            close(&y, &want);
            let (dx, pending) = linear.backward_input(ctx, GroupedRows::Sorted(&dy), &dispatch);
            close(&dx, &whole.backward_input(plain, GroupedRows::Sorted(&dy), &dispatch).0);
            // Finite differences of ⟨dy, y⟩, which is linear in each factor.
            let mut grads = params.zero_grads();
            linear.backward_params(
                &mut grads,
                GroupedRows::Tokens(&x),
                &saved,
                GroupedRows::Sorted(&dy),
                &pending,
                &dispatch,
            );
            let loss = |values: Vec<f32>| {
                let mut params = params.clone();
                params.set_all_values(values);
                let (y, _) = linear.forward(LinearContext::new(&params), GroupedRows::Tokens(&x), &dispatch);
                to_f32(y).iter().zip(to_f32(dy.clone())).map(|(y, dy)| f64::from(*y) * f64::from(dy)).sum::<f64>()
            };
            let values = params.all_values();
            for (index, grad) in grads.all_values().into_iter().enumerate() {
                let moved = |by: f32| {
                    let mut values = values.clone();
                    values[index] += by;
                    loss(values)
                };
                let slope = (moved(0.5) - moved(-0.5)) as f32;
                assert!((grad - slope).abs() < 1e-4, "{index}: {grad} {slope}");
            }
        }
    }

    fn close(got: &Tensor<2>, want: &Tensor<2>) {
        for (got, want) in to_f32(got.clone()).iter().zip(to_f32(want.clone())) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
}

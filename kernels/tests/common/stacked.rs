//! Frozen weights as one matrix, with low-rank factors and without, forward and backward.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::stacked::{InputGradient, Stacked, StackedFactors, StackedLinear, StackedSaved};
use rekindle_kernels::{ParamsBuilder, QuantizedWeight, Tensor, Weight};

use super::quantized::{Kind, Packed};
use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

/// y_j = onto + x · W_jᵀ + bias_j + s_j · (x · A_jᵀ) · B_jᵀ, with x `[m, k]`.
pub(crate) struct Stack {
    m: usize,
    k: usize,
    linears: Vec<Linear>,
    x: Vec<f32>,
    /// For a stack of one.
    onto: Option<Vec<f32>>,
    /// Linears with factors have magnitudes, as in DoRA.
    magnitudes: bool,
    /// Biases are trained, and differ from those of the base.
    trained_biases: bool,
}

struct Linear {
    n: usize,
    r: usize,
    scale: f32,
    w: Vec<f32>,
    codes: Option<QuantizedData>,
    bias: Option<Vec<f32>>,
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Vec<f32>,
    trained_bias: Vec<f32>,
    dy: Vec<f32>,
}

impl Stack {
    /// `linears` are rows and rank of each; a rank of 0 is a linear without factors. If all ranks are 0, the weights are
    /// stacked alone.
    pub(crate) fn new(
        [m, k]: [usize; 2],
        linears: &[(usize, usize)],
        kind: Option<Kind>,
        bias: bool,
        dtype: DType,
    ) -> Self {
        let linear = |(seed, &(n, r)): (u64, &(usize, usize))| {
            let input = |part, n| rounded(noise(10 * seed + part, n), dtype);
            let packed = kind.map(|kind| Packed::part(seed, [m, n, k], kind, dtype));
            Linear {
                n,
                r,
                scale: 0.25 * (seed + 1) as f32,
                w: packed.as_ref().map_or_else(|| input(1, n * k), Packed::weight),
                codes: packed.map(Packed::into_codes),
                bias: bias.then(|| input(2, n)),
                a: input(3, r * k),
                b: input(4, n * r),
                magnitude: noise(10 * seed + 6, n).into_iter().map(|m| 1.5 + m).collect(),
                trained_bias: input(8, n),
                dy: input(5, m * n),
            }
        };
        let onto = (linears.len() == 1).then(|| rounded(noise(7, m * linears[0].0), dtype));
        let linears = (0..).zip(linears).map(linear).collect();
        let x = rounded(noise(9, m * k), dtype);
        Self { m, k, linears, x, onto, magnitudes: false, trained_biases: false }
    }

    /// The same with magnitudes on linears with factors and with trained biases.
    pub(crate) fn trained(self, magnitudes: bool, trained_biases: bool) -> Self {
        Self { magnitudes, trained_biases, ..self }
    }

    /// ‖W + s·B·A‖ of every row of a linear, in `oracle`'s dtype.
    fn norms(&self, oracle: &Oracle, linear: &Linear) -> BurnTensor<2> {
        let Linear { n, r, scale, w, a, b, .. } = linear;
        let product = oracle.constant(b, [*n, *r]).matmul(oracle.constant(a, [*r, self.k]));
        let whole = oracle.constant(w, [*n, self.k]) + product * *scale;
        (whole.clone() * whole).sum_dim(1).sqrt().transpose() // [1, n]
    }

    fn has_factors(&self) -> bool {
        self.linears.iter().any(|linear| linear.r > 0)
    }

    fn name(part: &'static [&'static str; 3], index: usize) -> &'static str {
        part[index]
    }
}

const Y: [&str; 3] = ["y of 1", "y of 2", "y of 3"];
const BASE: [&str; 3] = ["base y of 1", "base y of 2", "base y of 3"];
const XA: [&str; 3] = ["xa of 1", "xa of 2", "xa of 3"];
const DROPPED: [&str; 3] = ["y of 1 with dropout", "y of 2 with dropout", "y of 3 with dropout"];
const DM: [&str; 3] = ["dm of 1", "dm of 2", "dm of 3"];
const DXA: [&str; 3] = ["dxa of 1", "dxa of 2", "dxa of 3"];

impl Case for Stack {
    fn naive(&self, dtype: DType) -> Results {
        let (m, k) = (self.m, self.k);
        let oracle = Oracle::new(dtype);
        let (x, base_x) = (oracle.leaf(&self.x, [m, k]), oracle.leaf(&self.x, [m, k]));
        let (mut results, mut loss, mut base_loss) = (Vec::new(), None, None);
        let add = |sum: Option<BurnTensor<1>>, more: BurnTensor<1>| Some(sum.map_or(more.clone(), |sum| sum + more));
        let mut inner = Vec::new();
        for (i, linear) in self.linears.iter().enumerate() {
            let Linear { n, r, scale, w, bias, a, b, magnitude, trained_bias, dy, .. } = linear;
            let w = oracle.constant(w, [*n, k]);
            let product = x.clone().matmul(w.clone().transpose());
            let with_bias = |y: BurnTensor<2>, bias: Option<&Vec<f32>>| match bias {
                Some(bias) => y + oracle.constant(bias, [*n]).unsqueeze::<2>(),
                None => y,
            };
            let with_onto = |y: BurnTensor<2>| match &self.onto {
                Some(onto) => oracle.constant(onto, [m, *n]) + y,
                None => y,
            };
            results.push((Self::name(&BASE, i), values(with_onto(with_bias(product.clone(), bias.as_ref())))));
            let mut z = product;
            if *r > 0 {
                // Through a leaf of its own, whose gradient is that to x·Aᵀ.
                let xa = x.clone().matmul(oracle.constant(a, [*r, k]).transpose());
                results.push((Self::name(&XA, i), values(xa.clone())));
                let xa_leaf = oracle.leaf(&vec![0.0; m * r], [m, *r]);
                z = z + ((xa + xa_leaf.clone()) * *scale).matmul(oracle.constant(b, [*n, *r]).transpose());
                inner.push((Self::name(&DXA, i), xa_leaf));
                if self.magnitudes {
                    let m = oracle.leaf(magnitude, [1, *n]);
                    z = z * (m.clone() / self.norms(&oracle, linear));
                    inner.push((Self::name(&DM, i), m));
                }
            }
            let y = with_bias(z, if self.trained_biases { Some(trained_bias) } else { bias.as_ref() });
            if self.has_factors() || self.trained_biases {
                results.push((Self::name(&Y, i), values(with_onto(y.clone()))));
            }
            if self.has_factors() {
                results.push((Self::name(&DROPPED, i), values(with_onto(y.clone()))));
            }
            let dy = oracle.constant(dy, [m, *n]);
            loss = add(loss, (y * dy.clone()).sum());
            base_loss = add(base_loss, (base_x.clone().matmul(w.transpose()) * dy).sum());
        }
        let grads = loss.expect("there is a linear").backward();
        let base_grads = base_loss.expect("there is a linear").backward();
        if self.has_factors() {
            results.push(("dx", grad(&x, &grads)));
            if !self.magnitudes {
                results.push(("dx of the base", grad(&base_x, &base_grads)));
            }
        }
        results.push(("dx without factors", grad(&base_x, &base_grads)));
        results.extend(inner.into_iter().map(|(name, leaf)| (name, grad(&leaf, &grads))));
        results
    }

    fn ours(&self, place: &Place) -> Results {
        let (m, k) = (self.m, self.k);
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        // So that parts do not begin at 16 bytes.
        builder.push("before", &[3], true, &[7.0; 3]);
        let weight = |Linear { n, w, codes, .. }: &Linear| match codes {
            Some(codes) => Weight::Quantized(QuantizedWeight::new(codes.clone(), &place.device)),
            None => Weight::Frozen(place.matrix(w, [*n, k])),
        };
        let mut weights: Vec<Weight> = self.linears.iter().map(weight).collect();
        let bias = |linear: &Linear| linear.bias.as_ref().map(|bias| Weight::Frozen(place.vector(bias).as_row()));
        let biases: Vec<Option<Weight>> = self.linears.iter().map(bias).collect();
        let mut magnitudes = Vec::new();
        let stack = if self.has_factors() || self.trained_biases {
            let parts = self.linears.iter().zip(&mut weights).zip(&biases);
            let parts = parts.map(|((linear, weight), bias)| {
                let &Linear { n, r, scale, ref a, ref b, ref magnitude, ref trained_bias, .. } = linear;
                let factors = (r > 0).then(|| {
                    let a = builder.push("a", &[r, k], true, a);
                    let b = builder.push("b", &[n, r], true, b);
                    let magnitude = self.magnitudes.then(|| builder.push("m", &[n], true, magnitude));
                    magnitudes.push(magnitude);
                    StackedFactors { a, b, scale, magnitude }
                });
                let trained_bias = self.trained_biases.then(|| builder.push("bias", &[n], false, trained_bias));
                StackedLinear { weight, bias: bias.as_ref(), trained_bias, factors }
            });
            let parts = parts.collect();
            Stacked::new(parts, &mut builder, None)
        } else {
            Stacked::of_weights(
                weights.iter_mut().zip(&biases).map(|(weight, bias)| (weight, bias.as_ref())).collect(),
                None,
            )
        };
        let stack = stack.expect("a CUDA device stacks what is frozen");
        let params = builder.build();

        let x = place.matrix(&self.x, [m, k]);
        let onto = self.onto.as_ref().map(|onto| place.matrix(onto, [m, self.linears[0].n]));
        let mut results = Vec::new();
        let base_ys = stack.forward_base(&x, onto.clone());
        results.extend(base_ys.into_iter().enumerate().map(|(i, y)| (Self::name(&BASE, i), values(y))));
        let dys: Vec<Tensor<2>> = self.linears.iter().map(|linear| place.matrix(&linear.dy, [m, linear.n])).collect();
        results.push(("dx without factors", values(stack.backward_base(&dys))));
        if self.trained_biases && !self.has_factors() {
            let ys = stack.forward(&x, None, onto.clone()).0;
            results.extend(ys.into_iter().enumerate().map(|(i, y)| (Self::name(&Y, i), values(y))));
        }
        if self.has_factors() {
            let (ys, StackedSaved { xa, z }) = stack.forward(&x, None, onto.clone());
            let xa = xa.expect("there are factors");
            // Dropout that drops nothing.
            let dropped = stack.forward(&x, Some(&x.clone().scale(1.0)), onto).0;
            results.extend(dropped.into_iter().enumerate().map(|(i, y)| (Self::name(&DROPPED, i), values(y))));
            let grads = params.zero_grads();
            let dys = z.map_or_else(|| dys.clone(), |z| stack.backward_magnitudes(&dys, &z, &grads));
            let (dxa, dx) = stack.backward(&dys, InputGradient::Whole);
            let (again, base) = stack.backward(&dys, InputGradient::Base);
            let (none, nothing) = stack.backward(&dys, InputGradient::No);
            assert!(nothing.is_none());
            assert_eq!(values(dxa), values(none));
            results.push(("dx", values(dx.expect("asked for"))));
            if !self.magnitudes {
                results.push(("dx of the base", values(base.expect("asked for"))));
            }
            let mut at = magnitudes.iter();
            for (i, _) in self.linears.iter().enumerate().filter(|(_, linear)| linear.r > 0) {
                if let Some(at) = at.next().expect("one for each linear with factors") {
                    results.push((Self::name(&DM, i), grads.values(*at).into_iter().map(f64::from).collect()));
                }
            }
            let mut column = 0;
            for (i, (linear, y)) in self.linears.iter().zip(ys).enumerate() {
                results.push((Self::name(&Y, i), values(y)));
                if linear.r > 0 {
                    results.push((Self::name(&XA, i), values(xa.columns(column, linear.r))));
                    results.push((Self::name(&DXA, i), values(again.columns(column, linear.r))));
                    column += linear.r;
                }
            }
        }
        for (linear, weight) in self.linears.iter().zip(weights) {
            match weight {
                Weight::Frozen(weight) => {
                    let expected: Vec<f64> = linear.w.iter().map(|&w| f64::from(w)).collect();
                    assert_eq!(values(weight), expected, "weights are what they were");
                }
                Weight::Quantized(weight) => assert_eq!(Some(&*weight.data()), linear.codes.as_ref()),
                Weight::Trained(_) | Weight::Sharded(_) => unreachable!("the weights are frozen"),
            }
        }
        results
    }
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes: Vec<_> = self.linears.iter().map(|linear| (linear.n, linear.r)).collect();
        let kind = self.linears[0].codes.as_ref().map_or("dense", |codes| codes.format.name());
        let Self { m, k, magnitudes, trained_biases, .. } = self;
        write!(f, "stack of {sizes:?} over {m} × {k}, {kind}, bias {}", self.linears[0].bias.is_some())?;
        if *magnitudes || *trained_biases {
            write!(f, ", magnitudes {magnitudes}, trained biases {trained_biases}")?;
        }
        Ok(())
    }
}

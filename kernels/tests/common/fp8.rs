//! Frozen fp8 weights with low-rank factors, multiplied in fp8.

use burn::tensor::DType;
use rekindle_kernels::fp8::{self, Fp8Products};
use rekindle_kernels::quantized::{Fp8Scaling, QuantizedData, QuantizedFormat};
use rekindle_kernels::stacked::{InputGradient, Stacked, StackedFactors, StackedLinear};
use rekindle_kernels::{ParamsBuilder, QuantizedWeight, Tensor, Weight};

use super::{Case, Oracle, Place, Results, noise, rounded, values};

/// y_j = onto + Q(x)·W_jᵀ + bias_j + s_j·(x·A_jᵀ)·B_jᵀ and its gradient to x, Q(dy)·W + low-rank part, with x `[m, k]`.
pub(crate) struct Fp8Stack {
    m: usize,
    k: usize,
    products: Fp8Products,
    /// Without factors, as linears multiply where there is no product of a group.
    base_only: bool,
    linears: Vec<Linear>,
    x: Vec<f32>,
    /// For a stack of one.
    onto: Option<Vec<f32>>,
}

struct Linear {
    n: usize,
    r: usize,
    scale: f32,
    codes: Vec<u8>,
    scales: Vec<f32>,
    bias: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
}

const Y: [&str; 3] = ["y of 1", "y of 2", "y of 3"];
const BASE: [&str; 3] = ["base y of 1", "base y of 2", "base y of 3"];

impl Fp8Stack {
    /// `linears` are rows and rank of each.
    pub(crate) fn new([m, k]: [usize; 2], linears: &[(usize, usize)], products: Fp8Products, dtype: DType) -> Self {
        let linear = |(seed, &(n, r)): (u64, &(usize, usize))| {
            let input = |part, n| rounded(noise(10 * seed + part, n), dtype);
            // Every code but the two that are NaN.
            let code = |x: f32| ((x + 1.0) * 127.0) as u8;
            let code = |x: f32| if x < 0.0 { code(x) } else { code(x - 1.0) | 0x80 };
            Linear {
                n,
                r,
                scale: 0.25 * (seed + 1) as f32,
                codes: noise(10 * seed + 1, n * k).into_iter().map(code).collect(),
                scales: noise(10 * seed + 6, n).iter().map(|x| x.abs() * 1e-3 + 1e-4).collect(),
                bias: input(2, n),
                a: input(3, r * k),
                b: input(4, n * r),
                dy: input(5, m * n),
            }
        };
        // Rows of very different lengths, one of them zeros.
        let mut x = noise(9, m * k);
        for (row, values) in x.chunks_mut(k).enumerate() {
            let length = if row == 1 { 0.0 } else { 4f32.powi(row as i32 % 5 - 2) };
            values.iter_mut().for_each(|x| *x *= length);
        }
        let onto = (linears.len() == 1).then(|| rounded(noise(7, m * linears[0].0), dtype));
        let linears = (0..).zip(linears).map(linear).collect();
        Self { m, k, products, base_only: false, linears, x: rounded(x, dtype), onto }
    }

    /// The same without factors, by the operations of single linears.
    pub(crate) fn without_factors(self) -> Self {
        Self { base_only: true, ..self }
    }

    fn rows(&self) -> usize {
        self.linears.iter().map(|linear| linear.n).sum()
    }

    fn data(&self, Linear { n, codes, scales, .. }: &Linear) -> QuantizedData {
        let (codes, scales) = (codes.clone(), scales.clone());
        let format = QuantizedFormat::Fp8 { codes, scales, scaling: Fp8Scaling::Row, section: *n };
        QuantizedData { dims: [*n, self.k], format }
    }

    /// The rows of dy of all linears, multiplied with `factors` of the columns in f32.
    fn joined_dy(&self, factors: bool) -> Vec<f32> {
        let row = |row: usize| {
            self.linears.iter().flat_map(move |Linear { n, dy, scales, .. }| {
                let factor = move |(dy, scale): (&f32, &f32)| if factors { dy * scale } else { *dy };
                dy[row * n..][..*n].iter().zip(scales).map(factor)
            })
        };
        (0..self.m).flat_map(row).collect()
    }
}

/// Every number of e4m3 that is not negative, by the definition of the format.
fn numbers() -> Vec<f64> {
    let number = |code: i32| match (code >> 3, f64::from(code & 7)) {
        (0, mantissa) => mantissa / 8.0 * 2f64.powi(-6),
        (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    (0..0x7f).map(number).collect()
}

fn value(code: u8) -> f64 {
    let number = numbers()[usize::from(code & 0x7f)];
    if code & 0x80 == 0 { number } else { -number }
}

/// Each row rounded to the nearest codes, decoded: the scale is computed in f32, as the definition says.
fn rounded_rows(x: &[f32], width: usize) -> Vec<f64> {
    let numbers = numbers();
    let round = |row: &[f32]| {
        let largest = row.iter().fold(2f32.powi(-100), |largest, x| largest.max(x.abs()));
        let (scale, inverse) = (largest / 448.0, 448.0 / largest);
        let code = |&x: &f32| {
            let scaled = f64::from(x * inverse);
            let above = numbers.partition_point(|number| *number < scaled.abs()).min(numbers.len() - 1);
            let below = above.saturating_sub(1);
            let [to_below, to_above] = [below, above].map(|code| (numbers[code] - scaled.abs()).abs());
            let is_below = to_below < to_above || (to_below == to_above && below.is_multiple_of(2));
            numbers[if is_below { below } else { above }].copysign(scaled) * f64::from(scale)
        };
        row.iter().map(code).collect::<Vec<f64>>()
    };
    x.chunks(width).flat_map(round).collect()
}

impl Case for Fp8Stack {
    fn naive(&self, dtype: DType) -> Results {
        let (m, k) = (self.m, self.k);
        let oracle = Oracle::new(dtype);
        let narrow = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let x = oracle.constant(&self.x, [m, k]);
        // In f32, whose error is nothing beside that of a code.
        let codes = oracle.constant(&narrow(&rounded_rows(&self.x, k)), [m, k]);
        let mut results = Vec::new();
        let dense = |linear: &Linear| -> Vec<f32> {
            let scales = linear.scales.iter().flat_map(|scale| (0..k).map(move |_| f64::from(*scale)));
            linear.codes.iter().zip(scales).map(|(code, scale)| (value(*code) * scale) as f32).collect()
        };
        let mut low_rank = None;
        for (i, linear) in self.linears.iter().enumerate() {
            let Linear { n, r, scale, bias, a, b, dy, .. } = linear;
            let base = codes.clone().matmul(oracle.constant(&dense(linear), [*n, k]).transpose())
                + oracle.constant(bias, [*n]).unsqueeze::<2>();
            let base = match &self.onto {
                Some(onto) => oracle.constant(onto, [m, *n]) + base,
                None => base,
            };
            results.push((BASE[i], values(base.clone())));
            if self.base_only {
                continue;
            }
            let (a, b) = (oracle.constant(a, [*r, k]), oracle.constant(b, [*n, *r]) * *scale);
            results.push((Y[i], values(base + x.clone().matmul(a.clone().transpose()).matmul(b.clone().transpose()))));
            let part = oracle.constant(dy, [m, *n]).matmul(b).matmul(a);
            low_rank = Some(low_rank.map_or(part.clone(), |sum| sum + part));
        }
        let rows = self.rows();
        let base = match self.products {
            Fp8Products::ForwardAndBackward => {
                let all: Vec<f32> =
                    self.linears.iter().flat_map(|l| l.codes.iter().map(|c| value(*c) as f32)).collect();
                let dy = narrow(&rounded_rows(&self.joined_dy(true), rows));
                oracle.constant(&dy, [m, rows]).matmul(oracle.constant(&all, [rows, k]))
            }
            Fp8Products::Forward => {
                let all: Vec<f32> = self.linears.iter().flat_map(dense).collect();
                oracle.constant(&self.joined_dy(false), [m, rows]).matmul(oracle.constant(&all, [rows, k]))
            }
        };
        if let Some(low_rank) = low_rank {
            results.push(("dx", values(base.clone() + low_rank)));
        }
        results.push(("dx of the base", values(base)));
        results
    }

    fn ours(&self, place: &Place) -> Results {
        let (m, k) = (self.m, self.k);
        let x = place.matrix(&self.x, [m, k]);
        let onto = self.onto.as_ref().map(|onto| place.matrix(onto, [m, self.linears[0].n]));
        let dys: Vec<Tensor<2>> = self.linears.iter().map(|linear| place.matrix(&linear.dy, [m, linear.n])).collect();
        let data: Vec<QuantizedData> = self.linears.iter().map(|linear| self.data(linear)).collect();
        let quantized = data.iter().map(|data| QuantizedWeight::new(data.clone(), &place.device));
        let mut results = Vec::new();
        if self.base_only {
            let weights: Vec<QuantizedWeight> = quantized.collect();
            for (i, (linear, weight)) in self.linears.iter().zip(&weights).enumerate() {
                let y = fp8::nt(weight, &x, Some(&place.vector(&linear.bias)));
                results.push((BASE[i], values(if let Some(onto) = &onto { y.plus(onto) } else { y })));
            }
            let weights: Vec<&QuantizedWeight> = weights.iter().collect();
            results.push(("dx of the base", values(fp8::input_gradient(&weights, &dys))));
            return results;
        }
        let mut builder = ParamsBuilder::new(&place.device, place.dtype);
        // So that parts do not begin at 16 bytes.
        builder.push("before", &[3], true, &[7.0; 3]);
        let mut weights: Vec<Weight> = quantized.map(Weight::Quantized).collect();
        let bias = |linear: &Linear| Weight::Frozen(place.vector(&linear.bias).as_row());
        let biases: Vec<Weight> = self.linears.iter().map(bias).collect();
        let parts = self.linears.iter().zip(&mut weights).zip(&biases);
        let parts = parts.map(|((Linear { n, r, scale, a, b, .. }, weight), bias)| {
            let (a, b) = (builder.push("a", &[*r, k], true, a), builder.push("b", &[*n, *r], true, b));
            let factors = Some(StackedFactors { a, b, scale: *scale, magnitude: None });
            StackedLinear { weight, bias: Some(bias), trained_bias: None, factors }
        });
        let parts = parts.collect();
        let stack =
            Stacked::new(parts, &mut builder, Some(self.products)).expect("a CUDA device stacks what is frozen");
        let _params = builder.build();
        let base = stack.forward_base(&x, onto.clone());
        results.extend(base.into_iter().enumerate().map(|(i, y)| (BASE[i], values(y))));
        let (ys, _) = stack.forward(&x, None, onto);
        results.extend(ys.into_iter().enumerate().map(|(i, y)| (Y[i], values(y))));
        results.push(("dx", values(stack.backward(&dys, InputGradient::Whole).1.expect("asked for"))));
        results.push(("dx of the base", values(stack.backward_base(&dys))));
        for (weight, data) in weights.iter().zip(&data) {
            let Weight::Quantized(weight) = weight else { unreachable!("the weights are quantized") };
            assert_eq!(*weight.data(), *data, "codes are what they were");
        }
        results
    }
}

impl std::fmt::Debug for Fp8Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes: Vec<_> = self.linears.iter().map(|linear| (linear.n, linear.r)).collect();
        write!(f, "fp8 products ({:?}) of {sizes:?} over {} × {}", self.products, self.m, self.k)
    }
}

//! RMSNorm, with and without the residual stream around it.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::Tensor;
use rekindle_kernels::rms_norm::{self, Gain, GainEps};

use super::{Case, Oracle, Place, ROOM, Results, grad, noise, rounded, values};

/// The form of the factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    Plain,
    RoundedAfter,
    OnePlus,
    None,
}

impl Form {
    pub(crate) const ALL: [Self; 4] = [Self::Plain, Self::RoundedAfter, Self::OnePlus, Self::None];

    pub(crate) fn gain(self, weight: Tensor<1>) -> Gain {
        match self {
            Self::Plain => Gain::Plain(weight),
            Self::RoundedAfter => Gain::RoundedAfter(weight),
            Self::OnePlus => Gain::OnePlus(weight),
            Self::None => Gain::None,
        }
    }
}

pub(crate) struct RmsNorm {
    form: Form,
    shape: [usize; 2],
    x: Vec<f32>,
    weight: Vec<f32>,
    dy: Vec<f32>,
    /// The addend before the norm, and the gradient that reaches the sum past the norm.
    residual: Option<(Vec<f32>, Vec<f32>)>,
    /// True if x, the sum and the gradient to it are f32 in every dtype.
    wide: bool,
}

const EPS: f64 = 1e-6;

impl RmsNorm {
    pub(crate) fn new(shape: [usize; 2], residual: bool, dtype: DType) -> Self {
        Self::with(Form::Plain, shape, residual, dtype)
    }

    pub(crate) fn with(form: Form, shape @ [tokens, hidden]: [usize; 2], residual: bool, dtype: DType) -> Self {
        let input = |seed, n| rounded(noise(seed, n), dtype);
        let n = tokens * hidden;
        Self {
            form,
            shape,
            x: input(1, n),
            weight: input(2, hidden),
            dy: input(3, n),
            residual: residual.then(|| (input(4, n), input(5, n))),
            wide: false,
        }
    }

    /// The same with a residual stream of f32.
    pub(crate) fn wide(self) -> Self {
        Self { wide: true, ..self }
    }

    fn graph(&self, dtype: DType, norm: impl Fn(&BurnTensor<2>, &BurnTensor<1>) -> BurnTensor<2>) -> Results {
        let oracle = Oracle::new(dtype);
        let (x, weight) = (oracle.leaf(&self.x, self.shape), oracle.leaf(&self.weight, [self.shape[1]]));
        let dy = oracle.constant(&self.dy, self.shape);
        let (sum, y, loss) = match &self.residual {
            None => {
                let y = norm(&x, &weight);
                (x.clone(), y.clone(), (y * dy).sum())
            }
            Some((delta, beside)) => {
                let sum = x.clone() + oracle.constant(delta, self.shape);
                let y = norm(&sum, &weight);
                let beside = (sum.clone() * oracle.constant(beside, self.shape)).sum();
                (sum, y.clone(), (y * dy).sum() + beside)
            }
        };
        let grads = loss.backward();
        let mut results = vec![("sum", values(sum)), ("y", values(y)), ("dx", grad(&x, &grads))];
        if self.form != Form::None {
            results.push(("dw", grad(&weight, &grads)));
        }
        results
    }
}

/// x / √(mean(x²) + eps) ∘ g, as it is written.
pub(super) fn plain(form: Form, x: &BurnTensor<2>, weight: &BurnTensor<1>, eps: f64) -> BurnTensor<2> {
    let rms = (x.clone().powi_scalar(2).mean_dim(1) + eps).sqrt();
    let normalized = x.clone() / rms;
    match form {
        Form::Plain | Form::RoundedAfter => normalized * weight.clone().unsqueeze::<2>(),
        Form::OnePlus => normalized * (weight.clone().unsqueeze::<2>() + 1.0),
        Form::None => normalized,
    }
}

impl Case for RmsNorm {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |x, weight| plain(self.form, x, weight, EPS))
    }

    fn ours(&self, place: &Place) -> Results {
        let stream = |values: &[f32]| stream(place, self.wide, values, self.shape);
        let (x, gain) = (stream(&self.x), self.form.gain(place.vector(&self.weight)));
        let dy = place.matrix(&self.dy, self.shape);
        let (sum, y, rstd) = match &self.residual {
            None => {
                let (y, rstd) = rms_norm::forward(&x, &gain, EPS, ROOM);
                (x, y, rstd)
            }
            Some((delta, _)) => rms_norm::add_forward(&x, place.matrix(delta, self.shape), &gain, EPS, ROOM),
        };
        let again = rms_norm::recompute(&sum, &gain, &rstd);
        let beside = self.residual.as_ref().map(|(_, beside)| stream(beside));
        let dx = rms_norm::backward(&dy, &sum, &gain, &rstd, beside, ROOM);
        let dw = rms_norm::weight_grad(&dy, &sum, &rstd);
        let expected = if self.wide { DType::F32 } else { place.dtype };
        assert_eq!([sum.dtype(), dx.dtype(), y.dtype()], [expected, expected, place.dtype]);
        assert_eq!(values(y.clone()), values(again), "recomputing gives the same bits");
        let mut results = vec![("sum", values(sum)), ("y", values(y)), ("dx", values(dx))];
        if self.form != Form::None {
            results.push(("dw", values(dw)));
        }
        results
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |x, weight| {
            rms_norm::forward(&x.clone().into(), &self.form.gain(weight.clone().into()), EPS, 0).0.into()
        }))
    }
}

impl std::fmt::Debug for RmsNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wide = if self.wide { ", in f32" } else { "" };
        write!(f, "rms_norm {:?} {:?}, residual {}{wide}", self.form, self.shape, self.residual.is_some())
    }
}

/// A norm before a residual addition, and one of the sum: h = r + g₁ ∘ norm(x), y = g₂ ∘ norm(h).
pub(crate) struct AddedNorm {
    form: Form,
    shape: [usize; 2],
    x: Vec<f32>,
    residual: Vec<f32>,
    weights: [Vec<f32>; 2],
    dy: Vec<f32>,
    dh: Vec<f32>,
    /// True if the residual and the sum are f32 in every dtype.
    wide: bool,
}

/// A matrix of the residual stream.
fn stream(place: &Place, wide: bool, values: &[f32], shape: [usize; 2]) -> Tensor<2> {
    place.matrix_of(values, shape, if wide { DType::F32 } else { place.dtype })
}

impl AddedNorm {
    pub(crate) fn new(form: Form, shape @ [tokens, hidden]: [usize; 2], dtype: DType) -> Self {
        let input = |seed, n| rounded(noise(seed, n), dtype);
        let n = tokens * hidden;
        Self {
            form,
            shape,
            x: input(1, n),
            residual: input(2, n),
            weights: [input(3, hidden), input(4, hidden)],
            dy: input(5, n),
            dh: input(6, n),
            wide: false,
        }
    }

    /// The same with a residual stream of f32.
    pub(crate) fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

impl Case for AddedNorm {
    fn naive(&self, dtype: DType) -> Results {
        let oracle = Oracle::new(dtype);
        let (x, residual) = (oracle.leaf(&self.x, self.shape), oracle.leaf(&self.residual, self.shape));
        let [first, second] = self.weights.each_ref().map(|weight| oracle.leaf(weight, [self.shape[1]]));
        let h = residual.clone() + plain(self.form, &x, &first, EPS);
        let y = plain(self.form, &h, &second, EPS);
        let beside = h.clone() * oracle.constant(&self.dh, self.shape);
        let grads = (y.clone() * oracle.constant(&self.dy, self.shape) + beside).sum().backward();
        let mut results =
            vec![("h", values(h)), ("y", values(y)), ("dx", grad(&x, &grads)), ("dresidual", grad(&residual, &grads))];
        if self.form != Form::None {
            results.extend([("dw1", grad(&first, &grads)), ("dw2", grad(&second, &grads))]);
        }
        results
    }

    fn ours(&self, place: &Place) -> Results {
        let matrix = |values: &[f32]| place.matrix(values, self.shape);
        let stream = |values: &[f32]| stream(place, self.wide, values, self.shape);
        let (x, residual) = (matrix(&self.x), stream(&self.residual));
        let [first, second] = self.weights.each_ref().map(|weight| self.form.gain(place.vector(weight)));
        let norm = |gain| GainEps { gain, eps: EPS };
        let (h, rstd1, y, rstd2) = rms_norm::forward_add_forward(&x, norm(&first), &residual, norm(&second), ROOM);
        let (alone, rstd) = rms_norm::forward_add(&x, &first, EPS, &residual);
        assert_eq!(
            (values(alone), values(rstd)),
            (values(h.clone()), values(rstd1.clone())),
            "without the second norm"
        );
        let dy = matrix(&self.dy);
        let dw2 = rms_norm::weight_grad(&dy, &h, &rstd2);
        let dh = rms_norm::backward(&dy, &h, &second, &rstd2, Some(stream(&self.dh)), 0);
        let dw1 = rms_norm::weight_grad(&dh, &x, &rstd1);
        let dx = rms_norm::backward(&dh, &x, &first, &rstd1, None, ROOM);
        let mut results = vec![("h", values(h)), ("y", values(y)), ("dx", values(dx)), ("dresidual", values(dh))];
        if self.form != Form::None {
            results.extend([("dw1", values(dw1)), ("dw2", values(dw2))]);
        }
        results
    }
}

impl std::fmt::Debug for AddedNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wide = if self.wide { " in f32" } else { "" };
        write!(f, "rms_norm {:?} {:?} before and after an addition{wide}", self.form, self.shape)
    }
}

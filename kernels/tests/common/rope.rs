//! The rotation, with and without the per-head norm before it.

use burn::tensor::{DType, Tensor as BurnTensor};
use rekindle_kernels::Device;
use rekindle_kernels::rope::{self, Angles, HeadNorm, RopeTables, Rotation};

use super::rms_norm::Form;
use super::{Case, Oracle, Place, Results, grad, noise, rounded, values};

pub(crate) struct Rope {
    tokens: usize,
    heads: usize,
    head_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
    norm: Option<Vec<f32>>,
    form: Form,
    interleaved: bool,
}

const EPS: f64 = 1e-6;

impl Rope {
    /// `rotary_dim` channels of each head turn; positions restart once, as at the border of two documents.
    pub(crate) fn new([tokens, heads, head_dim]: [usize; 3], rotary_dim: usize, norm: bool, dtype: DType) -> Self {
        let half = rotary_dim / 2;
        let angle = |i: usize| {
            let (token, channel) = (i / half, i % half);
            let position = if token > tokens / 2 { token - tokens / 2 } else { token + 1000 };
            position as f64 * 1e4f64.powf(-(channel as f64) / half as f64)
        };
        let table = |f: fn(f64) -> f64| (0..tokens * half).map(|i| f(angle(i)) as f32).collect();
        let input = |seed, n| rounded(noise(seed, n), dtype);
        let n = tokens * heads * head_dim;
        Self {
            tokens,
            heads,
            head_dim,
            cos: table(f64::cos),
            sin: table(f64::sin),
            x: input(1, n),
            dy: input(2, n),
            norm: norm.then(|| input(3, head_dim)),
            form: Form::Plain,
            interleaved: false,
        }
    }

    /// With another form of the norm's weight.
    pub(crate) fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// With channels 2i and 2i + 1 rotated together.
    pub(crate) fn interleaved(self) -> Self {
        Self { interleaved: true, ..self }
    }

    fn rotation<'a>(&self, angles: &'a Angles) -> Option<Rotation<'a>> {
        (!self.cos.is_empty()).then_some(Rotation { angles, interleaved: self.interleaved })
    }

    fn norm(&self, weight: rekindle_kernels::Tensor<1>) -> HeadNorm {
        HeadNorm { gain: self.form.gain(weight), eps: EPS }
    }

    fn shape(&self) -> [usize; 2] {
        [self.tokens, self.heads * self.head_dim]
    }

    /// From tables that hold the last token's angles first.
    fn angles(&self, device: &Device) -> Angles {
        let half = self.cos.len() / self.tokens;
        let last_first = |table: &[f32]| table.rchunks_exact(half.max(1)).flatten().copied().collect();
        let tables = RopeTables::new(last_first(&self.cos), last_first(&self.sin), half, device);
        let positions: Vec<u32> = (0..self.tokens as u32).rev().collect();
        tables.angles(&positions)
    }

    fn graph(
        &self,
        dtype: DType,
        turn: impl Fn(BurnTensor<2>, Option<&BurnTensor<1>>, &Oracle) -> BurnTensor<2>,
    ) -> Results {
        let oracle = Oracle::new(dtype);
        let x = oracle.leaf(&self.x, self.shape());
        let weight = self.norm.as_ref().map(|weight| oracle.leaf(weight, [self.head_dim]));
        let y = turn(x.clone(), weight.as_ref(), &oracle);
        let grads = (y.clone() * oracle.constant(&self.dy, self.shape())).sum().backward();
        let mut results = vec![("y", values(y)), ("dx", grad(&x, &grads))];
        results.extend(weight.map(|weight| ("dw", grad(&weight, &grads))));
        results
    }

    /// y = x ∘ C + (x · R) ∘ S: R is the signed permutation that brings each channel its partner, C and S
    /// hold cos and sin of every channel, 1 and 0 where it does not turn.
    fn plain(&self, x: BurnTensor<2>, oracle: &Oracle) -> BurnTensor<2> {
        let [tokens, width] = self.shape();
        let half = self.cos.len() / tokens;
        let (mut c, mut s) = (vec![1.0; tokens * width], vec![0.0; tokens * width]);
        let mut r = vec![0.0; width * width];
        for channel in (0..width).filter(|channel| channel % self.head_dim < 2 * half) {
            let place = channel % self.head_dim;
            let (pair, apart) = if self.interleaved { (place / 2, 1) } else { (place % half, half) };
            let is_first = if self.interleaved { place.is_multiple_of(2) } else { place < half };
            let (partner, sign) = if is_first { (channel + apart, -1.0) } else { (channel - apart, 1.0) };
            r[partner * width + channel] = sign;
            for token in 0..tokens {
                c[token * width + channel] = self.cos[token * half + pair];
                s[token * width + channel] = self.sin[token * half + pair];
            }
        }
        let partners = x.clone().matmul(oracle.constant(&r, [width, width]));
        x * oracle.constant(&c, [tokens, width]) + partners * oracle.constant(&s, [tokens, width])
    }
}

impl Case for Rope {
    fn naive(&self, dtype: DType) -> Results {
        self.graph(dtype, |x, weight, oracle| {
            let x = match weight {
                None => x,
                Some(weight) => {
                    let rows = x.reshape([self.tokens * self.heads, self.head_dim]);
                    super::rms_norm::plain(self.form, &rows, weight, EPS).reshape(self.shape())
                }
            };
            self.plain(x, oracle)
        })
    }

    fn ours(&self, place: &Place) -> Results {
        let angles = self.angles(&place.device);
        let norm = self.norm.as_ref().map(|weight| self.norm(place.vector(weight)));
        let x = || place.matrix(&self.x, self.shape());
        let (y, rstd) = rope::forward(x(), self.head_dim, norm.as_ref(), self.rotation(&angles));
        let saved = norm.as_ref().map(|norm| (norm, x(), rstd.as_ref().expect("a norm saves rstd")));
        let backward = |weight_grad| {
            let saved = saved.as_ref().map(|(norm, x, rstd)| (*norm, x.clone(), *rstd));
            let dy = place.matrix(&self.dy, self.shape());
            rope::backward(dy, self.head_dim, saved, self.rotation(&angles), weight_grad)
        };
        let (dx, dw) = backward(true);
        let (frozen_dx, none) = backward(false);
        assert!(none.is_none(), "a frozen weight has no gradient");
        let mut results = vec![("y", values(y)), ("dx", values(dx)), ("dx", values(frozen_dx))];
        results.extend(dw.map(|dw| ("dw", values(dw))));
        results
    }

    fn differentiated(&self) -> Option<Results> {
        Some(self.graph(DType::F32, |x, weight, _| {
            let angles = self.angles(&Device::cpu());
            let norm = weight.map(|weight| self.norm(weight.clone().into()));
            rope::forward(x.into(), self.head_dim, norm.as_ref(), self.rotation(&angles)).0.into()
        }))
    }
}

impl std::fmt::Debug for Rope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [tokens, _] = self.shape();
        let rotary_dim = 2 * self.cos.len() / tokens;
        write!(f, "rope {tokens} × {} × {}, {rotary_dim} turn, ", self.heads, self.head_dim)?;
        let pairs = if self.interleaved { "interleaved" } else { "halves" };
        write!(f, "{pairs}, norm {:?}", self.norm.as_ref().map(|_| self.form))
    }
}

use std::f64::consts::PI;

/// A rule that scales the frequencies of a model beyond the window it was trained with.
///
/// Below, `f` is the unscaled frequency of a pair, P is `original_max_position_embeddings`, and d is the number of
/// rotary dimensions.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// No scaling: `f`.
    Default,
    /// `f / factor`: interpolates positions.
    Linear {
        /// The growth of the window.
        factor: f64,
    },
    /// NTK scaling: for sequences of length L beyond the window W, theta becomes
    /// `theta · (factor·L/W − (factor − 1))^(d/(d−2))`.
    Dynamic {
        /// The growth rate of theta.
        factor: f64,
        /// W, `max_position_embeddings`.
        window: usize,
    },
    /// YaRN (arXiv:2309.00071): pairs with more than `beta_fast` turns within P keep `f`, those with fewer than
    /// `beta_slow` turns get `f / factor`, and a linear ramp over the pairs blends between the two.
    Yarn {
        /// The growth of the window.
        factor: f64,
        /// P.
        original: usize,
        /// The factor applied to cos and sin: the given one, else `m(mscale) / m(mscale_all_dim)` if both are given,
        /// else `m(1)`, where `m(s) = 0.1·s·ln(factor) + 1` (1 for a factor up to 1).
        attention_factor: f64,
        /// Turns within P above which a pair is unchanged.
        beta_fast: f64,
        /// Turns within P below which a pair is interpolated.
        beta_slow: f64,
        /// If true, the ends of the ramp are rounded outward to whole pairs.
        truncate: bool,
    },
    /// Llama 3.1's rule: with the wavelength `λ = 2π/f`, pairs with `λ < P/high_freq_factor` keep `f`, those with `λ >
    /// P/low_freq_factor` get `f / factor`, and those in between get `(1 − s)·f/factor + s·f` with `s = (P/λ −
    /// low_freq_factor) / (high_freq_factor − low_freq_factor)`.
    Llama3 {
        /// The growth of the window.
        factor: f64,
        /// Turns within P below which a pair is interpolated.
        low_freq_factor: f64,
        /// Turns within P above which a pair is unchanged.
        high_freq_factor: f64,
        /// P.
        original: usize,
    },
    /// Gemma 4's full layers: `f / factor` for the first pairs, 0 for the others, which positions do not rotate. In contrast to a
    /// partial rotary embedding, d is the whole head, and its halves are paired.
    Proportional {
        /// The divisor of frequencies.
        factor: f64,
        /// Pairs that are rotated.
        pairs: usize,
    },
    /// LongRoPE (arXiv:2402.13753): `f / short_factor` up to length P and `f / long_factor` beyond, elementwise.
    LongRope {
        /// Divisors for runs up to length P, one per pair.
        short_factor: Vec<f64>,
        /// Divisors for runs beyond length P, one per pair.
        long_factor: Vec<f64>,
        /// P.
        original: usize,
        /// The factor applied to cos and sin: the given one, else `√(1 + ln(factor)/ln(P))` (1 for a factor up to 1).
        attention_factor: f64,
    },
}

impl Scaling {
    /// Returns the frequencies in f64, one per pair.
    pub(crate) fn inv_freq(&self, theta: f64, rotary_dim: usize, seq_len: usize) -> Vec<f64> {
        let d = rotary_dim as f64;
        match self {
            Self::Default => unscaled(theta, rotary_dim),
            Self::Linear { factor } => unscaled(theta, rotary_dim).into_iter().map(|f| f / factor).collect(),
            Self::Proportional { factor, pairs } => {
                let all = unscaled(theta, rotary_dim).into_iter().enumerate();
                all.map(|(i, f)| if i < *pairs { f / factor } else { 0.0 }).collect()
            }
            Self::Dynamic { .. } => unscaled(self.theta_at(theta, rotary_dim, seq_len), rotary_dim),
            Self::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let ramp = yarn_ramp(theta, d, *original as f64, [*beta_fast, *beta_slow], *truncate);
                let blend = |(i, f): (usize, f64)| f / factor * ramp(i) + f * (1.0 - ramp(i));
                unscaled(theta, rotary_dim).into_iter().enumerate().map(blend).collect()
            }
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => {
                let scale = |f: f64| {
                    let turns = *original as f64 * f / (2.0 * PI); // P/λ
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - keep) * f / factor + keep * f
                };
                unscaled(theta, rotary_dim).into_iter().map(scale).collect()
            }
            Self::LongRope { short_factor, long_factor, original, .. } => {
                let factors = if seq_len > *original { long_factor } else { short_factor };
                unscaled(theta, rotary_dim).into_iter().zip(factors).map(|(f, factor)| f / factor).collect()
            }
        }
    }

    /// Returns the theta used for sequences of `seq_len`.
    pub(crate) fn theta_at(&self, theta: f64, rotary_dim: usize, seq_len: usize) -> f64 {
        let Self::Dynamic { factor, window } = self else { return theta };
        let d = rotary_dim as f64;
        let growth = factor * seq_len.max(*window) as f64 / *window as f64 - (factor - 1.0);
        theta * growth.powf(d / (d - 2.0))
    }

    /// Returns the `rope_type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Linear { .. } => "linear",
            Self::Dynamic { .. } => "dynamic",
            Self::Proportional { .. } => "proportional",
            Self::Yarn { .. } => "yarn",
            Self::Llama3 { .. } => "llama3",
            Self::LongRope { .. } => "longrope",
        }
    }

    /// Returns P for the rules that have it.
    pub(crate) fn original(&self) -> Option<usize> {
        match self {
            Self::Yarn { original, .. } | Self::Llama3 { original, .. } | Self::LongRope { original, .. } => {
                Some(*original)
            }
            _ => None,
        }
    }

    pub(crate) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        }
    }
}

fn unscaled(theta: f64, rotary_dim: usize) -> Vec<f64> {
    (0..rotary_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / rotary_dim as f64)).collect()
}

/// Returns a function from pair index to its position on the ramp from unchanged (0) to interpolated (1).
fn yarn_ramp(theta: f64, d: f64, original: f64, [fast, slow]: [f64; 2], truncate: bool) -> impl Fn(usize) -> f64 {
    // The (fractional) index of the pair with this many turns within the original window.
    let pair = |turns: f64| d * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(fast), pair(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(d - 1.0));
    if low == high {
        high += 0.001; // as in the reference implementation, to avoid a division by zero
    }
    move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
}

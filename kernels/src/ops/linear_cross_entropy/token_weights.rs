//! The weights of tokens in a loss.

/// The weights w of a loss whose gradient is that of Σ w_t·nll_t.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenWeights<'a> {
    /// The same weight for every token.
    Uniform(f32),
    /// A weight for each token, w_t = scale · weights_t.
    PerToken {
        /// `[tokens]`; those of tokens without a target are not read.
        weights: &'a [f32],
        /// The factor of all.
        scale: f32,
    },
}

impl From<f32> for TokenWeights<'_> {
    fn from(weight: f32) -> Self {
        Self::Uniform(weight)
    }
}

impl<'a> From<&'a [f32]> for TokenWeights<'a> {
    fn from(weights: &'a [f32]) -> Self {
        Self::PerToken { weights, scale: 1.0 }
    }
}

impl TokenWeights<'_> {
    /// Returns the weight of a token.
    pub fn of(self, token: usize) -> f32 {
        match self {
            Self::Uniform(weight) => weight,
            Self::PerToken { weights, scale } => weights[token] * scale,
        }
    }

    /// Returns these weights times a factor.
    #[must_use]
    pub fn times(self, factor: f32) -> Self {
        match self {
            Self::Uniform(weight) => Self::Uniform(weight * factor),
            Self::PerToken { weights, scale } => Self::PerToken { weights, scale: scale * factor },
        }
    }

    /// The weights of some rows, times a factor.
    pub(super) fn of_rows(self, rows: &[usize], tokens: usize, factor: f32) -> Vec<f32> {
        if let Self::PerToken { weights, .. } = self {
            assert_eq!(weights.len(), tokens, "one weight for every token");
        }
        rows.iter().map(|&row| self.of(row) * factor).collect()
    }
}

//! Numbers with their derivatives, so that a loss is written once.

use core::ops::{Add, Mul, Neg, Sub};

/// A value that depends on the log-probabilities of two documents, with its derivatives by them.
///
/// Forward-mode differentiation: each operation applies the chain rule, so the losses of this module are only formulas.
/// Every function is finite wherever its value is; none overflows for arguments of any size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Dual {
    pub(super) value: f64,
    /// ∂value/∂first and ∂value/∂second.
    pub(super) slope: [f64; 2],
}

impl Dual {
    /// Returns the first variable, such as the log-probability of the chosen document.
    pub(super) fn first(value: f64) -> Self {
        Self { value, slope: [1.0, 0.0] }
    }

    /// Returns the second variable, such as the log-probability of the rejected document.
    pub(super) fn second(value: f64) -> Self {
        Self { value, slope: [0.0, 1.0] }
    }

    /// Returns a number that depends on neither variable.
    pub(super) fn constant(value: f64) -> Self {
        Self { value, slope: [0.0, 0.0] }
    }

    /// Returns a function of this number, from its value and its derivative.
    fn chain(self, value: f64, derivative: f64) -> Self {
        Self { value, slope: self.slope.map(|slope| slope * derivative) }
    }

    /// e^x.
    pub(super) fn exp(self) -> Self {
        let value = self.value.exp();
        self.chain(value, value)
    }

    /// σ(x) = 1 / (1 + e^−x).
    pub(super) fn sigmoid(self) -> Self {
        let value = sigmoid(self.value);
        self.chain(value, value * sigmoid(-self.value))
    }

    /// ln σ(x) = −ln(1 + e^−x).
    pub(super) fn ln_sigmoid(self) -> Self {
        let x = self.value;
        self.chain(x.min(0.0) - (-x.abs()).exp().ln_1p(), sigmoid(-x))
    }

    /// ln(1 − e^x), for x < 0.
    pub(super) fn ln_1m_exp(self) -> Self {
        let x = self.value;
        // Each form is exact where the other cancels.
        let value = if x < -core::f64::consts::LN_2 { (-x.exp()).ln_1p() } else { (-x.exp_m1()).ln() };
        // −e^x / (1 − e^x).
        self.chain(value, 1.0 / -(-x).exp_m1())
    }

    /// x².
    pub(super) fn square(self) -> Self {
        self.chain(self.value * self.value, 2.0 * self.value)
    }

    /// max(x, 0), with derivative 0 at 0.
    pub(super) fn relu(self) -> Self {
        if self.value > 0.0 { self } else { Self::constant(0.0) }
    }

    /// min(x, most), with derivative 1 at `most`, as PyTorch's clamp.
    pub(super) fn at_most(self, most: f64) -> Self {
        if self.value > most { Self::constant(most) } else { self }
    }
}

/// σ(x), without overflow.
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

impl Add for Dual {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let slope = [0, 1].map(|i| self.slope[i] + other.slope[i]);
        Self { value: self.value + other.value, slope }
    }
}

impl Sub for Dual {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        let slope = [0, 1].map(|i| self.slope[i] - other.slope[i]);
        Self { value: self.value - other.value, slope }
    }
}

impl Mul for Dual {
    type Output = Self;
    #[allow(clippy::suspicious_arithmetic_impl, reason = "the product rule")]
    fn mul(self, other: Self) -> Self {
        let slope = [0, 1].map(|i| self.slope[i] * other.value + self.value * other.slope[i]);
        Self { value: self.value * other.value, slope }
    }
}

impl Neg for Dual {
    type Output = Self;
    fn neg(self) -> Self {
        self.chain(-self.value, -1.0)
    }
}

impl Add<f64> for Dual {
    type Output = Self;
    fn add(self, other: f64) -> Self {
        Self { value: self.value + other, ..self }
    }
}

impl Sub<f64> for Dual {
    type Output = Self;
    fn sub(self, other: f64) -> Self {
        Self { value: self.value - other, ..self }
    }
}

impl Sub<Dual> for f64 {
    type Output = Dual;
    fn sub(self, other: Dual) -> Dual {
        Dual { value: self - other.value, slope: other.slope.map(|slope| -slope) }
    }
}

impl Mul<Dual> for f64 {
    type Output = Dual;
    fn mul(self, other: Dual) -> Dual {
        other.chain(self * other.value, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function against central differences, on both sides of its branches.
    #[test]
    fn derivatives_are_slopes() {
        type Function = fn(Dual) -> Dual;
        let functions: [(&str, Function); 8] = [
            ("exp", Dual::exp),
            ("sigmoid", Dual::sigmoid),
            ("ln_sigmoid", Dual::ln_sigmoid),
            ("ln_1m_exp", |x| if x.value < 0.0 { x.ln_1m_exp() } else { x }),
            ("square", Dual::square),
            ("relu", Dual::relu),
            ("at_most", |x| x.at_most(0.25)),
            ("product", |x| (2.0 * x - 1.0) * (0.5 - x).exp()),
        ];
        for (name, function) in functions {
            for x in [-3.0, -0.7, -0.2, 0.3, 1.5] {
                let step = 1e-5;
                let at = |x: f64| function(Dual::first(x)).value;
                let slope = (at(x + step) - at(x - step)) / (2.0 * step);
                let [first, second] = function(Dual::first(x)).slope;
                assert!((first - slope).abs() < 1e-8 * slope.abs().max(1.0), "{name}({x}): {first}, not {slope}");
                assert_eq!(second, 0.0);
            }
        }
        let product = Dual::first(3.0) * Dual::second(5.0) - Dual::constant(1.0);
        assert_eq!((product.value, product.slope), (14.0, [5.0, 3.0]));
    }

    #[test]
    fn nothing_overflows() {
        for x in [-1e4, 1e4] {
            for value in [Dual::first(x).sigmoid(), Dual::first(x).ln_sigmoid()] {
                assert!(value.value.is_finite() && value.slope[0].is_finite(), "{x}: {value:?}");
            }
        }
        let tiny = Dual::first(-1e-300).ln_1m_exp();
        assert!(tiny.value.is_finite() && tiny.slope[0].is_finite(), "{tiny:?}");
        let far = Dual::first(-1e4).ln_1m_exp();
        assert_eq!((far.value, far.slope[0]), (0.0, 0.0));
    }
}

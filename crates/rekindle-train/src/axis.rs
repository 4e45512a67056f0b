//! Round numbers for the axis of a plot.

/// An axis from the first to the last of its ticks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Axis {
    /// Round values at equal distances, at least two.
    pub(crate) ticks: Vec<f64>,
    /// Decimal places that distinguish the ticks.
    pub(crate) digits: usize,
}

impl Axis {
    /// Returns the shortest axis over `min` to `max` with at most five intervals of 1, 2, 2.5 or 5 times a power of
    /// ten, extended slightly if the ends require it.
    pub(crate) fn over(min: f64, max: f64) -> Self {
        // A single value is in the middle.
        let (min, max) = if max > min { (min, max) } else { (min - 0.5 * min.abs(), max + 0.5 * max.abs()) };
        let (min, max) = if max > min { (min, max) } else { (0.0, 1.0) };
        let raw = (max - min) / 5.0;
        let magnitude = raw.log10().floor();
        let (mantissa, more) = [(1.0, 0), (2.0, 0), (2.5, 1), (5.0, 0)]
            .into_iter()
            .find(|(m, _)| m * 10f64.powf(magnitude) >= raw * (1.0 - 1e-9))
            .unwrap_or((10.0, -1));
        let distance = mantissa * 10f64.powf(magnitude);
        let digits = (more - magnitude as i32).max(0) as usize;
        let first = (min / distance + 1e-9).floor() as i64;
        let last = ((max / distance - 1e-9).ceil() as i64).max(first + 1);
        // Through decimal text, so that 3 · 0.1 is 0.3.
        let round = |i: i64| format!("{:.digits$}", i as f64 * distance).parse().unwrap_or(i as f64 * distance);
        Self { ticks: (first..=last).map(round).collect(), digits }
    }

    /// Returns the position of `value`: 0 at the first tick, 1 at the last.
    pub(crate) fn place(&self, value: f64) -> f64 {
        let (first, last) = (self.ticks[0], self.ticks[self.ticks.len() - 1]);
        (value - first) / (last - first)
    }

    /// Formats a tick. All ticks have the same number of digits, in powers of ten if that is shorter.
    pub(crate) fn label(&self, tick: f64) -> String {
        let digits = self.digits;
        if digits > 4 && tick != 0.0 {
            format!("{tick:e}")
        } else {
            format!("{tick:.*}", if tick == 0.0 && digits > 4 { 0 } else { digits })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_both_ends() {
        assert_eq!(Axis::over(0.0, 4.2).ticks, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(Axis::over(0.0, 0.3).ticks, [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(Axis::over(1.73, 2.41).ticks, [1.6, 1.8, 2.0, 2.2, 2.4, 2.6]);
        assert_eq!(Axis::over(0.0, 60.0).ticks, [0.0, 20.0, 40.0, 60.0]);
        assert_eq!(Axis::over(-3.0, 8.0).ticks, [-5.0, -2.5, 0.0, 2.5, 5.0, 7.5, 10.0]);
        let axis = Axis::over(0.0, 2e-4);
        assert_eq!(
            axis.ticks.iter().map(|&tick| axis.label(tick)).collect::<Vec<_>>(),
            ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
        );
    }

    #[test]
    fn one_value_has_room_around_it() {
        assert!((Axis::over(3.0, 3.0).place(3.0) - 0.5).abs() < 0.2);
        assert_eq!(Axis::over(0.0, 0.0).ticks.first(), Some(&0.0));
    }
}

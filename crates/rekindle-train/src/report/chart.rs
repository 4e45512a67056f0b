//! A chart: curves over steps as SVG, with labels as HTML around it, so that text keeps its size at any width.

use core::fmt::Write as _;

use serde_json::json;

use super::text::{escape, group, significant};
use crate::axis::Axis;

/// The approximate number of points to draw of a series.
const MOST: usize = 1000;
/// The width and height of the SVG, which is stretched to the page.
const SIZE: f64 = 1000.0;

/// Curves over one axis.
pub(super) struct Chart {
    title: &'static str,
    /// The unit of the values, shown beside the title.
    unit: &'static str,
    format: Format,
    series: Vec<Series>,
    has_zero: bool,
    wide: bool,
}

/// The format of values.
#[derive(Clone, Copy)]
pub(super) enum Format {
    /// Three or four significant digits.
    Significant,
    /// Whole numbers.
    Whole,
    /// Bytes in the given unit.
    Bytes(&'static str),
}

/// A curve.
pub(super) struct Series {
    name: String,
    /// Its class in the style sheet.
    class: &'static str,
    points: Vec<(usize, f64)>,
    /// True if each point has a dot.
    dots: bool,
}

impl Series {
    pub(super) fn line(name: &str, class: &'static str, points: Vec<(usize, f64)>) -> Self {
        Self { name: name.to_owned(), class, points: thin(points), dots: false }
    }

    pub(super) fn dotted(name: &str, class: &'static str, points: Vec<(usize, f64)>) -> Self {
        let dots = points.len() <= 60;
        Self { dots, ..Self::line(name, class, points) }
    }
}

impl Chart {
    /// Returns a chart of the series that have points.
    pub(super) fn new(title: &'static str, format: Format, mut series: Vec<Series>) -> Self {
        series.iter_mut().for_each(|series| series.points.retain(|point| point.1.is_finite()));
        series.retain(|series| !series.points.is_empty());
        let unit = if let Format::Bytes(unit) = format { unit } else { "" };
        Self { title, unit, format, series, has_zero: false, wide: false }
    }

    /// Sets the unit of the values.
    pub(super) fn unit(mut self, unit: &'static str) -> Self {
        self.unit = unit;
        self
    }

    /// Includes 0 in the axis.
    pub(super) fn with_zero(mut self) -> Self {
        self.has_zero = true;
        self
    }

    /// Makes the chart as wide as the page.
    pub(super) fn wide(mut self) -> Self {
        self.wide = true;
        self
    }

    pub(super) fn has_points(&self) -> bool {
        !self.series.is_empty()
    }

    /// Returns the chart over steps 0 to `last` as HTML.
    pub(super) fn html(&self, last: usize) -> String {
        let values = || self.series.iter().flat_map(|series| &series.points).map(|point| point.1);
        let zero = self.has_zero.then_some(0.0);
        let axis =
            Axis::over(values().chain(zero).fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let last = last.max(1);
        let x = |step: usize| SIZE * step as f64 / last as f64;
        let y = |value: f64| SIZE * (1.0 - axis.place(value));

        let key = |series: &Series| format!("<span class=\"key {}\">{}</span>", series.class, escape(&series.name));
        let keys: String = if self.series.len() > 1 { self.series.iter().map(key).collect() } else { String::new() };
        let grid: String = axis.ticks.iter().map(|&tick| format!("M0 {:.1}H{SIZE}", y(tick))).collect();
        let mut svg = format!("<path class=\"grid\" d=\"{grid}\"/>");
        for Series { class, points, dots, .. } in &self.series {
            let mut line = String::new();
            let mut dotted = String::new();
            for &(step, value) in points {
                let command = if line.is_empty() { 'M' } else { 'L' };
                write!(line, "{command}{:.1} {:.1}", x(step), y(value)).expect("writing to a string");
                write!(dotted, "M{:.1} {:.1}h0", x(step), y(value)).expect("writing to a string");
            }
            write!(svg, "<path class=\"{class}\" d=\"{line}\"/>").expect("writing to a string");
            if *dots || points.len() == 1 {
                write!(svg, "<path class=\"{class} dots\" d=\"{dotted}\"/>").expect("writing to a string");
            }
        }
        let mut labels = String::new();
        for &tick in &axis.ticks {
            let top = 0.1 * y(tick);
            write!(labels, "<span class=\"y\" style=\"top:{top:.2}%\">{}</span>", self.tick(&axis, tick))
                .expect("writing to a string");
        }
        for step in steps(last) {
            let left = 0.1 * x(step);
            write!(labels, "<span class=\"x\" style=\"left:{left:.2}%\">{}</span>", group(step as f64))
                .expect("writing to a string");
        }
        let under_pointer = self.series.iter().map(|Series { name, class, points, .. }| {
            let points =
                points.iter().map(|&(step, value)| json!([step, (y(value) * 10.0).round() / 100.0, self.value(value)]));
            json!({ "name": name, "class": class, "points": points.collect::<Vec<_>>() })
        });
        // A name could end the element otherwise.
        let data = json!(under_pointer.collect::<Vec<_>>()).to_string().replace('<', "\\u003c");
        format!(
            "<figure{}>\n<figcaption><b>{}</b><small>{}</small>{keys}</figcaption>\n<div class=\"plot\">\
             <svg viewBox=\"0 0 {SIZE} {SIZE}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">{svg}</svg>\
             {labels}<span class=\"axis\">step</span><i></i><output></output><script type=\"application/json\">{data}</script></div>\n</figure>\n",
            if self.wide { " class=\"wide\"" } else { "" },
            self.title,
            self.unit,
            self.summary(),
        )
    }

    fn tick(&self, axis: &Axis, tick: f64) -> String {
        if tick.abs() >= 1e3 && axis.digits == 0 { group(tick) } else { axis.label(tick) }
    }

    fn value(&self, value: f64) -> String {
        match self.format {
            Format::Significant => significant(value),
            Format::Whole => group(value),
            Format::Bytes(unit) => format!("{value:.2} {unit}"),
        }
    }

    /// Returns a description of the chart for screen readers.
    fn summary(&self) -> String {
        let ends = self.series.iter().filter(|series| series.class != "raw").filter_map(|series| {
            let (first, last) = (series.points.first()?, series.points.last()?);
            let (from, to) = (self.value(first.1), self.value(last.1));
            Some(format!("{} {from} at step {}, {to} at step {}", series.name, first.0, last.0))
        });
        escape(&format!("{}: {}", self.title, ends.collect::<Vec<_>>().join("; ")))
    }
}

/// Returns round steps for the axis, including the last one if it does not overlap the one before.
fn steps(last: usize) -> Vec<usize> {
    let ticks = Axis::over(0.0, last as f64).ticks;
    let mut steps: Vec<usize> =
        ticks.into_iter().filter(|tick| tick.fract() == 0.0).map(|tick| tick as usize).collect();
    steps.retain(|&step| step == 0 || step * 10 <= last * 9);
    steps.push(last);
    steps
}

/// Thins a series to about [`MOST`] points: the minimum and the maximum of each group.
fn thin(points: Vec<(usize, f64)>) -> Vec<(usize, f64)> {
    if points.len() <= MOST {
        return points;
    }
    let by_value = |a: &&(usize, f64), b: &&(usize, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::with_capacity(MOST + 2);
    for part in points.chunks(points.len().div_ceil(MOST / 2)) {
        let ends = [part.iter().min_by(by_value), part.iter().max_by(by_value)];
        let mut ends: Vec<_> = ends.into_iter().flatten().copied().collect();
        ends.sort_by_key(|point| point.0);
        ends.dedup();
        kept.extend(ends);
    }
    // The ends of the run are looked at most.
    kept.insert(0, points[0]);
    kept.push(points[points.len() - 1]);
    kept.dedup();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_they_should() {
        let chart = Chart::new(
            "Loss",
            Format::Significant,
            vec![
                Series::line("training", "train", vec![(1, 3.0), (5, f64::NAN), (10, 1.0)]),
                Series::dotted("</script>", "eval", vec![(5, 2.0)]),
                Series::line("nothing", "peak", Vec::new()),
            ],
        )
        .with_zero();
        let html = chart.html(10);
        assert!(html.contains("<path class=\"train\" d=\"M100.0 0.0L1000.0 666.7\"/>"), "{html}");
        assert!(html.contains("<path class=\"eval dots\" d=\"M500.0 333.3h0\"/>"), "{html}");
        assert!(html.contains("<span class=\"y\" style=\"top:100.00%\">0</span>"), "{html}");
        assert!(html.contains("[10,66.67,\"1.000\"]"), "{html}");
        assert!(html.contains("aria-label=\"Loss: training 3.000 at step 1, 1.000 at step 10;"), "{html}");
        assert_eq!(html.matches("</script>").count(), 1, "a name does not end the data");
        assert!(!html.contains("nothing"));
        assert!(html.contains("<span class=\"axis\">step</span>"), "{html}");
    }

    #[test]
    fn thinning_keeps_what_stands_out() {
        let mut points: Vec<_> = (1..=50_000).map(|x| (x, 1.0 + (x as f64 * 1e-3).sin() * 0.1)).collect();
        points[31_234].1 = 9.0;
        points[41_234].1 = -9.0;
        let thinned = thin(points.clone());
        assert!(thinned.len() <= MOST + 2, "{}", thinned.len());
        for kept in [0, 31_234, 41_234, 49_999] {
            assert!(thinned.contains(&points[kept]), "{kept}");
        }
        assert!(thinned.is_sorted_by_key(|point| point.0));
    }

    #[test]
    fn steps_end_at_the_last() {
        assert_eq!(steps(60), [0, 20, 40, 60]);
        assert_eq!(steps(1), [0, 1]);
        assert_eq!(steps(4837), [0, 1000, 2000, 3000, 4000, 4837]);
        assert_eq!(steps(1010), [0, 250, 500, 750, 1010]);
    }
}

//! `loss.svg`: the losses of a run as an image.

use core::fmt::Write as _;

use crate::RunHistory;
use crate::axis::Axis;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 44.0;

/// Draws the training and evaluation losses over steps. Points that are not finite are omitted.
pub fn loss_svg(history: &RunHistory) -> String {
    let train = history.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let eval = history.evals.iter().map(|eval| (eval.step as f64, eval.eval_loss)).collect();
    let mut series = vec![
        PlotSeries { name: "training loss", color: "#2b6cb0", points: train },
        PlotSeries { name: "evaluation loss", color: "#c05621", points: eval },
    ];
    series.iter_mut().for_each(|series| series.points.retain(|point| point.1.is_finite()));
    series.retain(|series| !series.points.is_empty());
    lines_svg("loss", &series)
}

/// A line of a plot over steps.
#[derive(Clone, Debug)]
pub struct PlotSeries {
    /// The name in the legend.
    pub name: &'static str,
    /// A CSS color.
    pub color: &'static str,
    /// `(step, value)` pairs with non-negative values.
    pub points: Vec<(f64, f64)>,
}

/// Draws lines over steps.
pub fn lines_svg(title: &str, series: &[PlotSeries]) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    let x_max = points().map(|p| p.0).fold(1.0, f64::max);
    let axis = Axis::over(0.0, points().map(|p| p.1).fold(0.0, f64::max));
    let x = |step: f64| LEFT + step / x_max * (WIDTH - LEFT - RIGHT);
    let y = |loss: f64| HEIGHT - BOTTOM - axis.place(loss) * (HEIGHT - TOP - BOTTOM);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}</text>\n"
    );
    let mut line = |text: String| {
        svg.push_str(&text);
        svg.push('\n');
    };
    for &tick in &axis.ticks {
        let (at, label) = (y(tick), axis.label(tick));
        line(format!("<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#ddd\"/>", WIDTH - RIGHT));
        line(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 6.0, at + 4.0));
    }
    for part in 0..=4 {
        let step = (x_max * f64::from(part) / 4.0).round();
        let (at, below) = (x(step), HEIGHT - BOTTOM + 18.0);
        line(format!("<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{step}</text>"));
    }
    line(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">step</text>", WIDTH - RIGHT, HEIGHT - 8.0));
    for (i, PlotSeries { name, color, points }) in series.iter().enumerate() {
        let mut path = String::new();
        for (step, loss) in points {
            let command = if path.is_empty() { 'M' } else { 'L' };
            write!(path, "{command}{:.1} {:.1}", x(*step), y(*loss)).expect("writing to a string");
        }
        line(format!("<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>"));
        let (lx, ly) = (WIDTH - RIGHT - 180.0, TOP + 6.0 + 18.0 * i as f64);
        line(format!("<path d=\"M{lx} {ly}h20\" stroke=\"{color}\" stroke-width=\"3\"/>"));
        line(format!("<text x=\"{}\" y=\"{}\">{name}</text>", lx + 26.0, ly + 4.0));
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{eval, step};

    #[test]
    fn points_lie_where_they_should() {
        let [first, mut lost, mut last] = [0, 5, 10].map(step);
        (lost.loss, last.loss) = (f64::NAN, 0.0);
        let steps = vec![crate::StepMetrics { loss: 4.0, ..first }, lost, last];
        let svg = loss_svg(&RunHistory { steps: steps.clone(), ..RunHistory::default() });
        assert!(svg.contains("M56.0 36.0L704.0 356.0"), "{svg}");
        assert!(!svg.contains("evaluation loss"));
        let svg = loss_svg(&RunHistory { steps, evals: vec![eval(10)], ..RunHistory::default() });
        assert!(svg.contains("evaluation loss") && svg.contains("M704.0 176.0\""), "{svg}");
    }
}

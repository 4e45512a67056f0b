//! `loss.svg`: the losses of a run as a picture that any browser opens.

use core::fmt::Write as _;

/// A line of the plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Colour, as SVG writes it.
    pub color: &'static str,
    /// (step, loss).
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 44.0;

/// Draws `series` over steps. Points that are not finite are left out.
pub fn loss_svg(title: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points).filter(|(_, y)| y.is_finite());
    let x_max = points().map(|p| p.0).fold(1.0, f64::max);
    let y_max = points().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
    let ticks = ticks(y_max);
    let top = ticks.last().copied().unwrap_or(1.0);
    let x = |step: f64| LEFT + step / x_max * (WIDTH - LEFT - RIGHT);
    let y = |loss: f64| HEIGHT - BOTTOM - loss / top * (HEIGHT - TOP - BOTTOM);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    let mut line = |text: String| {
        svg.push_str(&text);
        svg.push('\n');
    };
    for tick in &ticks {
        let at = y(*tick);
        line(format!("<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#ddd\"/>", WIDTH - RIGHT));
        line(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>", LEFT - 6.0, at + 4.0));
    }
    for part in 0..=4 {
        let step = (x_max * f64::from(part) / 4.0).round();
        let (at, below) = (x(step), HEIGHT - BOTTOM + 18.0);
        line(format!("<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{step}</text>"));
    }
    line(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">step</text>", WIDTH - RIGHT, HEIGHT - 8.0));
    for (i, s) in series.iter().enumerate() {
        let mut path = String::new();
        for (step, loss) in s.points.iter().filter(|(_, y)| y.is_finite()) {
            let command = if path.is_empty() { 'M' } else { 'L' };
            write!(path, "{command}{:.1} {:.1}", x(*step), y(*loss)).expect("writing to a string");
        }
        line(format!("<path d=\"{path}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"/>", s.color));
        let (lx, ly) = (WIDTH - RIGHT - 130.0, TOP + 6.0 + 18.0 * i as f64);
        line(format!("<path d=\"M{lx} {ly}h20\" stroke=\"{}\" stroke-width=\"3\"/>", s.color));
        line(format!("<text x=\"{}\" y=\"{}\">{}</text>", lx + 26.0, ly + 4.0, escape(&s.name)));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Round values from 0 to at least `max`, five steps or fewer.
fn ticks(max: f64) -> Vec<f64> {
    let raw = max / 4.0;
    let magnitude = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * magnitude).find(|&s| s >= raw).unwrap_or(raw);
    let count = (max / step).ceil() as usize;
    // Through decimal text, so that 3 · 0.1 is 0.3.
    (0..=count).map(|i| format!("{:.6}", i as f64 * step).parse().unwrap_or(i as f64 * step)).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_top() {
        assert_eq!(ticks(4.2), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(ticks(0.3), [0.0, 0.1, 0.2, 0.3]);
    }

    #[test]
    fn points_lie_where_they_should() {
        let points = vec![(0.0, 4.0), (5.0, f64::NAN), (10.0, 0.0)];
        let svg = loss_svg("a < b", &[Series { name: "train".into(), color: "#c40", points }]);
        assert!(svg.contains("a &lt; b"));
        assert!(svg.contains("M56.0 36.0L704.0 356.0"), "{svg}");
    }
}

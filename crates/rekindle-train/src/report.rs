//! `report.html`: a run on one self-contained page.

mod chart;
mod completions;
mod curves;
mod samples;
mod text;

use core::fmt::Write as _;

use crate::RunHistory;
use text::{bytes, count, duration, escape, group, significant};

/// The description of a run in its report, besides its metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunDescription {
    /// The page's title, such as the model's name.
    pub title: String,
    /// Names and texts that describe the model and the data.
    pub facts: Vec<(String, String)>,
    /// Ways to use the result: the program, and the lines to write.
    pub usage: Vec<(String, String)>,
    /// The configuration, as a run file.
    pub configuration: String,
}

const STYLE: &str = include_str!("report/style.css");
const SCRIPT: &str = include_str!("report/script.js");

/// Returns the page of a run of `total` steps, with the steps in `history`.
///
/// The page loads nothing: styles, script and images are embedded, and its policy forbids requests. Charts are drawn
/// without the script, which only shows the values under the pointer. Their series are thinned to about a thousand
/// points, with extremes kept, so that the page of a long run stays small.
pub fn report_html(history: &RunHistory, total: usize, description: &RunDescription) -> String {
    let title = escape(&description.title);
    let done = history.steps.last().map_or(0, |step| step.step);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body data-last=\"{done}\">\n<main>\n\
         <header>\n<h1>{title}</h1>\n<p>{}</p>\n</header>\n",
        progress(done, total)
    );
    page += &figures(history);
    page += "<section class=\"charts\">\n";
    curves::charts(history).iter().for_each(|chart| page += &chart.html(done));
    page += "</section>\n";
    page += &samples::html(&history.samples);
    page += &completions::html(&history.completions);
    if !description.facts.is_empty() {
        let rows = description.facts.iter();
        let rows: String =
            rows.map(|(name, text)| format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(text))).collect();
        section(&mut page, "Model and data", &format!("<dl>\n{rows}</dl>\n"));
    }
    if !description.usage.is_empty() {
        let rows = description.usage.iter();
        let rows: String =
            rows.map(|(with, lines)| format!("<h3>{}</h3>\n<pre>{}</pre>\n", escape(with), escape(lines))).collect();
        section(&mut page, "Usage", &rows);
    }
    if !description.configuration.is_empty() {
        let text = format!("<pre>{}</pre>\n", escape(&description.configuration));
        section(&mut page, "Configuration", &text);
    }
    let version = env!("CARGO_PKG_VERSION");
    write!(
        page,
        "<footer>Written by Rekindle {version}. This file is self-contained: it loads nothing and sends \
         nothing.</footer>\n\
         </main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    )
    .expect("writing to a string");
    page
}

fn section(page: &mut String, title: &str, body: &str) {
    write!(page, "<section>\n<h2>{title}</h2>\n{body}</section>\n").expect("writing to a string");
}

fn progress(done: usize, total: usize) -> String {
    match done {
        done if done >= total && total == 1 => "The run's one step is done.".to_owned(),
        done if done >= total => format!("All {} steps are done.", group(total as f64)),
        done => {
            format!("Step {} of {}: the run is not finished.", group(done as f64), group(total as f64))
        }
    }
}

/// Returns the main figures of the run.
fn figures(history: &RunHistory) -> String {
    let Some(last) = history.steps.last() else { return String::new() };
    let mut tiles = Vec::new();
    let mut tile = |name: &str, value: String, note: String| {
        let note = if note.is_empty() { note } else { format!("<small>{note}</small>") };
        tiles.push(format!("<div><span>{name}</span><b>{value}</b>{note}</div>\n"));
    };
    if let Some(eval) = history.evals.last() {
        let best = history.evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).unwrap_or(eval);
        let first = history.evals.first().filter(|first| first.step == 0 && eval.step > 0);
        let note = match (first, best.step == eval.step) {
            (_, false) if best.step > 0 => {
                format!("best {} at step {}", significant(best.eval_loss), group(best.step as f64))
            }
            (Some(first), _) => format!("{} before step 1", significant(first.eval_loss)),
            (None, _) => {
                let perplexity = eval.eval_perplexity.map(significant);
                perplexity.map_or_else(String::new, |perplexity| format!("perplexity {perplexity}"))
            }
        };
        tile("evaluation loss", significant(eval.eval_loss), note);
        if let Some(margin) = eval.metrics.get("eval_rewards/margins") {
            let accuracy = eval.metrics.get("eval_rewards/accuracies");
            let note = accuracy.map(|accuracy| format!("chosen preferred in {:.1} % of pairs", 100.0 * accuracy));
            tile("held-out reward margin", significant(margin), note.unwrap_or_default());
        }
    }
    let first = history.steps.first().map_or(f64::NAN, |step| step.loss);
    tile(
        "training loss",
        significant(curves::recent_loss(history)),
        format!("{} at the first step", significant(first)),
    );
    let tokens: usize = history.steps.iter().map(|step| step.tokens).sum();
    let trained: usize = history.steps.iter().map(|step| step.trained_tokens).sum();
    tile("tokens", count(tokens), format!("{} counted in the loss", count(trained)));
    let steps = if last.step == 1 { "1 step".to_owned() } else { format!("{} steps", group(last.step as f64)) };
    tile("epochs", format!("{:.2}", last.epoch), steps);
    tile("tokens per second", group(curves::median_speed(history)), "median of the training steps".to_owned());
    if let (Some(scale), Some(skipped)) = (last.metrics.get("loss_scale"), last.metrics.get("skipped_steps")) {
        let note =
            if skipped == 1.0 { "1 step skipped".to_owned() } else { format!("{} steps skipped", group(skipped)) };
        tile("loss scale", group(scale), note);
    }
    if let Some(peak) = history.steps.iter().filter_map(|step| step.peak_memory).max() {
        tile("peak memory", bytes(peak), String::new());
    }
    tile("time", duration(last.seconds), String::new());
    format!("<section class=\"figures\">\n{}</section>\n", tiles.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{eval, sample, step};

    fn history(steps: usize) -> RunHistory {
        let evals = (1..=steps).filter(|n| n % 4 == 0);
        let samples = evals.clone().map(sample).collect();
        RunHistory {
            steps: (1..=steps).map(step).collect(),
            evals: evals.map(eval).collect(),
            samples,
            completions: Vec::new(),
        }
    }

    fn description() -> RunDescription {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        RunDescription {
            title: "a <model> & more".into(),
            facts: vec![pair("data", "rows </dd><script>alert(1)</script>")],
            usage: vec![pair("rekindle", "rekindle generate --model \"m\"")],
            configuration: "[train]\nmax_steps = 8\n".into(),
        }
    }

    #[test]
    fn everything_is_in_the_page_and_nothing_outside_is_named() {
        let page = report_html(&history(8), 8, &description());
        for part in [
            "<title>a &lt;model&gt; &amp; more</title>",
            "All 8 steps",
            "max_steps = 8",
            "after 4",
            "after 8",
            "3.00 MiB",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        for charts in ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"] {
            assert!(page.contains(&format!("<b>{charts}</b>")), "{charts}");
        }
        for outside in
            ["http:", "https:", "=\"//", "src=", "href=", "url(", "@import", "<link", "<img", "fetch", "XMLHttp"]
        {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(!page.contains("<script>alert"), "texts are escaped");
    }

    #[test]
    fn the_loss_before_the_first_step_stands_beside_the_last() {
        let eval_at = |step, eval_loss| crate::EvalMetrics { step, eval_loss, ..eval(step) };
        let page = |evals: &[(usize, f64)]| {
            let evals = evals.iter().map(|&(step, loss)| eval_at(step, loss)).collect();
            report_html(&RunHistory { evals, ..history(8) }, 8, &description())
        };
        assert!(page(&[(0, 0.76), (8, 0.03)]).contains("<b>0.0300</b><small>0.760 before step 1</small>"));
        assert!(page(&[(0, 0.76), (4, 0.02), (8, 0.03)]).contains("best 0.0200 at step 4"));
        assert!(page(&[(0, 0.5), (8, 0.75)]).contains("<b>0.750</b><small>0.500 before step 1</small>"));
        assert!(page(&[(8, 0.75)]).contains("<b>0.750</b><small>perplexity"));
        let values = [("loss_scale".to_owned(), 32768.0), ("skipped_steps".to_owned(), 1.0)].into();
        let scaled = crate::StepMetrics { metrics: crate::MetricValues(values), grad_norm: f64::INFINITY, ..step(1) };
        let scaled = report_html(&RunHistory { steps: vec![scaled], ..RunHistory::default() }, 8, &description());
        assert!(scaled.contains("<span>loss scale</span><b>32,768</b><small>1 step skipped</small>"), "{scaled}");
        let one = report_html(&RunHistory { steps: vec![step(1)], ..RunHistory::default() }, 1, &description());
        assert!(one.contains("one step is done") && one.contains("<small>1 step</small>"), "{one}");
    }

    #[test]
    fn every_chart_names_its_axes() {
        let page = report_html(&history(8), 8, &description());
        assert_eq!(page.matches("<span class=\"axis\">step</span>").count(), 5, "x");
        for unit in ["nats per token", "L2, before clipping", "tokens per second of training steps", "MiB"] {
            assert!(page.contains(&format!("<small>{unit}</small>")), "{unit}");
        }
    }

    #[test]
    fn a_run_that_is_not_over_says_so() {
        let page = report_html(&history(5), 2000, &RunDescription::default());
        assert!(page.contains("Step 5 of 2,000") && page.contains("data-last=\"5\""), "{page}");
        assert!(!page.contains("Configuration</h2>") && !page.contains("Usage"));
        let empty = report_html(&RunHistory::default(), 10, &RunDescription::default());
        assert!(empty.contains("Step 0 of 10") && !empty.contains("<svg"), "{empty}");
    }

    #[test]
    fn a_long_run_gives_a_page_of_bounded_size() {
        let [short, long] =
            [2_000, 60_000].map(|steps| report_html(&history(steps), steps, &RunDescription::default()));
        let charts = |page: &str| page.find("<h2>Samples").unwrap();
        assert!(charts(&long) < charts(&short) * 3 / 2, "{} {}", charts(&long), charts(&short));
    }
}

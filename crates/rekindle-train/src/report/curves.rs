//! The curves of a run, and their smoothing.

use super::chart::{Chart, Format, Series};
use super::text::byte_unit;
use crate::{RunHistory, StepMetrics};

/// Returns the charts of a page, the loss first.
pub(super) fn charts(history: &RunHistory) -> Vec<Chart> {
    if history.steps.is_empty() {
        return Vec::new();
    }
    let of = |value: fn(&StepMetrics) -> f64| points(history, |step| Some(value(step)));
    let mut charts = vec![loss(history)];
    charts.extend(rewards(history));
    charts.extend(scores(history));
    charts.extend(completions(history));
    charts.extend([
        Chart::new(
            "Learning rate",
            Format::Significant,
            vec![Series::line("learning rate", "train", of(|s| s.learning_rate))],
        )
        .with_zero(),
        Chart::new("Gradient norm", Format::Significant, smoothed("before clipping", of(|s| s.grad_norm)))
            .unit("L2, before clipping")
            .with_zero(),
        Chart::new("Throughput", Format::Whole, smoothed("tokens per second", of(|s| s.tokens_per_second)))
            .unit("tokens per second of training steps")
            .with_zero(),
        memory(history),
    ]);
    charts.retain(Chart::has_points);
    charts
}

/// Returns the series of a metric in training, smoothed, and in evaluations.
fn with_evaluations(history: &RunHistory, name: &str) -> Vec<Series> {
    let mut series = smoothed("training data", points(history, |step| step.metrics.get(name)));
    let name = format!("eval_{name}");
    let evals = history.evals.iter().filter_map(|eval| Some((eval.step, eval.metrics.get(&name)?))).collect();
    series.push(Series::dotted("evaluation data", "eval", evals));
    series
}

/// Returns the charts of a preference loss: rewards, their margin, and the share of pairs in the right order. Without such
/// metrics they have no points.
fn rewards(history: &RunHistory) -> [Chart; 3] {
    let of = |name: &str| points(history, |step| step.metrics.get(name));
    let both = |name: &str| with_evaluations(history, name);
    let sides = vec![
        Series::line("chosen", "train", smooth(&of("rewards/chosen"))),
        Series::line("rejected", "eval", smooth(&of("rewards/rejected"))),
    ];
    [
        Chart::new("Reward margin", Format::Significant, both("rewards/margins")).unit("chosen − rejected").wide(),
        Chart::new("Rewards", Format::Significant, sides).unit("training data"),
        Chart::new("Reward accuracy", Format::Significant, both("rewards/accuracies"))
            .unit("share of pairs")
            .with_zero(),
    ]
}

/// Returns the charts of a reward model: the margin and the accuracy of its scores, and their range. Without such metrics they
/// have no points.
fn scores(history: &RunHistory) -> [Chart; 3] {
    let of = |name: &str| points(history, |step| step.metrics.get(name));
    let both = |name: &str| with_evaluations(history, name);
    let range = vec![
        Series::line("max", "peak", smooth(&of("max_reward"))),
        Series::line("mean", "train", smooth(&of("mean_reward"))),
        Series::line("min", "eval", smooth(&of("min_reward"))),
    ];
    [
        Chart::new("Score margin", Format::Significant, both("margin")).unit("chosen − rejected").wide(),
        Chart::new("Scores", Format::Significant, range).unit("training data"),
        Chart::new("Accuracy", Format::Significant, both("accuracy")).unit("share of pairs").with_zero(),
    ]
}

/// Returns the charts of sampled completions: rewards, lengths, the divergence from the reference model, which `kto` has too, and
/// the share of prompts without a signal. Without such metrics they have no points.
fn completions(history: &RunHistory) -> [Chart; 4] {
    let of = |name: &str| points(history, |step| step.metrics.get(name));
    let evals = history.evals.iter().filter_map(|eval| Some((eval.step, eval.metrics.get("eval_reward")?))).collect();
    let mut reward = smoothed("training data", of("reward"));
    reward.push(Series::dotted("evaluation data", "eval", evals));
    let lengths = vec![
        Series::line("mean", "train", of("completions/mean_length")),
        Series::line("max", "peak", of("completions/max_length")),
    ];
    let equal = vec![Series::line("equal rewards", "train", of("frac_reward_zero_std"))];
    [
        Chart::new("Reward", Format::Significant, reward).unit("mean over completions").wide(),
        Chart::new("Completion length", Format::Whole, lengths).unit("tokens").with_zero(),
        Chart::new("KL to the reference", Format::Significant, smoothed("KL", of("kl"))).unit("nats"),
        Chart::new("Prompts without a signal", Format::Significant, equal).unit("share of prompts").with_zero(),
    ]
}

/// Returns the mean loss of the last steps, over the span of the smoothing.
pub(super) fn recent_loss(history: &RunHistory) -> f64 {
    smooth(&points(history, |step| Some(step.loss))).last().map_or(f64::NAN, |point| point.1)
}

/// Returns the median of tokens per second over the steps.
pub(super) fn median_speed(history: &RunHistory) -> f64 {
    let mut speeds: Vec<f64> = history.steps.iter().map(|step| step.tokens_per_second).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied().unwrap_or(f64::NAN)
}

fn loss(history: &RunHistory) -> Chart {
    let mut series = smoothed("training data", points(history, |step| Some(step.loss)));
    let evals = history.evals.iter().map(|eval| (eval.step, eval.eval_loss)).collect();
    series.push(Series::dotted("evaluation data", "eval", evals));
    let has = |name: &str| history.steps.iter().any(|step| step.metrics.get(name).is_some());
    let is_preference = has("rewards/chosen") || has("reward") || has("mean_reward");
    let unit = if is_preference { "of the training method" } else { "nats per token" };
    Chart::new("Loss", Format::Significant, series).unit(unit).wide()
}

fn memory(history: &RunHistory) -> Chart {
    let most = history.steps.iter().filter_map(|step| step.peak_memory.max(step.memory)).max().unwrap_or(0);
    let (unit, name) = byte_unit(most as f64);
    let of =
        |value: fn(&StepMetrics) -> Option<u64>| points(history, |step| value(step).map(|bytes| bytes as f64 / unit));
    let series = vec![
        Series::line("peak", "peak", of(|s| s.peak_memory)),
        Series::line("after the step", "train", of(|s| s.memory)),
    ];
    Chart::new("Memory", Format::Bytes(name), series).with_zero()
}

fn points(history: &RunHistory, value: impl Fn(&StepMetrics) -> Option<f64>) -> Vec<(usize, f64)> {
    let points = history.steps.iter().filter_map(|step| Some((step.step, value(step)?)));
    points.filter(|point| point.1.is_finite()).collect()
}

/// Returns the points as a faint series, and a smoothed series if there are enough points.
fn smoothed(name: &str, points: Vec<(usize, f64)>) -> Vec<Series> {
    if span(points.len()) < 2 {
        return vec![Series::line(name, "train", points)];
    }
    let smooth = smooth(&points);
    vec![Series::line(name, "raw", points), Series::line("smoothed", "train", smooth)]
}

/// Returns the span of the smoothing: a fiftieth of all points, at most fifty.
fn span(count: usize) -> usize {
    (count / 50).min(50)
}

/// Computes an exponential moving average, s ← s + α(y − s) with α = 2 / (span + 1), corrected for its start.
fn smooth(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let alpha = 2.0 / (span(points.len()).max(1) as f64 + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |&(step, y): &(usize, f64)| {
        sum += alpha * (y - sum);
        weight += alpha * (1.0 - weight);
        (step, sum / weight)
    };
    points.iter().map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::step;

    #[test]
    fn a_constant_stays_one_and_noise_gets_less() {
        let constant: Vec<_> = (1..=100).map(|x| (x, 3.0)).collect();
        assert!(smooth(&constant).iter().all(|point| (point.1 - 3.0).abs() < 1e-12));
        let noise: Vec<_> = (1..=1000).map(|x| (x, if x % 2 == 0 { 1.0 } else { -1.0 })).collect();
        let smooth = smooth(&noise);
        assert_eq!(smooth[0], (1, -1.0), "the first has no other to be averaged with");
        assert!(smooth[100..].iter().all(|point| point.1.abs() < 0.1), "{smooth:?}");
    }

    #[test]
    fn a_preference_run_has_charts_of_rewards() {
        let mut history = RunHistory { steps: (1..=12).map(step).collect(), ..RunHistory::default() };
        let values = [("rewards/chosen", 0.5), ("rewards/rejected", -0.25), ("rewards/margins", 0.75)];
        for step in &mut history.steps {
            step.metrics = crate::MetricValues::prefixed(&values, "");
        }
        let html: String = charts(&history).iter().map(|chart| chart.html(12)).collect();
        for part in ["<b>Reward margin</b>", "<b>Rewards</b>", "0.750", "of the training method"] {
            assert!(html.contains(part), "{part}: {html}");
        }
        assert!(!html.contains("Reward accuracy"), "it has no values");
    }

    #[test]
    fn a_reward_model_has_charts_of_scores() {
        let mut history = RunHistory { steps: (1..=12).map(step).collect(), ..RunHistory::default() };
        let values =
            [("min_reward", -1.5), ("mean_reward", 0.0), ("max_reward", 2.5), ("margin", 0.75), ("accuracy", 1.0)];
        for step in &mut history.steps {
            step.metrics = crate::MetricValues::prefixed(&values, "");
        }
        let charts = charts(&history);
        let html: String = charts.iter().map(|chart| chart.html(12)).collect();
        for part in ["<b>Score margin</b>", "<b>Scores</b>", "<b>Accuracy</b>", "of the training method"] {
            assert!(html.contains(part), "{part}: {html}");
        }
        assert_eq!(charts.len(), 8);
    }

    #[test]
    fn a_short_run_is_not_smoothed() {
        let history = RunHistory { steps: (1..=12).map(step).collect(), ..RunHistory::default() };
        assert_eq!(recent_loss(&history), 2.0 + 1.0 / 12.0);
        assert_eq!(median_speed(&history), 900.0);
        assert_eq!(charts(&history).len(), 5);
    }
}

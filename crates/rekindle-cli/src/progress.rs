//! Progress on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};

use indicatif::{BinaryBytes, DecimalBytes, HumanCount, ProgressBar, ProgressFinish, ProgressStyle};
use rekindle::{EvalMetrics, MetricValues, PromptSample, StepMetrics, Timetable, TrainEvent, counted};

/// The progress of a training run.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The steps at which evaluations and saves are due, known from the start of the run.
    times: Option<Timetable>,
    /// The bar, created by the first step, which knows their number.
    bar: Option<ProgressBar>,
    is_terminal: bool,
    clock: Clock,
}

/// The time of a run, divided into training steps, and evaluations, samples and checkpoints between them.
#[derive(Debug, Default, PartialEq)]
struct Clock {
    /// Steps observed.
    steps: usize,
    /// Wall-clock seconds of the run at the last step.
    last: Option<f64>,
    /// Seconds between steps.
    between: f64,
    /// Seconds of training steps.
    training: f64,
    /// Tokens and seconds of the training steps since the last line.
    line: (usize, f64),
}

impl Clock {
    fn step(&mut self, metrics: &StepMetrics) {
        let seconds = metrics.tokens as f64 / metrics.tokens_per_second;
        self.training += seconds;
        if let Some(last) = self.last {
            self.between += (metrics.seconds - last - seconds).max(0.0);
        }
        self.last = Some(metrics.seconds);
        self.steps += 1;
        self.line = (self.line.0 + metrics.tokens, self.line.1 + seconds);
    }

    /// Returns tokens per second of the training steps since the last call, without evaluations.
    fn speed(&mut self) -> f64 {
        let (tokens, seconds) = std::mem::take(&mut self.line);
        tokens as f64 / seconds
    }

    /// Returns the seconds that `steps` steps take, including the time between them.
    fn left(&self, steps: usize) -> f64 {
        (self.training + self.between) / self.steps.max(1) as f64 * steps as f64
    }
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { times: None, bar: None, is_terminal: stderr().is_terminal(), clock: Clock::default() }
    }

    pub(crate) fn event(&mut self, event: &TrainEvent<'_>) {
        match event {
            TrainEvent::Started { done, times, checkpoint, notes } => {
                self.times = Some(**times);
                notes.iter().for_each(|note| eprintln!("{note}"));
                if let Some(path) = checkpoint {
                    eprintln!("resuming from {} after step {done} of {}", path.display(), times.total);
                }
            }
            TrainEvent::Step { metrics, total } => self.step(metrics, *total),
            TrainEvent::Eval(metrics) => self.note(&eval_line(metrics)),
            TrainEvent::Sample(sample) => self.note(&sample_line(sample)),
            TrainEvent::Saved(path) => self.note(&format!("saved {}", path.display())),
            _ => {}
        }
    }

    fn step(&mut self, metrics: &StepMetrics, total: usize) {
        self.clock.step(metrics);
        if self.is_terminal {
            // A resumed run starts in the middle; earlier steps do not count for the speed.
            let bar = self.bar.get_or_insert_with(|| bar(total).with_position(metrics.step as u64 - 1));
            bar.set_message(bar_message(metrics));
            bar.set_position(metrics.step as u64);
            if metrics.step == total {
                // What follows, evaluation and saving, would otherwise share its line.
                bar.finish_and_clear();
                self.bar = None;
            }
            return;
        }
        if self.times.is_none_or(|times| times.logs_after(metrics.step)) {
            let speed = self.clock.speed();
            eprintln!("{}", step_line(metrics, total, speed, self.clock.left(total - metrics.step)));
        }
    }

    /// Prints a line above the bar.
    fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

/// Returns a callback that shows the bytes of weights read, with the verb `doing`, on a terminal only.
pub(crate) fn reading(doing: &'static str) -> impl FnMut(u64, u64) + 'static {
    let bar = stderr().is_terminal().then(|| {
        let style = style("{msg} {bar:30} {bytes} of {total_bytes}  {eta} left");
        ProgressBar::no_length().with_style(style).with_message(doing)
    });
    move |done, total| {
        if let Some(bar) = &bar {
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
    }
}

/// Returns a callback that shows downloaded bytes: a bar on a terminal, elsewhere a line at the beginning and at the
/// end of each download.
pub(crate) fn downloading() -> impl FnMut(u64, u64) + 'static {
    let is_terminal = stderr().is_terminal();
    let mut bar: Option<ProgressBar> = None;
    move |done, total| {
        let current = bar.get_or_insert_with(|| {
            if !is_terminal {
                eprintln!("downloading {}", DecimalBytes(total));
                return ProgressBar::hidden();
            }
            let style = style(
                "downloading {bar:30} {decimal_bytes} of {decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left",
            );
            // What follows a failure would otherwise share its line.
            ProgressBar::no_length().with_style(style).with_finish(ProgressFinish::AndClear)
        });
        current.set_length(total);
        current.set_position(done);
        if done >= total {
            current.finish_and_clear();
            bar = None;
            if !is_terminal {
                eprintln!("downloaded");
            }
        }
    }
}

/// Returns a callback that shows the answered rows of `total` and the speed in tokens per second: a bar on a terminal, and
/// a line at each tenth elsewhere.
pub(crate) fn answers(total: usize) -> impl FnMut(usize, f64) {
    let bar = stderr().is_terminal().then(|| bar(total));
    move |done, speed| match &bar {
        Some(bar) => {
            bar.set_message(format!("{speed:.0} tok/s"));
            bar.set_position(done as u64);
            if done == total {
                bar.finish_and_clear();
            }
        }
        None if done * 10 / total > (done - 1) * 10 / total => {
            eprintln!("answered {done}/{total}  {speed:.0} tok/s");
        }
        None => {}
    }
}

/// Returns a callback that shows the rows evaluated, on a terminal only.
pub(crate) fn rows() -> impl FnMut(usize) {
    let bar = stderr().is_terminal().then(|| ProgressBar::no_length().with_style(style("{pos} rows")));
    move |done| {
        if let Some(bar) = &bar {
            bar.set_position(done as u64);
        }
    }
}

fn bar(total: usize) -> ProgressBar {
    ProgressBar::new(total as u64).with_style(style("{bar:30} {pos}/{len}  {msg}  {eta} left"))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates of this file are valid")
}

fn step_line(metrics: &StepMetrics, total: usize, speed: f64, left: f64) -> String {
    let StepMetrics { step, loss, grad_norm, learning_rate, .. } = metrics;
    let rewards = rewards(&metrics.metrics, "");
    let skipped = skipped(&metrics.metrics);
    format!(
        "step {step}/{total}  loss {loss:.3}{rewards}  grad_norm {grad_norm:.2}{skipped}  lr {learning_rate:.1e}  {speed:.0} tok/s  eta {}",
        duration(left)
    )
}

fn bar_message(metrics: &StepMetrics) -> String {
    let speed = HumanCount(metrics.tokens_per_second.round() as u64);
    let memory = metrics.memory.map_or_else(String::new, |bytes| format!("  {}", BinaryBytes(bytes)));
    let (rewards, skipped) = (rewards(&metrics.metrics, ""), skipped(&metrics.metrics));
    format!("loss {:.3}{rewards}{skipped}  {speed} tok/s{memory}", metrics.loss)
}

/// The maximum number of characters of an answer.
const WIDTH: usize = 100;

fn sample_line(sample: &PromptSample) -> String {
    let text = format!("{:?}", sample.output);
    let text = match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text,
    };
    format!("sample {} {}: {text}", sample.sample, when(sample.step))
}

fn eval_line(metrics: &EvalMetrics) -> String {
    let EvalMetrics { step, eval_loss, eval_perplexity, eval_tokens, metrics } = metrics;
    let perplexity = eval_perplexity.map_or_else(String::new, |perplexity| format!("  perplexity {perplexity:.2}"));
    format!(
        "eval {}  loss {eval_loss:.4}{perplexity}{}  ({})",
        when(*step),
        rewards(metrics, "eval_"),
        counted(*eval_tokens, "token")
    )
}

/// Returns the margin and the accuracy of the rewards of a preference loss, or the reward of sampled completions.
fn rewards(metrics: &MetricValues, prefix: &str) -> String {
    let show =
        |(name, key): (&str, &str)| metrics.get(&format!("{prefix}{key}")).map(|value| format!("  {name} {value:.3}"));
    let names = [("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"), ("reward", "reward")];
    names.into_iter().filter_map(show).collect()
}

/// Returns the steps that an f16 run has skipped, and the scale of the loss.
fn skipped(metrics: &MetricValues) -> String {
    match (metrics.get("skipped_steps"), metrics.get("loss_scale")) {
        (Some(skipped), Some(scale)) if skipped > 0.0 => format!("  skipped {skipped} (loss scale {scale})"),
        _ => String::new(),
    }
}

/// Returns the time of an evaluation in the run.
fn when(step: usize) -> String {
    if step == 0 { "before step 1".to_owned() } else { format!("after step {step}") }
}

/// Formats seconds as `12s`, `3m04s` or `2h05m`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_it_goes() {
        let line = step_line(&metrics(10, 2.4), 60, 1234.4, 12.0);
        assert_eq!(line, "step 10/60  loss 1.234  grad_norm 0.56  lr 2.0e-4  1234 tok/s  eta 12s");
        assert_eq!(bar_message(&metrics(10, 2.4)), "loss 1.234  200 tok/s  2.18 GiB");
        let eval = |step| EvalMetrics {
            step,
            eval_loss: 0.5,
            eval_perplexity: Some(1.65),
            eval_tokens: 1,
            metrics: MetricValues::default(),
        };
        assert_eq!(eval_line(&eval(0)), "eval before step 1  loss 0.5000  perplexity 1.65  (1 token)");
        assert!(eval_line(&eval(7)).starts_with("eval after step 7  "));
        let values = [("loss_scale".to_owned(), 32768.0), ("skipped_steps".to_owned(), 1.0)].into();
        let skipped = StepMetrics { grad_norm: f64::INFINITY, metrics: MetricValues(values), ..metrics(10, 2.4) };
        let line = step_line(&skipped, 60, 1234.4, 12.0);
        assert!(line.contains("  grad_norm inf  skipped 1 (loss scale 32768)  lr"), "{line}");
        let values = [("eval_rewards/margins", 0.25), ("eval_rewards/accuracies", 0.5)];
        let values = values.map(|(name, value)| (name.to_owned(), value));
        let pairs = EvalMetrics { eval_perplexity: None, metrics: MetricValues(values.into()), ..eval(7) };
        assert_eq!(eval_line(&pairs), "eval after step 7  loss 0.5000  margin 0.250  accuracy 0.500  (1 token)");
        let values = [("eval_reward".to_owned(), 0.75)].into();
        let sampled = EvalMetrics { metrics: MetricValues(values), ..pairs };
        assert_eq!(eval_line(&sampled), "eval after step 7  loss 0.5000  reward 0.750  (1 token)");
    }

    /// Returns the metrics of a step of half a second.
    fn metrics(step: usize, seconds: f64) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0.5,
            loss: 1.2344,
            grad_norm: 0.561,
            learning_rate: 2e-4,
            tokens: 100,
            trained_tokens: 50,
            tokens_per_second: 200.0,
            seconds,
            memory: Some(2_345_000_000),
            peak_memory: None,
            metrics: MetricValues::default(),
        }
    }

    #[test]
    fn the_speed_is_that_of_training_steps() {
        let mut clock = Clock::default();
        // An evaluation of ten seconds before the first step, and one of four after the second.
        for (step, seconds) in [(1, 10.5), (2, 11.0)] {
            clock.step(&metrics(step, seconds));
            assert_eq!(clock.speed(), 200.0);
        }
        clock.step(&metrics(3, 15.5));
        assert_eq!(clock.speed(), 200.0);
        // Two steps and their share of the evaluation; what came before the first step does not come again.
        assert!((clock.left(2) - (1.5 + 4.0) / 3.0 * 2.0).abs() < 1e-9, "{clock:?}");
    }

    #[test]
    fn an_answer_is_one_line() {
        let sample = PromptSample {
            step: 20,
            sample: 1,
            prompt: "q".into(),
            expected: None,
            output: "a\nb".into(),
            new_tokens: 3,
            ended: true,
        };
        assert_eq!(sample_line(&sample), "sample 1 after step 20: \"a\\nb\"");
        let long = sample_line(&PromptSample { output: "ä".repeat(500), ..sample });
        assert!(long.ends_with("ää …") && long.chars().count() < 130, "{long}");
    }

    #[test]
    fn durations() {
        assert_eq!([0.4, 59.6, 184.0, 7500.0].map(duration), ["0s", "1m00s", "3m04s", "2h05m"]);
    }
}

//! How far a command is: a bar on a terminal, plain lines elsewhere; always on stderr.

use std::io::{IsTerminal, stderr};

use indicatif::{DecimalBytes, HumanCount, ProgressBar, ProgressFinish, ProgressStyle};
use rekindle::{EvalMetrics, Event, Sample, StepMetrics};

/// Follows a training run.
#[derive(Debug)]
pub(crate) struct Progress {
    logging_steps: usize,
    /// Made by the first step, which knows how many there are.
    bar: Option<ProgressBar>,
    is_terminal: bool,
    /// Tokens and seconds at the last line, for the speed since then.
    last: (usize, f64),
    tokens: usize,
}

impl Progress {
    /// Says something at least every `logging_steps` steps.
    pub(crate) fn new(logging_steps: usize) -> Self {
        Self { logging_steps, bar: None, is_terminal: stderr().is_terminal(), last: (0, 0.0), tokens: 0 }
    }

    pub(crate) fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { done, total, checkpoint, notes } => {
                notes.iter().for_each(|note| eprintln!("{note}"));
                if let Some(path) = checkpoint {
                    eprintln!("going on from {} after step {done} of {total}", path.display());
                }
            }
            Event::Step { metrics, total } => self.step(metrics, *total),
            Event::Eval(metrics) => self.note(&eval_line(metrics)),
            Event::Sample(sample) => self.note(&sample_line(sample)),
            Event::Saved(path) => self.note(&format!("saved {}", path.display())),
            _ => {}
        }
    }

    fn step(&mut self, metrics: &StepMetrics, total: usize) {
        if self.tokens == 0 {
            // A run that is gone on with has a past.
            self.last.1 = metrics.seconds - metrics.tokens as f64 / metrics.tokens_per_second;
        }
        self.tokens += metrics.tokens;
        if self.is_terminal {
            // A run that goes on begins in the middle; what came before is no part of the speed.
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
        if metrics.step == 1 || metrics.step == total || metrics.step.is_multiple_of(self.logging_steps) {
            let (tokens, seconds) = (self.tokens - self.last.0, metrics.seconds - self.last.1);
            eprintln!("{}", step_line(metrics, total, tokens as f64 / seconds));
            self.last = (self.tokens, metrics.seconds);
        }
    }

    /// A line above the bar.
    fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

/// Follows what reads weights, `doing` in a word, by their bytes: nothing off a terminal.
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

/// Follows downloads by their bytes: a bar on a terminal, elsewhere a line at the beginning of each and one at its end.
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

/// Follows an evaluation by the number of rows done: nothing off a terminal.
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

fn step_line(metrics: &StepMetrics, total: usize, speed: f64) -> String {
    let StepMetrics { step, loss, grad_norm, learning_rate, seconds, .. } = metrics;
    let left = seconds / *step as f64 * (total - step) as f64;
    format!(
        "step {step}/{total}  loss {loss:.3}  grad_norm {grad_norm:.2}  lr {learning_rate:.1e}  {speed:.0} tok/s  eta {}",
        duration(left)
    )
}

fn bar_message(metrics: &StepMetrics) -> String {
    let speed = HumanCount(metrics.tokens_per_second.round() as u64);
    let memory = metrics.memory.map_or_else(String::new, |bytes| format!("  {}", DecimalBytes(bytes)));
    format!("loss {:.3}  {speed} tok/s{memory}", metrics.loss)
}

/// Characters of an answer that are shown.
const WIDTH: usize = 100;

fn sample_line(sample: &Sample) -> String {
    let text = format!("{:?}", sample.output);
    let text = match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text,
    };
    format!("sample {} after step {}: {text}", sample.sample, sample.step)
}

fn eval_line(metrics: &EvalMetrics) -> String {
    let EvalMetrics { step, eval_loss, eval_perplexity, eval_tokens } = metrics;
    format!("eval after step {step}  loss {eval_loss:.4}  perplexity {eval_perplexity:.2}  ({eval_tokens} tokens)")
}

/// Seconds as `12s`, `3m04s` or `2h05m`.
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
        let metrics = StepMetrics {
            step: 10,
            epoch: 0.5,
            loss: 1.2344,
            grad_norm: 0.561,
            learning_rate: 2e-4,
            tokens: 100,
            trained_tokens: 50,
            tokens_per_second: 1900.4,
            seconds: 2.4,
            memory: Some(2_345_000_000),
            peak_memory: None,
        };
        let line = step_line(&metrics, 60, 1234.4);
        assert_eq!(line, "step 10/60  loss 1.234  grad_norm 0.56  lr 2.0e-4  1234 tok/s  eta 12s");
        assert_eq!(bar_message(&metrics), "loss 1.234  1,900 tok/s  2.35 GB");
    }

    #[test]
    fn an_answer_is_one_line() {
        let sample = Sample {
            step: 20,
            sample: 1,
            prompt: "q".into(),
            expected: None,
            output: "a\nb".into(),
            new_tokens: 3,
            ended: true,
        };
        assert_eq!(sample_line(&sample), "sample 1 after step 20: \"a\\nb\"");
        let long = sample_line(&Sample { output: "ä".repeat(500), ..sample });
        assert!(long.ends_with("ää …") && long.chars().count() < 130, "{long}");
    }

    #[test]
    fn durations() {
        assert_eq!([0.4, 59.6, 184.0, 7500.0].map(duration), ["0s", "1m00s", "3m04s", "2h05m"]);
    }
}

//! `rekindle data stats`: statistics of the rows of a run.

use std::collections::HashMap;
use std::fmt::Write as _;

use rekindle::run::DataArguments;
use rekindle::{DataSource, Dataset, Example, LoadReport, NotShown, Overlong, Packs, Untrained, counted};
use serde::Serialize;

use super::open;
use crate::args::StatsArgs;
use crate::failure::Failure;
use crate::output;

/// Statistics of the rows of one source.
#[derive(Debug, Serialize)]
struct Stats {
    source: String,
    formats: Vec<String>,
    /// Rows in the files, and examples made of them.
    rows: usize,
    examples: usize,
    tokens: usize,
    trained_tokens: usize,
    lengths: Lengths,
    duplicates: usize,
    /// The places of the first two equal examples.
    first_duplicate: Option<[String; 2]>,
    dropped: usize,
    truncated: usize,
    split: usize,
    /// Rows without a token to train, which are omitted here.
    untrained: usize,
    not_shown: usize,
    /// Rows that training refuses with `overlong = "error"`.
    too_long: usize,
    packing: Packing,
}

#[derive(Debug, Serialize)]
struct Lengths {
    min: usize,
    median: usize,
    p90: usize,
    p99: usize,
    max: usize,
    /// Numbers of examples by their maximum length.
    histogram: Vec<Bar>,
}

#[derive(Debug, Serialize)]
struct Bar {
    at_most: usize,
    examples: usize,
}

/// The share of filled rows of `max_seq_length` tokens, with one example each and packed.
#[derive(Debug, Serialize)]
struct Packing {
    max_seq_length: usize,
    rows: usize,
    filled: f64,
    packed_rows: usize,
    packed_filled: f64,
}

pub(super) fn run(args: &StatsArgs) -> Result<(), Failure> {
    let (config, encoder) = open(&args.run)?;
    let max_seq_length = encoder.max_seq_length();
    let refuses = config.data.overlong == Overlong::Error;
    // What training refuses is counted here.
    let encoder = if refuses { encoder.of_any_length() } else { encoder };
    let train = config.train_source();
    for source in std::iter::once(train).chain(config.eval_source()) {
        let refuses_not_shown = config.data.not_shown == NotShown::Error;
        let counting = source.clone().untrained(Untrained::Drop);
        let counting = if refuses_not_shown { counting.not_shown(NotShown::Allow) } else { counting };
        let (dataset, report) = encoder.encode(&counting)?;
        let stats = Stats::new(&source, &dataset, &report, max_seq_length);
        let text = if args.json {
            serde_json::to_string(&stats).expect("numbers serialize")
        } else {
            stats.text(&config.data)
        };
        output::line(&text)?;
    }
    Ok(())
}

impl Stats {
    fn new(source: &DataSource, dataset: &Dataset, report: &LoadReport, max_seq_length: usize) -> Self {
        let lengths: Vec<usize> = dataset.examples().map(|example| example.input_ids.len()).collect();
        let (duplicates, first_duplicate) = duplicates(dataset);
        Stats {
            source: source.to_string(),
            formats: report.formats.iter().map(ToString::to_string).collect(),
            rows: report.rows,
            examples: report.examples,
            tokens: report.tokens,
            trained_tokens: report.trained_tokens,
            duplicates,
            first_duplicate,
            dropped: report.dropped,
            truncated: report.truncated,
            split: report.split,
            untrained: report.untrained,
            not_shown: report.not_shown,
            too_long: lengths.iter().filter(|&&length| length > max_seq_length).count(),
            packing: Packing::new(&lengths, max_seq_length),
            lengths: Lengths::new(lengths),
        }
    }

    fn text(&self, data: &DataArguments) -> String {
        let mut out = format!(
            "{}: {} ({}), {}, {} trained ({:.1} %)\n",
            self.source,
            counted(self.rows, "row"),
            self.formats.join("; "),
            counted(self.tokens, "token"),
            self.trained_tokens,
            100.0 * self.trained_tokens as f64 / self.tokens as f64
        );
        let mut line = |text: String| writeln!(out, "  {text}").expect("a string takes all");
        let Lengths { min, median, p90, p99, max, histogram } = &self.lengths;
        line(format!("tokens a row: min {min}, median {median}, p90 {p90}, p99 {p99}, max {max}"));
        let most = histogram.iter().map(|bar| bar.examples).max().unwrap_or(1).max(1);
        for Bar { at_most, examples } in histogram {
            let width = (40 * examples).div_ceil(most);
            line(format!("  ≤ {at_most:>7}  {:<40}  {examples}", "█".repeat(width)));
        }
        match &self.first_duplicate {
            None => line("duplicates: none".to_owned()),
            Some([first, second]) => line(format!(
                "duplicates: {} with the tokens and mask of an earlier one; {second} as {first}",
                counted(self.duplicates, "row")
            )),
        }
        let max_seq_length = self.packing.max_seq_length;
        for (count, what) in [
            (self.dropped, "dropped".to_owned()),
            (self.truncated, "truncated".to_owned()),
            (self.split, "split".to_owned()),
            (
                self.too_long,
                format!("longer than max_seq_length = {max_seq_length}: training refuses such rows; see data.overlong"),
            ),
        ] {
            if count > 0 {
                line(format!("{} {what}", counted(count, "row")));
            }
        }
        if self.untrained > 0 {
            let refused = if data.untrained == Untrained::Error {
                ": training refuses such rows; see data.untrained"
            } else {
                ", dropped"
            };
            line(format!("{} without a token to train{refused}", counted(self.untrained, "row")));
        }
        if self.not_shown > 0 {
            let what = match data.not_shown {
                NotShown::Error => ": training refuses such rows; see data.not_shown",
                NotShown::Drop => ", dropped",
                NotShown::Allow => "",
            };
            line(format!("{} that the chat template does not render completely{what}", counted(self.not_shown, "row")));
        }
        let Packing { rows, filled, packed_rows, packed_filled, .. } = self.packing;
        line(format!(
            "fill of max_seq_length = {max_seq_length}: {:.1} % on average over {}; packed, {:.1} % over {}",
            100.0 * filled,
            counted(rows, "row"),
            100.0 * packed_filled,
            counted(packed_rows, "row")
        ));
        out.truncate(out.trim_end().len());
        out
    }
}

impl Lengths {
    fn new(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        // The smallest length that this percentage of rows does not exceed.
        let share = |percent: usize| lengths[(percent * lengths.len()).div_ceil(100).max(1) - 1];
        let mut histogram = Vec::new();
        let (mut at_most, mut before) = (lengths[0].next_power_of_two(), 0);
        while before < lengths.len() {
            let up_to = lengths.partition_point(|&length| length <= at_most);
            histogram.push(Bar { at_most, examples: up_to - before });
            (at_most, before) = (2 * at_most, up_to);
        }
        Lengths {
            min: lengths[0],
            median: share(50),
            p90: share(90),
            p99: share(99),
            max: lengths[lengths.len() - 1],
            histogram,
        }
    }
}

impl Packing {
    /// Computes the shares from the rows that fit.
    fn new(lengths: &[usize], max_seq_length: usize) -> Self {
        let fitting: Vec<usize> = lengths.iter().copied().filter(|&length| length <= max_seq_length).collect();
        let tokens: usize = fitting.iter().sum();
        let filled = |rows: usize| tokens as f64 / (rows.max(1) * max_seq_length) as f64;
        let (rows, packed_rows) = (fitting.len(), Packs::best_fit(fitting, max_seq_length).len());
        Packing { max_seq_length, rows, filled: filled(rows), packed_rows, packed_filled: filled(packed_rows) }
    }
}

/// Returns the number of examples that equal an earlier one, and the places of the first such pair.
fn duplicates(dataset: &Dataset) -> (usize, Option<[String; 2]>) {
    let place = |example: &Example<'_>| format!("{} {}", example.path.display(), example.row);
    let mut seen = HashMap::new();
    let (mut count, mut first) = (0, None);
    for (index, example) in dataset.examples().enumerate() {
        let earlier = *seen.entry((example.input_ids, example.labels)).or_insert(index);
        if earlier != index {
            count += 1;
            first.get_or_insert_with(|| [place(&dataset.example(earlier)), place(&example)]);
        }
    }
    (count, first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_bars() {
        let lengths = Lengths::new((1..=100).collect());
        assert_eq!([lengths.min, lengths.median, lengths.p90, lengths.p99, lengths.max], [1, 50, 90, 99, 100]);
        let bars: Vec<_> = lengths.histogram.iter().map(|bar| (bar.at_most, bar.examples)).collect();
        assert_eq!(bars, [(1, 1), (2, 1), (4, 2), (8, 4), (16, 8), (32, 16), (64, 32), (128, 36)]);
        let one = Lengths::new(vec![5]);
        assert_eq!([one.min, one.median, one.p99, one.max, one.histogram.len()], [5, 5, 5, 5, 1]);
    }

    #[test]
    fn rows_that_do_not_fit_are_left_out_of_packing() {
        let Packing { rows, filled, packed_rows, packed_filled, .. } = Packing::new(&[6, 4, 10, 30], 10);
        assert_eq!((rows, packed_rows), (3, 2));
        assert_eq!((filled, packed_filled), (20.0 / 30.0, 1.0));
    }
}

//! Random samples of a dataset: a maximum number of rows, and held-out rows.

use sha2::{Digest, Sha256};

use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::hash::hex;
use crate::order::Order;
use crate::report::{LoadReport, RowPlace};

/// A random selection of rows, the same for the same seed and number of rows.
///
/// Rows are shuffled; the first `max_rows` of them are selected, and of these the first are held out. Therefore a
/// number of held-out rows gives the same rows for every `max_rows`. Examples keep the order of their files, and the
/// pieces of a split row stay together.
///
/// ```
/// use rekindle_data::{Dataset, EncodeOptions, RowPart, RowSample};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("rows.jsonl");
/// std::fs::write(&path, "{\"input_ids\": [1, 2]}\n".repeat(100))?;
/// let (all, report) = Dataset::load(&path, None, &EncodeOptions::default())?;
///
/// let sample = RowSample { max_rows: Some(60), held_out: Some(0.05), seed: 3407 };
/// assert_eq!(sample.take(&all, &report, RowPart::Kept)?.0.len(), 57);
/// assert_eq!(sample.take(&all, &report, RowPart::HeldOut)?.0.len(), 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowSample {
    /// The maximum number of rows.
    pub max_rows: Option<usize>,
    /// Held-out rows: a fraction of the selected rows, or their number if it is 1 or more.
    pub held_out: Option<f64>,
    /// The seed of the selection.
    pub seed: u64,
}

/// A part of the rows of a [`RowSample`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowPart {
    /// The rows that are not held out.
    #[default]
    Kept,
    /// The rows that are held out.
    HeldOut,
}

/// The epoch of [`Order`] that shuffles the rows, beyond that of any run.
const EPOCH: u64 = u64::MAX;

impl RowSample {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Options`] for a number of rows that is 0, and for an invalid fraction.
    pub fn check(&self) -> Result<()> {
        if self.max_rows == Some(0) {
            return Err(Error::Options("max_rows = 0 leaves no row; it must be at least 1".to_owned()));
        }
        match self.held_out {
            Some(part) if !(part > 0.0 && part.is_finite()) || (part >= 1.0 && part.fract() != 0.0) => {
                Err(Error::Options(format!(
                    "eval_fraction = {part} is neither a fraction between 0 and 1 nor a whole number of rows"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Returns a part of the rows of `dataset`, and `report` for that part.
    ///
    /// # Errors
    /// [`Error::Options`] as in [`check`](Self::check), and if all rows would be held out.
    pub fn take(&self, dataset: &Dataset, report: &LoadReport, part: RowPart) -> Result<(Dataset, LoadReport)> {
        self.check()?;
        if self.max_rows.is_none() && self.held_out.is_none() {
            return Ok((dataset.clone(), report.clone()));
        }
        let rows = row_numbers(dataset);
        let count = rows.last().map_or(0, |last| last + 1);
        let used = self.max_rows.unwrap_or(count).min(count);
        let held_out = self.count_held_out(used)?;
        let order = Order::new(count, true, self.seed).epoch(EPOCH);
        let mut is_taken = vec![false; count];
        let taken = match part {
            RowPart::Kept => &order[held_out..used],
            RowPart::HeldOut => &order[..held_out],
        };
        taken.iter().for_each(|&row| is_taken[row] = true);
        let examples: Vec<usize> = (0..dataset.len()).filter(|&example| is_taken[rows[example]]).collect();

        let mut hash = Sha256::new_with_prefix(dataset.fingerprint());
        hash.update(format!("{self:?} {part:?}"));
        let dataset = dataset.with_examples(examples, hex(&hash.finalize()));
        let mut report = counted(report.clone(), &dataset, taken.len());
        report.notices.push(self.describe(count, held_out, part));
        Ok((dataset, report))
    }

    fn count_held_out(&self, used: usize) -> Result<usize> {
        let count = match self.held_out {
            None => return Ok(0),
            Some(fraction) if fraction < 1.0 => ((fraction * used as f64).round() as usize).max(1),
            Some(count) => count as usize,
        };
        if count < used {
            return Ok(count);
        }
        let rows = crate::counted(used, "row");
        let part = self.held_out.unwrap_or_default();
        Err(Error::Options(format!("eval_fraction = {part} of {rows} leaves none to train on; lower it, or set eval")))
    }

    fn describe(&self, count: usize, held_out: usize, part: RowPart) -> String {
        let mut options = Vec::new();
        if let Some(max_rows) = self.max_rows {
            options.push(format!("max_rows = {max_rows}"));
        }
        if let Some(fraction) = self.held_out {
            options.push(format!("eval_fraction = {fraction}"));
        }
        let options = options.join(", ");
        let rows = if count == 1 { "row" } else { "rows" };
        match part {
            RowPart::HeldOut => format!("held out of {count} {rows} ({options})"),
            RowPart::Kept if held_out > 0 => format!("of {count} {rows}, {held_out} held out ({options})"),
            RowPart::Kept => format!("of {count} {rows} ({options})"),
        }
    }
}

/// Returns the report for a part of the loaded rows.
fn counted(report: LoadReport, dataset: &Dataset, rows: usize) -> LoadReport {
    // The first of the longest, as where all rows are loaded.
    let longest = dataset
        .examples()
        .reduce(|longest, example| if example.input_ids.len() > longest.input_ids.len() { example } else { longest });
    let longest_at = longest.and_then(|example| {
        let file = report.files.iter().position(|file| file == example.path)?;
        Some(RowPlace { file, row: example.row })
    });
    LoadReport {
        rows,
        examples: dataset.len(),
        tokens: dataset.examples().map(|example| example.input_ids.len()).sum(),
        trained_tokens: dataset.examples().map(|example| example.trained_tokens()).sum(),
        longest: longest.map_or(0, |example| example.input_ids.len()),
        longest_at,
        plain_prompts: report.plain_prompts.min(rows),
        preferred: report
            .preferred
            .map(|_| dataset.examples().filter(|example| example.preferred == Some(true)).count()),
        ..report
    }
}

/// Returns the number of each example's row, counted from 0.
fn row_numbers(dataset: &Dataset) -> Vec<usize> {
    let mut numbers = Vec::with_capacity(dataset.len());
    let mut last = None;
    let mut number = 0;
    for example in dataset.examples() {
        let row = (example.path, example.row);
        number += usize::from(last.is_some_and(|last| last != row));
        last = Some(row);
        numbers.push(number);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::write_rows;
    use crate::{EncodeOptions, Overlong};

    /// Returns rows of ids `[i, i, …]`, the last five tokens long.
    fn load(rows: usize) -> (Dataset, LoadReport) {
        let line = |i: usize| format!("{{\"input_ids\": {:?}}}\n", vec![i; if i + 1 == rows { 5 } else { 2 }]);
        let (_dir, path) = write_rows((0..rows).map(line).collect::<String>());
        let options = EncodeOptions { max_seq_length: 3, overlong: Overlong::Split, ..EncodeOptions::default() };
        Dataset::load(&path, None, &options).expect("loads")
    }

    fn ids(dataset: &Dataset) -> Vec<u32> {
        dataset.examples().map(|example| example.input_ids[0]).collect()
    }

    #[test]
    fn parts_are_disjoint_and_complete() {
        let (all, report) = load(40);
        assert_eq!(all.len(), 41, "the last row is in two pieces");
        for (held_out, count) in [(0.1, 4), (0.001, 1), (7.0, 7), (39.0, 39)] {
            let sample = RowSample { held_out: Some(held_out), seed: 3407, ..RowSample::default() };
            let (kept, of_kept) = sample.take(&all, &report, RowPart::Kept).expect("valid");
            let (held, of_held) = sample.take(&all, &report, RowPart::HeldOut).expect("valid");
            assert_eq!((of_held.rows, of_kept.rows), (count, 40 - count));
            let mut both = [ids(&kept), ids(&held)].concat();
            both.sort_unstable();
            assert_eq!(both, ids(&all), "and no row is cut apart");
            assert!(ids(&kept).is_sorted() && ids(&held).is_sorted());
            assert_ne!(kept.fingerprint(), held.fingerprint());
            assert_eq!(of_kept.tokens + of_held.tokens, report.tokens);
            assert_eq!(of_kept.trained_tokens + of_held.trained_tokens, report.trained_tokens);
            assert_eq!(of_held.examples, held.len());
        }
    }

    #[test]
    fn the_seed_decides_and_a_count_stays_under_max_rows() {
        let (all, report) = load(40);
        let held = |max_rows, seed| {
            let sample = RowSample { max_rows, held_out: Some(5.0), seed };
            ids(&sample.take(&all, &report, RowPart::HeldOut).expect("valid").0)
        };
        assert_eq!(held(None, 1), held(Some(20), 1));
        assert_ne!(held(None, 1), held(None, 2));
        let sample = RowSample { max_rows: Some(20), held_out: None, seed: 1 };
        let (some, of_some) = sample.take(&all, &report, RowPart::Kept).expect("valid");
        assert_eq!(of_some.rows, 20);
        assert!(ids(&some) != (0..20).collect::<Vec<_>>(), "drawn, not the first");
        assert!(of_some.to_string().ends_with("; of 40 rows (max_rows = 20)"), "{of_some}");
        let more = RowSample { max_rows: Some(99), held_out: None, seed: 1 };
        assert_eq!(ids(&more.take(&all, &report, RowPart::Kept).expect("valid").0), ids(&all));
    }

    #[test]
    fn numbers_that_leave_nothing_are_refused() {
        let (all, report) = load(4);
        let error = |max_rows, held_out| {
            let sample = RowSample { max_rows, held_out, seed: 0 };
            sample.take(&all, &report, RowPart::Kept).expect_err("refused").to_string()
        };
        assert_eq!(error(Some(0), None), "max_rows = 0 leaves no row; it must be at least 1");
        for bad in [0.0, -0.5, 1.5, f64::NAN] {
            assert!(error(None, Some(bad)).contains("neither a fraction between 0 and 1 nor a whole number of rows"));
        }
        assert_eq!(
            error(Some(3), Some(3.0)),
            "eval_fraction = 3 of 3 rows leaves none to train on; lower it, or set eval"
        );
        assert!(error(Some(1), Some(0.5)).starts_with("eval_fraction = 0.5 of 1 row leaves none"));
    }
}

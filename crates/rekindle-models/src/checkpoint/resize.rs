//! Changes the size of the vocabulary.

use serde_json::Value;

use crate::{Error, ModelConfig};

/// More ids than a label can name.
const MOST_IDS: usize = i32::MAX as usize;

impl ModelConfig {
    /// Returns this configuration with `rows` token ids.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number that labels cannot name.
    pub fn resized(mut self, rows: usize) -> Result<Self, Error> {
        if rows == 0 || rows > MOST_IDS {
            return Err(Error::Argument(format!(
                "resize_model_vocab is {rows}; expected 1 to {MOST_IDS} rows, as many as the tokenizer has tokens \
                 (this model has {})",
                self.vocab_size()
            )));
        }
        self.spec.vocab_size = rows;
        self.set_json("vocab_size", Value::from(rows));
        Ok(self)
    }
}

/// The first `rows` rows of a table, and for those that it lacks the mean of all it has, summed in `f64`: a token that
/// was never trained is then about as likely as the average one, not far more than all others.
pub(crate) fn resize_rows(mut values: Vec<f32>, width: usize, rows: usize) -> Vec<f32> {
    let had = values.len() / width;
    if rows > had {
        let mut mean = vec![0.0_f64; width];
        for row in values.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        let mean: Vec<f32> = mean.into_iter().map(|sum| (sum / had as f64) as f32).collect();
        values.extend(mean.iter().copied().cycle().take((rows - had) * width));
    }
    values.truncate(rows * width);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_and_go() {
        let table = vec![1.0, 2.0, 3.0, 6.0];
        assert_eq!(resize_rows(table.clone(), 2, 4), [1.0, 2.0, 3.0, 6.0, 2.0, 4.0, 2.0, 4.0]);
        assert_eq!(resize_rows(table.clone(), 2, 2), table);
        assert_eq!(resize_rows(table, 2, 1), [1.0, 2.0]);
    }
}

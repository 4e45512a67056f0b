//! `rekindle eval`.

use rekindle::{DataSource, Evaluation};

use crate::args::EvalArgs;
use crate::failure::Failure;
use crate::{open, output, progress};

pub(crate) fn run(args: &EvalArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open(&args.model)?;
    let evaluation =
        model.evaluate(tokenizer.as_ref(), &DataSource::new(&args.data).held_out(), &mut progress::rows())?;
    if args.json {
        return output::line(&serde_json::to_string(&evaluation).expect("numbers serialize"));
    }
    if args.per_row {
        output::line(&table(&evaluation))?;
    }
    let Evaluation { loss, perplexity, tokens, rows } = &evaluation;
    output::line(&format!("loss {loss:.5}  perplexity {perplexity:.4}  ({tokens} tokens of {} rows)", rows.len()))
}

/// Every row with its tokens, the sum of their losses and the mean.
fn table(evaluation: &Evaluation) -> String {
    let mut text = format!("{:>6}  {:>7}  {:>12}  {:>9}\n", "row", "tokens", "nll", "loss");
    for (index, row) in evaluation.rows.iter().enumerate() {
        let mean = row.nll / row.tokens as f64;
        text += &format!("{:>6}  {:>7}  {:>12.5}  {:>9.5}\n", index + 1, row.tokens, row.nll, mean);
    }
    text
}

#[cfg(test)]
mod tests {
    use rekindle::RowLoss;

    use super::*;

    #[test]
    fn a_row_a_line() {
        let rows = vec![RowLoss { nll: 3.0, tokens: 2 }, RowLoss { nll: 0.5, tokens: 1 }];
        let text = table(&Evaluation { loss: 0.0, perplexity: 1.0, tokens: 3, rows });
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["row", "tokens", "nll", "loss"]);
        assert_eq!(lines[1..], [["1", "2", "3.00000", "1.50000"], ["2", "1", "0.50000", "0.50000"]]);
    }
}

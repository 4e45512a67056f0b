//! `rekindle eval`.

use rekindle::{DataSource, Evaluation, TokenLoss, Tokenizer, counted};
use serde::Serialize;

use crate::args::EvalArgs;
use crate::failure::Failure;
use crate::{open, output, progress};

pub(crate) fn run(args: &EvalArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open(&args.model)?;
    let tokenizer = tokenizer.as_ref();
    let data = DataSource::new(&args.data).held_out().text_end_token(!args.no_end_token);
    if args.per_token {
        let evaluation = model.evaluate_tokens(tokenizer, &data, &mut progress::rows())?;
        return output::line(&serde_json::to_string(&per_token(&evaluation, tokenizer)).expect("texts and numbers"));
    }
    let evaluation = model.evaluate(tokenizer, &data, &mut progress::rows())?;
    if args.json {
        return output::line(&serde_json::to_string(&evaluation).expect("numbers serialize"));
    }
    if args.per_row {
        output::line(&table(&evaluation))?;
    }
    let Evaluation { loss, perplexity, tokens, rows } = &evaluation;
    let (tokens, rows) = (counted(*tokens, "token"), counted(rows.len(), "row"));
    output::line(&format!("loss {loss:.5}  perplexity {perplexity:.4}  ({tokens} of {rows})"))
}

/// An evaluation with the text of each token.
#[derive(Serialize)]
struct PerToken<'a> {
    loss: f64,
    perplexity: f64,
    tokens: usize,
    rows: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    nll: f64,
    tokens: usize,
    token_nll: Vec<Token<'a>>,
}

#[derive(Serialize)]
struct Token<'a> {
    #[serde(flatten)]
    loss: &'a TokenLoss,
    /// Its text; null if the checkpoint has no tokenizer.
    token: Option<String>,
}

fn per_token<'a>(evaluation: &'a Evaluation, tokenizer: Option<&Tokenizer>) -> PerToken<'a> {
    let token = |loss: &'a TokenLoss| Token { loss, token: tokenizer.and_then(|t| t.decode(&[loss.id], false).ok()) };
    let rows = evaluation.rows.iter().map(|row| Row {
        nll: row.nll,
        tokens: row.tokens,
        token_nll: row.token_nll.iter().flatten().map(token).collect(),
    });
    let Evaluation { loss, perplexity, tokens, .. } = *evaluation;
    PerToken { loss, perplexity, tokens, rows: rows.collect() }
}

/// Returns a table of rows with their tokens, the sum of their losses and the mean.
fn table(evaluation: &Evaluation) -> String {
    let mut text = format!("{:>6}  {:>7}  {:>12}  {:>9}\n", "row", "tokens", "nll", "loss");
    for (index, row) in evaluation.rows.iter().enumerate() {
        let mean = if row.tokens == 0 { "-".to_owned() } else { format!("{:.5}", row.nll / row.tokens as f64) };
        text += &format!("{:>6}  {:>7}  {:>12.5}  {mean:>9}\n", index + 1, row.tokens, row.nll);
    }
    text
}

#[cfg(test)]
mod tests {
    use rekindle::RowLoss;

    use super::*;

    #[test]
    fn a_row_a_line() {
        let row = |nll, tokens| RowLoss { nll, tokens, token_nll: None };
        let rows = vec![row(3.0, 2), row(0.5, 1), row(0.0, 0)];
        let text = table(&Evaluation { loss: 0.0, perplexity: 1.0, tokens: 3, rows });
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["row", "tokens", "nll", "loss"]);
        assert_eq!(lines[1..3], [["1", "2", "3.00000", "1.50000"], ["2", "1", "0.50000", "0.50000"]]);
        assert_eq!(lines[3], ["3", "0", "0.00000", "-"], "no mean of nothing");
    }
}

//! Rows as text, with their trained tokens marked.

use rekindle::{Example, IGNORED, RowNumber, Tokenizer};
use serde::Serialize;

/// The marking of trained tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Trained tokens green, with bold special tokens; others in the default color, with dim special tokens.
    Colour,
    /// `⟦` and `⟧` around trained tokens.
    Plain,
}

/// Formats the place of a row, its tokens and its trained tokens in a line.
pub(crate) fn facts(example: &Example<'_>) -> String {
    let (tokens, trained) = (example.input_ids.len(), example.trained_tokens());
    let share = 100.0 * trained as f64 / tokens as f64;
    let pieces = pieces(example).filter(|piece| piece.trained).count();
    let pieces = if pieces == 1 { "1 piece".to_owned() } else { format!("{pieces} pieces") };
    let (path, row) = (example.path.display(), example.row);
    let side = example.preferred.map_or("", |preferred| if preferred { " chosen" } else { " rejected" });
    format!("{path} {row}{side}: {tokens} tokens, {trained} trained ({share:.1} %) in {pieces}")
}

/// Returns the row's text, or its ids without a tokenizer. Line breaks are shown as `↵` and kept; other control
/// characters are escaped, so that rows cannot control the terminal.
pub(crate) fn view(example: &Example<'_>, tokenizer: Option<&Tokenizer>, style: Style) -> String {
    let mut out = String::new();
    for Piece { ids, trained } in pieces(example) {
        let text = match (tokenizer, style) {
            (None, _) => ids.iter().map(|id| format!("{id} ")).collect(),
            (Some(tokenizer), Style::Plain) => decode(tokenizer, ids),
            (Some(tokenizer), Style::Colour) => coloured(tokenizer, ids, trained),
        };
        match (style, trained) {
            (Style::Plain, true) => out.push_str(&format!("⟦{}⟧", text.trim_end_matches('\n'))),
            _ => out.push_str(&text),
        }
        if style == Style::Plain && trained && text.ends_with('\n') {
            out.push('\n');
        }
    }
    out.trim_end().to_owned()
}

/// A row of `--json`.
#[derive(Serialize)]
struct JsonRow<'a> {
    /// Its number among all rows, from 1.
    index: usize,
    file: String,
    /// The line of a file of lines, or the row of a table or a list.
    #[serde(flatten)]
    place: RowNumber,
    /// True for a chosen or desirable answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    preferred: Option<bool>,
    tokens: usize,
    trained_tokens: usize,
    pieces: Vec<JsonPiece>,
    input_ids: &'a [u32],
    labels: &'a [i32],
}

#[derive(Serialize)]
struct JsonPiece {
    trained: bool,
    tokens: usize,
    /// The text; absent without a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

/// Returns the row as a JSON object. Texts are decoded by the tokenizer; a character that two pieces share is `U+FFFD`
/// in both.
pub(super) fn json(example: &Example<'_>, tokenizer: Option<&Tokenizer>, index: usize) -> String {
    let piece = |Piece { ids, trained }| JsonPiece {
        trained,
        tokens: ids.len(),
        text: tokenizer.and_then(|tokenizer| tokenizer.decode(ids, false).ok()),
    };
    let row = JsonRow {
        index,
        file: example.path.display().to_string(),
        place: example.row,
        preferred: example.preferred,
        tokens: example.input_ids.len(),
        trained_tokens: example.trained_tokens(),
        pieces: pieces(example).map(piece).collect(),
        input_ids: example.input_ids,
        labels: example.labels,
    };
    serde_json::to_string(&row).expect("numbers and texts serialize")
}

/// Adjacent tokens that are all trained, or all not.
struct Piece<'a> {
    ids: &'a [u32],
    trained: bool,
}

fn pieces<'a>(example: &Example<'a>) -> impl Iterator<Item = Piece<'a>> {
    let (ids, labels) = (example.input_ids, example.labels);
    let trained = move |place: usize| place > 0 && labels[place] != IGNORED;
    let mut start = 0;
    std::iter::from_fn(move || {
        let first = trained((start < ids.len()).then_some(start)?);
        let end = (start..ids.len()).find(|&place| trained(place) != first).unwrap_or(ids.len());
        let piece = Piece { ids: &ids[start..end], trained: first };
        start = end;
        Some(piece)
    })
}

fn coloured(tokenizer: &Tokenizer, ids: &[u32], trained: bool) -> String {
    let parts = ids.chunk_by(|&a, &b| tokenizer.is_special(a) == tokenizer.is_special(b));
    let part = |ids: &[u32]| {
        let code = match (trained, tokenizer.is_special(ids[0])) {
            (true, true) => "1;32",
            (true, false) => "32",
            (false, true) => "2",
            (false, false) => return decode(tokenizer, ids),
        };
        format!("\u{1b}[{code}m{}\u{1b}[0m", decode(tokenizer, ids))
    };
    parts.map(part).collect()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let text = tokenizer.decode(ids, false).unwrap_or_else(|_| format!("{ids:?}"));
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push_str("↵\n"),
            '\t' => out.push('\t'),
            control if control.is_control() => out.extend(control.escape_unicode()),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rekindle::RowNumber;

    use super::*;

    fn example<'a>(input_ids: &'a [u32], labels: &'a [i32]) -> Example<'a> {
        Example {
            input_ids,
            labels,
            row: RowNumber::Line(3),
            path: Path::new("rows.jsonl"),
            preferred: None,
            margin: None,
        }
    }

    #[test]
    fn ids_are_shown_where_there_is_no_tokenizer() {
        let row = example(&[5, 6, 7, 8, 9], &[5, IGNORED, 7, 8, IGNORED]);
        // The first token never counts.
        assert_eq!(view(&row, None, Style::Plain), "5 6 ⟦7 8 ⟧9");
        assert_eq!(facts(&row), "rows.jsonl line 3: 5 tokens, 2 trained (40.0 %) in 1 piece");
        let rejected = Example { preferred: Some(false), ..row };
        assert!(facts(&rejected).starts_with("rows.jsonl line 3 rejected: 5 tokens"));
    }

    #[test]
    fn a_row_is_one_json_object() {
        let row = example(&[5, 6, 7, 8, 9], &[5, IGNORED, 7, 8, IGNORED]);
        let json: serde_json::Value = serde_json::from_str(&json(&row, None, 4)).unwrap();
        let expected = serde_json::json!({
            "index": 4, "file": "rows.jsonl", "line": 3, "tokens": 5, "trained_tokens": 2,
            "pieces": [
                {"trained": false, "tokens": 2}, {"trained": true, "tokens": 2}, {"trained": false, "tokens": 1},
            ],
            "input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, -100],
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn trained_text_is_marked_and_special_tokens_stay() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/base");
        let tokenizer = Tokenizer::from_dir(&base).unwrap();
        let ids = tokenizer
            .encode("<|im_start|>user\nhi\u{1b}[2J<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n", false)
            .unwrap();
        let answer = tokenizer.encode("yes<|im_end|>\n", false).unwrap().len();
        let trained = ids.len() - answer;
        let label = |place: usize| if place >= trained { ids[place] as i32 } else { IGNORED };
        let labels: Vec<i32> = (0..ids.len()).map(label).collect();
        let row = example(&ids, &labels);
        assert_eq!(
            view(&row, Some(&tokenizer), Style::Plain),
            "<|im_start|>user↵\nhi\\u{1b}[2J<|im_end|>↵\n<|im_start|>assistant↵\n⟦yes<|im_end|>↵⟧"
        );
        let coloured = view(&row, Some(&tokenizer), Style::Colour);
        assert!(coloured.starts_with("\u{1b}[2m<|im_start|>\u{1b}[0muser↵\n"), "{coloured:?}");
        assert!(coloured.contains("\u{1b}[32myes\u{1b}[0m\u{1b}[1;32m<|im_end|>\u{1b}[0m"), "{coloured:?}");
    }
}

use serde::{Deserialize, Serialize};

use crate::example::{Encoded, IGNORED};

/// The treatment of a row with more than `max_seq_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Fail, with the row in the message.
    #[default]
    Error,
    /// Omit the row.
    Drop,
    /// Keep the first `max_seq_length` tokens.
    Truncate,
    /// Split the row into several examples. Each begins with the last token of the one before it, with that token's
    /// label ignored, so that every label of the row counts exactly once.
    Split,
}

/// Keeps the first `max` tokens.
pub(crate) fn truncate(mut example: Encoded, max: usize) -> Encoded {
    example.input_ids.truncate(max);
    example.labels.truncate(max);
    example
}

/// Splits an example into pieces of at most `max` tokens (`max` ≥ 2) that share one token at each cut.
pub(crate) fn split(example: &Encoded, max: usize) -> Vec<Encoded> {
    let len = example.input_ids.len();
    let mut pieces = Vec::new();
    let mut start = 0;
    loop {
        let end = len.min(start + max);
        let mut labels = example.labels[start..end].to_vec();
        if start > 0 {
            labels[0] = IGNORED;
        }
        pieces.push(Encoded {
            input_ids: example.input_ids[start..end].to_vec(),
            labels,
            line: example.line,
            notes: example.notes,
            preferred: example.preferred,
        });
        if end == len {
            return pieces;
        }
        start = end - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_every_label_once() {
        for (len, max) in [(2_u32, 2), (7, 2), (7, 3), (9, 3), (10, 4), (5, 5), (6, 5)] {
            let row = Encoded {
                input_ids: (0..len).collect(),
                labels: (0..len as i32).collect(),
                line: 1,
                notes: Default::default(),
                preferred: None,
            };
            let pieces = split(&row, max);
            assert!(pieces.iter().all(|piece| (2..=max).contains(&piece.input_ids.len())), "{pieces:?}");
            let counted: Vec<i32> =
                pieces.iter().flat_map(|piece| &piece.labels[1..]).copied().filter(|&label| label != IGNORED).collect();
            assert_eq!(counted, (1..len as i32).collect::<Vec<_>>());
            // What a label is predicted from directly is the same token as in the whole row.
            for piece in &pieces {
                for pair in piece.input_ids.windows(2) {
                    assert_eq!(pair[1], pair[0] + 1);
                }
            }
        }
    }

    #[test]
    fn names_are_lowercase() {
        for (value, name) in [
            (Overlong::Error, "\"error\""),
            (Overlong::Drop, "\"drop\""),
            (Overlong::Truncate, "\"truncate\""),
            (Overlong::Split, "\"split\""),
        ] {
            assert_eq!(serde_json::to_string(&value).expect("serializable"), name);
            assert_eq!(serde_json::from_str::<Overlong>(name).expect("known"), value);
        }
        let error = serde_json::from_str::<Overlong>("\"cut\"").expect_err("unknown");
        assert!(error.to_string().contains("`error`, `drop`, `truncate`, `split`"), "{error}");
    }
}

//! The messages between a run and a reward outside of its process.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{RewardError, Sample};

/// A batch to score, as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct ScoreRequest<'a> {
    /// The number of the request, which the reply repeats.
    pub(crate) id: u64,
    /// The completions.
    pub(crate) samples: Vec<SampleMessage<'a>>,
}

/// A sample as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct SampleMessage<'a> {
    prompt: &'a str,
    completion: &'a str,
    completion_ids: &'a [u32],
    truncated: bool,
    /// The prompt's messages, or null.
    messages: Option<&'a Value>,
    /// The row's other columns.
    row: &'a Map<String, Value>,
}

impl<'a> ScoreRequest<'a> {
    pub(crate) fn new(id: u64, samples: &'a [Sample<'a>]) -> Self {
        let message = |sample: &'a Sample<'a>| SampleMessage {
            prompt: sample.prompt,
            completion: sample.completion,
            completion_ids: sample.completion_ids,
            truncated: sample.truncated,
            messages: sample.messages,
            row: sample.row,
        };
        Self { id, samples: samples.iter().map(message).collect() }
    }

    /// Returns the request as one line without its end.
    pub(crate) fn to_line(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and rows are JSON")
    }
}

/// The scores of a batch.
#[derive(Debug, Deserialize)]
struct ScoreReply {
    /// The number of the request.
    id: Option<u64>,
    rewards: Option<Vec<Option<f64>>>,
    error: Option<String>,
}

/// Returns the scores in the text of a reply to request `id`.
///
/// The error says what is wrong with the reply. `origin` names where it came from.
pub(crate) fn read_reply(
    reward: &str,
    origin: &str,
    text: &str,
    id: u64,
    expected: usize,
) -> Result<Vec<Option<f64>>, RewardError> {
    let failed = |problem: String| RewardError::failed(reward, problem);
    let wanted = "{\"id\": 1, \"rewards\": [0.5, null]}";
    let reply: ScoreReply = serde_json::from_str(text).map_err(|error| {
        failed(format!("{origin} answered {}, which is not a reply such as {wanted}: {error}", excerpt(text)))
    })?;
    if let Some(error) = reply.error {
        return Err(failed(format!("{origin} reported an error: {error}")));
    }
    if reply.id != Some(id) {
        let got = reply.id.map_or_else(|| "no id".to_owned(), |id| format!("id {id}"));
        return Err(failed(format!("{origin} answered request {id} with {got}; repeat the id of the request")));
    }
    let Some(rewards) = reply.rewards else {
        let text = excerpt(text);
        return Err(failed(format!("{origin} answered {text} without rewards; a reply is {wanted}")));
    };
    if rewards.len() != expected {
        return Err(RewardError::Count { reward: reward.to_owned(), got: rewards.len(), expected });
    }
    Ok(rewards)
}

/// Returns the beginning of a text, in quotes.
pub(crate) fn excerpt(text: &str) -> String {
    const LIMIT: usize = 200;
    let text = text.trim_end();
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Option<f64>>, String> {
        read_reply("r", "the command", text, 7, 2).map_err(|error| error.to_string())
    }

    #[test]
    fn replies_are_checked() {
        assert_eq!(read("{\"id\": 7, \"rewards\": [1, null]}"), Ok(vec![Some(1.0), None]));
        for (text, expected) in [
            ("Loading…", "reward \"r\": the command answered \"Loading…\", which is not a reply such as"),
            ("{\"id\": 7, \"rewards\": [NaN, 1]}", "which is not a reply"),
            ("{\"id\": 6, \"rewards\": [1, 1]}", "answered request 7 with id 6; repeat the id"),
            ("{\"rewards\": [1, 1]}", "answered request 7 with no id"),
            ("{\"id\": 7}", "without rewards"),
            ("{\"id\": 7, \"rewards\": [1]}", "reward \"r\" returned 1 score for 2 completions"),
            ("{\"id\": 7, \"rewards\": [1, 2, 3]}", "returned 3 scores for 2 completions"),
            ("{\"id\": 7, \"error\": \"no gold\"}", "the command reported an error: no gold"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let long = "x".repeat(1000);
        assert!(read(&long).unwrap_err().len() < 400);
    }
}

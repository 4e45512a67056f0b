//! Scores of TRL's own reward functions, in `goldens/trl.json`.

use serde_json::{Value, json};

use crate::rules::testing::{score, score_ids};

fn golden() -> Value {
    serde_json::from_str(include_str!("../goldens/trl.json")).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

#[test]
fn format_is_think_format_reward() {
    let golden = golden();
    let cases = &golden["think_format"];
    for (text, expected) in list(&cases["completions"]).iter().zip(list(&cases["scores"])) {
        let scored = score(json!({"type": "format"}), text.as_str().unwrap(), json!({}));
        assert_eq!(scored, Ok(expected.as_f64()), "{text}");
    }
}

#[test]
fn repetition_is_the_repetition_penalty() {
    for case in list(&golden()["repetition"]) {
        let reward =
            json!({"type": "repetition", "ngram_size": case["ngram_size"], "max_penalty": case["max_penalty"]});
        for (ids, expected) in list(&case["ids"]).iter().zip(list(&case["scores"])) {
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(score_ids(reward.clone(), "", &ids, json!({})), Ok(expected.as_f64()), "{case} {ids:?}");
        }
    }
}

#[test]
fn soft_overlong_is_the_soft_overlong_punishment() {
    for case in list(&golden()["soft_overlong"]) {
        let reward = json!({
            "type": "soft_overlong",
            "max_completion_len": case["max_completion_len"],
            "soft_punish_cache": case["soft_punish_cache"],
        });
        for (length, expected) in list(&case["lengths"]).iter().zip(list(&case["scores"])) {
            let ids = vec![1; length.as_u64().unwrap() as usize];
            assert_eq!(score_ids(reward.clone(), "", &ids, json!({})), Ok(expected.as_f64()), "{length}");
        }
    }
}

/// TRL's `accuracy_reward` reads the last `\boxed{…}`, and gives null for a solution that it cannot parse.
#[test]
fn numeric_is_accuracy_reward_on_numbers() {
    let golden = golden();
    let cases = &golden["accuracy"];
    let texts = list(&cases["completions"]).iter().zip(list(&cases["solutions"])).zip(list(&cases["scores"]));
    for ((text, solution), expected) in texts {
        let reward = json!({"type": "numeric", "column": "solution", "extract": "boxed"});
        let scored = score(reward, text.as_str().unwrap(), json!({"solution": solution}));
        assert_eq!(scored, Ok(expected.as_f64()), "{text} {solution}");
    }
}

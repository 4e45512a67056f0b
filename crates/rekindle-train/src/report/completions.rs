//! Sampled completions with their rewards.

use std::collections::BTreeMap;

use super::samples::{row, text};
use super::text::{group, significant};
use crate::RewardedCompletion;

/// Returns a section with the completions of evaluation prompts over the run, and one with those of training prompts; empty
/// without completions.
pub(super) fn html(completions: &[RewardedCompletion]) -> String {
    let mut of_evaluation: BTreeMap<&str, Vec<&RewardedCompletion>> = BTreeMap::new();
    let mut of_training: BTreeMap<usize, Vec<&RewardedCompletion>> = BTreeMap::new();
    for completion in completions {
        match completion.evaluation {
            true => of_evaluation.entry(&completion.prompt).or_default().push(completion),
            false => of_training.entry(completion.step).or_default().push(completion),
        }
    }
    let section = |title: &str, about: &str, cards: String| match &*cards {
        "" => String::new(),
        _ => format!("<section>\n<h2>{title}</h2>\n<p>{about}</p>\n{cards}</section>\n"),
    };
    let evaluation = of_evaluation.values().map(|of_prompt| card(of_prompt)).collect();
    let training = of_training.values().map(|of_step| card(of_step)).collect();
    section("Completions of the evaluation", "A sampled completion of each prompt with its reward.", evaluation)
        + &section(
            "Completions in training",
            "The completions of a prompt with the highest and the lowest reward, over the run.",
            training,
        )
}

/// Returns a prompt with its completions, of which there is at least one.
fn card(completions: &[&RewardedCompletion]) -> String {
    let prompt = completions.first().map_or("", |completion| &completion.prompt);
    let rows: String = completions.iter().map(|completion| of_completion(completion)).collect();
    format!("<article>\n<pre>{}</pre>\n<table>\n{rows}</table>\n</article>\n", text(prompt))
}

fn of_completion(completion: &RewardedCompletion) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "null".to_owned(), significant);
    let mut name = format!("step {}<br>reward {}", group(completion.step as f64), number(completion.reward));
    // A single reward is the total, but for its weight.
    for (of, value) in completion.rewards.iter().filter(|_| completion.rewards.len() > 1) {
        name += &format!("<br>{} {}", text(of), number(*value));
    }
    let cut = if completion.ended { "" } else { "<span class=\"special\"> … cut</span>" };
    row(&name, "", &(text(&completion.completion) + cut))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_stand_with_their_rewards() {
        let completion = |step, evaluation, reward| RewardedCompletion {
            step,
            evaluation,
            prompt: if evaluation { "<q>".into() } else { format!("q{step}") },
            completion: format!("answer {step}"),
            reward,
            rewards: [("exact".to_owned(), reward), ("length".to_owned(), None)].into(),
            new_tokens: 2,
            ended: reward.is_some(),
        };
        let html = html(&[completion(0, true, Some(0.25)), completion(1, false, None), completion(4, true, Some(1.0))]);
        let at = |part: &str| html.find(part).unwrap_or_else(|| panic!("{part}: {html}"));
        assert!(at("&lt;q&gt;") < at("answer 0") && at("answer 0") < at("answer 4") && at("answer 4") < at("q1"));
        assert!(html.contains("step 0<br>reward 0.250<br>exact 0.250<br>length null"), "{html}");
        assert_eq!((html.matches("<article>").count(), html.matches("… cut").count()), (2, 1));
        assert_eq!(super::html(&[]), "");
    }
}

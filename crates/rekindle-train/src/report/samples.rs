//! The answers to prompts at each evaluation.

use std::collections::BTreeMap;

use super::text::{escape, group};
use crate::PromptSample;

/// Returns a section with each prompt and its answers in the order of the run; empty without samples.
pub(super) fn html(samples: &[PromptSample]) -> String {
    let mut prompts: BTreeMap<usize, Vec<&PromptSample>> = BTreeMap::new();
    for sample in samples {
        prompts.entry(sample.sample).or_default().push(sample);
    }
    if prompts.is_empty() {
        return String::new();
    }
    let cards: String = prompts.values().map(|answers| card(answers)).collect();
    format!(
        "<section>\n<h2>Samples</h2>\n<p>The most likely continuation of each prompt, at each evaluation.</p>\n{cards}</section>\n"
    )
}

/// Returns a prompt with its answers, of which there is at least one.
fn card(answers: &[&PromptSample]) -> String {
    let Some(PromptSample { prompt, expected, .. }) = answers.first() else { return String::new() };
    let mut rows = String::new();
    if let Some(expected) = expected {
        rows += &row("in the rows", "expected", &text(expected));
    }
    // What was said several times in a row is one row.
    for same in answers.chunk_by(|a, b| a.output == b.output && a.ended == b.ended) {
        let answer = same[0];
        let cut = if answer.ended { "" } else { "<span class=\"special\"> … cut</span>" };
        let output = match &*answer.output {
            "" => "<span class=\"special\">nothing</span>".to_owned(),
            output => text(output),
        };
        let class = if expected.as_deref() == Some(&*answer.output) { "same" } else { "" };
        let steps = match same {
            [one] => format!("step {}", group(one.step as f64)),
            [first, .., last] => format!("steps {} to {}", group(first.step as f64), group(last.step as f64)),
            [] => String::new(),
        };
        rows += &row(&steps, class, &(output + cut));
    }
    format!("<article>\n<pre>{}</pre>\n<table>\n{rows}</table>\n</article>\n", text(prompt))
}

/// Returns a row of a table.
pub(super) fn row(name: &str, class: &str, html: &str) -> String {
    format!("<tr class=\"{class}\"><th>{name}</th><td>{html}</td></tr>\n")
}

/// Returns text as HTML, with special tokens such as `<|im_end|>` dimmed.
pub(super) fn text(text: &str) -> String {
    let mut html = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("<|") {
        let Some(length) = rest[start..].find("|>") else { break };
        let end = start + length + 2;
        html += &escape(&rest[..start]);
        html += &format!("<span class=\"special\">{}</span>", escape(&rest[start..end]));
        rest = &rest[end..];
    }
    html + &escape(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::sample;

    #[test]
    fn special_tokens_stand_back() {
        assert_eq!(text("<|user|>a<b <|"), "<span class=\"special\">&lt;|user|&gt;</span>a&lt;b &lt;|");
    }

    #[test]
    fn a_prompt_has_its_answers_in_order() {
        let right = PromptSample { expected: Some("after 8".into()), ended: false, ..sample(8) };
        let html = html(&[PromptSample { expected: Some("after 8".into()), ..sample(4) }, right]);
        let at = |part: &str| html.find(part).unwrap_or_else(|| panic!("{part}: {html}"));
        assert!(
            at("&lt;q&gt;") < at("in the rows")
                && at("in the rows") < at("step 4")
                && at("step 4") < at("class=\"same\"")
        );
        assert_eq!(html.matches("… cut").count(), 1);
        let twice = super::html(&[sample(4), PromptSample { step: 6, ..sample(4) }]);
        assert!(twice.contains("<th>steps 4 to 6</th><td>after 4</td>"), "{twice}");
        assert_eq!(super::html(&[]), "");
    }
}

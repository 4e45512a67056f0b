//! Multiple choice.

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::number::last_boxed;
use super::{Rule, column_text, pass};
use crate::Sample;

/// 1 if the choice of the completion is that of a column, else 0. Case is ignored.
///
/// The choice is, in this order: the content of the last `\boxed{…}`; the choice after the last "answer" ("The answer is
/// (B)", "Answer: B"); the choice that the completion begins with ("B", "(B) because …"). A completion without one scores 0.
/// A column that holds none of the choices is an error, a null column gives null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// The column with the expected choice.
    pub column: String,
    /// The choices. Default A to D.
    #[serde(default = "letters")]
    pub choices: Vec<String>,
}

fn letters() -> Vec<String> {
    ["A", "B", "C", "D"].map(str::to_owned).to_vec()
}

/// A [`Choice`] with its compiled expressions. The first group of each is a choice.
#[derive(Debug)]
struct CompiledChoice {
    options: Choice,
    whole: Regex,
    after_answer: Regex,
    at_start: Regex,
}

impl Choice {
    pub(crate) fn compile(&self) -> Result<Box<dyn Rule>, String> {
        if self.choices.len() < 2 {
            return Err("choices needs at least 2 texts".to_owned());
        }
        if self.choices.iter().any(|choice| choice.trim().is_empty()) {
            return Err("choices holds an empty text".to_owned());
        }
        // The longest first, since the first alternative that matches wins.
        let mut choices: Vec<&str> = self.choices.iter().map(|choice| choice.trim()).collect();
        choices.sort_by_key(|choice| core::cmp::Reverse(choice.len()));
        let any = choices.into_iter().map(regex::escape).collect::<Vec<_>>().join("|");
        let marked = format!(r#"[\s*_("'\[]*({any})(?:[^\w]|$)"#);
        let compile = |pattern: String| Regex::new(&pattern).expect("escaped texts are valid");
        Ok(Box::new(CompiledChoice {
            options: self.clone(),
            whole: compile(format!(r#"(?i)^(?:\\text)?[\s*_("'\[{{]*({any})[\s*_)"'\]}}.]*$"#)),
            after_answer: compile(format!(r"(?i)answer\b(?:\s+is)?\s*:?{marked}")),
            at_start: compile(format!("(?i)^{marked}")),
        }))
    }
}

impl CompiledChoice {
    fn found<'a>(&self, completion: &'a str) -> Option<&'a str> {
        let first_group = |captures: regex::Captures<'a>| captures.get(1).map(|group| group.as_str());
        if let Some(boxed) = last_boxed(completion) {
            return self.whole.captures(boxed).and_then(first_group);
        }
        let after = self.after_answer.captures_iter(completion).last();
        after.or_else(|| self.at_start.captures(completion)).and_then(first_group)
    }
}

impl Rule for CompiledChoice {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let column = &self.options.column;
        let Some(text) = column_text(sample, column)? else { return Ok(None) };
        let expected = self.whole.captures(text.trim()).and_then(|captures| captures.get(1));
        let Some(expected) = expected else {
            return Err(format!(
                "column {column:?} is {text:?}; it must be one of {}",
                self.options.choices.join(", ")
            ));
        };
        let equal = |found: &str| found.to_lowercase() == expected.as_str().to_lowercase();
        Ok(pass(self.found(sample.completion).is_some_and(equal)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn the_choice_is_found_where_answers_have_it() {
        let choice = json!({"type": "choice", "column": "gold"});
        let gold = || json!({"gold": "(b)"});
        for (text, expected) in [
            ("B", 1.0),
            ("(B) because a dog barks", 1.0),
            ("**B.**", 1.0),
            (r"It is \boxed{B}", 1.0),
            (r"It is \boxed{\text{B}}, not A", 1.0),
            ("The answer is (B).", 1.0),
            ("Answer: A. No, answer: b", 1.0),
            ("The answer is **C**", 0.0),
            ("A dog", 0.0),
            ("Because", 0.0),
            ("I cannot say", 0.0),
        ] {
            assert_eq!(score(choice.clone(), text, gold()), Ok(Some(expected)), "{text}");
        }
        assert_eq!(score(choice.clone(), "A", json!({"gold": null})), Ok(None));
        let error = score(choice, "A", json!({"gold": "E"})).unwrap_err();
        assert!(error.contains("column \"gold\" is \"E\"; it must be one of A, B, C, D"), "{error}");
        let words = json!({"type": "choice", "column": "gold", "choices": ["no", "not sure", "yes"]});
        assert_eq!(score(words, "Not sure, maybe", json!({"gold": "not sure"})), Ok(Some(1.0)));
    }
}

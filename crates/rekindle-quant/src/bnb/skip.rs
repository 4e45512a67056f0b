//! Patterns for the modules that a checkpoint leaves unquantized.

use crate::Error;

/// An entry of `llm_int8_skip_modules`, or of `modules_to_not_convert` in the fp8 methods of transformers.
///
/// The rule is that of transformers 5 (`should_convert_module`). A module is skipped when the entry
/// - matches its name as a regular expression, from the start of the name to the end of a component: `model.layers.1`
///   skips `model.layers.1.mlp` but not `model.layers.11.mlp`; or
/// - is a suffix of its name, regardless of components: `head` skips `lm_head`.
///
/// The supported regular expression syntax is `.`, `*`, `+`, `?`, `\d` and escaped punctuation, which covers all
/// entries in use.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SkipPattern {
    text: String,
    atoms: Vec<(Atom, Repeat)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Atom {
    Any,
    Digit,
    Literal(char),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Repeat {
    Once,
    Optional,
    Any,
}

impl SkipPattern {
    /// Parses an entry.
    ///
    /// # Errors
    /// [`Error::Config`] for a regular expression with unsupported syntax.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        Self::parse_in("llm_int8_skip_modules", text)
    }

    /// Parses an entry of the list `key`.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub(crate) fn parse_in(key: &str, text: &str) -> Result<Self, Error> {
        let mut atoms: Vec<(Atom, Repeat)> = Vec::new();
        let mut repeatable = false;
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            let refuse = || {
                let supported = r"names, '.', '*', '+', '?' and '\d'";
                let text: String = text.chars().take(40).collect();
                Error::config(key, &format!("has {text:?}, in which {c:?} is not supported; use {supported}"))
            };
            let atom = match c {
                '*' | '+' | '?' => {
                    let last = *atoms.last().filter(|_| repeatable).ok_or_else(refuse)?;
                    repeatable = false;
                    match c {
                        '+' => atoms.push((last.0, Repeat::Any)),
                        _ => *atoms.last_mut().expect("there is a last one") = (last.0, repeat(c)),
                    }
                    continue;
                }
                '\\' => match chars.next().ok_or_else(refuse)? {
                    'd' => Atom::Digit,
                    escaped if escaped.is_ascii_punctuation() => Atom::Literal(escaped),
                    _ => return Err(refuse()),
                },
                '[' | ']' | '(' | ')' | '{' | '}' | '|' | '^' | '$' => return Err(refuse()),
                '.' => Atom::Any,
                _ => Atom::Literal(c),
            };
            atoms.push((atom, Repeat::Once));
            repeatable = true;
        }
        Ok(Self { text: text.to_owned(), atoms })
    }

    /// Creates a pattern that matches `text` literally.
    pub(crate) fn literal(text: &str) -> Self {
        Self { text: text.to_owned(), atoms: text.chars().map(|c| (Atom::Literal(c), Repeat::Once)).collect() }
    }

    /// Returns the entries of compressed-tensors' `ignore` that match the same modules.
    pub(crate) fn to_ignore(&self) -> Vec<String> {
        if self.text == "lm_head" {
            return vec![self.text.clone()];
        }
        let expression = if Self::parse(&self.text).is_ok() { self.text.clone() } else { regex::escape(&self.text) };
        // The boundary may also be the last point of the expression.
        let start = match expression.strip_suffix('.') {
            Some(before) => format!(r"re:(?:{before}\.|(?:{expression})(?:\.|$))"),
            None => format!(r"re:(?:{expression})(?:\.|$)"),
        };
        vec![start, format!("re:.*{}$", regex::escape(&self.text))]
    }

    pub(crate) fn skips(&self, module: &str) -> bool {
        module.ends_with(&self.text) || self.matches_components(module)
    }

    /// Simulates all paths through the expression at once: `reached[i]` is true if the first i atoms match the input so
    /// far.
    fn matches_components(&self, module: &str) -> bool {
        let mut reached = vec![false; self.atoms.len() + 1];
        reached[0] = true;
        let mut before = None;
        let mut rest = module.chars();
        loop {
            for (i, (_, repeat)) in self.atoms.iter().enumerate() {
                reached[i + 1] |= reached[i] && *repeat != Repeat::Once;
            }
            let next = rest.next();
            if reached[self.atoms.len()] && (before == Some('.') || matches!(next, None | Some('.'))) {
                return true;
            }
            let Some(c) = next else { return false };
            let mut after = vec![false; reached.len()];
            for (i, (atom, repeat)) in self.atoms.iter().enumerate() {
                if reached[i] && atom.matches(c) {
                    after[if *repeat == Repeat::Any { i } else { i + 1 }] = true;
                }
            }
            (reached, before) = (after, Some(c));
        }
    }
}

impl Atom {
    fn matches(self, c: char) -> bool {
        match self {
            Self::Any => true,
            Self::Digit => c.is_ascii_digit(),
            Self::Literal(literal) => c == literal,
        }
    }
}

fn repeat(c: char) -> Repeat {
    if c == '?' { Repeat::Optional } else { Repeat::Any }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples in transformers' comments, plus cases checked against its function.
    #[test]
    fn matches_like_transformers() {
        for (entry, module, skipped) in [
            ("lm_head", "lm_head", true),
            ("lm_head", "model.lm_head", true),
            ("head", "lm_head", true),
            ("lm", "lm_head", false),
            ("layer.1", "layer.1.attn", true),
            ("layer.1", "layer.11.attn", false),
            ("layer.*", "layer.11.attn", true),
            ("mlp.gate", "mlp.gate_proj", false),
            ("mlp.gate", "mlp.gate", true),
            ("fc1", "model.decoder.layers.23.fc1", true),
            ("model.layers.0", "model.layers.0.mlp.up_proj", true),
            ("model.layers.0.", "model.layers.0.mlp.up_proj", true),
            ("layers.0", "model.layers.0.mlp.up_proj", false),
            (r"model\.layers\.\d+\.mlp", "model.layers.17.mlp.up_proj", true),
            (r"model\.layers\.\d+\.mlp", "model.layers.x.mlp.up_proj", false),
            ("model.layers.1?2.mlp", "model.layers.2.mlp", true),
            ("model.layers.1?2.mlp", "model.layers.12.mlp", true),
            ("", "anything", true),
        ] {
            let pattern = SkipPattern::parse(entry).expect("readable");
            assert_eq!(pattern.skips(module), skipped, "{entry:?} on {module:?}");
        }
    }

    #[test]
    fn unsupported_expressions_are_refused() {
        for entry in ["a|b", "[ab]", "(a)", "a{2}", "^a", "a$", r"\w", "*a", "a**", "\\"] {
            let error = SkipPattern::parse(entry).expect_err(entry).to_string();
            assert!(error.starts_with("llm_int8_skip_modules has"), "{error}");
        }
    }

    #[test]
    fn many_repeats_do_not_backtrack() {
        let pattern = SkipPattern::parse(&".*a".repeat(200)).expect("readable");
        assert!(!pattern.skips(&"a".repeat(199)));
    }
}

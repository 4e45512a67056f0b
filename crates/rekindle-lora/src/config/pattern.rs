use indexmap::IndexMap;
use regex::Regex;
use serde::{Deserialize, Serialize};

/// Values for some modules that replace the common one, by a regular expression for the end of their names.
///
/// As in PEFT, a key applies to a module whose name it matches from the beginning, or from a dot, to the end. The first
/// key that matches is used: `q_proj`, `layers\.0\..*_proj`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModulePattern<T>(pub IndexMap<String, T>);

impl<T: Copy> ModulePattern<T> {
    /// Returns true if there are no values.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the value for `module`, or `default`.
    pub fn get(&self, module: &str, default: T) -> T {
        let found = self.0.iter().find(|(key, _)| compiled(key).is_ok_and(|regex| is_match(&regex, module)));
        found.map_or(default, |(_, value)| *value)
    }

    /// Returns one sentence for each key that is not a regular expression of the `regex` crate.
    pub(crate) fn invalid(&self, argument: &'static str) -> impl Iterator<Item = String> {
        self.0.keys().filter_map(move |key| checked(argument, key).err())
    }

    /// Returns one sentence for each key that is not a regular expression, or matches none of `modules`.
    pub(crate) fn problems<S: AsRef<str>>(&self, argument: &str, modules: &[S]) -> Vec<String> {
        let problem = |key: &String| match checked(argument, key) {
            Err(problem) => Some(problem),
            Ok(regex) if modules.iter().any(|module| is_match(&regex, module.as_ref())) => None,
            Ok(_) => {
                let names = modules.iter().filter_map(|module| module.as_ref().rsplit('.').next());
                let hint = crate::error::nearest_hint(key, names);
                Some(format!("{argument} key \"{key}\" matches no adapted linear{hint}"))
            }
        };
        self.0.keys().filter_map(problem).collect()
    }
}

/// Returns true if a key applies to this module. It also applies to a linear of an expert if it matches the name without the
/// expert's index.
fn is_match(regex: &Regex, module: &str) -> bool {
    regex.is_match(module) || without_expert(module).is_some_and(|module| regex.is_match(&module))
}

/// Returns `model.layers.0.mlp.experts.up_proj` for `model.layers.0.mlp.experts.7.up_proj`.
fn without_expert(module: &str) -> Option<String> {
    let (before, after) = module.split_once(".experts.")?;
    let (index, rest) = after.split_once('.')?;
    index.bytes().all(|byte| byte.is_ascii_digit()).then(|| format!("{before}.experts.{rest}"))
}

/// Compiles a key of an argument, or returns the problem.
fn checked(argument: &str, key: &str) -> Result<Regex, String> {
    compiled(key).map_err(|_| format!("{argument} key \"{key}\" is not a regular expression without look-around"))
}

fn compiled(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"\A(?:.*\.)?(?:{key})\z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_that_matches_the_end_counts() {
        let text = r#"{"layers\\.0\\..*q_proj": 2, "q_proj": 3, "proj": 4}"#;
        let pattern: ModulePattern<usize> = serde_json::from_str(text).expect("valid");
        assert_eq!(pattern.get("model.layers.0.self_attn.q_proj", 8), 2);
        assert_eq!(pattern.get("model.layers.10.self_attn.q_proj", 8), 3);
        assert_eq!(pattern.get("model.layers.1.self_attn.v_proj", 8), 8, "a key does not begin within a name");
        let problems = pattern.problems("rank_pattern", &["model.layers.0.self_attn.q_proj"]);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains("rank_pattern key \"proj\" matches no adapted linear"), "{problems:?}");
    }
}

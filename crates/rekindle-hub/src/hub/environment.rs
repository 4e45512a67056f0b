//! The environment variables of Python's `huggingface_hub`. No other module reads them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The default address of the hub.
const ENDPOINT: &str = "https://huggingface.co";

/// The hub settings of the environment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Environment {
    /// `HF_ENDPOINT` without a trailing slash.
    pub(crate) endpoint: String,
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub(crate) cache_dir: PathBuf,
    /// `HF_TOKEN`, or the content of the file `HF_TOKEN_PATH` or `token` in `HF_HOME`.
    pub(crate) token: Option<String>,
    /// The variable that disables the network.
    pub(crate) offline: Option<&'static str>,
}

impl Environment {
    /// Reads the variables of this process.
    pub(crate) fn read() -> Environment {
        Environment::from_variables(env::home_dir(), |name| env::var(name).ok())
    }

    fn from_variables(home: Option<PathBuf>, variable: impl Fn(&str) -> Option<String>) -> Environment {
        let text = |name| variable(name).filter(|value| !value.is_empty());
        // Without a home directory the cache is in the working directory.
        let home = home.unwrap_or_default();
        let path = |name| text(name).map(|value| expand(&value, &home));
        let hf_home = path("HF_HOME").unwrap_or_else(|| match path("XDG_CACHE_HOME") {
            Some(caches) => caches.join("huggingface"),
            None => home.join(".cache").join("huggingface"),
        });
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let in_file = || fs::read_to_string(token_path).ok();
        let is_on = |name| text(name).is_some_and(|value| is_true(&value));
        let token = match is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            true => None,
            false => text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(in_file),
        };
        Environment {
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned(),
            cache_dir: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| hf_home.join("hub")),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| is_on(name)),
        }
    }
}

/// Returns true for the values that Python's library accepts as true.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

/// Expands a leading `~`, which the shell does not expand in every context.
fn expand(path: &str, home: &Path) -> PathBuf {
    match path.strip_prefix('~') {
        Some("") => home.to_path_buf(),
        Some(rest) if rest.starts_with(['/', '\\']) => home.join(&rest[1..]),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::from_variables(Some("/home/ada".into()), |name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn defaults_are_those_of_python() {
        let expected = Environment {
            endpoint: "https://huggingface.co".to_owned(),
            cache_dir: "/home/ada/.cache/huggingface/hub".into(),
            token: None,
            offline: None,
        };
        assert_eq!(environment(&[]), expected);
        assert_eq!(environment(&[("HF_HOME", ""), ("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]), expected);
    }

    #[test]
    fn the_more_specific_variable_sets_the_cache() {
        let xdg = ("XDG_CACHE_HOME", "/xdg");
        let home = ("HF_HOME", "~/hf");
        let cache = ("HF_HUB_CACHE", "/big/disk");
        assert_eq!(environment(&[xdg]).cache_dir, Path::new("/xdg/huggingface/hub"));
        assert_eq!(environment(&[xdg, home]).cache_dir, Path::new("/home/ada/hf/hub"));
        assert_eq!(environment(&[xdg, home, cache]).cache_dir, Path::new("/big/disk"));
    }

    #[test]
    fn the_token_is_read_from_variables_and_files() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("token"), "hf_home\n").unwrap();
        let other = scratch.path().join("other");
        fs::write(&other, " hf_path\n").unwrap();
        let home = ("HF_HOME", scratch.path().to_str().unwrap());
        let path = ("HF_TOKEN_PATH", other.to_str().unwrap());
        let token = ("HF_TOKEN", "hf_variable");
        let off = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        assert_eq!(environment(&[home]).token.as_deref(), Some("hf_home"));
        assert_eq!(environment(&[home, path]).token.as_deref(), Some("hf_path"));
        assert_eq!(environment(&[home, path, token]).token.as_deref(), Some("hf_variable"));
        assert_eq!(environment(&[home, path, token, off]).token, None);
    }

    #[test]
    fn endpoint_and_offline_are_read() {
        let found = environment(&[("HF_ENDPOINT", "http://mirror:8080/"), ("HF_HUB_OFFLINE", "True")]);
        assert_eq!(found.endpoint, "http://mirror:8080");
        assert_eq!(found.offline, Some("HF_HUB_OFFLINE"));
        assert_eq!(environment(&[("TRANSFORMERS_OFFLINE", "yes")]).offline, Some("TRANSFORMERS_OFFLINE"));
    }
}

//! Selection of the required files of a repository.

use crate::adapter::{ADAPTER_CONFIG, ADAPTER_FILE};
use crate::error::quoted;
use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::is_companion;

pub(crate) const CONFIG: &str = "config.json";
const POSITIONS: &str = "rope_parameters.json";

/// The files to download.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) files: Vec<String>,
    /// True if the index among them names more files.
    pub(crate) sharded: bool,
}

impl Selection {
    /// Returns the files that describe the weights: configurations and the index.
    pub(crate) fn descriptions(&self) -> Vec<String> {
        let describes = |file: &&String| [CONFIG, ADAPTER_CONFIG, POSITIONS, INDEX_FILE].contains(&file.as_str());
        self.files.iter().filter(describes).cloned().collect()
    }

    /// Returns the single weight file, or `None` if an index names several. A model takes precedence over an adapter
    /// next to it.
    pub(crate) fn weights(&self) -> Option<&str> {
        let has = |name: &&str| self.files.iter().any(|file| file == name);
        [SINGLE_FILE, ADAPTER_FILE].into_iter().filter(|_| !self.sharded).find(has)
    }
}

/// Selects from all files of a repository. Of its subdirectories only that of chat templates is required.
///
/// # Errors
/// A message that explains why the repository is neither a supported model nor an adapter, and what to use instead.
pub(crate) fn select(all: &[String]) -> Result<Selection, String> {
    let has = |name: &str| all.iter().any(|file| file == name);
    let is_model = has(CONFIG) && (has(SINGLE_FILE) || has(INDEX_FILE));
    let is_adapter = has(ADAPTER_CONFIG) && has(ADAPTER_FILE);
    if !is_model && !is_adapter {
        return Err(unreadable(all));
    }
    let mut files: Vec<_> =
        [CONFIG, ADAPTER_CONFIG, POSITIONS].into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    files.extend(all.iter().filter(|name| is_companion(name)).cloned());
    // If both exist, `Checkpoint::open` uses the single file.
    let sharded = is_model && !has(SINGLE_FILE);
    if is_model {
        files.push(if sharded { INDEX_FILE } else { SINGLE_FILE }.to_owned());
    }
    if is_adapter {
        files.push(ADAPTER_FILE.to_owned());
    }
    Ok(Selection { files, sharded })
}

fn unreadable(all: &[String]) -> String {
    let ending = |endings: &[&str]| {
        let found = all.iter().filter(|file| endings.iter().any(|ending| file.ends_with(ending)));
        found.map(String::as_str).collect::<Vec<_>>()
    };
    let weights = ending(&[".safetensors"]);
    let pickled = ending(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]);
    let gguf = ending(&[".gguf"]);
    if !weights.is_empty() {
        let lacks = if weights.contains(&ADAPTER_FILE) { ADAPTER_CONFIG } else { CONFIG };
        let found = quoted(weights.into_iter().take(3));
        return format!(
            "it holds {found}, but not {lacks} together with {SINGLE_FILE} or {INDEX_FILE} in its top directory; \
             use a model or an adapter in transformers' layout"
        );
    }
    if !pickled.is_empty() {
        return format!(
            "its weights are pickled ({}), and reading pickles can run code; \
             use a repository or revision with safetensors",
            quoted(pickled.into_iter().take(3))
        );
    }
    if !gguf.is_empty() {
        return "it holds GGUF files, which are not supported; use the repository they were converted from".to_owned();
    }
    "it holds no weights; use the repository of a model or an adapter".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select_of(all: &[&str]) -> Result<Selection, String> {
        select(&all.iter().map(|file| (*file).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn only_required_files_are_selected() {
        let found = select_of(&[
            ".gitattributes",
            "README.md",
            "additional_chat_templates/tool_use.jinja",
            "additional_chat_templates/notes.txt",
            "config.json",
            "consolidated.safetensors",
            "merges.txt",
            "model.safetensors",
            "onnx/model.onnx",
            "original/config.json",
            "pytorch_model.bin",
            "tokenization_custom.py",
            "tokenizer.json",
            "tokenizer.model",
            "training_args.bin",
        ]);
        let files = [
            "config.json",
            "additional_chat_templates/tool_use.jinja",
            "merges.txt",
            "tokenizer.json",
            "tokenizer.model",
            "model.safetensors",
        ];
        assert_eq!(found, Ok(Selection { files: files.map(str::to_owned).into(), sharded: false }));
    }

    #[test]
    fn shards_are_found_by_their_index() {
        let found = select_of(&["config.json", INDEX_FILE, "model-00001-of-00002.safetensors"]).unwrap();
        assert_eq!(found.files, ["config.json", INDEX_FILE]);
        assert!(found.sharded);
        let both = select_of(&["config.json", INDEX_FILE, SINGLE_FILE]).unwrap();
        assert_eq!(both.files, ["config.json", SINGLE_FILE]);
    }

    #[test]
    fn an_adapter_is_selected() {
        let found = select_of(&["README.md", ADAPTER_CONFIG, ADAPTER_FILE, "chat_template.jinja"]).unwrap();
        assert_eq!(found.files, [ADAPTER_CONFIG, "chat_template.jinja", ADAPTER_FILE]);
        assert!(!found.sharded);
    }

    #[test]
    fn unsupported_weights_are_refused_by_name() {
        let cases: [(&[&str], &str); 6] = [
            (&["config.json", "pytorch_model.bin"], "pickled (\"pytorch_model.bin\")"),
            (&["adapter_config.json", "adapter_model.bin"], "\"adapter_model.bin\""),
            (&["config.json", "m.Q4_K_M.gguf"], "holds GGUF"),
            (&["README.md"], "no weights"),
            (&["model.safetensors"], "but not config.json"),
            (&["adapter_model.safetensors"], "but not adapter_config.json"),
        ];
        for (all, expected) in cases {
            let reason = select_of(all).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}

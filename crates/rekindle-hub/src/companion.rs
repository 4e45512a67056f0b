//! The files of a checkpoint that are neither weights nor `config.json`: tokenizer, chat templates, processors and the
//! generation configuration.

use std::path::{Path, PathBuf};

/// The directory of named chat templates, as transformers writes them.
pub const ADDITIONAL_CHAT_TEMPLATES: &str = "additional_chat_templates";

/// The names that `save_pretrained` of transformers gives to these files.
const NAMES: [&str; 16] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
];

/// Returns whether `name`, a path relative to the checkpoint with `/` between its parts, is such a file.
///
/// Code (`tokenization_*.py`) is not: a copy of it would run wherever the result is loaded.
///
/// ```
/// assert!(rekindle_hub::is_companion("tokenizer.model"));
/// assert!(rekindle_hub::is_companion("additional_chat_templates/tool_use.jinja"));
/// assert!(!rekindle_hub::is_companion("tokenization_custom.py"));
/// ```
pub fn is_companion(name: &str) -> bool {
    if let Some((directory, file)) = name.split_once('/') {
        return directory == ADDITIONAL_CHAT_TEMPLATES && file.ends_with(".jinja") && !file.contains('/');
    }
    // SentencePiece and tiktoken models carry a version: "tokenizer.model.v3", "qwen.tiktoken".
    NAMES.contains(&name)
        || name == "tokenizer.model"
        || name.starts_with("tokenizer.model.v")
        || name.ends_with(".tiktoken")
}

/// Returns the paths of all such files of the checkpoint or adapter in `directory`, sorted; none for a directory that
/// cannot be read.
pub fn companion_files(directory: &Path) -> Vec<PathBuf> {
    let below = |directory: &Path| {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut files = below(directory);
    files.extend(below(&directory.join(ADDITIONAL_CHAT_TEMPLATES)));
    files.retain(|file| file.is_file() && companion_name(file).is_some());
    files.sort();
    files
}

/// Returns the path of a companion file relative to its checkpoint; `None` for any other file.
pub fn companion_name(file: &Path) -> Option<PathBuf> {
    let name = file.file_name()?;
    let inside = Path::new(ADDITIONAL_CHAT_TEMPLATES).join(name);
    let relative = if file.ends_with(&inside) { inside } else { PathBuf::from(name) };
    let text: Vec<&str> = relative.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
    is_companion(&text.join("/")).then_some(relative)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn finds_everything_but_weights_and_code() {
        let scratch = tempfile::tempdir().unwrap();
        let templates = scratch.path().join(ADDITIONAL_CHAT_TEMPLATES);
        fs::create_dir(&templates).unwrap();
        fs::create_dir(scratch.path().join("vocab.json")).unwrap();
        for name in [
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "qwen.tiktoken",
            "tekken.json",
            "config.json",
            "model.safetensors",
            "tokenization_custom.py",
            "README.md",
            "additional_chat_templates/tool_use.jinja",
            "additional_chat_templates/notes.txt",
        ] {
            fs::write(scratch.path().join(name), "").unwrap();
        }
        let found = companion_files(scratch.path());
        let names: Vec<PathBuf> = found.iter().filter_map(|file| companion_name(file)).collect();
        let expected = [
            "additional_chat_templates/tool_use.jinja",
            "qwen.tiktoken",
            "tekken.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
        ];
        assert_eq!(names, expected.map(PathBuf::from));
        assert!(companion_files(Path::new("/no/such/model")).is_empty());
    }

    #[test]
    fn a_template_elsewhere_is_not_one() {
        for name in ["templates/tool_use.jinja", "a/additional_chat_templates/x.jinja", "tool_use.jinja", ""] {
            assert!(!is_companion(name), "{name}");
        }
    }
}

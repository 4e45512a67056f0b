//! The files that accompany `tokenizer.json`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::templates::{DEFAULT, TemplateSource};
use crate::error::{Error, Result};

/// Reads `bos_token`, `eos_token`, `unk_token` … by name. A token is a string, or an object with its text under
/// `content`.
pub(crate) fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut tokens = BTreeMap::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        for (name, value) in read_object(&dir.join(file))?.into_iter().flatten() {
            // `add_bos_token` is a boolean, not a token.
            let text = value.as_str().or_else(|| value.get("content")?.as_str());
            if let Some(text) = text.filter(|_| name.ends_with("_token")) {
                tokens.entry(name).or_insert_with(|| text.to_owned());
            }
        }
    }
    Ok(tokens)
}

/// Reads `eos_token_id` of a checkpoint directory, a number or a list: from `generation_config.json`, else
/// `config.json`.
///
/// # Errors
/// [`Error::Tokenizer`] if the file is invalid or contains anything but token ids.
pub fn eos_token_ids(dir: &Path) -> Result<Option<Vec<u32>>> {
    for file in ["generation_config.json", "config.json"] {
        let path = dir.join(file);
        let Some(value) = read_object(&path)?.and_then(|mut fields| fields.shift_remove("eos_token_id")) else {
            continue;
        };
        let ids = match &value {
            Value::Null => continue,
            Value::Array(values) => values.iter().map(token_id).collect(),
            single => token_id(single).map(|id| vec![id]),
        };
        return ids.map(Some).ok_or_else(|| {
            Error::tokenizer(path, format!("eos_token_id is {value}; expected a token id or a list of them"))
        });
    }
    Ok(None)
}

/// Returns the texts of the chat templates of a checkpoint or adapter, by name.
///
/// # Errors
/// [`Error::Tokenizer`] if a file is invalid.
pub fn chat_template_sources(dir: &Path) -> Result<BTreeMap<String, String>> {
    Ok(chat_templates(dir)?.into_iter().map(|template| (template.name, template.text)).collect())
}

/// Reads the checkpoint's chat templates: `chat_template.jinja` and `additional_chat_templates/*.jinja`, else those of
/// `tokenizer_config.json`.
pub(crate) fn chat_templates(dir: &Path) -> Result<Vec<TemplateSource>> {
    let mut templates = Vec::new();
    templates.extend(template_file(DEFAULT.to_owned(), dir.join("chat_template.jinja"))?);
    let more = dir.join("additional_chat_templates");
    let entries = match std::fs::read_dir(&more) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::tokenizer(more, error.to_string())),
    };
    let paths = entries.into_iter().collect::<std::io::Result<Vec<_>>>();
    let mut paths: Vec<PathBuf> =
        paths.map_err(|error| Error::tokenizer(more, error.to_string()))?.iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
        if let Some(name) = name.map(str::to_owned) {
            templates.extend(template_file(name, path)?);
        }
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    let path = dir.join("tokenizer_config.json");
    let template = read_object(&path)?.and_then(|mut fields| fields.shift_remove("chat_template"));
    match template {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![TemplateSource { name: DEFAULT.to_owned(), path, text }]),
        Some(Value::Array(named)) => named.into_iter().map(|entry| named_template(entry, &path)).collect(),
        Some(_) => Err(Error::tokenizer(path, "chat_template is neither a string nor a list of named ones")),
    }
}

fn template_file(name: String, path: PathBuf) -> Result<Option<TemplateSource>> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(TemplateSource { name, path, text })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::tokenizer(path, error.to_string())),
    }
}

/// Reads `{"name": …, "template": …}`.
fn named_template(entry: Value, path: &Path) -> Result<TemplateSource> {
    match (entry.get("name").and_then(Value::as_str), entry.get("template").and_then(Value::as_str)) {
        (Some(name), Some(text)) => {
            Ok(TemplateSource { name: name.to_owned(), path: path.to_owned(), text: text.to_owned() })
        }
        _ => Err(Error::tokenizer(path, "chat_template has an entry without \"name\" and \"template\"")),
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Reads the object in a JSON file; `None` if there is no such file.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::tokenizer(path, error.to_string())),
    };
    match serde_json::from_slice(&bytes) {
        Ok(fields) => Ok(Some(fields)),
        Err(error) => Err(Error::tokenizer(path, format!("invalid JSON: {error}"))),
    }
}

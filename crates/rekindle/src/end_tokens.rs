//! The tokens that end a generation, in computation and in saved files.

use std::path::{Path, PathBuf};

use rekindle_data::{Dataset, Tokenizer, eos_token_ids};
use rekindle_hub::read_json;
use rekindle_train::Companion;
use serde_json::{Map, Value};

use crate::{Error, ModelFiles};

/// Returns the end tokens of the checkpoint in `model`, then those that only `tokenizer` has.
pub(crate) fn end_tokens(model: &Path, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Error> {
    let mut ids = eos_token_ids(model)?.unwrap_or_default();
    if let Some(tokenizer) = tokenizer {
        for id in tokenizer.eos_ids().iter().copied().chain(tokenizer.eos_id()).chain(tokenizer.ends_of_turns()) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    Ok(ids)
}

/// Returns the text of a `generation_config.json` with all of `end_tokens`: that of `file` with an extended
/// `eos_token_id` or, without a file, the token ids of the checkpoint's `config`. Returns `None` if the checkpoint
/// already has them all.
pub(crate) fn generation_config(
    file: Option<&Path>,
    config: &Path,
    end_tokens: &[u32],
) -> Result<Option<String>, Error> {
    let json: Value = read_json(file.unwrap_or(config))?;
    let Value::Object(mut fields) = json else { return Ok(None) };
    if file.is_none() {
        let keys = ["bos_token_id", "eos_token_id", "pad_token_id"];
        let kept = keys.into_iter().filter_map(|key| Some((key.to_owned(), fields.get(key)?.clone())));
        fields = kept.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>();
    }
    let mut ids: Vec<Value> = match fields.get("eos_token_id") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
    };
    let missing: Vec<Value> = end_tokens.iter().map(|&id| Value::from(id)).filter(|id| !ids.contains(id)).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    ids.extend(missing);
    let ids = if ids.len() == 1 { ids.remove(0) } else { Value::Array(ids) };
    fields.insert("eos_token_id".to_owned(), ids);
    Ok(Some(format!("{:#}\n", Value::Object(fields))))
}

/// Returns the files to save beside weights: `files`, with a generation configuration that has all end tokens.
pub(crate) fn companions(files: &ModelFiles, tokenizer: Option<&Tokenizer>) -> Result<Vec<Companion>, Error> {
    const NAME: &str = "generation_config.json";
    let paths = files.companions();
    let file = paths.iter().find(|path| path.ends_with(NAME));
    let ends = end_tokens(&files.model, tokenizer)?;
    let text = generation_config(file.map(PathBuf::as_path), &files.model.join("config.json"), &ends)?;
    let copied = paths.into_iter().filter(|path| text.is_none() || !path.ends_with(NAME));
    let mut companions: Vec<_> = copied.map(Companion::from).collect();
    companions.extend(text.map(|text| Companion::Text { name: NAME.to_owned(), text }));
    Ok(companions)
}

/// Returns a notice if a run trains texts to end with a token that is no end token of the checkpoint in `model`.
pub(crate) fn notice(model: &Path, tokenizer: &Tokenizer, rows: &Dataset) -> Result<Option<String>, Error> {
    let named = eos_token_ids(model)?;
    let named = named.unwrap_or_else(|| tokenizer.eos_id().into_iter().collect());
    let show = |id: u32| match tokenizer.id_to_token(id) {
        Some(token) => format!("{token} (id {id})"),
        None => format!("id {id}"),
    };
    let is_trained = |id: u32| rows.examples().any(|row| row.labels.contains(&(id as i32)));
    let turns = tokenizer.ends_of_turns();
    let mut ends = turns.iter().copied().chain(tokenizer.eos_id());
    let Some(end) = ends.find(|end| !named.contains(end) && is_trained(*end)) else { return Ok(None) };
    let what = if turns.contains(&end) { "the chat template ends turns" } else { "texts end" };
    let base = match &named[..] {
        [] => "the base model has no end token".to_owned(),
        ids => format!("the base model ends at {}", ids.iter().map(|&id| show(id)).collect::<Vec<_>>().join(", ")),
    };
    Ok(Some(format!(
        "{what} with {}, and {base}; generation ends at any of them, and the saved generation_config.json lists them \
         all",
        show(end)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Returns the generation configuration to write for these files and end tokens.
    fn written(file: Option<Value>, config: Value, end_tokens: &[u32]) -> Option<Value> {
        let dir = tempfile::tempdir().unwrap();
        let [path, config_path] = ["generation_config.json", "config.json"].map(|name| dir.path().join(name));
        std::fs::write(&config_path, config.to_string()).unwrap();
        if let Some(file) = &file {
            std::fs::write(&path, file.to_string()).unwrap();
        }
        let text = generation_config(file.is_some().then_some(&path), &config_path, end_tokens).unwrap();
        text.map(|text| serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn only_missing_ids_are_added() {
        let config = json!({"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": null, "hidden_size": 8});
        let file = |ids: Value| Some(json!({"temperature": 0.7, "eos_token_id": ids, "pad_token_id": 0}));
        assert_eq!(written(file(json!([2, 0])), config.clone(), &[0, 2]), None);
        assert_eq!(written(file(json!(0)), config.clone(), &[0]), None);
        assert_eq!(written(file(json!(0)), config.clone(), &[0, 2]), file(json!([0, 2])));
        assert_eq!(written(file(Value::Null), config.clone(), &[2]), file(json!(2)));
        assert_eq!(written(None, config.clone(), &[0]), None);
        let made = json!({"bos_token_id": 1, "eos_token_id": [0, 2]});
        assert_eq!(written(None, config, &[0, 2]), Some(made));
        assert_eq!(written(None, json!({}), &[2]), Some(json!({"eos_token_id": 2})));
    }
}

//! Saving of adapters and models.

use std::path::Path;

use rekindle_hub::{ADDITIONAL_CHAT_TEMPLATES, AtomicDir, Dtype, is_companion};
use rekindle_lora::Adapter;
use rekindle_lora::peft::{CONFIG_FILE, TENSORS_FILE};
use rekindle_models::{CausalLm, DEFAULT_ADAPTER, Positions, save_positions};

use crate::model_card::{CardRun, README, keep_readme};
use crate::{Companion, Error, ModelCard, checkpoint};

/// Writes the trained result to `dir`: PEFT's files for an adapter, or a whole checkpoint in `dtype` if all weights are
/// trained. Adds `companions`, such as the tokenizer's files.
///
/// `dir` is written atomically. An existing directory is replaced if it contains an earlier result of the same kind and
/// nothing else.
///
/// # Errors
/// [`Error::File`] if `dir` contains anything else or cannot be written; [`Error::Model`] if the model cannot be saved.
pub fn save_result(model: &CausalLm, dir: &Path, companions: &[Companion], dtype: Dtype) -> Result<(), Error> {
    write_result(dir, model.lora().is_some(), companions, |target| write_model(model, target, dtype))
}

/// Writes the adapter, or the whole model in `dtype` if all weights are trained, into an existing directory, with a
/// model card.
pub(crate) fn write_model(model: &CausalLm, target: &Path, dtype: Dtype) -> Result<(), Error> {
    write_model_with(model, target, dtype, &ModelCard::default(), None)
}

/// Writes like [`write_model`], with details for the card.
pub(crate) fn write_model_with(
    model: &CausalLm,
    target: &Path,
    dtype: Dtype,
    card: &ModelCard,
    run: Option<CardRun<'_>>,
) -> Result<(), Error> {
    let adapter = model.adapter();
    // What is read from a device that failed is no adapter.
    model.device().check().map_err(rekindle_models::Error::from)?;
    match adapter {
        Some(adapter) => write_adapter(model, &adapter, target, card, run),
        None => {
            model.save(target, dtype)?;
            card.write(model, None, run, target)
        }
    }
}

/// Writes the adapter called `name` to `dir`, as [`save_result`] writes the active one.
///
/// # Errors
/// As `save_result`, and for an unknown name.
pub fn save_adapter(model: &CausalLm, name: &str, dir: &Path, companions: &[Companion]) -> Result<(), Error> {
    let adapter = model.adapter_called(name)?;
    write_result(dir, true, companions, |target| write_adapter(model, &adapter, target, &ModelCard::default(), None))
}

/// Writes all adapters of `model` to `dir` in PEFT's layout: the one called [`DEFAULT_ADAPTER`] at the top, others in
/// directories of their names. Adds `companions` at the top.
///
/// `dir` is written atomically. An existing directory is replaced if it contains an earlier result of these adapters
/// and nothing else.
///
/// # Errors
/// [`Error::File`] if `dir` contains anything else or cannot be written; [`Error::Model`] if an adapter cannot be
/// saved.
pub fn save_adapters(model: &CausalLm, dir: &Path, companions: &[Companion]) -> Result<(), Error> {
    let is_named = |name: &&str| *name != DEFAULT_ADAPTER;
    let named: Vec<&str> = model.adapters().into_iter().filter(is_named).collect();
    check_with(dir, true, &named, &[])?;
    write_new(dir, companions, |target| {
        for name in model.adapters() {
            let adapter = model.adapter_called(name)?;
            let mut place = target.to_owned();
            if is_named(&name) {
                place.push(name);
                std::fs::create_dir(&place).map_err(|source| Error::Io { path: place.clone(), source })?;
            }
            write_adapter(model, &adapter, &place, &ModelCard::default(), None)?;
            if is_named(&name) {
                keep_readme(&dir.join(name), &place)?;
            }
        }
        Ok(())
    })
}

/// Writes the files of one adapter of `model`.
fn write_adapter(
    model: &CausalLm,
    adapter: &Adapter,
    dir: &Path,
    card: &ModelCard,
    run: Option<CardRun<'_>>,
) -> Result<(), Error> {
    if let Some(extension) = model.context_extension() {
        save_positions(&extension.positions, dir)?;
    }
    adapter.save(dir).map_err(rekindle_models::Error::from)?;
    card.write(model, Some(adapter.config.lora()), run, dir)
}

/// Writes `dir` atomically with the output of `write`, which receives a directory, and `companions`.
///
/// An existing directory is replaced if it contains an earlier result of the same kind, adapter or checkpoint, and
/// nothing else.
///
/// # Errors
/// [`Error::File`] if `dir` contains anything else or cannot be written, and those of `write`.
pub fn write_result<T>(
    dir: &Path,
    is_adapter: bool,
    companions: &[Companion],
    write: impl FnOnce(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    check_replaceable(dir, is_adapter)?;
    write_new(dir, companions, write)
}

/// Writes like [`write_result`], without a check of the existing directory.
pub(crate) fn write_new<T>(
    dir: &Path,
    companions: &[Companion],
    write: impl FnOnce(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let target = AtomicDir::replace(dir)?;
    let written = write(target.path())?;
    companions.iter().try_for_each(|companion| companion.write(target.path()))?;
    keep_readme(dir, target.path())?;
    target.commit()?;
    Ok(written)
}

/// Refuses a directory with anything that an earlier save of this kind did not write.
pub(crate) fn check_replaceable(dir: &Path, adapter: bool) -> Result<(), Error> {
    check_with(dir, adapter, &[], &[])
}

/// Checks like [`check_replaceable`], for a checkpoint of a run.
pub(crate) fn check_checkpoint(dir: &Path, adapter: bool) -> Result<(), Error> {
    check_with(dir, adapter, &[], &checkpoint::FILES)
}

/// Checks like [`check_replaceable`], with adapters in the directories `named`, and additional `files`.
fn check_with(dir: &Path, adapter: bool, named: &[&str], files: &[&str]) -> Result<(), Error> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for name in named {
        check_replaceable(&dir.join(name), true)?;
    }
    let mut names = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match std::fs::read_dir(entry.path()) {
            Ok(inside) if name == ADDITIONAL_CHAT_TEMPLATES => {
                names.extend(inside.flatten().map(|file| format!("{name}/{}", file.file_name().to_string_lossy())));
            }
            _ => names.push(name),
        }
    }
    let weights = |name: &str| name.starts_with("model") && name.contains(".safetensors");
    let ours = |name: &str| {
        is_companion(name)
            || name == README
            || named.contains(&name)
            || files.contains(&name)
            || if adapter {
                [CONFIG_FILE, TENSORS_FILE, Positions::FILE].contains(&name)
            } else {
                name == "config.json" || weights(name)
            }
    };
    match names.iter().find(|name| !ours(name)) {
        None => Ok(()),
        Some(name) => Err(rekindle_hub::Error::Unwritable {
            path: dir.to_owned(),
            reason: format!("it holds \"{name}\", which saving would remove; choose a new directory"),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_result_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let check = |adapter| check_replaceable(dir.path(), adapter);
        check(true).unwrap();
        for name in [CONFIG_FILE, TENSORS_FILE, Positions::FILE, "tokenizer.json", README] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        check(true).unwrap();
        assert!(check(false).unwrap_err().to_string().contains("adapter_"), "a model does not replace an adapter");
        let templates = dir.path().join("additional_chat_templates");
        std::fs::create_dir(&templates).unwrap();
        std::fs::write(templates.join("tool_use.jinja"), "").unwrap();
        check(true).unwrap();
        std::fs::write(templates.join("notes.txt"), "").unwrap();
        let error = check(true).unwrap_err().to_string();
        assert!(error.contains("it holds \"additional_chat_templates/notes.txt\""), "{error}");
        std::fs::remove_dir_all(&templates).unwrap();
        std::fs::write(dir.path().join("config.json"), "").unwrap();
        std::fs::write(dir.path().join("trainer_state.json"), "").unwrap();
        assert!(check_checkpoint(dir.path(), false).unwrap_err().to_string().contains("adapter_"));
        std::fs::remove_file(dir.path().join("trainer_state.json")).unwrap();
        let error = check(true).unwrap_err().to_string();
        assert!(error.contains("it holds \"config.json\", which saving would remove"), "{error}");
        check_replaceable(&dir.path().join("absent"), true).unwrap();
    }

    #[test]
    fn adapters_of_other_names_are_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().join("sql");
        std::fs::create_dir(&named).unwrap();
        std::fs::write(named.join(TENSORS_FILE), "").unwrap();
        check_with(dir.path(), true, &["sql", "chat"], &[]).unwrap();
        assert!(check_with(dir.path(), true, &["chat"], &[]).unwrap_err().to_string().contains("it holds \"sql\""));
        std::fs::write(named.join("notes.txt"), "").unwrap();
        let error = check_with(dir.path(), true, &["sql"], &[]).unwrap_err().to_string();
        assert!(error.contains("sql\"") && error.contains("it holds \"notes.txt\""), "{error}");
    }
}

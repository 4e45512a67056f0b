//! The files of a model, and the arguments of `from_pretrained` for finding them.

use std::path::{Path, PathBuf};

use rekindle_hub::{AdapterBase, adapter_base, companion_files, companion_name};

use super::Loader;
use crate::Error;
use crate::model_source::{FetchedFiles, HubToken, find, find_config};
use crate::run::ModelArguments;

/// The directories of a model's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// The directory of the checkpoint.
    pub model: PathBuf,
    /// The directory of the adapter, if one was given as the model.
    pub adapter: Option<PathBuf>,
    /// Notices for the user: the hub could not be reached and the cache was used; the adapter has another tokenizer or
    /// chat template than the checkpoint.
    pub notices: Vec<String>,
    /// The checkpoint's name as given, and its revision if one was given.
    pub(crate) name: String,
    pub(super) revision: Option<String>,
    /// An adapter that is attached to the model in addition to, or instead of, `adapter`.
    pub(super) beside: Option<PathBuf>,
}

impl ModelFiles {
    /// Returns the files of a checkpoint and an adapter in these directories.
    pub(crate) fn of(model: &Path, adapter: &Path) -> Self {
        let (model, adapter) = (model.to_owned(), Some(adapter.to_owned()));
        Self { name: model.display().to_string(), model, adapter, notices: Vec::new(), revision: None, beside: None }
    }

    /// Returns the files of a checkpoint in this directory, without an adapter.
    pub(crate) fn of_model(model: &Path) -> Self {
        Self { adapter: None, ..Self::of(model, model) }
    }

    /// Returns the files that are saved with a model or adapter: tokenizer, chat templates, processors and the
    /// generation configuration.
    ///
    /// If the adapter has the tokenizer, its missing files are taken from the checkpoint if they agree with it: other
    /// forms of the vocabulary if `tokenizer.json` is the same, and templates if `tokenizer_config.json` is the same
    /// too.
    pub(crate) fn companions(&self) -> Vec<PathBuf> {
        let tokenizer = self.tokenizer();
        let mut files = companion_files(tokenizer);
        let same = |name: &str| {
            let [own, base] = [tokenizer, &self.model].map(|dir| std::fs::read(dir.join(name)).ok());
            own == base
        };
        let same_vocabulary = same("tokenizer.json");
        let same_tokenizer = same_vocabulary && same("tokenizer_config.json") && same("chat_template.jinja");
        let lacking = companion_files(&self.model).into_iter().filter(|file| {
            let Some(name) = companion_name(file).filter(|name| !tokenizer.join(name).exists()) else { return false };
            match name.to_str().unwrap_or_default() {
                "tokenizer_config.json" => false,
                "vocab.json" | "vocab.txt" | "merges.txt" | "tekken.json" => same_vocabulary,
                name if name.ends_with("_config.json") => true,
                name if name.contains(".model") || name.ends_with(".tiktoken") => same_vocabulary,
                _ => same_tokenizer,
            }
        });
        files.extend(lacking);
        files
    }
}

impl<'a> Loader<'a> {
    /// Sets the branch, tag or commit of a name on the hub. Default `main`. An adapter records that of its base.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.args.revision = Some(revision.into());
        self
    }

    /// Sets the token for private and gated repositories ([`HubAccess::token`](crate::HubAccess::token)).
    pub fn token(mut self, token: impl Into<HubToken>) -> Self {
        self.args.token = Some(token.into());
        self
    }

    /// Sets the directory for downloads ([`HubAccess::cache_dir`](crate::HubAccess::cache_dir)).
    pub fn cache_dir(mut self, cache_dir: impl Into<PathBuf>) -> Self {
        self.args.cache_dir = Some(cache_dir.into());
        self
    }

    /// If true, the network is not used ([`HubAccess::local_files_only`](crate::HubAccess::local_files_only)).
    pub fn local_files_only(mut self, local_files_only: bool) -> Self {
        self.args.local_files_only = local_files_only;
        self
    }

    /// Sets a callback for the bytes downloaded so far, and those of all files to download, of an adapter and its base
    /// one after the other. It is not called if there is nothing to download.
    pub fn on_download(mut self, on_download: impl FnMut(u64, u64) + 'a) -> Self {
        self.on_download = Some(Box::new(on_download));
        self
    }

    /// Finds the files once; downloads missing ones. Loading begins with this.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::File`] for missing files, of the kind
    /// [`ErrorKind::Hub`](crate::ErrorKind::Hub) if a name could not be downloaded; [`Error::AdapterBase`] for an
    /// adapter without its base.
    pub fn fetch(&mut self) -> Result<&ModelFiles, Error> {
        let files = match self.files.take() {
            Some(files) => files,
            None => {
                let mut files = self.find()?;
                files.beside = self.adapter.clone();
                files.notices.extend(files.notice());
                files
            }
        };
        Ok(self.files.insert(files))
    }

    fn find(&mut self) -> Result<ModelFiles, Error> {
        self.check()?;
        let access = self.args.access();
        let on_download = &mut self.on_download;
        let mut fetch = |name: &Path, revision: Option<&str>| {
            find(name, revision, &access, &mut |done, total| {
                if let Some(on_download) = on_download {
                    on_download(done, total);
                }
            })
        };
        let ModelArguments { name_or_path: given, revision, full_finetuning, .. } = &self.args;
        let first = fetch(given, revision.as_deref())?;
        let mut notices: Vec<String> = first.notice.into_iter().collect();
        let Some(base) = adapter_base(&first.path)? else {
            let (name, revision) = (given.display().to_string(), revision.clone());
            return Ok(ModelFiles { model: first.path, adapter: None, notices, name, revision, beside: None });
        };
        let adapter = first.path;
        if *full_finetuning {
            return Err(Error::Argument(format!(
                "{} is an adapter, but full_finetuning trains all weights of a model; merge it first, or use its base \
                 ({}) instead",
                given.display(),
                base.name_or_path
            )));
        }
        let name = base_directory(&base, &adapter, first.commit.as_deref(), &mut notices);
        let found = fetch(&name, base.revision.as_deref());
        let found = found.map_err(|error| Error::AdapterBase { adapter: given.clone(), source: Box::new(error) })?;
        notices.extend(found.notice);
        let (name, revision) = (name.display().to_string(), base.revision);
        Ok(ModelFiles { model: found.path, adapter: Some(adapter), notices, name, revision, beside: None })
    }

    /// Returns the directories with the configuration of the model, and of the adapter that was given as the model.
    /// Does not download the weights of a name on the hub.
    pub(super) fn find_config(&self) -> Result<(PathBuf, Option<PathBuf>), Error> {
        self.check()?;
        if let Some(files) = &self.files {
            return Ok((files.model.clone(), files.adapter.clone()));
        }
        let access = &self.args.access();
        let ModelArguments { name_or_path: given, revision, .. } = &self.args;
        let first = find_config(given, revision.as_deref(), access)?;
        let Some(base) = adapter_base(&first)? else { return Ok((first, None)) };
        // An adapter is small, and the shapes of its tables are needed.
        let FetchedFiles { path: first, commit, .. } = find(given, revision.as_deref(), access, &mut |_, _| ())?;
        let name = base_directory(&base, &first, commit.as_deref(), &mut Vec::new());
        let found = find_config(&name, base.revision.as_deref(), access);
        let found = found.map_err(|error| Error::AdapterBase { adapter: given.clone(), source: Box::new(error) })?;
        Ok((found, Some(first)))
    }
}

/// Returns the directory of an adapter's base, or its name on the hub. Adds a notice if a relative path was resolved
/// from a directory above the adapter. `commit` is that of an adapter from the hub, whose base is on the hub too.
pub(crate) fn base_directory(
    base: &AdapterBase,
    adapter: &Path,
    commit: Option<&str>,
    notices: &mut Vec<String>,
) -> PathBuf {
    let given = PathBuf::from(&base.name_or_path);
    let found = if commit.is_none() { base.directory(adapter) } else { None };
    let found = found.unwrap_or_else(|| given.clone());
    if found != given {
        notices.push(format!("the adapter's base model \"{}\" is loaded from {}", given.display(), found.display()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Returns the names of the companion files of a checkpoint and an adapter with these files.
    fn companions(model: &[(&str, &str)], adapter: &[(&str, &str)]) -> Vec<String> {
        let scratch = tempfile::tempdir().unwrap();
        for (dir, files) in [("model", model), ("adapter", adapter)] {
            for (name, text) in files {
                let path = scratch.path().join(dir).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        let files = ModelFiles::of(&scratch.path().join("model"), &scratch.path().join("adapter")).companions();
        let mut names: Vec<String> =
            files.iter().map(|file| file.strip_prefix(scratch.path()).unwrap().display().to_string()).collect();
        names.sort();
        names
    }

    const MODEL: [(&str, &str); 8] = [
        ("tokenizer.json", "t"),
        ("tokenizer_config.json", "c"),
        ("tokenizer.model", "m"),
        ("vocab.json", "v"),
        ("chat_template.jinja", "j"),
        ("additional_chat_templates/tool_use.jinja", "u"),
        ("generation_config.json", "g"),
        ("config.json", "{}"),
    ];

    #[test]
    fn everything_of_the_checkpoint_comes_along() {
        let all = [
            "model/additional_chat_templates/tool_use.jinja",
            "model/chat_template.jinja",
            "model/generation_config.json",
            "model/tokenizer.json",
            "model/tokenizer.model",
            "model/tokenizer_config.json",
            "model/vocab.json",
        ];
        assert_eq!(companions(&MODEL, &[("adapter_model.safetensors", "")]), all);
    }

    #[test]
    fn what_an_adapter_lacks_comes_from_the_checkpoint_where_it_agrees() {
        let same = [("tokenizer.json", "t"), ("tokenizer_config.json", "c"), ("chat_template.jinja", "j")];
        let expected = [
            "adapter/chat_template.jinja",
            "adapter/tokenizer.json",
            "adapter/tokenizer_config.json",
            "model/additional_chat_templates/tool_use.jinja",
            "model/generation_config.json",
            "model/tokenizer.model",
            "model/vocab.json",
        ];
        assert_eq!(companions(&MODEL, &same), expected);

        let another_template = [("tokenizer.json", "t"), ("tokenizer_config.json", "c"), ("chat_template.jinja", "x")];
        let found = companions(&MODEL, &another_template);
        assert!(found.contains(&"model/tokenizer.model".to_owned()), "{found:?}");
        assert!(!found.iter().any(|name| name.contains("tool_use")), "{found:?}");

        let another_tokenizer = [("tokenizer.json", "x"), ("tokenizer_config.json", "c")];
        let expected = ["adapter/tokenizer.json", "adapter/tokenizer_config.json", "model/generation_config.json"];
        assert_eq!(companions(&MODEL, &another_tokenizer), expected);
    }
}

//! The arguments of `from_pretrained` that say where the files come from, and the files.

use std::path::{Path, PathBuf};

use rekindle_hub::{AdapterBase, adapter_base, companion_files, companion_name};

use super::Loader;
use crate::Error;
use crate::source::{Fetched, find};

/// Where the files of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The directory of the checkpoint.
    pub model: PathBuf,
    /// That of the adapter, when one was given as the model.
    pub adapter: Option<PathBuf>,
    /// What the user should be told: the hub was out of reach, and the cache was taken instead; the adapter brings a
    /// tokenizer or template that is not the checkpoint's.
    pub notices: Vec<String>,
    /// What the checkpoint was called, and its revision where one was given.
    pub(crate) name: String,
    pub(super) revision: Option<String>,
    /// An adapter that is put on the model beside, or instead of, the one that was given as it.
    pub(super) beside: Option<PathBuf>,
}

impl Files {
    /// A checkpoint and an adapter that lie here.
    pub(crate) fn of(model: &Path, adapter: &Path) -> Self {
        let (model, adapter) = (model.to_owned(), Some(adapter.to_owned()));
        Self { name: model.display().to_string(), model, adapter, notices: Vec::new(), revision: None, beside: None }
    }

    /// Returns the files that a saved model or adapter carries along: tokenizer, chat templates, processors and the
    /// generation configuration.
    ///
    /// Where the adapter brings the tokenizer, files that it lacks come from the checkpoint if they agree with it: other
    /// forms of the vocabulary where `tokenizer.json` is the same, and templates where `tokenizer_config.json` is too.
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

impl Loader {
    /// A branch, tag or commit of a name on the hub. Default `main`. Of an adapter's base, its configuration says it.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.source = self.source.revision(revision);
        self
    }

    /// The token for private and gated repositories ([`Source::token`](crate::Source::token)).
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.source = self.source.token(token);
        self
    }

    /// Where downloads lie ([`Source::cache_dir`](crate::Source::cache_dir)).
    pub fn cache_dir(mut self, cache_dir: impl Into<PathBuf>) -> Self {
        self.source = self.source.cache_dir(cache_dir);
        self
    }

    /// Returns true if the network is left alone ([`Source::local_files_only`](crate::Source::local_files_only)).
    pub fn local_files_only(mut self, local_files_only: bool) -> Self {
        self.source = self.source.local_files_only(local_files_only);
        self
    }

    /// Is told the bytes that are here, and those of all files that are being downloaded, an adapter and its base one
    /// after the other; not called when nothing is.
    pub fn on_download(mut self, on_download: impl FnMut(u64, u64) + 'static) -> Self {
        self.source = self.source.on_download(on_download);
        self
    }

    /// Finds the files, downloading what is missing, once; loading begins with this.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::File`] for what is not there, of the kind
    /// [`ErrorKind::Hub`](crate::ErrorKind::Hub) where a name could not be turned into files; [`Error::AdapterBase`] for
    /// an adapter without its base.
    pub fn fetch(&mut self) -> Result<&Files, Error> {
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

    fn find(&mut self) -> Result<Files, Error> {
        self.check()?;
        let given = self.source.name_or_path.clone();
        let first = self.source.find()?;
        let mut notices: Vec<String> = first.notice.into_iter().collect();
        let Some(base) = adapter_base(&first.path)? else {
            let (name, revision) = (given.display().to_string(), self.source.revision.clone());
            return Ok(Files { model: first.path, adapter: None, notices, name, revision, beside: None });
        };
        let adapter = first.path;
        if self.full_finetuning {
            return Err(Error::Argument(format!(
                "{} is an adapter, and full_finetuning trains a whole model; merge it first, or give its base \
                 ({}) instead",
                given.display(),
                base.name_or_path
            )));
        }
        let name = base_directory(&base, &adapter, first.commit.as_deref(), &mut notices);
        let found = self.source.find_other(&name, base.revision.as_deref());
        let found = found.map_err(|error| Error::AdapterBase { adapter: given, source: Box::new(error) })?;
        notices.extend(found.notice);
        let (name, revision) = (name.display().to_string(), base.revision);
        Ok(Files { model: found.path, adapter: Some(adapter), notices, name, revision, beside: None })
    }

    /// The directories with the configuration of the model, and of the adapter that was given as it; of a name on the hub
    /// the weights stay there.
    pub(super) fn find_config(&self) -> Result<(PathBuf, Option<PathBuf>), Error> {
        self.check()?;
        if let Some(files) = &self.files {
            return Ok((files.model.clone(), files.adapter.clone()));
        }
        let given = &self.source.name_or_path;
        let first = self.source.find_config(given, self.source.revision.as_deref())?;
        let Some(base) = adapter_base(&first)? else { return Ok((first, None)) };
        // An adapter is small, and what it saved is looked at.
        let Fetched { path: first, commit, .. } =
            find(given, self.source.revision.as_deref(), &self.source.access, &mut |_, _| ())?;
        let name = base_directory(&base, &first, commit.as_deref(), &mut Vec::new());
        let found = self.source.find_config(&name, base.revision.as_deref());
        let found = found.map_err(|error| Error::AdapterBase { adapter: given.clone(), source: Box::new(error) })?;
        Ok((found, Some(first)))
    }
}

/// Returns where the base of the adapter in `adapter` is, or what it is called on the hub. A base that lies above the
/// adapter, not where its relative path leads from here, gets a notice. `commit` is that of an adapter from the hub, whose
/// base is on the hub too.
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
        notices.push(format!("the adapter's base model \"{}\" is taken from {}", given.display(), found.display()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A checkpoint and an adapter with these files, and the names of what comes along.
    fn companions(model: &[(&str, &str)], adapter: &[(&str, &str)]) -> Vec<String> {
        let scratch = tempfile::tempdir().unwrap();
        for (dir, files) in [("model", model), ("adapter", adapter)] {
            for (name, text) in files {
                let path = scratch.path().join(dir).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        let files = Files::of(&scratch.path().join("model"), &scratch.path().join("adapter")).companions();
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

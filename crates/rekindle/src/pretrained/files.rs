//! The arguments of `from_pretrained` that say where the files come from, and the files.

use std::path::{Path, PathBuf};

use rekindle_data::companion_files;
use rekindle_hub::adapter_base;

use super::Loader;
use crate::Error;
use crate::source::find;

/// Where the files of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The directory of the checkpoint.
    pub model: PathBuf,
    /// That of the adapter, when one was given as the model.
    pub adapter: Option<PathBuf>,
    /// What the user should be told: the hub was out of reach, and the cache was taken instead.
    pub notices: Vec<String>,
    /// What the checkpoint was called, and its revision where one was given.
    pub(crate) name: String,
    pub(super) revision: Option<String>,
}

impl Files {
    /// A checkpoint and an adapter that lie here.
    pub(crate) fn of(model: &Path, adapter: &Path) -> Self {
        let (model, adapter) = (model.to_owned(), Some(adapter.to_owned()));
        Self { name: model.display().to_string(), model, adapter, notices: Vec::new(), revision: None }
    }

    /// The files that a saved model or adapter carries along: the tokenizer's, and what ends a generation.
    pub(crate) fn companions(&self) -> Vec<PathBuf> {
        let is_generation = |path: &PathBuf| path.ends_with("generation_config.json");
        let mut files = companion_files(self.tokenizer());
        if !files.iter().any(is_generation) {
            files.extend(companion_files(&self.model).into_iter().filter(is_generation));
        }
        files
    }

    /// The directory whose tokenizer is meant: the adapter's, if it has one.
    pub fn tokenizer(&self) -> &Path {
        self.adapter.as_deref().filter(|adapter| adapter.join("tokenizer.json").is_file()).unwrap_or(&self.model)
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

    /// Whether the network is left alone ([`Source::local_files_only`](crate::Source::local_files_only)).
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
            None => self.find()?,
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
            return Ok(Files { model: first.path, adapter: None, notices, name, revision });
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
        let found = self.source.find_other(Path::new(&base.name_or_path), base.revision.as_deref());
        let found = found.map_err(|error| Error::AdapterBase { adapter: given, source: Box::new(error) })?;
        notices.extend(found.notice);
        let (name, revision) = (base.name_or_path, base.revision);
        Ok(Files { model: found.path, adapter: Some(adapter), notices, name, revision })
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
        let first = find(given, self.source.revision.as_deref(), &self.source.access, &mut |_, _| ())?.path;
        let found = self.source.find_config(Path::new(&base.name_or_path), base.revision.as_deref());
        let found = found.map_err(|error| Error::AdapterBase { adapter: given.clone(), source: Box::new(error) })?;
        Ok((found, Some(first)))
    }
}

//! Directories and names on the hub.

use core::fmt;
use std::path::{Path, PathBuf};

use rekindle_hub::CheckpointHeaders;
#[cfg(feature = "network")]
use rekindle_hub::{HubOptions, Resolved};
use rekindle_models::open_checkpoint;
use serde::Deserialize;

use crate::Error;
use crate::gguf_model::{is_gguf, unpacked};

/// A model or an adapter: a directory, a GGUF file, or a name on the Hugging Face hub.
///
/// An existing directory is read in place. A GGUF file is unpacked into a directory in Rekindle's cache, without its weights;
/// any file of a split model will do. `organization/model` is downloaded into the cache that is shared with
/// Python: only missing files, and only weights in safetensors, never pickled ones. `HF_HOME`, `HF_HUB_CACHE`,
/// `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` apply. Without the feature `network`, only directories are supported.
///
/// ```no_run
/// # fn main() -> Result<(), rekindle::Error> {
/// let model = rekindle::ModelSource::new("Qwen/Qwen3-0.6B").revision("main").fetch()?;
/// println!("{} at {:?}", model.path.display(), model.commit);
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is found before `fetch`"]
pub struct ModelSource<'a> {
    pub(crate) name_or_path: PathBuf,
    pub(crate) revision: Option<String>,
    pub(crate) access: HubAccess,
    on_download: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// The files of a [`ModelSource`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchedFiles {
    /// The directory that was given, or one in the cache.
    pub path: PathBuf,
    /// The commit on the hub; `None` for a directory.
    pub commit: Option<String>,
    /// A notice for the user that the hub could not be reached and the cache was used.
    pub notice: Option<String>,
}

/// Access to the hub for models, adapters and datasets. The default follows the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubAccess {
    /// Token for private and gated repositories. Default `HF_TOKEN`, or the login saved by `huggingface-cli`.
    pub token: Option<HubToken>,
    /// Directory for downloads. Default `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// If true, the network is not used. Default false, or `HF_HUB_OFFLINE`.
    pub local_files_only: bool,
}

/// A token of the hub. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct HubToken(String);

impl<S: Into<String>> From<S> for HubToken {
    fn from(token: S) -> Self {
        Self(token.into())
    }
}

impl HubToken {
    /// Returns the token.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for HubToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HubToken(…)")
    }
}

/// A callback for the bytes downloaded so far, and those of all files to download.
pub(crate) type OnDownload<'a> = &'a mut dyn FnMut(u64, u64);

impl<'a> ModelSource<'a> {
    /// Returns the model or adapter with this name or path.
    pub fn new(name_or_path: impl Into<PathBuf>) -> Self {
        Self { name_or_path: name_or_path.into(), revision: None, access: HubAccess::default(), on_download: None }
    }

    /// Sets the branch, tag or commit of a name on the hub. Default `main`.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Sets the token, the cache and the use of the network.
    pub fn hub(mut self, access: HubAccess) -> Self {
        self.access = access;
        self
    }

    /// Sets a callback for the bytes downloaded so far, and those of all files to download. It is not called if there
    /// is nothing to download.
    pub fn on_download(mut self, on_download: impl FnMut(u64, u64) + 'a) -> Self {
        self.on_download = Some(Box::new(on_download));
        self
    }

    /// Finds the files; downloads missing ones.
    ///
    /// # Errors
    /// [`Error::File`]; its [kind](Error::kind) is [`ErrorKind::Hub`](crate::ErrorKind::Hub) if a name could not be
    /// downloaded.
    pub fn fetch(mut self) -> Result<FetchedFiles, Error> {
        let on_download = &mut self.on_download;
        find(&self.name_or_path, self.revision.as_deref(), &self.access, &mut |done, total| {
            if let Some(on_download) = on_download {
                on_download(done, total);
            }
        })
    }
}

/// Finds the files of the directory or name `name`.
#[cfg(feature = "network")]
pub(crate) fn find(
    name: &Path,
    revision: Option<&str>,
    access: &HubAccess,
    on_download: OnDownload<'_>,
) -> Result<FetchedFiles, Error> {
    if is_gguf(name) {
        return Ok(FetchedFiles::directory(&unpacked(name)?));
    }
    let Some(text) = name.to_str() else { return Ok(FetchedFiles::directory(name)) };
    let options = HubOptions { on_progress: Some(Box::new(on_download)), ..access.options(revision) };
    let Resolved { path, commit, notice } = rekindle_hub::resolve(text, options)?;
    Ok(FetchedFiles { path, commit, notice })
}

#[cfg(feature = "network")]
impl HubAccess {
    pub(crate) fn options(&self, revision: Option<&str>) -> HubOptions<'static> {
        HubOptions {
            revision: revision.map(str::to_owned),
            token: self.token.as_ref().map(|token| token.as_str().to_owned()),
            cache_dir: self.cache_dir.clone(),
            local_files_only: self.local_files_only,
            endpoint: None,
            on_progress: None,
        }
    }
}

impl ModelSource<'_> {
    /// Reads the headers of the tensors; also returns a notice for the user.
    pub(crate) fn headers(self) -> Result<(CheckpointHeaders, Option<String>), Error> {
        if is_gguf(&self.name_or_path) {
            return Ok((CheckpointHeaders::of(&open_checkpoint(&unpacked(&self.name_or_path)?)?), None));
        }
        #[cfg(feature = "network")]
        if let Some(name) = self.name_or_path.to_str() {
            let options = self.access.options(self.revision.as_deref());
            let (Resolved { notice, .. }, headers) = rekindle_hub::headers(name, options)?;
            return Ok((headers, notice));
        }
        let FetchedFiles { path, notice, .. } = self.fetch()?;
        Ok((CheckpointHeaders::open(&path)?, notice))
    }
}

/// Finds a directory with the configuration of a model or adapter; does not download the weights of a name on the hub.
pub(crate) fn find_config(name: &Path, revision: Option<&str>, access: &HubAccess) -> Result<PathBuf, Error> {
    #[cfg(feature = "network")]
    if let (Some(text), false) = (name.to_str(), name.exists()) {
        let (Resolved { path, .. }, _) = rekindle_hub::headers(text, access.options(revision))?;
        return Ok(path);
    }
    Ok(find(name, revision, access, &mut |_, _| ())?.path)
}

/// Returns the directory `name`.
#[cfg(not(feature = "network"))]
pub(crate) fn find(name: &Path, _: Option<&str>, _: &HubAccess, _: OnDownload<'_>) -> Result<FetchedFiles, Error> {
    if is_gguf(name) {
        return Ok(FetchedFiles::directory(&unpacked(name)?));
    }
    if name.exists() {
        return Ok(FetchedFiles::directory(name));
    }
    let reason =
        "no such directory, and this build cannot download from the hub; build it with the feature \"network\"";
    Err(rekindle_hub::Error::NotFound { path: name.to_owned(), reason: reason.to_owned() }.into())
}

impl FetchedFiles {
    /// Returns a directory, which is checked when it is opened.
    fn directory(path: &Path) -> Self {
        Self { path: path.to_owned(), commit: None, notice: None }
    }
}

impl fmt::Debug for ModelSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSource")
            .field("name_or_path", &self.name_or_path)
            .field("revision", &self.revision)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn offline(cache_dir: Option<PathBuf>) -> HubAccess {
        HubAccess { cache_dir, local_files_only: true, ..HubAccess::default() }
    }

    #[test]
    fn a_directory_is_taken_as_it_is() {
        let here = ModelSource::new(env!("CARGO_MANIFEST_DIR")).hub(offline(None)).fetch().unwrap();
        assert_eq!(here, FetchedFiles::directory(Path::new(env!("CARGO_MANIFEST_DIR"))));
        let error = ModelSource::new("/no/such/model").fetch().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed, "{error}");
    }

    #[cfg(feature = "network")]
    #[test]
    fn a_name_that_cannot_be_met_is_of_a_kind_of_its_own() {
        let scratch = std::env::temp_dir().join("no-such-cache");
        let error = ModelSource::new("org/model").hub(offline(Some(scratch))).fetch().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hub, "{error}");
        assert!(error.to_string().starts_with("org/model: there is no such directory"), "{error}");
        assert!(error.to_string().contains("local_files_only is set"), "{error}");
        assert_eq!(ModelSource::new("qwen3").fetch().unwrap_err().kind(), ErrorKind::Hub);
    }

    #[test]
    fn shows_no_token() {
        let access = HubAccess { token: Some("hf_secret".into()), ..HubAccess::default() };
        assert!(!format!("{:?}", ModelSource::new("org/model").hub(access)).contains("secret"));
    }
}

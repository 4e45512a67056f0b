//! From a directory or a name on the hub to a directory.

use core::fmt;
use std::path::{Path, PathBuf};

use rekindle_hub::CheckpointHeaders;
#[cfg(feature = "network")]
use rekindle_hub::{HubOptions, Resolved};

use crate::Error;

/// A model or an adapter: a directory, or a name on the Hugging Face hub.
///
/// A directory that exists is taken as it is. `organization/model` becomes a directory in the cache that is shared with
/// Python, after the files that are needed and missing were downloaded: weights in safetensors, never pickled ones.
/// `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are obeyed. Without the feature `network`
/// there are only directories.
///
/// ```no_run
/// # fn main() -> Result<(), rekindle::Error> {
/// let model = rekindle::Source::new("Qwen/Qwen3-0.6B").revision("main").fetch()?;
/// println!("{} at {:?}", model.path.display(), model.commit);
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is looked for before `fetch`"]
pub struct Source<'a> {
    pub(crate) name_or_path: PathBuf,
    pub(crate) revision: Option<String>,
    pub(crate) access: Access,
    on_download: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// Where the files of a [`Source`] are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The directory that was given, or one in the cache.
    pub path: PathBuf,
    /// The commit that was taken from the hub; `None` for a directory.
    pub commit: Option<String>,
    /// What the user should be told: the hub was out of reach, and the cache was taken instead.
    pub notice: Option<String>,
}

/// How the hub is asked, whatever it is asked for.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) token: Option<String>,
    pub(crate) cache_dir: Option<PathBuf>,
    pub(crate) local_files_only: bool,
}

/// Told the bytes that are here, and those of all files that are being downloaded.
pub(crate) type OnDownload<'a> = &'a mut dyn FnMut(u64, u64);

impl<'a> Source<'a> {
    /// The model or adapter that is called so, or lies there.
    pub fn new(name_or_path: impl Into<PathBuf>) -> Self {
        Self { name_or_path: name_or_path.into(), revision: None, access: Access::default(), on_download: None }
    }

    /// A branch, tag or commit of a name on the hub. Default `main`.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// The token for private and gated repositories. Default `HF_TOKEN`, or what `huggingface-cli login` left.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.access.token = Some(token.into());
        self
    }

    /// Where downloads lie. Default `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
    pub fn cache_dir(mut self, cache_dir: impl Into<PathBuf>) -> Self {
        self.access.cache_dir = Some(cache_dir.into());
        self
    }

    /// Returns true if the network is left alone. Default false, or what `HF_HUB_OFFLINE` says.
    pub fn local_files_only(mut self, local_files_only: bool) -> Self {
        self.access.local_files_only = local_files_only;
        self
    }

    /// Is told the bytes that are here, and those of all files that are being downloaded; not called when nothing is.
    pub fn on_download(mut self, on_download: impl FnMut(u64, u64) + 'a) -> Self {
        self.on_download = Some(Box::new(on_download));
        self
    }

    /// Finds the files, downloading what is missing.
    ///
    /// # Errors
    /// [`Error::File`]; its [kind](Error::kind) is [`ErrorKind::Hub`](crate::ErrorKind::Hub) where a name could not be
    /// turned into files.
    pub fn fetch(mut self) -> Result<Fetched, Error> {
        self.find()
    }

    /// As [`fetch`](Self::fetch), for more to come.
    pub(crate) fn find(&mut self) -> Result<Fetched, Error> {
        let (name, revision) = (self.name_or_path.clone(), self.revision.clone());
        self.find_other(&name, revision.as_deref())
    }

    /// Something else, looked for in the same way.
    pub(crate) fn find_other(&mut self, name: &Path, revision: Option<&str>) -> Result<Fetched, Error> {
        let on_download = &mut self.on_download;
        find(name, revision, &self.access, &mut |done, total| {
            if let Some(on_download) = on_download {
                on_download(done, total);
            }
        })
    }
}

/// The directory of what is called, or lies at, `name`.
#[cfg(feature = "network")]
pub(crate) fn find(
    name: &Path,
    revision: Option<&str>,
    access: &Access,
    on_download: OnDownload<'_>,
) -> Result<Fetched, Error> {
    let Some(text) = name.to_str() else { return Ok(Fetched::directory(name)) };
    let options = HubOptions { on_progress: Some(Box::new(on_download)), ..access.options(revision) };
    let Resolved { path, commit, notice } = rekindle_hub::resolve(text, options)?;
    Ok(Fetched { path, commit, notice })
}

#[cfg(feature = "network")]
impl Access {
    fn options(&self, revision: Option<&str>) -> HubOptions<'static> {
        HubOptions {
            revision: revision.map(str::to_owned),
            token: self.token.clone(),
            cache_dir: self.cache_dir.clone(),
            local_files_only: self.local_files_only,
            endpoint: None,
            on_progress: None,
        }
    }
}

impl Source<'_> {
    /// What the tensors are, and what the user should be told.
    pub(crate) fn headers(self) -> Result<(CheckpointHeaders, Option<String>), Error> {
        #[cfg(feature = "network")]
        if let Some(name) = self.name_or_path.to_str() {
            let options = self.access.options(self.revision.as_deref());
            let (Resolved { notice, .. }, headers) = rekindle_hub::headers(name, options)?;
            return Ok((headers, notice));
        }
        let Fetched { path, notice, .. } = self.fetch()?;
        Ok((CheckpointHeaders::open(&path)?, notice))
    }
}

impl Source<'_> {
    /// A directory with the configuration of something that is looked for in the same way; of a name on the hub the
    /// weights stay there.
    pub(crate) fn find_config(&self, name: &Path, revision: Option<&str>) -> Result<PathBuf, Error> {
        #[cfg(feature = "network")]
        if let (Some(text), false) = (name.to_str(), name.exists()) {
            let (Resolved { path, .. }, _) = rekindle_hub::headers(text, self.access.options(revision))?;
            return Ok(path);
        }
        Ok(find(name, revision, &self.access, &mut |_, _| ())?.path)
    }
}

/// The directory `name`.
#[cfg(not(feature = "network"))]
pub(crate) fn find(name: &Path, _: Option<&str>, _: &Access, _: OnDownload<'_>) -> Result<Fetched, Error> {
    if name.exists() {
        return Ok(Fetched::directory(name));
    }
    let reason =
        "there is no such directory, and this program was built without names on the hub (the feature network)";
    Err(rekindle_hub::Error::NotFound { path: name.to_owned(), reason: reason.to_owned() }.into())
}

impl Fetched {
    /// For whoever opens it to say what is wrong with it.
    fn directory(path: &Path) -> Self {
        Self { path: path.to_owned(), commit: None, notice: None }
    }
}

impl fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("name_or_path", &self.name_or_path)
            .field("revision", &self.revision)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Access {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("cache_dir", &self.cache_dir)
            .field("local_files_only", &self.local_files_only)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_directory_is_taken_as_it_is() {
        let here = Source::new(env!("CARGO_MANIFEST_DIR")).local_files_only(true).fetch().unwrap();
        assert_eq!(here, Fetched::directory(Path::new(env!("CARGO_MANIFEST_DIR"))));
        let error = Source::new("/no/such/model").fetch().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed, "{error}");
    }

    #[cfg(feature = "network")]
    #[test]
    fn a_name_that_cannot_be_met_is_of_a_kind_of_its_own() {
        let scratch = std::env::temp_dir().join("no-such-cache");
        let error = Source::new("org/model").cache_dir(scratch).local_files_only(true).fetch().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hub, "{error}");
        assert!(error.to_string().starts_with("org/model: there is no such directory"), "{error}");
        assert!(error.to_string().contains("local_files_only is set"), "{error}");
        assert_eq!(Source::new("qwen3").fetch().unwrap_err().kind(), ErrorKind::Hub);
    }

    #[test]
    fn shows_no_token() {
        assert!(!format!("{:?}", Source::new("org/model").token("hf_secret")).contains("secret"));
    }
}

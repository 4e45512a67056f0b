//! Resolution of names on the Hugging Face hub to directories.

mod api;
mod checksum;
mod download;
mod environment;
mod failure;
mod fetch;
mod layout;
mod name;
mod select;
mod space;
mod split;
mod upload;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::checkpoint::check_directory;
use crate::{CheckpointHeaders, Error, HubErrorKind};

use failure::Request;
use name::{RepoKind, RepoName};

pub(crate) use environment::Environment;
pub(crate) use layout::{CachedRepo, INCOMPLETE};
pub use split::DatasetPart;
pub use upload::{UploadContent, UploadFile, UploadOptions, Uploaded, check_upload, upload};

/// Options for resolving a hub name. Unset options follow the environment, as in Python's `huggingface_hub`.
#[derive(Default)]
pub struct HubOptions<'a> {
    /// The branch, tag or commit. Default: `main`.
    pub revision: Option<String>,
    /// The access token. Default: `HF_TOKEN`, or the content of the file `HF_TOKEN_PATH` or `token` in `HF_HOME`.
    pub token: Option<String>,
    /// The cache directory. Default: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// If true, the network is not used. Default: false, or the value of `HF_HUB_OFFLINE`.
    pub local_files_only: bool,
    /// The address of the hub. Default: `HF_ENDPOINT`, or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Called with the bytes present and the total bytes of all files to download. Not called when nothing needs to be
    /// downloaded.
    pub on_progress: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// A resolved name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The given directory, or a snapshot in the cache.
    pub path: PathBuf,
    /// The commit of the snapshot; `None` for a directory.
    pub commit: Option<String>,
    /// A message for the user: the hub was unreachable and the cache was used.
    pub notice: Option<String>,
}

/// The default revision.
const MAIN: &str = "main";

/// Resolves `name` to a directory that contains a model or an adapter.
///
/// An existing directory is returned as is. `organization/model` is resolved to its snapshot in the cache shared with
/// Python, after downloading missing files: configuration, tokenizer, chat template, and weights in safetensors, never
/// pickled ones. Files are downloaded in parallel, interrupted downloads resume, and every file is verified against the
/// hub's checksum. If the hub is unreachable and the cache has a snapshot, the snapshot is returned with a notice.
///
/// ```no_run
/// use rekindle_hub::{Checkpoint, HubOptions, resolve};
///
/// # fn main() -> Result<(), rekindle_hub::Error> {
/// let options = HubOptions {
///     on_progress: Some(Box::new(|done, total| eprint!("\r{done} of {total} bytes"))),
///     ..HubOptions::default()
/// };
/// let model = resolve("unsloth/Qwen3-4B-Thinking-2507", options)?;
/// let checkpoint = Checkpoint::open(&model.path)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Hub`], whose kind describes the failure; [`Error::NotFound`] for a path that is not a directory;
/// [`Error::Io`] if the cache is not writable.
pub fn resolve(name: &str, options: HubOptions<'_>) -> Result<Resolved, Error> {
    match locate(name, &options)? {
        Location::Local(found) => Ok(found.resolved),
        Location::Hub { request, repo, token } => {
            let found = download::download(request, repo, token, RequiredFiles::Model, options.on_progress);
            Ok(found.map_err(|error| no_directory(name, error))?.resolved)
        }
    }
}

/// Reads the headers of the weights of `name`. For a hub name the weights are not downloaded, but read from the cache
/// if they are there. `path` of the result contains the configuration.
///
/// # Errors
/// The errors of [`resolve`] and [`CheckpointHeaders::open`].
pub fn headers(name: &str, options: HubOptions<'_>) -> Result<(Resolved, CheckpointHeaders), Error> {
    match locate(name, &options)? {
        Location::Local(Snapshot { resolved, .. }) => {
            let headers = CheckpointHeaders::open(&resolved.path)?;
            Ok((resolved, headers))
        }
        Location::Hub { request, repo, token } => {
            download::describe(request, repo, token).map_err(|error| no_directory(name, error))
        }
    }
}

/// The location of a name's files.
enum Location {
    /// A directory: the given one, or one in the cache.
    Local(Snapshot),
    /// The hub, which must be queried.
    Hub { request: Request, repo: CachedRepo, token: Option<String> },
}

fn locate(name: &str, options: &HubOptions<'_>) -> Result<Location, Error> {
    let directory = Path::new(name);
    if directory.exists() || is_path(name) {
        check_directory(directory)?;
        let resolved = Resolved { path: directory.to_path_buf(), commit: None, notice: None };
        return Ok(Location::Local(Snapshot { resolved, files: Vec::new() }));
    }
    let repo = RepoName::parse(RepoKind::Model, name)?;
    find(repo, options, &RequiredFiles::Model).map_err(|error| no_directory(name, error))
}

/// Adds to the error of a failed lookup that `name` is not a directory either, because it may be a mistyped path. If the
/// parent directory exists, the error is about a path.
fn no_directory(name: &str, error: Error) -> Error {
    let Error::Hub { kind, name: asked, reason } = error else { return error };
    let unreachable = matches!(kind, HubErrorKind::Network | HubErrorKind::Offline);
    if !unreachable && !reason.contains(failure::NO_SUCH_MODEL) {
        return Error::Hub { kind, name: asked, reason };
    }
    let parent = Path::new(name).parent().filter(|parent| parent.is_dir() && !parent.as_os_str().is_empty());
    match parent {
        Some(parent) => Error::NotFound {
            path: name.into(),
            reason: format!("there is no such directory in {parent:?}; as a name on the hub: {reason}"),
        },
        None => Error::Hub {
            kind,
            name: asked,
            reason: format!("there is no such directory; as a name on the hub: {reason}"),
        },
    }
}

/// The files of a split of a dataset repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRows {
    /// The files of the split, sorted by name.
    pub files: Vec<PathBuf>,
    /// The commit of the files.
    pub commit: Option<String>,
    /// A message for the user: the hub was unreachable and the cache was used.
    pub notice: Option<String>,
}

/// Resolves the name of a dataset repository, `organization/name`, to the files of one split.
///
/// Parquet files are preferred over JSON and JSON Lines. Files are downloaded to the shared cache in the same way as
/// those of models ([`resolve`]). The rows of a dataset with a Python loading script are in the revision
/// `refs/convert/parquet`.
///
/// # Errors
/// [`Error::Hub`], whose kind describes the failure, such as [`HubErrorKind::Rows`] for a missing split, subset or
/// rows; [`Error::Io`] if the cache is not writable.
pub fn resolve_rows(name: &str, part: &DatasetPart, options: HubOptions<'_>) -> Result<ResolvedRows, Error> {
    let name = RepoName::parse(RepoKind::Dataset, name)?;
    let wanted = RequiredFiles::Rows(part.clone());
    let Snapshot { resolved, files } = match find(name, &options, &wanted)? {
        Location::Local(found) => found,
        Location::Hub { request, repo, token } => {
            download::download(request, repo, token, wanted, options.on_progress)?
        }
    };
    let Resolved { path, commit, notice } = resolved;
    Ok(ResolvedRows { files: files.iter().map(|file| path.join(file)).collect(), commit, notice })
}

/// The required files of a repository.
#[derive(Clone, Debug)]
pub(crate) enum RequiredFiles {
    Model,
    Rows(DatasetPart),
}

/// A snapshot with the required files.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) resolved: Resolved,
    /// For a dataset, the files of the split.
    pub(crate) files: Vec<String>,
}

/// Decides whether the cache suffices for the required files or the hub must be queried.
fn find(name: RepoName, options: &HubOptions<'_>, wanted: &RequiredFiles) -> Result<Location, Error> {
    let environment = Environment::read();
    let token = options.token.clone().or(environment.token);
    let endpoint = options.endpoint.as_deref().map(|given| given.trim_end_matches('/').to_owned());
    let request = Request {
        endpoint: endpoint.unwrap_or(environment.endpoint),
        revision: options.revision.clone().unwrap_or_else(|| MAIN.to_owned()),
        has_token: token.is_some(),
        name,
    };
    if !layout::stays_below(&request.revision) {
        let reason = format!("revision {:?} is not a valid branch, tag or commit", request.revision);
        return Err(request.error(HubErrorKind::Name, reason));
    }
    let cache_dir = options.cache_dir.as_ref().unwrap_or(&environment.cache_dir);
    let repo = CachedRepo::new(cache_dir, &request.name.folder());
    let offline = if options.local_files_only { Some("local_files_only") } else { environment.offline };
    if let Some(reason) = offline {
        return cached(&request, &repo, wanted).map(Location::Local).map_err(|state| {
            let revision = &request.revision;
            let reason = format!("{state} (revision {revision:?}) and {reason} is set; unset it to download");
            request.error(HubErrorKind::Offline, reason)
        });
    }
    // Only the hub knows which files a dataset has: the cache may contain only part of a split.
    if layout::is_commit(&request.revision)
        && matches!(wanted, RequiredFiles::Model)
        && let Ok(found) = cached(&request, &repo, wanted)
    {
        return Ok(Location::Local(found));
    }
    Ok(Location::Hub { request, repo, token })
}

/// Returns true if `name` can only be a path: a name on the hub has one slash, between two words.
fn is_path(name: &str) -> bool {
    Path::new(name).is_absolute()
        || name.starts_with(['.', '~'])
        || name.contains('\\')
        || name.ends_with('/')
        || name.matches('/').count() > 1
}

/// Returns the cached snapshot if it is complete; otherwise describes what is missing.
fn cached(request: &Request, repo: &CachedRepo, wanted: &RequiredFiles) -> Result<Snapshot, String> {
    let snapshot = repo.commit_of(&request.revision).map(|commit| (repo.snapshot(&commit), commit));
    let Some((path, commit)) = snapshot.filter(|(path, _)| path.is_dir()) else {
        return Err(format!("the cache has no {:?}", repo.path()));
    };
    let files = match wanted {
        RequiredFiles::Model => match layout::lacks(&path) {
            Some(missing) => Err(format!("its snapshot {path:?} lacks {missing}")),
            None => Ok(Vec::new()),
        },
        RequiredFiles::Rows(part) => {
            part.select(&layout::names(&path)).and_then(|files| match split::missing_piece(&files) {
                Some(missing) => Err(format!("its snapshot {path:?} lacks {missing}")),
                None => Ok(files),
            })
        }
    };
    Ok(Snapshot { files: files?, resolved: Resolved { path, commit: Some(commit), notice: None } })
}

impl fmt::Debug for HubOptions<'_> {
    /// Omits the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("cache_dir", &self.cache_dir)
            .field("local_files_only", &self.local_files_only)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_directory_is_returned_as_is() {
        let scratch = tempfile::tempdir().unwrap();
        let resolved = resolve(scratch.path().to_str().unwrap(), HubOptions::default()).unwrap();
        assert_eq!(resolved, Resolved { path: scratch.path().to_path_buf(), commit: None, notice: None });
    }

    #[test]
    fn the_hub_is_not_queried_for_a_path() {
        for path in ["/no/such/model", "./runs/1", "../model", "~/model", "runs/model/", r"C:\model", "no/such/model"] {
            let error = resolve(path, HubOptions::default()).unwrap_err();
            assert!(matches!(error, Error::NotFound { .. }), "{error}");
        }
        let error = resolve("Cargo.toml", HubOptions::default()).unwrap_err();
        assert!(error.to_string().contains("it is a file"), "{error}");
    }

    #[test]
    fn a_mistyped_path_is_said_to_be_one() {
        let offline = |name: &str| {
            let cache_dir = Some(PathBuf::from("/no/such/cache"));
            resolve(name, HubOptions { cache_dir, local_files_only: true, ..HubOptions::default() }).unwrap_err()
        };
        let error = offline("src/modle");
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
        let expected = "no checkpoint at \"src/modle\": there is no such directory in \"src\"; as a name on the hub: ";
        assert!(error.to_string().starts_with(expected), "{error}");
        let error = offline("org/model");
        assert_eq!(error.hub_kind(), Some(HubErrorKind::Offline));
        assert!(
            error.to_string().starts_with("org/model: there is no such directory; as a name on the hub: the cache"),
            "{error}"
        );
        let error = offline("~/model");
        assert!(error.to_string().contains("write the home directory out"), "{error}");
    }

    #[test]
    fn a_revision_outside_the_cache_is_refused() {
        let options = HubOptions { revision: Some("../../x".to_owned()), ..HubOptions::default() };
        let error = resolve("org/model", options).unwrap_err();
        assert_eq!(error.hub_kind(), Some(HubErrorKind::Name), "{error}");
    }

    #[test]
    fn the_token_is_not_shown() {
        let options = HubOptions { token: Some("hf_secret".to_owned()), ..HubOptions::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}

//! Names on the Hugging Face hub, turned into directories.

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

use std::fmt;
use std::path::{Path, PathBuf};

use crate::checkpoint::check_directory;
use crate::{Error, Headers, HubErrorKind};

use failure::Request;
use name::{RepoKind, RepoName};

pub(crate) use environment::Environment;
pub(crate) use layout::{CachedRepo, INCOMPLETE};
pub use split::DatasetPart;

/// How a name on the hub is resolved. What is left out follows the environment, as in Python's
/// `huggingface_hub`.
#[derive(Default)]
pub struct HubOptions<'a> {
    /// A branch, tag or commit. Default `main`.
    pub revision: Option<String>,
    /// Default `HF_TOKEN`, or what the file `HF_TOKEN_PATH` or `token` in `HF_HOME` holds.
    pub token: Option<String>,
    /// Default `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Whether the network is left alone. Default false, or what `HF_HUB_OFFLINE` says.
    pub local_files_only: bool,
    /// Where the hub is. Default `HF_ENDPOINT`, or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Is told the bytes that are here, and those of all files that are being downloaded; not
    /// called when nothing is.
    pub on_progress: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// Where the files of a name are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The directory that was given, or a snapshot in the cache.
    pub path: PathBuf,
    /// The commit that the snapshot is of; `None` for a directory.
    pub commit: Option<String>,
    /// What the user should be told: the hub was out of reach, and the cache was taken instead.
    pub notice: Option<String>,
}

/// The revision that is meant when none is given.
const MAIN: &str = "main";

/// Turns `name` into a directory with a model or an adapter.
///
/// A directory stays what it is. `organization/model` becomes its snapshot in the cache that is
/// shared with Python, after the files that are needed and missing were downloaded: configuration,
/// tokenizer, chat template, and weights in safetensors, never pickled ones. Several files come at
/// once; an interrupted download goes on where it ended; every file is held against the checksum
/// that the hub gives. When the hub is out of reach and the cache has a snapshot, that is taken,
/// with a notice.
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
/// [`Error::Hub`], whose kind says what stands in the way; [`Error::NotFound`] for a path that is
/// no directory; [`Error::Io`] for a cache that cannot be written.
pub fn resolve(name: &str, options: HubOptions<'_>) -> Result<Resolved, Error> {
    match place(name, &options)? {
        Place::Here(found) => Ok(found.resolved),
        Place::Hub { request, repo, token } => {
            let found = download::download(request, repo, token, Wanted::Model, options.on_progress);
            Ok(found.map_err(|error| no_directory(name, error))?.resolved)
        }
    }
}

/// What the tensors of `name` are, as the headers of its weights say it; of a name on the hub the weights stay there,
/// unless the cache has them. `path` of the result holds its configuration.
///
/// # Errors
/// Those of [`resolve`], and of [`Headers::open`].
pub fn headers(name: &str, options: HubOptions<'_>) -> Result<(Resolved, Headers), Error> {
    match place(name, &options)? {
        Place::Here(Found { resolved, .. }) => {
            let headers = Headers::open(&resolved.path)?;
            Ok((resolved, headers))
        }
        Place::Hub { request, repo, token } => {
            download::describe(request, repo, token).map_err(|error| no_directory(name, error))
        }
    }
}

/// Where a name leads to.
enum Place {
    /// A directory, the one that was given or one of the cache.
    Here(Found),
    /// The hub, which is asked first.
    Hub { request: Request, repo: CachedRepo, token: Option<String> },
}

fn place(name: &str, options: &HubOptions<'_>) -> Result<Place, Error> {
    let directory = Path::new(name);
    if directory.exists() || is_path(name) {
        check_directory(directory)?;
        let resolved = Resolved { path: directory.to_path_buf(), commit: None, notice: None };
        return Ok(Place::Here(Found { resolved, files: Vec::new() }));
    }
    let repo = RepoName::parse(RepoKind::Model, name)?;
    find(repo, options, &Wanted::Model).map_err(|error| no_directory(name, error))
}

/// Adds to an error about a name that the hub does not have, or could not be asked for, that it is no directory either: it
/// may be a mistyped path. If the directory that it would be in exists, the error is about a path.
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

/// Rows of a dataset repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRows {
    /// The files of the split, sorted by name.
    pub files: Vec<PathBuf>,
    /// The commit that they are of.
    pub commit: Option<String>,
    /// What the user should be told: the hub was out of reach, and the cache was taken instead.
    pub notice: Option<String>,
}

/// Turns the name of a dataset repository, `organization/name`, into the files of one split.
///
/// Parquet is taken where there is some, else JSON and JSON lines. They come, and lie in the shared cache, as those of
/// models do ([`resolve`]); a dataset of Python's loading scripts has its rows in the revision `refs/convert/parquet`.
///
/// # Errors
/// [`Error::Hub`], whose kind says what stands in the way: [`HubErrorKind::Rows`] for a split, a subset or rows that the
/// repository does not have; [`Error::Io`] for a cache that cannot be written.
pub fn resolve_rows(name: &str, part: &DatasetPart, options: HubOptions<'_>) -> Result<ResolvedRows, Error> {
    let name = RepoName::parse(RepoKind::Dataset, name)?;
    let wanted = Wanted::Rows(part.clone());
    let Found { resolved, files } = match find(name, &options, &wanted)? {
        Place::Here(found) => found,
        Place::Hub { request, repo, token } => download::download(request, repo, token, wanted, options.on_progress)?,
    };
    let Resolved { path, commit, notice } = resolved;
    Ok(ResolvedRows { files: files.iter().map(|file| path.join(file)).collect(), commit, notice })
}

/// What of a repository is needed.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    Model,
    Rows(DatasetPart),
}

/// A snapshot with what is needed in it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) resolved: Resolved,
    /// Of a dataset, the files of the split.
    pub(crate) files: Vec<String>,
}

/// Whether the cache does for what is `wanted` of a repository, or the hub is to be asked.
fn find(name: RepoName, options: &HubOptions<'_>, wanted: &Wanted) -> Result<Place, Error> {
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
        let reason = format!("revision {:?} is neither a branch, a tag nor a commit", request.revision);
        return Err(request.error(HubErrorKind::Name, reason));
    }
    let cache_dir = options.cache_dir.as_ref().unwrap_or(&environment.cache_dir);
    let repo = CachedRepo::new(cache_dir, &request.name.folder());
    let offline = if options.local_files_only { Some("local_files_only") } else { environment.offline };
    if let Some(reason) = offline {
        return cached(&request, &repo, wanted).map(Place::Here).map_err(|state| {
            let revision = &request.revision;
            let reason = format!("{state} (revision {revision:?}) and {reason} is set; unset it to download");
            request.error(HubErrorKind::Offline, reason)
        });
    }
    // Which files a dataset has, only the hub knows: a part of a split may be in the cache.
    if layout::is_commit(&request.revision)
        && matches!(wanted, Wanted::Model)
        && let Ok(found) = cached(&request, &repo, wanted)
    {
        return Ok(Place::Here(found));
    }
    Ok(Place::Hub { request, repo, token })
}

/// Returns whether `name` can only be meant as a path: a name on the hub has one slash, between two words.
fn is_path(name: &str) -> bool {
    Path::new(name).is_absolute()
        || name.starts_with(['.', '~'])
        || name.contains('\\')
        || name.ends_with('/')
        || name.matches('/').count() > 1
}

/// The snapshot that the cache has, if it can be loaded; otherwise what the cache has instead.
fn cached(request: &Request, repo: &CachedRepo, wanted: &Wanted) -> Result<Found, String> {
    let snapshot = repo.commit_of(&request.revision).map(|commit| (repo.snapshot(&commit), commit));
    let Some((path, commit)) = snapshot.filter(|(path, _)| path.is_dir()) else {
        return Err(format!("the cache has no {:?}", repo.path()));
    };
    let files = match wanted {
        Wanted::Model => match layout::lacks(&path) {
            Some(missing) => Err(format!("its snapshot {path:?} lacks {missing}")),
            None => Ok(Vec::new()),
        },
        Wanted::Rows(part) => part.select(&layout::names(&path)).and_then(|files| match split::missing_piece(&files) {
            Some(missing) => Err(format!("its snapshot {path:?} lacks {missing}")),
            None => Ok(files),
        }),
    };
    Ok(Found { files: files?, resolved: Resolved { path, commit: Some(commit), notice: None } })
}

impl fmt::Debug for HubOptions<'_> {
    /// Without the token.
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
    fn a_directory_stays_what_it_is() {
        let scratch = tempfile::tempdir().unwrap();
        let resolved = resolve(scratch.path().to_str().unwrap(), HubOptions::default()).unwrap();
        assert_eq!(resolved, Resolved { path: scratch.path().to_path_buf(), commit: None, notice: None });
    }

    #[test]
    fn a_path_is_not_asked_of_the_hub() {
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
    fn refuses_a_revision_that_leaves_the_cache() {
        let options = HubOptions { revision: Some("../../x".to_owned()), ..HubOptions::default() };
        let error = resolve("org/model", options).unwrap_err();
        assert_eq!(error.hub_kind(), Some(HubErrorKind::Name), "{error}");
    }

    #[test]
    fn shows_no_token() {
        let options = HubOptions { token: Some("hf_secret".to_owned()), ..HubOptions::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}

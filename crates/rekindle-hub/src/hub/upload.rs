//! Uploads of files to a repository of the hub.

mod commit;
mod large_files;

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use crate::{Error, HubErrorKind};

use super::MAIN;
use super::api::{Api, refusal};
use super::checksum::Hasher;
use super::environment::Environment;
use super::failure::{DELAYS, FIRST_DELAYS, Failure, Refusal, Request, retry};
use super::name::{RepoKind, RepoName};

/// A file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadFile {
    /// The path in the repository, with `/` between folders.
    pub path: String,
    /// The contents.
    pub content: UploadContent,
}

/// The contents of a file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UploadContent {
    /// The contents of a file on disk.
    File(PathBuf),
    /// The given bytes.
    Bytes(Vec<u8>),
}

/// Options of [`upload`]. Unset options follow the environment, as in Python's `huggingface_hub`.
#[derive(Default)]
pub struct UploadOptions<'a> {
    /// The access token, which must have write permission. Default: as in [`HubOptions`](crate::HubOptions).
    pub token: Option<String>,
    /// The address of the hub. Default: `HF_ENDPOINT`, or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// If true, the repository is created as a private one, and a public repository is refused.
    pub private: bool,
    /// The message of the commit.
    pub message: String,
    /// Called with the bytes of large files sent so far and in total.
    pub on_progress: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// A finished upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The page of the repository.
    pub url: String,
    /// The commit with the files.
    pub commit: String,
    /// True if the repository was created.
    pub created: bool,
    /// Paths that the commit added or changed.
    pub changed: Vec<String>,
    /// Paths whose contents were already there.
    pub unchanged: Vec<String>,
    /// Paths that the repository's `.gitignore` excludes; they were not uploaded.
    pub ignored: Vec<String>,
}

/// Checks what can be checked before an upload without a request: the name, the presence of a token, and that the network
/// is not disabled.
///
/// # Errors
/// [`Error::Hub`], as [`upload`].
pub fn check_upload(name: &str, options: &UploadOptions<'_>) -> Result<(), Error> {
    connect(name, options).map(drop)
}

/// Uploads files in one commit to the branch `main` of the model repository `name`, which is created if it does not
/// exist. Files already in the repository are kept unless they have the same path.
///
/// Contents that the hub already has are not sent again, so that a repeated upload continues an interrupted one. The
/// commit comes last: until then the repository is unchanged.
///
/// # Errors
/// [`Error::Hub`]; its kind is [`HubErrorKind::Denied`] for a missing token or one without write permission,
/// [`HubErrorKind::Public`] if a private upload would go to a public repository. [`Error::Io`] if a file cannot be read.
pub fn upload(name: &str, files: &[UploadFile], options: UploadOptions<'_>) -> Result<Uploaded, Error> {
    let api = connect(name, &options)?;
    let mut pending = files.iter().map(PendingFile::new).collect::<Result<Vec<_>, Error>>()?;
    let created = create(&api, options.private)?;
    for chunk in pending.chunks_mut(CHUNK) {
        retry(&DELAYS, || classify(&api, chunk))?;
    }
    let ignored = pending.extract_if(.., |file| file.is_ignored).map(|file| file.path().to_owned()).collect();
    for file in &mut pending {
        file.hash()?;
    }
    let unchanged = pending.extract_if(.., |file| file.is_unchanged()).map(|file| file.path().to_owned()).collect();
    let url = api.request().page();
    if pending.is_empty() {
        let commit = retry(&DELAYS, || api.files())?.0;
        return Ok(Uploaded { url, commit, created, changed: Vec::new(), unchanged, ignored });
    }
    let large: Vec<&PendingFile<'_>> = pending.iter().filter(|file| file.is_large).collect();
    large_files::send(&api, &large, options.on_progress)?;
    let commit = commit::commit(&api, &pending, &options.message)?;
    let changed = pending.iter().map(|file| file.path().to_owned()).collect();
    Ok(Uploaded { url, commit, created, changed, unchanged, ignored })
}

/// The maximum number of files of a request, as in `huggingface_hub`.
const CHUNK: usize = 256;

/// The number of bytes by which the hub recognizes a binary file.
const SAMPLE: u64 = 512;

/// A file of an upload in progress.
#[derive(Debug)]
struct PendingFile<'a> {
    file: &'a UploadFile,
    size: u64,
    /// True if the file goes to large-file storage.
    is_large: bool,
    is_ignored: bool,
    /// The hash of the file of the same path in the repository.
    remote: Option<String>,
    /// SHA-256 of a large file, and git's blob id of another one.
    hash: String,
}

impl<'a> PendingFile<'a> {
    fn new(file: &'a UploadFile) -> Result<Self, Error> {
        let size = match &file.content {
            UploadContent::File(path) => std::fs::metadata(path).map_err(Error::io(path))?.len(),
            UploadContent::Bytes(bytes) => bytes.len() as u64,
        };
        Ok(Self { file, size, is_large: false, is_ignored: false, remote: None, hash: String::new() })
    }

    fn path(&self) -> &'a str {
        &self.file.path
    }

    /// Opens the contents from the offset `start`.
    fn open(&self, start: u64) -> Result<Box<dyn Read + 'a>, Error> {
        Ok(match &self.file.content {
            UploadContent::File(path) => {
                let mut file = File::open(path).map_err(Error::io(path))?;
                file.seek(SeekFrom::Start(start)).map_err(Error::io(path))?;
                Box::new(file)
            }
            UploadContent::Bytes(bytes) => {
                let mut bytes = Cursor::new(bytes.as_slice());
                bytes.set_position(start);
                Box::new(bytes)
            }
        })
    }

    /// Reads up to `length` bytes from the beginning.
    fn read(&self, length: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.open(0)?.take(length).read_to_end(&mut bytes).map_err(|error| self.unreadable(error))?;
        Ok(bytes)
    }

    fn hash(&mut self) -> Result<(), Error> {
        let mut hasher = if self.is_large { Hasher::sha256() } else { Hasher::git_blob(self.size) };
        hasher.update_from(&mut self.open(0)?).map_err(|error| self.unreadable(error))?;
        self.hash = hasher.finish();
        Ok(())
    }

    fn is_unchanged(&self) -> bool {
        self.remote.as_ref() == Some(&self.hash)
    }

    fn unreadable(&self, source: io::Error) -> Error {
        let path = match &self.file.content {
            UploadContent::File(path) => path,
            UploadContent::Bytes(_) => Path::new(self.path()),
        };
        Error::io(path)(source)
    }
}

/// Checks the name, the token and the use of the network.
fn connect(name: &str, options: &UploadOptions<'_>) -> Result<Api, Error> {
    let name = RepoName::parse(RepoKind::Model, name).map_err(|error| match error {
        Error::Hub { kind, name, reason } => {
            // The name cannot be a directory here.
            let reason = reason.trim_start_matches("there is no such directory, and ").to_owned();
            Error::Hub { kind, name, reason }
        }
        error => error,
    })?;
    let environment = Environment::read();
    let token = options.token.clone().or(environment.token);
    let endpoint = options.endpoint.as_deref().map(|given| given.trim_end_matches('/').to_owned());
    let request = Request {
        endpoint: endpoint.unwrap_or(environment.endpoint),
        revision: MAIN.to_owned(),
        has_token: token.is_some(),
        name,
    };
    if let Some(variable) = environment.offline {
        return Err(request.error(HubErrorKind::Offline, format!("{variable} is set; unset it to upload")));
    }
    if token.is_none() {
        let endpoint = &request.endpoint;
        let reason = format!(
            "an upload needs a token; create one with write permission at {endpoint}/settings/tokens and set HF_TOKEN"
        );
        return Err(request.error(HubErrorKind::Denied, reason));
    }
    Api::new(request, token)
}

/// The visibility of a repository.
#[derive(Deserialize)]
struct Visibility {
    private: bool,
}

/// Creates the repository if it does not exist; returns true if it did not. A public repository is refused for a
/// private upload.
fn create(api: &Api, private: bool) -> Result<bool, Error> {
    let Request { name: RepoName { organization, name, .. }, endpoint, .. } = api.request();
    let mut body = json!({ "name": name, "organization": organization, "type": "model" });
    if private {
        body["private"] = true.into();
    }
    let path = format!("models/{organization}/{name}");
    let created = retry(&FIRST_DELAYS, || {
        let answer = api.post(&format!("{endpoint}/api/repos/create"), JSON, body.to_string().as_bytes())?;
        match answer.status().as_u16() {
            200..300 => Ok(true),
            409 => Ok(false),
            // A token may write to one repository without the permission to create others.
            403 if api.json::<Visibility>(&path).is_ok() => Ok(false),
            _ => Err(refused(api.request(), &refusal(answer), "create the repository")),
        }
    })?;
    if private && !retry(&DELAYS, || api.json::<Visibility>(&path))?.private {
        let reason = format!(
            "it is public, and --private was given; make it private at {}/settings, or omit --private",
            api.request().page()
        );
        return Err(api.request().error(HubErrorKind::Public, reason));
    }
    Ok(created)
}

/// The media type of the hub's API.
const JSON: &str = "application/json";

/// The hub's decisions about files.
#[derive(Deserialize)]
struct Preupload {
    files: Vec<PreuploadFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreuploadFile {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
    oid: Option<String>,
}

/// Asks the hub which files go to large-file storage.
fn classify(api: &Api, files: &mut [PendingFile<'_>]) -> Result<(), Failure> {
    let Request { name, endpoint, revision, .. } = api.request();
    let described = files.iter().map(|file| {
        let sample = file.read(SAMPLE).map_err(|error| Failure { error, transient: false })?;
        Ok(json!({ "path": file.path(), "sample": commit::base64(&sample), "size": file.size }))
    });
    let body = json!({ "files": described.collect::<Result<Vec<_>, Failure>>()? });
    let url = format!("{endpoint}/api/models/{name}/preupload/{revision}");
    let answer = api.post(&url, JSON, body.to_string().as_bytes())?;
    if !answer.status().is_success() {
        return Err(refused(api.request(), &refusal(answer), "upload"));
    }
    let answer: Preupload = api.parsed(answer)?;
    for file in files {
        let Some(found) = answer.files.iter().find(|found| found.path == file.path()) else {
            return Err(api.unexpected_response(&format!("it does not say how to upload {}", file.path())));
        };
        // The storage refuses empty files.
        file.is_large = found.upload_mode == "lfs" && file.size > 0;
        file.is_ignored = found.should_ignore;
        file.remote.clone_from(&found.oid);
    }
    Ok(())
}

/// Translates an error status of a request that writes.
fn refused(request: &Request, refusal: &Refusal, action: &str) -> Failure {
    let Request { endpoint, .. } = request;
    let said = refusal.message.as_deref().map(|message| format!(" ({message})")).unwrap_or_default();
    let reason = match refusal.status {
        401 => format!(
            "{endpoint} does not accept the token{said}; create one with write permission at {endpoint}/settings/tokens \
             and set HF_TOKEN"
        ),
        403 | 404 => format!(
            "the token may not {action}{said}; check the spelling of {}, and use a token with write permission to it",
            request.name
        ),
        400 | 413 | 422 => format!("{endpoint} refuses to {action}{said}"),
        _ => return request.refused(refusal),
    };
    let kind = if matches!(refusal.status, 401 | 403 | 404) { HubErrorKind::Denied } else { HubErrorKind::Response };
    Failure { error: request.error(kind, reason), transient: false }
}

//! The HTTP requests of a download.
//!
//! hf-hub names repositories and describes their contents. The requests are made here, because hf-hub's downloads do
//! not resume, verify checksums or time out on a silent server, and they follow the redirect to the storage, which loses
//! the size and checksum in the hub's own response.

use std::fmt::Write as _;
use std::io::Read;
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::{Repo, RepoType};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::http::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, LOCATION, RANGE};
use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder, SendBody};

use crate::{Error, HubErrorKind};

use super::checksum::Checksum;
use super::failure::{Failure, Refusal, Request};
use super::layout::is_commit;
use super::name::{RepoKind, RepoName};

/// A connection to one repository.
#[derive(Debug)]
pub(crate) struct Api {
    repo: Repo,
    /// Does not follow redirects; [`get`](Self::get) does.
    client: Agent,
    token: Option<String>,
    request: Request,
}

/// A file of a commit as announced by the hub.
#[derive(Clone, Debug)]
pub(crate) struct RemoteFile {
    pub(crate) name: String,
    /// The name of its blob in the cache.
    pub(crate) etag: String,
    pub(crate) size: u64,
    pub(crate) checksum: Option<Checksum>,
}

/// The timeout for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout for the next bytes of a connection.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The timeout for the response to an upload: the hub assembles large files before it answers.
const WRITE_RESPONSE_TIMEOUT: Duration = Duration::from_secs(300);

/// The maximum number of redirects: within the hub after a repository was renamed, and to the storage.
const MAX_REDIRECTS: usize = 5;

/// The maximum size of a JSON response in bytes; a list of 100,000 files has about 10 MB.
const MAX_JSON: u64 = 64 << 20;

/// The media type of the protocol for large files.
pub(crate) const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// The branches and tags of a repository.
#[derive(Deserialize)]
struct References {
    branches: Vec<Reference>,
    tags: Vec<Reference>,
}

#[derive(Deserialize)]
struct Reference {
    name: String,
}

/// The body of an error response.
#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl Api {
    pub(crate) fn new(request: Request, token: Option<String>) -> Result<Api, Error> {
        let endpoint = request.endpoint.parse::<Uri>().ok().filter(|uri| uri.scheme().is_some());
        let Some(host) = endpoint.as_ref().and_then(Uri::host) else {
            let reason =
                format!("{:?} is not a valid URL; set HF_ENDPOINT to one like \"https://host\"", request.endpoint);
            return Err(request.error(HubErrorKind::Network, reason));
        };
        let config = Agent::config_builder()
            .user_agent(concat!("rekindle/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .timeout_per_write(Some(READ_TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build());
        // A proxy cannot reach this machine's loopback addresses.
        let is_loopback = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        let config = if is_loopback { config.proxy(None) } else { config };
        let client = config.build().new_agent();
        let RepoName { kind, organization, name } = &request.name;
        let kind = match kind {
            RepoKind::Model => RepoType::Model,
            RepoKind::Dataset => RepoType::Dataset,
        };
        let repo = Repo::with_revision(format!("{organization}/{name}"), kind, encoded(&request.revision));
        Ok(Api { repo, client, token, request })
    }

    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// Returns the commit of the revision and the names of all its files.
    pub(crate) fn files(&self) -> Result<(String, Vec<String>), Failure> {
        let RepoInfo { siblings, sha } = self.json(&self.repo.api_url())?;
        if !is_commit(&sha) {
            return Err(self.unexpected_response("it names no commit"));
        }
        Ok((sha, siblings.into_iter().map(|file| file.rfilename).collect()))
    }

    /// Returns the names of branches and tags, for errors that suggest one; empty if the hub does not list them.
    pub(crate) fn revisions(&self) -> Vec<String> {
        let RepoName { kind, organization, name } = &self.request.name;
        match self.json::<References>(&format!("{}s/{organization}/{name}/refs", kind.noun())) {
            Ok(found) => found.branches.into_iter().chain(found.tags).map(|reference| reference.name).collect(),
            Err(_) => Vec::new(),
        }
    }

    /// Returns the size and checksum of a file.
    pub(crate) fn describe(&self, commit: &str, file: &str) -> Result<RemoteFile, Failure> {
        let mut url = self.url(commit, file);
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(self.client.head(&url), true)?;
            match redirect(&url, &answer) {
                Some(target) if origin(&target) == origin(&url) => url = target,
                _ => return self.announced(file, answer),
            }
        }
        Err(self.unexpected_response(&format!("{file} is redirected more than {MAX_REDIRECTS} times")))
    }

    /// Requests the contents of a file from `start`; returns the actual start too, since a server may not support
    /// ranges.
    pub(crate) fn contents(
        &self,
        commit: &str,
        file: &RemoteFile,
        start: u64,
    ) -> Result<(u64, Response<Body>), Failure> {
        let url = self.url(commit, &file.name);
        if start > 0 {
            let range = format!("bytes={start}-{}", file.size - 1);
            let answer = self.get(&url, Some(&range))?;
            match answer.status() {
                StatusCode::PARTIAL_CONTENT => return Ok((start, answer)),
                // The stored file has changed.
                StatusCode::RANGE_NOT_SATISFIABLE => {}
                _ => return Ok((0, self.accepted(answer)?)),
            }
        }
        let answer = self.get(&url, None)?;
        Ok((0, self.accepted(answer)?))
    }

    /// Extends `have` to the first `length` bytes of a file, ignoring anything the server sends beyond that.
    pub(crate) fn head(
        &self,
        commit: &str,
        file: &RemoteFile,
        mut have: Vec<u8>,
        length: usize,
    ) -> Result<Vec<u8>, Failure> {
        let range = format!("bytes={}-{}", have.len(), length - 1);
        let answer = self.get(&self.url(commit, &file.name), Some(&range))?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            // A server without range support starts from the beginning.
            have.clear();
        }
        let body = self.accepted(answer)?.into_body();
        let missing = (length - have.len()) as u64;
        let read = body.into_reader().take(missing).read_to_end(&mut have);
        read.map_err(|error| self.request.interrupted(error))?;
        if have.len() < length {
            return Err(self.request.closed_early());
        }
        Ok(have)
    }

    /// Returns the JSON at `path` of the hub's API.
    pub(crate) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let answer = self.get(&format!("{}/api/{path}", self.request.endpoint), None)?;
        self.parsed(self.accepted(answer)?)
    }

    /// Sends a body of the media type `media` to `url`. The token is sent to the hub only, not to its storage.
    pub(crate) fn post(&self, url: &str, media: &str, body: &[u8]) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.client.post(&url).header(CONTENT_TYPE, media);
            if media == LFS_JSON {
                request = request.header(ACCEPT, LFS_JSON);
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.request.endpoint)) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let request = request.config().timeout_recv_response(Some(WRITE_RESPONSE_TIMEOUT)).build();
            let answer = request.send(body).map_err(|error| self.request.unreachable(&error))?;
            match redirect(&url, &answer) {
                Some(target) if origin(&target) == origin(&url) => url = target,
                _ => return Ok(answer),
            }
        }
        Err(self.unexpected_response(&format!("{url} is redirected more than {MAX_REDIRECTS} times")))
    }

    /// Sends `length` bytes to a signed URL of the storage.
    pub(crate) fn put(&self, url: &str, bytes: &mut dyn Read, length: u64) -> Result<Response<Body>, Failure> {
        let request = self.client.put(url).header(CONTENT_LENGTH, length.to_string());
        let request = request.config().timeout_recv_response(Some(WRITE_RESPONSE_TIMEOUT)).build();
        request.send(SendBody::from_reader(bytes)).map_err(|error| self.request.unreachable(&error))
    }

    /// Parses the JSON body of a response.
    pub(crate) fn parsed<T: DeserializeOwned>(&self, answer: Response<Body>) -> Result<T, Failure> {
        let mut text = Vec::new();
        let body = answer.into_body();
        let read = body.into_with_config().limit(MAX_JSON).reader().read_to_end(&mut text);
        read.map_err(|error| self.request.interrupted(error))?;
        serde_json::from_slice(&text).map_err(|error| {
            let endpoint = &self.request.endpoint;
            let reason = format!("{endpoint} did not respond like a Hugging Face hub ({error}); check HF_ENDPOINT");
            Failure { error: self.request.error(HubErrorKind::Response, reason), transient: false }
        })
    }

    /// Sends a GET request and follows redirects. The token is not sent to another scheme, host or port.
    fn get(&self, url: &str, range: Option<&str>) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        let mut is_trusted = true;
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.client.get(&url);
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let answer = self.send(request, is_trusted)?;
            let Some(target) = redirect(&url, &answer) else { return Ok(answer) };
            is_trusted &= origin(&target) == origin(&url);
            url = target;
        }
        Err(self.unexpected_response(&format!("{url} is redirected more than {MAX_REDIRECTS} times")))
    }

    fn send(&self, mut request: RequestBuilder<WithoutBody>, is_trusted: bool) -> Result<Response<Body>, Failure> {
        if let Some(token) = self.token.as_ref().filter(|_| is_trusted) {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call().map_err(|error| self.request.unreachable(&error))
    }

    fn accepted(&self, answer: Response<Body>) -> Result<Response<Body>, Failure> {
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(self.request.refused(&refusal(answer)))
    }

    fn url(&self, commit: &str, file: &str) -> String {
        let Request { name, endpoint, .. } = &self.request;
        let file = file.split('/').map(encoded).collect::<Vec<_>>().join("/");
        format!("{endpoint}/{}/resolve/{commit}/{file}", name.path())
    }

    fn announced(&self, file: &str, answer: Response<Body>) -> Result<RemoteFile, Failure> {
        let answer = if answer.status().is_redirection() { answer } else { self.accepted(answer)? };
        let (status, headers) = (answer.status(), answer.headers());
        // A redirect's Content-Length and ETag describe the redirect itself.
        let size = text(headers, "x-linked-size").or_else(|| match status.is_success() {
            true => text(headers, CONTENT_LENGTH.as_str()),
            false => None,
        });
        let size = size.and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| self.unexpected_response(&format!("it does not report the size of {file}")))?;
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, ETAG.as_str()));
        let etag = etag.as_deref().map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let etag = etag.filter(|etag| is_plain(etag));
        let etag = etag.ok_or_else(|| self.unexpected_response(&format!("it gives no usable ETag for {file}")))?;
        Ok(RemoteFile { name: file.to_owned(), etag: etag.to_owned(), size, checksum: Checksum::of_etag(etag) })
    }

    pub(crate) fn unexpected_response(&self, what: &str) -> Failure {
        let reason =
            format!("{} did not respond like a Hugging Face hub: {what}; check HF_ENDPOINT", self.request.endpoint);
        Failure { error: self.request.error(HubErrorKind::Response, reason), transient: false }
    }
}

/// Reads the hub's reason for an error status.
pub(crate) fn refusal(answer: Response<Body>) -> Refusal {
    let header = |name| text(answer.headers(), name);
    let (status, code, message) = (answer.status().as_u16(), header("x-error-code"), header("x-error-message"));
    let message = message.or_else(|| {
        let body = answer.into_body().into_with_config().limit(MAX_JSON).reader();
        serde_json::from_reader(body).ok().map(|body: ErrorBody| body.error)
    });
    Refusal { status, code, message }
}

/// Percent-encodes a segment of a path.
fn encoded(segment: &str) -> String {
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string succeeds");
        }
    }
    out
}

/// Returns the scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Returns the target of a redirect from `url`.
fn redirect(url: &str, answer: &Response<Body>) -> Option<String> {
    let location = text(answer.headers(), LOCATION.as_str()).filter(|_| answer.status().is_redirection())?;
    match location.strip_prefix("//") {
        Some(host) => Some(format!("{}://{host}", url.split("://").next().unwrap_or("https"))),
        None if location.starts_with('/') => Some(format!("{}{location}", origin(url))),
        None => Some(location),
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Returns true if an ETag can be used as a file name.
fn is_plain(etag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !etag.is_empty() && etag.len() <= 128 && !etag.starts_with('.') && etag.bytes().all(plain)
}

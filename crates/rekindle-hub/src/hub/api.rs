//! The HTTP requests of a download.
//!
//! hf-hub looks up repositories, revisions and files. The rest is implemented here on the HTTP client it includes:
//! hf-hub's downloads do not resume, verify checksums or time out on a silent server, and they follow the redirect to
//! the storage, which loses the size and checksum in the hub's own response.

use std::time::Duration;

use hf_hub::{HFClient, HFRepository, RepoTypeDataset, RepoTypeModel};
use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, StatusCode, Url};

use crate::{Error, HubErrorKind};

use super::checksum::Checksum;
use super::failure::{Failure, Refusal, Request};
use super::layout::is_commit;
use super::name::{RepoKind, RepoName};

/// A connection to one repository.
#[derive(Debug)]
pub(crate) struct Api {
    repository: Repository,
    /// Follows redirects, dropping the token when they lead to another host.
    client: Client,
    /// Does not follow redirects.
    staying: Client,
    token: Option<String>,
    request: Request,
}

#[derive(Debug)]
enum Repository {
    Model(HFRepository<RepoTypeModel>),
    Dataset(HFRepository<RepoTypeDataset>),
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

/// The maximum number of redirects within the hub, which occur after a repository was renamed.
const MAX_REDIRECTS: usize = 5;

impl Api {
    pub(crate) fn new(request: Request, token: Option<String>) -> Result<Api, Error> {
        let unusable = |error: reqwest::Error| request.insecure(&error);
        let endpoint = &request.endpoint;
        let builder = || {
            let builder = Client::builder()
                .user_agent(concat!("rekindle/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT);
            without_proxy_on_loopback(builder, endpoint)
        };
        let client = builder().build().map_err(unusable)?;
        let staying = builder().redirect(Policy::none()).build().map_err(unusable)?;
        let hub = HFClient::builder().endpoint(endpoint).client(client.clone());
        // Retries are handled here, uniformly for all requests.
        let mut hub = hub.cache_enabled(false).retry_max_attempts(0);
        if let Some(token) = &token {
            hub = hub.token(token);
        }
        let hub = hub.build().map_err(|error| {
            let reason =
                format!("{endpoint:?} is not a valid URL ({error}); set HF_ENDPOINT to one like \"https://host\"");
            request.error(HubErrorKind::Network, reason)
        })?;
        let RepoName { kind, organization, name } = &request.name;
        let repository = match kind {
            RepoKind::Model => Repository::Model(hub.model(organization, name)),
            RepoKind::Dataset => Repository::Dataset(hub.dataset(organization, name)),
        };
        Ok(Api { repository, client, staying, token, request })
    }

    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// Returns the commit of the revision and the names of all its files.
    pub(crate) async fn files(&self) -> Result<(String, Vec<String>), Failure> {
        let revision = &self.request.revision;
        let asked = match &self.repository {
            Repository::Model(model) => {
                model.info().revision(revision).send().await.map(|info| (info.sha, info.siblings))
            }
            Repository::Dataset(dataset) => {
                dataset.info().revision(revision).send().await.map(|info| (info.sha, info.siblings))
            }
        };
        let (commit, files) = asked.map_err(|error| self.request.failure(error))?;
        let commit =
            commit.filter(|sha| is_commit(sha)).ok_or_else(|| self.unexpected_response("it names no commit"))?;
        let files = files.ok_or_else(|| self.unexpected_response("it lists no files"))?;
        Ok((commit, files.into_iter().map(|file| file.rfilename).collect()))
    }

    /// Returns branches and tags for an error message; empty if the hub does not list them.
    pub(crate) async fn revisions(&self) -> Vec<String> {
        let asked = match &self.repository {
            Repository::Model(model) => model.list_refs().send().await,
            Repository::Dataset(dataset) => dataset.list_refs().send().await,
        };
        match asked {
            Ok(refs) => refs.branches.into_iter().chain(refs.tags).map(|reference| reference.name).collect(),
            Err(_) => Vec::new(),
        }
    }

    /// Returns the size and checksum of a file.
    pub(crate) async fn describe(&self, commit: &str, file: &str) -> Result<RemoteFile, Failure> {
        let mut url = self.url(commit, file)?;
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(self.staying.head(url.clone())).await?;
            match relative_redirect(&answer) {
                Some(within) => {
                    url = url.join(&within).map_err(|error| self.unexpected_response(&error.to_string()))?
                }
                None => return self.announced(file, answer),
            }
        }
        Err(self.unexpected_response(&format!("{file} is redirected more than {MAX_REDIRECTS} times")))
    }

    /// Requests the contents of a file from `start`; returns the actual start too, since a server may not support
    /// ranges.
    pub(crate) async fn contents(
        &self,
        commit: &str,
        file: &RemoteFile,
        start: u64,
    ) -> Result<(u64, Response), Failure> {
        let url = self.url(commit, &file.name)?;
        if start > 0 {
            let range = format!("bytes={start}-{}", file.size - 1);
            let answer = self.send(self.client.get(url.clone()).header(RANGE, range)).await?;
            match answer.status() {
                StatusCode::PARTIAL_CONTENT => return Ok((start, answer)),
                // The stored file has changed.
                StatusCode::RANGE_NOT_SATISFIABLE => {}
                _ => return Ok((0, self.accepted(answer)?)),
            }
        }
        let answer = self.send(self.client.get(url)).await?;
        Ok((0, self.accepted(answer)?))
    }

    /// Extends `have` to the first `length` bytes of a file, ignoring anything the server sends beyond that.
    pub(crate) async fn head(
        &self,
        commit: &str,
        file: &RemoteFile,
        mut have: Vec<u8>,
        length: usize,
    ) -> Result<Vec<u8>, Failure> {
        let url = self.url(commit, &file.name)?;
        let range = format!("bytes={}-{}", have.len(), length - 1);
        let answer = self.send(self.client.get(url).header(RANGE, range)).await?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            // A server without range support starts from the beginning.
            have.clear();
        }
        let mut answer = self.accepted(answer)?;
        while have.len() < length {
            match answer.chunk().await.map_err(|error| self.request.unreachable(&error))? {
                Some(chunk) => have.extend_from_slice(&chunk),
                None => {
                    let reason = format!("{} closed the connection early", self.request.endpoint);
                    return Err(Failure { error: self.request.error(HubErrorKind::Network, reason), transient: true });
                }
            }
        }
        have.truncate(length);
        Ok(have)
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Response, Failure> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        request.send().await.map_err(|error| self.request.unreachable(&error))
    }

    fn accepted(&self, answer: Response) -> Result<Response, Failure> {
        if answer.status().is_success() {
            return Ok(answer);
        }
        let header = |name| text(answer.headers(), name);
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        Err(self.request.refused(&Refusal { status: answer.status().as_u16(), code, message }))
    }

    fn url(&self, commit: &str, file: &str) -> Result<Url, Failure> {
        let Request { name, endpoint, .. } = &self.request;
        let mut url = Url::parse(&format!("{endpoint}/{}/resolve/{commit}", name.path()))
            .map_err(|error| self.unexpected_response(&error.to_string()))?;
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.extend(file.split('/'));
        }
        Ok(url)
    }

    fn announced(&self, file: &str, answer: Response) -> Result<RemoteFile, Failure> {
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

    fn unexpected_response(&self, what: &str) -> Failure {
        let reason =
            format!("{} did not respond like a Hugging Face hub: {what}; check HF_ENDPOINT", self.request.endpoint);
        Failure { error: self.request.error(HubErrorKind::Response, reason), transient: false }
    }
}

/// Disables the proxy for loopback addresses, which a proxy cannot reach.
fn without_proxy_on_loopback(builder: ClientBuilder, endpoint: &str) -> ClientBuilder {
    let host = Url::parse(endpoint).ok().and_then(|url| url.host_str().map(str::to_owned));
    match host.as_deref() {
        Some("localhost" | "127.0.0.1" | "[::1]") => builder.no_proxy(),
        _ => builder,
    }
}

/// Returns the target of a redirect to another path of the hub.
fn relative_redirect(answer: &Response) -> Option<String> {
    let location = text(answer.headers(), LOCATION.as_str()).filter(|_| answer.status().is_redirection())?;
    (location.starts_with('/') && !location.starts_with("//")).then_some(location)
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Returns true if an ETag can be used as a file name.
fn is_plain(etag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !etag.is_empty() && etag.len() <= 128 && !etag.starts_with('.') && etag.bytes().all(plain)
}

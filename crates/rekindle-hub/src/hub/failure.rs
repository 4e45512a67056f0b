//! Translation of failed requests into errors for the user.

use std::error::Error as StdError;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use crate::{Error, HubErrorKind};

use super::name::{RepoKind, RepoName};

/// A failed request; `transient` is true if the same request may soon succeed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) transient: bool,
}

/// Retries transient failures, once after each of the delays.
pub(crate) fn retry<T>(delays: &[Duration], mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Error> {
    for &delay in delays {
        match attempt() {
            Err(failure) if failure.transient => sleep(delay),
            settled => return settled.map_err(|failure| failure.error),
        }
    }
    attempt().map_err(|failure| failure.error)
}

/// Delays that survive a short network outage.
pub(crate) const DELAYS: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];

/// Shorter delays for the first request, since often there is no network at all.
pub(crate) const FIRST_DELAYS: [Duration; 2] = [DELAYS[0], DELAYS[1]];

/// The endpoint, repository and revision of a request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) name: RepoName,
    pub(crate) endpoint: String,
    pub(crate) revision: String,
    pub(crate) has_token: bool,
}

/// The words about a repository that may not exist.
pub(crate) const NO_SUCH_MODEL: &str = "has no such model";

/// The hub's response to a refused request.
#[derive(Debug, Default)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// `X-Error-Code`.
    pub(crate) code: Option<String>,
    /// `X-Error-Message`, or `error` of the body.
    pub(crate) message: Option<String>,
}

impl Request {
    pub(crate) fn error(&self, kind: HubErrorKind, reason: impl Into<String>) -> Error {
        Error::Hub { kind, name: self.name.to_string(), reason: reason.into() }
    }

    /// Returns the address of the repository's page.
    pub(crate) fn page(&self) -> String {
        format!("{}/{}", self.endpoint, self.name.path())
    }

    /// Translates a failed request.
    pub(crate) fn unreachable(&self, error: &ureq::Error) -> Failure {
        let endpoint = &self.endpoint;
        let cause = innermost(error);
        let (what, transient) = match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                let reason =
                    format!("{endpoint:?} is not a valid URL ({cause}); set HF_ENDPOINT to one like \"https://host\"");
                return Failure { error: self.error(HubErrorKind::Network, reason), transient: false };
            }
            ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::Pem(_) => {
                let reason = format!(
                    "cannot make a secure connection to {endpoint} ({cause}); install the system's CA certificates, or \
                     set SSL_CERT_FILE"
                );
                return Failure { error: self.error(HubErrorKind::Network, reason), transient: false };
            }
            ureq::Error::Timeout(_) => ("timed out".to_owned(), true),
            ureq::Error::InvalidProxyUrl => (cause.to_string(), false),
            _ => (cause.to_string(), true),
        };
        let verb = if is_connected(error) { "lost the connection to" } else { "cannot reach" };
        let reason =
            format!("{verb} {endpoint}: {what}; check the network, and HF_ENDPOINT and HTTPS_PROXY if they are set");
        Failure { error: self.error(HubErrorKind::Network, reason), transient }
    }

    /// Translates a failure to read a response.
    pub(crate) fn interrupted(&self, error: io::Error) -> Failure {
        let (endpoint, error) = (&self.endpoint, ureq::Error::from(error));
        let what = match &error {
            ureq::Error::Timeout(_) => "timed out".to_owned(),
            error => innermost(error).to_string(),
        };
        let reason = format!(
            "lost the connection to {endpoint}: {what}; check the network, and HF_ENDPOINT and HTTPS_PROXY if they are set"
        );
        Failure { error: self.error(HubErrorKind::Network, reason), transient: true }
    }

    /// Reports a response that ended before its announced length.
    pub(crate) fn closed_early(&self) -> Failure {
        let reason = format!("{} closed the connection early", self.endpoint);
        Failure { error: self.error(HubErrorKind::Network, reason), transient: true }
    }

    /// Translates an error response of the hub.
    pub(crate) fn refused(&self, refusal: &Refusal) -> Failure {
        let Request { name, endpoint, revision, has_token } = self;
        let (page, noun) = (self.page(), name.kind.noun());
        let said = refusal.message.as_deref().map(|message| format!(" ({message})")).unwrap_or_default();
        let (kind, reason) = match (refusal.code.as_deref(), refusal.status) {
            (Some("GatedRepo"), _) if *has_token => (
                HubErrorKind::Denied,
                format!(
                    "its licence has not been accepted with this token{said}; accept it at {page}, wait \
                     until access is granted, and use a token that may read gated repositories"
                ),
            ),
            (Some("GatedRepo"), _) => (
                HubErrorKind::Denied,
                format!(
                    "it is gated; accept its licence at {page}, create a token at \
                     {endpoint}/settings/tokens, and set HF_TOKEN to it"
                ),
            ),
            (Some("RevisionNotFound"), _) => {
                (HubErrorKind::NotFound, format!("it has no branch, tag or commit {revision:?}"))
            }
            (Some("EntryNotFound"), _) => {
                (HubErrorKind::NotFound, format!("{endpoint} lists a file it does not have{said}"))
            }
            (Some("RepoNotFound"), _) | (None, 404) => {
                let private = match has_token {
                    true => "if it is private, use a token that may read it",
                    false => "if it is private, set HF_TOKEN",
                };
                let here = match name.kind {
                    RepoKind::Model => "",
                    RepoKind::Dataset => ", and there is no such file or directory",
                };
                (
                    HubErrorKind::NotFound,
                    format!("{endpoint} has no such {noun}{here}; check the spelling, and {private}"),
                )
            }
            (_, 401) if *has_token => (
                HubErrorKind::Denied,
                format!(
                    "{endpoint} does not accept the token{said}; create one at {endpoint}/settings/tokens and set HF_TOKEN"
                ),
            ),
            // Without a valid token the hub does not reveal whether a private repository exists.
            (_, 401) => (
                HubErrorKind::Denied,
                format!("{endpoint} has no such {noun}, or it is private{said}; check the spelling, or set HF_TOKEN"),
            ),
            (_, 403) => (
                HubErrorKind::Denied,
                format!("{endpoint} denies access{said}; ask the owner, or set HF_TOKEN to a token that may read it"),
            ),
            (_, 429) => (
                HubErrorKind::Response,
                format!(
                    "{endpoint} is limiting requests{said}; wait a few minutes, or set HF_TOKEN for a higher limit"
                ),
            ),
            (_, status) => {
                (HubErrorKind::Response, format!("{endpoint} returned status {status}{said}; try again later"))
            }
        };
        let transient = matches!(refusal.status, 408 | 429 | 500 | 502 | 503 | 504);
        Failure { error: self.error(kind, reason), transient }
    }
}

/// Returns true if the request failed after the connection was made.
fn is_connected(error: &ureq::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        ureq::Error::Io(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        }
        ureq::Error::Timeout(timeout) => !matches!(timeout, ureq::Timeout::Resolve | ureq::Timeout::Connect),
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_)
        | ureq::Error::InvalidProxyUrl => false,
        _ => true,
    }
}

/// Returns the system's error; the errors around it only name the layers that passed it on.
fn innermost(error: &ureq::Error) -> &(dyn StdError + 'static) {
    let mut cause: &(dyn StdError + 'static) = match error {
        ureq::Error::Io(error) => error,
        error => error,
    };
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(has_token: bool, status: u16, code: Option<&str>) -> Failure {
        let request = Request {
            name: RepoName::parse(RepoKind::Model, "org/model").unwrap(),
            endpoint: "https://hub".to_owned(),
            revision: "main".to_owned(),
            has_token,
        };
        let code = code.map(str::to_owned);
        request.refused(&Refusal { status, code, message: Some("server's words".to_owned()) })
    }

    #[test]
    fn a_model_that_may_not_exist_is_named_in_the_same_words() {
        for (status, code) in [(401, Some("RepoNotFound")), (404, None), (401, None)] {
            assert!(refused(false, status, code).error.to_string().contains(NO_SUCH_MODEL), "{status}");
        }
        for (status, code) in [(404, Some("RevisionNotFound")), (403, Some("GatedRepo")), (503, None)] {
            assert!(!refused(false, status, code).error.to_string().contains(NO_SUCH_MODEL), "{status}");
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        let cases = [
            (false, 401, Some("GatedRepo"), HubErrorKind::Denied, "accept its licence at https://hub/org/model"),
            (true, 403, Some("GatedRepo"), HubErrorKind::Denied, "with this token (server's words); accept it"),
            (false, 401, Some("RepoNotFound"), HubErrorKind::NotFound, "no such model; check the spelling"),
            (false, 401, None, HubErrorKind::Denied, "or set HF_TOKEN"),
            (true, 401, None, HubErrorKind::Denied, "does not accept the token"),
            (true, 403, None, HubErrorKind::Denied, "denies access (server's words)"),
            (true, 404, Some("RevisionNotFound"), HubErrorKind::NotFound, "no branch, tag or commit \"main\""),
            (true, 404, None, HubErrorKind::NotFound, "use a token that may read it"),
            (true, 429, None, HubErrorKind::Response, "wait a few minutes"),
            (true, 503, None, HubErrorKind::Response, "status 503"),
        ];
        for (has_token, status, code, kind, expected) in cases {
            let Failure { error, transient } = refused(has_token, status, code);
            assert_eq!(error.hub_kind(), Some(kind), "{error}");
            assert!(error.to_string().starts_with("org/model: "), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(transient, status == 429 || status == 503);
        }
    }
}

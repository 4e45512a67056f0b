//! Errors in OpenAI's form.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::engine::{EngineError, EngineErrorKind};

/// An error for a client: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) kind: &'static str,
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code }
    }

    /// Returns an error about the field `param` (400).
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::invalid(message) }
    }

    /// Returns the error as one about the field `param`, unless it names a field already.
    pub(crate) fn in_field(self, param: &str) -> Self {
        Self { param: self.param.or_else(|| Some(param.to_owned())), ..self }
    }

    /// Returns an error about the request as a whole (400).
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, None, message)
    }

    /// Returns an error for a prompt that is too long (400).
    pub(crate) fn too_long(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::field(param, message) }
    }

    /// Returns an error for an unknown model (404).
    pub(crate) fn unknown_model(name: &str, known: &[String]) -> Self {
        let message = format!("the model {name:?} does not exist; available: {}", known.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// Returns an error for a path that is not served (404).
    pub(crate) fn unknown_path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, None, format!("there is no route {path}"))
    }

    /// Returns an error for a method that a route does not have (405).
    pub(crate) fn method(method: &str, path: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, None, format!("{path} does not take {method}"))
    }

    /// Returns an error for a missing or wrong key (401).
    pub(crate) fn key(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key"), message)
    }

    /// Returns an error for a route that is closed (403).
    pub(crate) fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, INVALID, None, message)
    }

    /// Returns an error for a body that did not come in time (408).
    pub(crate) fn slow_body(seconds: u64) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, None, format!("the body did not arrive within {seconds} s"))
    }

    /// Returns an error for a body that is too large (413).
    pub(crate) fn large_body(limit: usize) -> Self {
        let message = format!("the body is larger than the limit of {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, None, message)
    }

    /// Returns an error for a body that is not JSON (415).
    pub(crate) fn content_type(found: &str) -> Self {
        let message = format!("the content type is {found}; it must be application/json");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, None, message)
    }

    /// Returns an error for a full queue (429).
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message)
    }

    /// Returns an error for a failure of the server (500).
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// Returns an error for a server that is shutting down (503).
    pub(crate) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", None, "the server is shutting down")
    }

    /// Returns the body.
    pub(crate) fn json(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }

    pub(crate) fn response(&self) -> Response<Body> {
        let mut response = json_response(self.status, &self.json());
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error.kind {
            EngineErrorKind::Invalid => Self::invalid(error.message),
            EngineErrorKind::TooLong => Self { param: None, ..Self::too_long("", error.message) },
            EngineErrorKind::NotFound => {
                Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), error.message)
            }
            EngineErrorKind::Overloaded => Self::busy(error.message),
            EngineErrorKind::Internal => Self::internal(error.message),
        }
    }
}

/// Returns a response with a JSON body.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response<Body> {
    typed_response(status, "application/json", value.to_string())
}

/// Returns a response with a body of this content type.
pub(crate) fn typed_response(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Returns a page of this server.
pub(crate) fn page_response(html: &'static str) -> Response<Body> {
    let mut response = typed_response(StatusCode::OK, "text/html; charset=utf-8", html);
    // The page loads nothing from elsewhere, and nothing that a model writes may.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

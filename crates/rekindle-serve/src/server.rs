//! The routes and the life of a server.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{Method, Response, StatusCode, header};
use axum::middleware::{self, Next};
use axum::routing::{any, get, post};
use axum::serve::ListenerExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::engine::Engine;
use crate::error::{ApiError, json_response, page_response, typed_response};
use crate::fields::Fields;
use crate::state::{ServerConfig, ServerState};
use crate::{chat, completions};

type Answer = Result<Response<Body>, ApiError>;

/// A server that listens, and serves once [`run`](Self::run) is called.
///
/// ```no_run
/// # fn engine() -> std::sync::Arc<dyn rekindle_serve::Engine> { unimplemented!() }
/// use rekindle_serve::{Server, ServerConfig};
///
/// let server = Server::bind(engine(), ServerConfig::default(), "127.0.0.1", 8000)?;
/// println!("http://{}", server.address());
/// server.run()?; // until SIGINT or SIGTERM
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Server {
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    address: SocketAddr,
    engine: Arc<dyn Engine>,
    config: ServerConfig,
    stop: watch::Sender<bool>,
}

/// A handle that stops a server.
#[derive(Clone, Debug)]
pub struct ServerStop(watch::Sender<bool>);

impl ServerStop {
    /// Begins the shutdown: no new requests, and running ones have [`ServerConfig::shutdown_timeout`] to end.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Server {
    /// Listens at an address; port 0 is any free port.
    ///
    /// # Errors
    /// An error if the address cannot be used.
    pub fn bind(engine: Arc<dyn Engine>, config: ServerConfig, host: &str, port: u16) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((host, port)))?;
        let address = listener.local_addr()?;
        Ok(Self { runtime, listener, address, engine, config, stop: watch::Sender::new(false) })
    }

    /// Returns the address, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the options, for example by the address.
    pub fn configure(&mut self, change: impl FnOnce(&mut ServerConfig)) {
        change(&mut self.config);
    }

    /// Returns a handle that stops the server.
    pub fn stopper(&self) -> ServerStop {
        ServerStop(self.stop.clone())
    }

    /// Serves until SIGINT, SIGTERM or [`ServerStop::stop`]; a second signal ends running requests at once.
    ///
    /// # Errors
    /// An error if signals cannot be handled or the listener fails.
    pub fn run(self) -> io::Result<()> {
        let Self { runtime, listener, engine, config, stop, .. } = self;
        let state = Arc::new(ServerState::new(engine, config));
        let served = runtime.block_on(serve(listener, state, stop));
        // Requests that are still running are ended by dropping them.
        runtime.shutdown_timeout(std::time::Duration::from_secs(1));
        served
    }
}

async fn serve(listener: TcpListener, state: Arc<ServerState>, stop: watch::Sender<bool>) -> io::Result<()> {
    let mut signals = Signals::new()?;
    let stopped = |mut stopping: watch::Receiver<bool>| async move {
        // The sender lives as long as the server.
        let _ = stopping.wait_for(|&stopping| stopping).await;
    };
    let service = router(state.clone());
    let listener = listener.tap_io(|stream| {
        // A token would otherwise wait for the acknowledgement of the one before it. Without the option it still works.
        let _ = stream.set_nodelay(true);
    });
    let server = axum::serve(listener, service).with_graceful_shutdown(stopped(stop.subscribe()));
    let server = server.into_future();
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return result,
        () = signals.next() => {}
        () = stopped(stop.subscribe()) => {}
    }
    state.stopping.store(true, Ordering::Relaxed);
    stop.send_replace(true);
    tokio::select! {
        result = &mut server => result,
        () = signals.next() => Ok(()),
        () = tokio::time::sleep(state.config.shutdown_timeout) => Ok(()),
    }
}

/// SIGINT and SIGTERM.
struct Signals {
    #[cfg(unix)]
    both: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    #[cfg(unix)]
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { both: [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?] })
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        let [interrupt, terminate] = &mut self.both;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }

    #[cfg(not(unix))]
    fn new() -> io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    fn next(&mut self) -> impl Future<Output = ()> {
        async { drop(tokio::signal::ctrl_c().await) }
    }
}

/// Returns the service with all routes.
fn router(state: Arc<ServerState>) -> Router {
    let open = Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/ping", get(health))
        .route("/metrics", get(metrics));
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/load_lora_adapter", post(load_adapter))
        .route("/v1/unload_lora_adapter", post(unload_adapter))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .fallback(any(unknown))
        .layer(middleware::from_fn_with_state(state.clone(), check_key));
    let all = open.merge(api).method_not_allowed_fallback(wrong_method);
    all.layer(middleware::from_fn_with_state(state.clone(), count)).with_state(state)
}

/// Counts the response.
async fn count(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response<Body> {
    let response = next.run(request).await;
    state.metrics.responded(response.status().as_u16());
    response
}

/// Checks the API key.
async fn check_key(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response<Body> {
    let Some(key) = &state.config.api_key else { return next.run(request).await };
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let error = match given.map(|given| given.strip_prefix("Bearer ").map(str::trim)) {
        None => "no API key; send the header Authorization: Bearer KEY",
        Some(Some(given)) if is_equal(given.as_bytes(), key.as_bytes()) => return next.run(request).await,
        Some(_) => "the API key is wrong",
    };
    ApiError::key(error).response()
}

/// Compares in a time that depends on the lengths only.
fn is_equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

async fn page() -> Response<Body> {
    page_response(include_str!("page.html"))
}

async fn health(State(state): State<Arc<ServerState>>) -> Response<Body> {
    if state.stopping.load(Ordering::Relaxed) {
        return ApiError::stopping().response();
    }
    json_response(StatusCode::OK, &json!({"status": "ok"}))
}

async fn metrics(State(state): State<Arc<ServerState>>) -> Response<Body> {
    let models = state.engine.models();
    let (adapters, bases): (Vec<_>, Vec<_>) = models.into_iter().partition(|model| model.parent.is_some());
    let base = bases.into_iter().next().map(|model| model.name).unwrap_or_default();
    let adapters: Vec<String> = adapters.into_iter().map(|model| model.name).collect();
    let text = state.metrics.text(&base, &state.engine.stats(), &adapters);
    typed_response(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

fn model_list(state: &ServerState) -> Vec<Value> {
    let max_model_len = state.engine.limits().max_model_len;
    let models = state.engine.models().into_iter().map(|model| {
        json!({
            "id": model.name,
            "object": "model",
            "created": state.started,
            "owned_by": "rekindle",
            "root": model.root,
            "parent": model.parent,
            "max_model_len": max_model_len,
        })
    });
    models.collect()
}

async fn models(State(state): State<Arc<ServerState>>) -> Response<Body> {
    json_response(StatusCode::OK, &json!({"object": "list", "data": model_list(&state)}))
}

async fn model(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    let name = request.uri().path().trim_start_matches("/v1/models/").to_owned();
    let name = percent_decode(&name);
    let list = model_list(&state);
    match list.iter().find(|model| model["id"] == name.as_str()) {
        Some(model) => json_response(StatusCode::OK, model),
        None => {
            let known: Vec<String> = state.engine.models().into_iter().map(|model| model.name).collect();
            ApiError::unknown_model(&name, &known).response()
        }
    }
}

/// Decodes `%2F` and the like in a path.
pub(crate) fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

async fn unknown(request: Request) -> Response<Body> {
    ApiError::unknown_path(request.uri().path()).response()
}

async fn wrong_method(method: Method, request: Request) -> Response<Body> {
    ApiError::method(method.as_str(), request.uri().path()).response()
}

async fn chat_completions(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    respond(async { chat::answer(state.clone(), body(&state, request).await?).await }).await
}

async fn text_completions(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    respond(async { completions::answer(state.clone(), body(&state, request).await?).await }).await
}

async fn respond(answer: impl Future<Output = Answer>) -> Response<Body> {
    answer.await.unwrap_or_else(|error| error.response())
}

/// Reads a body on a thread that may block, and answers it with `answer`.
async fn blocking(
    state: Arc<ServerState>,
    request: Request,
    answer: impl FnOnce(&ServerState, Fields) -> Result<Value, ApiError> + Send + 'static,
) -> Response<Body> {
    respond(async {
        let fields = Fields::new(body(&state, request).await?, "")?;
        let shared = state.clone();
        let value = state.prepare(move || answer(&shared, fields)).await?;
        Ok(json_response(StatusCode::OK, &value))
    })
    .await
}

async fn tokenize(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    blocking(state, request, crate::tokenize::tokenize).await
}

async fn detokenize(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    blocking(state, request, crate::tokenize::detokenize).await
}

fn check_runtime_adapters(state: &ServerState) -> Result<(), ApiError> {
    let message = "loading adapters at run time is off: the server can be reached from other machines without a key; \
                   start it with an API key";
    if state.config.runtime_adapters { Ok(()) } else { Err(ApiError::forbidden(message)) }
}

async fn load_adapter(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    blocking(state, request, |state, mut fields| {
        check_runtime_adapters(state)?;
        let (name, path) = (fields.required_string("lora_name")?, fields.required_string("lora_path")?);
        let replace = fields.boolean("load_inplace")?.unwrap_or(false);
        fields.finish(&[])?;
        state.engine.load_adapter(&name, &path, replace)?;
        Ok(json!({"status": "loaded", "lora_name": name}))
    })
    .await
}

async fn unload_adapter(State(state): State<Arc<ServerState>>, request: Request) -> Response<Body> {
    blocking(state, request, |state, mut fields| {
        check_runtime_adapters(state)?;
        let name = fields.required_string("lora_name")?;
        // Other servers number their adapters, and accept the number here.
        fields.finish(&["lora_int_id"])?;
        state.engine.unload_adapter(&name)?;
        Ok(json!({"status": "unloaded", "lora_name": name}))
    })
    .await
}

/// Reads a JSON body within the limits of size and time.
async fn body(state: &ServerState, request: Request) -> Result<Value, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = content_type.map(|value| value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    // A page of another site could send other types without asking this server first.
    match media_type.as_deref() {
        Some("application/json") => {}
        Some(other) => return Err(ApiError::content_type(&format!("{other:?}"))),
        None => return Err(ApiError::content_type("missing")),
    }
    let limit = state.config.max_body_bytes;
    let body = request.into_body();
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::large_body(limit));
    }
    let timeout = state.config.body_timeout;
    let bytes = match tokio::time::timeout(timeout, axum::body::to_bytes(body, limit)).await {
        Err(_) => return Err(ApiError::slow_body(timeout.as_secs())),
        Ok(Err(error)) => {
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                if inner.to_string().contains("length limit exceeded") {
                    return Err(ApiError::large_body(limit));
                }
                source = inner.source();
            }
            return Err(ApiError::invalid(format!("the body cannot be read: {error}")));
        }
        Ok(Ok(bytes)) => bytes,
    };
    serde_json::from_slice(&bytes).map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))
}

//! A page that shows training runs while they are running and afterwards.
//!
//! It reads the files that a run writes into its output directory (`metrics.jsonl`, `run.toml`), and asks a running run
//! to stop by creating the file `stop` there.

mod runs;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use axum::middleware::{self, Next};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::error::{ApiError, json_response, page_response};
use crate::server::percent_decode;

use runs::{Run, find_runs};

/// The runs of a dashboard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DashboardConfig {
    /// A run's output directory, or a directory that contains such directories.
    pub dir: PathBuf,
    /// The number of levels of directories below `dir` in which runs are searched.
    pub depth: usize,
    /// If true, the page can ask running runs to stop, provided that the dashboard listens at a loopback address.
    pub stops: bool,
}

/// A dashboard that listens, and serves once [`run`](Self::run) or [`spawn`](Self::spawn) is called.
///
/// ```no_run
/// use rekindle_serve::{Dashboard, DashboardConfig};
///
/// let config = DashboardConfig { dir: "outputs".into(), depth: 2, stops: true };
/// let dashboard = Dashboard::bind(config, "127.0.0.1:8001".parse().expect("an address"))?;
/// println!("http://{}", dashboard.address());
/// dashboard.run()?; // until the process ends
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Dashboard {
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    address: SocketAddr,
    config: DashboardConfig,
}

impl Dashboard {
    /// Listens at an address; port 0 is any free port.
    ///
    /// # Errors
    /// An error if the address cannot be used.
    pub fn bind(config: DashboardConfig, address: SocketAddr) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(address))?;
        let address = listener.local_addr()?;
        Ok(Self { runtime, listener, address, config })
    }

    /// Returns the address, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// An error if the listener fails.
    pub fn run(self) -> io::Result<()> {
        let Self { runtime, listener, address, config } = self;
        runtime.block_on(axum::serve(listener, router(config, address)).into_future())
    }

    /// Serves in the background until the process ends.
    pub fn spawn(self) {
        // An error ends the dashboard only, not the run that it shows.
        std::thread::spawn(|| self.run());
    }
}

/// The state of the server.
struct DashboardState {
    config: DashboardConfig,
    is_local: bool,
}

type Shared = State<Arc<DashboardState>>;

fn router(config: DashboardConfig, address: SocketAddr) -> Router {
    let state = Arc::new(DashboardState { config, is_local: address.ip().is_loopback() });
    let routes = Router::new()
        .route("/", get(page))
        .route("/api/runs", get(list))
        .route("/api/metrics", get(metrics))
        .route("/api/stop", post(stop))
        .fallback(|request: Request| async move { ApiError::unknown_path(request.uri().path()).response() });
    routes.layer(middleware::from_fn_with_state(state.clone(), check_host)).with_state(state)
}

/// Refuses a foreign name of a loopback address, by which a page of another site could read the runs.
async fn check_host(State(state): Shared, request: Request, next: Next) -> Response<Body> {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if state.is_local && !["127.0.0.1", "localhost", "[::1]"].contains(&name) {
        return ApiError::forbidden(&format!("{host:?} is not a name of this machine; open http://127.0.0.1"))
            .response();
    }
    next.run(request).await
}

async fn page() -> Response<Body> {
    page_response(include_str!("dashboard/page.html"))
}

/// Runs `answer` with the runs on a thread that may block.
async fn blocking(
    state: Arc<DashboardState>,
    answer: impl FnOnce(&DashboardState, Vec<Run>) -> Result<Value, ApiError> + Send + 'static,
) -> Response<Body> {
    let answered = tokio::task::spawn_blocking(move || {
        let runs = find_runs(&state.config.dir, state.config.depth);
        answer(&state, runs)
    });
    match answered.await {
        Ok(Ok(value)) => json_response(StatusCode::OK, &value),
        Ok(Err(error)) => error.response(),
        Err(error) => ApiError::internal(error.to_string()).response(),
    }
}

async fn list(State(state): Shared) -> Response<Body> {
    blocking(state, |state, runs| {
        let stops = state.config.stops && state.is_local;
        let runs: Vec<Value> = runs.iter().map(Run::describe).collect();
        Ok(json!({ "runs": runs, "stops": stops, "dir": state.config.dir.display().to_string() }))
    })
    .await
}

async fn metrics(State(state): Shared, request: Request) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    blocking(state, move |_, runs| {
        let run = select(&runs, &query)?;
        let from = parameter(&query, "from").and_then(|from| from.parse().ok()).unwrap_or(0);
        let piece = run.read(from, &parameter(&query, "generation").unwrap_or_default());
        piece.map_err(|error| ApiError::internal(format!("{}: {error}", run.name)))
    })
    .await
}

async fn stop(State(state): Shared, request: Request) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    // A page of another site cannot send this header without asking this server first.
    let is_json = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    blocking(state, move |state, runs| {
        if !is_json {
            return Err(ApiError::content_type("not application/json"));
        }
        if !(state.config.stops && state.is_local) {
            return Err(ApiError::forbidden("this dashboard can be reached from other machines, and stops no runs"));
        }
        let run = select(&runs, &query)?;
        if !run.is_running() {
            return Err(ApiError::invalid(format!("{} is not running", run.name)));
        }
        run.stop().map_err(|error| ApiError::internal(format!("{}: {error}", run.name)))?;
        Ok(json!({ "status": "stopping" }))
    })
    .await
}

/// Returns the run that a query names.
fn select<'a>(runs: &'a [Run], query: &str) -> Result<&'a Run, ApiError> {
    let name = parameter(query, "run").unwrap_or_default();
    runs.iter().find(|run| run.name == name).ok_or_else(|| ApiError::invalid(format!("there is no run {name:?}")))
}

fn parameter(query: &str, name: &str) -> Option<String> {
    let found = query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    found.map(|(_, value)| percent_decode(value))
}

//! The state that all requests share.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

use crate::engine::{Engine, EngineLimits};
use crate::error::ApiError;
use crate::metrics::Metrics;

/// The options of a server.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// A key that `Authorization: Bearer KEY` must have for all routes but `/`, `/health` and `/metrics`.
    pub api_key: Option<String>,
    /// The maximum size of a body in bytes.
    pub max_body_bytes: usize,
    /// The maximum number of tokens of a prompt; `None` is the model's length.
    pub max_prompt_tokens: Option<usize>,
    /// The maximum number of samples that run or wait; requests beyond it get 429.
    pub max_in_flight: usize,
    /// Clients may load and unload adapters.
    pub runtime_adapters: bool,
    /// The time that running requests have to end when the server stops.
    pub shutdown_timeout: Duration,
    /// The time that a body has to arrive.
    pub body_timeout: Duration,
}

impl Default for ServerConfig {
    /// Bodies of 16 MiB, 512 samples in flight, and 30 seconds.
    fn default() -> Self {
        Self {
            api_key: None,
            max_body_bytes: 16 << 20,
            max_prompt_tokens: None,
            max_in_flight: 512,
            runtime_adapters: false,
            shutdown_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
        }
    }
}

/// The engine, the options and the counters.
pub(crate) struct ServerState {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) config: ServerConfig,
    pub(crate) metrics: Metrics,
    /// Seconds since 1970 at the start.
    pub(crate) started: u64,
    pub(crate) stopping: AtomicBool,
    in_flight: AtomicUsize,
    /// Permits for the preparation of requests.
    preparing: Semaphore,
    next_id: AtomicU64,
    /// Makes ids of different servers different.
    id_prefix: u64,
}

impl ServerState {
    pub(crate) fn new(engine: Arc<dyn Engine>, config: ServerConfig) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            engine,
            config,
            metrics: Metrics::default(),
            started: now.as_secs(),
            stopping: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            preparing: Semaphore::new(available_parallelism().map_or(1, NonZero::get)),
            next_id: AtomicU64::new(0),
            id_prefix: now.as_nanos() as u64,
        }
    }

    /// Calls `work` on a thread that may block. Rendering, encoding and grammars take time and memory for large requests, so
    /// at most one request for each core is prepared at a time.
    pub(crate) async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let _permit = self.preparing.acquire().await.map_err(|error| ApiError::internal(error.to_string()))?;
        tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::internal(error.to_string()))?
    }

    /// Returns a new id with a prefix, such as `chatcmpl-`.
    pub(crate) fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:016x}{:08x}", self.id_prefix, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the adapter that `model` names, or `None` if it names the base model.
    pub(crate) fn adapter(&self, model: &str) -> Result<Option<String>, ApiError> {
        let models = self.engine.models();
        match models.iter().position(|served| served.name == model) {
            Some(index) => Ok(models[index].parent.is_some().then(|| model.to_owned())),
            None => {
                let names: Vec<String> = models.into_iter().map(|served| served.name).collect();
                Err(ApiError::unknown_model(model, &names))
            }
        }
    }

    /// Checks the length of a prompt, and returns the maximum number of new tokens: `asked`, or `default` if there is
    /// room for them.
    pub(crate) fn max_tokens(
        &self,
        prompt: &[u32],
        asked: Option<usize>,
        default: usize,
        param: &str,
    ) -> Result<usize, ApiError> {
        let EngineLimits { max_model_len, .. } = self.engine.limits();
        let tokens = prompt.len();
        if tokens == 0 {
            return Err(ApiError::field(param, format!("{param} has no tokens")));
        }
        if let Some(limit) = self.config.max_prompt_tokens.filter(|&limit| tokens > limit) {
            return Err(ApiError::too_long(param, format!("the prompt has {tokens} tokens; the limit is {limit}")));
        }
        let least = asked.unwrap_or(1);
        if tokens + least > max_model_len {
            return Err(ApiError::too_long(
                param,
                format!(
                    "the maximum context length is {max_model_len} tokens; the prompt has {tokens} tokens, and {least} \
                     for the answer are too many; shorten either"
                ),
            ));
        }
        Ok(asked.unwrap_or(default.min(max_model_len - tokens)))
    }

    /// Takes places for `samples` in the queue, until the returned value is dropped.
    pub(crate) fn places(self: &Arc<Self>, samples: usize) -> Result<Places, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::stopping());
        }
        let limit = self.config.max_in_flight;
        let before = self.in_flight.fetch_add(samples, Ordering::Relaxed);
        let places = Places { state: self.clone(), samples };
        if before + samples > limit {
            return Err(ApiError::busy(format!(
                "{before} samples run or wait, and this request adds {samples}; the limit is {limit}; try again later"
            )));
        }
        Ok(places)
    }
}

/// Places in the queue.
pub(crate) struct Places {
    state: Arc<ServerState>,
    samples: usize,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.state.in_flight.fetch_sub(self.samples, Ordering::Relaxed);
    }
}

/// Returns the seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

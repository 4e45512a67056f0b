//! The running requests behind one HTTP request.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::engine::{EngineEvent, EngineRequest, EventSink, FinishReason, RequestId};
use crate::error::ApiError;
use crate::state::{Places, ServerState};

/// The samples of an HTTP request. Dropping it, as when the client disconnects, aborts those that have not ended.
pub(crate) struct Generation {
    state: Arc<ServerState>,
    events: UnboundedReceiver<(usize, EngineEvent)>,
    requests: Vec<RequestId>,
    clocks: Vec<Clock>,
    running: usize,
    /// Given back when the generation is dropped.
    _places: Places,
}

/// The times of a sample.
struct Clock {
    start: Instant,
    last_token: Option<Instant>,
    is_running: bool,
}

impl Generation {
    /// Submits requests. The choices of an HTTP request are numbered over the samples of all of them.
    pub(crate) fn submit(state: &Arc<ServerState>, requests: Vec<EngineRequest>) -> Result<Self, ApiError> {
        let samples: usize = requests.iter().map(|request| request.n).sum();
        let places = state.places(samples)?;
        let (sender, events) = unbounded_channel();
        let clock = |_| Clock { start: Instant::now(), last_token: None, is_running: true };
        let mut generation = Self {
            state: state.clone(),
            events,
            requests: Vec::new(),
            clocks: Vec::new(),
            running: 0,
            _places: places,
        };
        for request in requests {
            let (n, tokens) = (request.n, request.prompt.len());
            let sink = EventSink::new(generation.running, sender.clone());
            generation.requests.push(state.engine.submit(request, sink)?);
            generation.clocks.extend((0..n).map(clock));
            generation.running += n;
            state.metrics.prompt_tokens.add(tokens);
        }
        Ok(generation)
    }

    /// Waits for the next event of any sample; `None` after the end of all.
    pub(crate) async fn next(&mut self) -> Option<(usize, EngineEvent)> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// Polls for the next event.
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, EngineEvent)>> {
        if self.running == 0 {
            return Poll::Ready(None);
        }
        match self.events.poll_recv(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some((sample, event))) => {
                self.record(sample, &event);
                Poll::Ready(Some((sample, event)))
            }
            Poll::Ready(None) => {
                // The engine has dropped its side: it has ended.
                let sample = self.clocks.iter().position(|clock| clock.is_running).unwrap_or(0);
                self.running = 0;
                let message = "the engine stopped in the middle of the answer";
                let error = crate::EngineError::new(crate::EngineErrorKind::Internal, message);
                Poll::Ready(Some((sample, EngineEvent::Failed(error))))
            }
        }
    }

    fn record(&mut self, sample: usize, event: &EngineEvent) {
        let metrics = &self.state.metrics;
        let Some(clock) = self.clocks.get_mut(sample).filter(|clock| clock.is_running) else { return };
        let now = Instant::now();
        match event {
            EngineEvent::Prompt(_) => return,
            EngineEvent::Tokens { ids, .. } if ids.is_empty() => return,
            EngineEvent::Tokens { ids, .. } => {
                metrics.generation_tokens.add(ids.len());
                match clock.last_token.replace(now) {
                    None => metrics.first_token.observe(now - clock.start),
                    Some(last) => metrics.between_tokens.observe(now - last),
                }
                return;
            }
            EngineEvent::Finished { reason: FinishReason::Stop, .. } => metrics.finished_stop.add(1),
            EngineEvent::Finished { reason: FinishReason::Length, .. } => metrics.finished_length.add(1),
            EngineEvent::Failed(_) => metrics.finished_error.add(1),
        }
        metrics.request.observe(now - clock.start);
        clock.is_running = false;
        self.running -= 1;
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let running = self.clocks.iter().filter(|clock| clock.is_running).count();
        if running > 0 {
            self.requests.iter().for_each(|&request| self.state.engine.abort(request));
            self.state.metrics.finished_abort.add(running);
        }
    }
}

/// The tokens of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) cached_tokens: usize,
}

impl Usage {
    pub(crate) fn json(&self) -> Value {
        let Self { prompt_tokens, completion_tokens, cached_tokens } = self;
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        })
    }
}

/// Returns OpenAI's name of a reason.
pub(crate) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

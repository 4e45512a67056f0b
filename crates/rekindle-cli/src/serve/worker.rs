//! The thread that computes, one request at a time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rekindle::{Error, GenerationConfig, Model, StopReason, Tokenizer};
use rekindle_serve::{
    EngineError, EngineErrorKind, EngineEvent, EngineRequest, EngineStats, EventSink, FinishReason, RequestId,
    StopMatch,
};

/// The sending side of the thread.
pub(super) struct Worker {
    jobs: Mutex<Sender<Job>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    next: AtomicU64,
    waiting: AtomicUsize,
    running: AtomicUsize,
    aborted: Mutex<HashSet<RequestId>>,
}

enum Job {
    Generate(RequestId, EngineRequest, EventSink),
    /// A change of the model, between requests.
    Change(Box<dyn FnOnce(&mut Model) + Send>),
}

impl Worker {
    /// Moves a model to a new thread.
    pub(super) fn start(model: Model, tokenizer: Arc<Tokenizer>, end_tokens: Vec<u32>) -> Self {
        let (jobs, received) = channel();
        let shared = Arc::new(Shared::default());
        let thread = Thread { model, tokenizer, end_tokens, shared: shared.clone() };
        std::thread::spawn(move || thread.run(&received));
        Self { jobs: Mutex::new(jobs), shared }
    }

    fn send(&self, job: Job) -> Result<(), EngineError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.send(job).map_err(|_| EngineError::new(EngineErrorKind::Internal, "the engine has stopped"))
    }

    pub(super) fn submit(&self, request: EngineRequest, events: EventSink) -> Result<RequestId, EngineError> {
        check(&request)?;
        let id = RequestId(self.shared.next.fetch_add(1, Ordering::Relaxed));
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        self.send(Job::Generate(id, request, events))?;
        Ok(id)
    }

    pub(super) fn abort(&self, id: RequestId) {
        self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    /// Calls `change` on the thread, and returns its result.
    fn call<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Model) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (sender, result) = channel();
        self.send(Job::Change(Box::new(move |model| {
            // Nobody waits if the server is ending.
            let _ = sender.send(change(model));
        })))?;
        let stopped = |_| EngineError::new(EngineErrorKind::Internal, "the engine has stopped");
        result.recv().map_err(stopped)?.map_err(|error| EngineError::invalid(error.to_string()))
    }

    /// Returns a name for an adapter that none has yet.
    pub(super) fn unused_name(&self, name: &str) -> Result<String, EngineError> {
        let name = name.to_owned();
        self.call(move |model| {
            let known = model.adapters();
            let names = (2..).map(|number| format!("{name}-{number}"));
            Ok(names.into_iter().find(|name| !known.contains(&name.as_str())).unwrap_or_default())
        })
    }

    pub(super) fn load(&self, name: String, path: String) -> Result<(), EngineError> {
        self.call(move |model| model.load_adapter_as(&name, path))
    }

    pub(super) fn unload(&self, name: String) -> Result<(), EngineError> {
        self.call(move |model| model.delete_adapter(&name))
    }

    pub(super) fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.shared.running.load(Ordering::Relaxed),
            waiting: self.shared.waiting.load(Ordering::Relaxed),
            ..EngineStats::default()
        }
    }
}

/// Refuses what [`Model::generate_text`] does not do.
fn check(request: &EngineRequest) -> Result<(), EngineError> {
    let EngineRequest { sampling, stops, .. } = request;
    let problem = if request.logprobs.is_some() || request.prompt_logprobs.is_some() {
        "logprobs"
    } else if request.constraint.is_some() {
        "constrained answers (response_format, structured_outputs and tool_choice = \"required\")"
    } else if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        "presence_penalty and frequency_penalty"
    } else if !sampling.logit_bias.is_empty() {
        "logit_bias"
    } else if stops.min_tokens > 0 {
        "min_tokens"
    } else if request.max_tokens == 0 {
        "max_tokens = 0"
    } else {
        return Ok(());
    };
    Err(EngineError::invalid(format!("this version does not support {problem}")))
}

struct Thread {
    model: Model,
    tokenizer: Arc<Tokenizer>,
    end_tokens: Vec<u32>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            match job {
                Job::Change(change) => change(&mut self.model),
                Job::Generate(id, request, events) => {
                    self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.shared.running.fetch_add(1, Ordering::Relaxed);
                    for sample in 0..request.n {
                        let event = match self.sample(id, &request, sample, &events) {
                            Ok(Some(event)) => event,
                            Ok(None) => break,
                            Err(error) => {
                                let internal = EngineError::new(EngineErrorKind::Internal, error.to_string());
                                EngineEvent::Failed(internal)
                            }
                        };
                        events.send(sample, event);
                    }
                    self.shared.running.fetch_sub(1, Ordering::Relaxed);
                    self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                }
            }
        }
    }

    /// Generates one sample; returns its last event, or `None` if it was aborted.
    fn sample(
        &mut self,
        id: RequestId,
        request: &EngineRequest,
        sample: usize,
        events: &EventSink,
    ) -> Result<Option<EngineEvent>, Error> {
        let is_aborted = || self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner).contains(&id);
        if is_aborted() {
            return Ok(None);
        }
        match &request.adapter {
            Some(name) if self.model.active_adapter() != Some(name) => self.model.set_adapter(name)?,
            None if self.model.active_adapter().is_some() => self.model.disable_adapter()?,
            _ => {}
        }
        let (sampling, stops) = (&request.sampling, &request.stops);
        let ends = if stops.ignore_eos { &[][..] } else { &self.end_tokens };
        let config = GenerationConfig {
            max_new_tokens: request.max_tokens,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed.unwrap_or(id.0).wrapping_add(sample as u64),
            eos_ids: [ends, &stops.ids].concat(),
        };
        let send =
            |text: String, ids: Vec<u32>| events.send(sample, EngineEvent::Tokens { text, ids, logprobs: Vec::new() });
        let generated =
            self.model.generate_text(&self.tokenizer, &request.prompt, &config, &stops.strings, |piece| {
                send(piece.to_owned(), Vec::new()) && !is_aborted()
            })?;
        let (stop_string, generated) = (generated.stop_string, generated.generated);
        if stop_string.is_none() && generated.stop == StopReason::Caller {
            return Ok(None);
        }
        let kept = stop_string.clone().filter(|_| stops.include_stop).unwrap_or_default();
        let last = generated.ids.last().copied();
        send(kept, generated.ids);
        let (reason, stop) = match (stop_string, generated.stop) {
            (Some(text), _) => (FinishReason::Stop, Some(StopMatch::Text(text))),
            (None, StopReason::Length) => (FinishReason::Length, None),
            (None, _) => (FinishReason::Stop, last.filter(|id| stops.ids.contains(id)).map(StopMatch::Id)),
        };
        Ok(Some(EngineEvent::Finished { reason, stop, cached_tokens: 0 }))
    }
}

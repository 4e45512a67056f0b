//! An engine on a thread of its own.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use crate::request::{Event, Request, RequestId};
use crate::{Engine, EngineModel, EngineStats, Error};

/// Receives the events of one request on the engine's thread; returns false to abort the request. It must not block.
pub type EventSink = Box<dyn FnMut(Event) -> bool + Send>;

/// A call on the engine's thread, between two steps.
type Call<M> = Box<dyn FnOnce(&mut Worker<M>) + Send>;

/// An engine on a thread of its own, for callers on any thread.
///
/// Clones refer to the same engine. Its thread ends when the last clone and the last [`RequestStream`] are dropped.
#[derive(Debug)]
pub struct EngineHandle<M> {
    calls: Sender<Call<M>>,
}

impl<M> Clone for EngineHandle<M> {
    fn clone(&self) -> Self {
        Self { calls: self.calls.clone() }
    }
}

/// The events of one request, in order. It ends after the last event; dropping it earlier aborts the request.
#[derive(Debug)]
pub struct RequestStream {
    id: RequestId,
    events: Receiver<Event>,
    abort: Option<AbortCall>,
}

/// Aborts a request, whatever the engine's model is.
struct AbortCall(Box<dyn FnOnce() + Send>);

impl core::fmt::Debug for AbortCall {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("AbortCall")
    }
}

impl RequestStream {
    /// Returns the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Waits for the next event at most this long; returns `None` if there was none, or if the request is complete.
    pub fn next_within(&self, time: Duration) -> Option<Event> {
        self.events.recv_timeout(time).ok()
    }
}

impl Iterator for RequestStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().ok();
        if event.is_none() {
            self.abort = None;
        }
        event
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if let Some(AbortCall(abort)) = self.abort.take() {
            abort();
        }
    }
}

/// The engine with the receivers of its events.
struct Worker<M> {
    engine: Engine<M>,
    /// With the number of samples that have not ended.
    sinks: HashMap<RequestId, (EventSink, usize)>,
}

impl<M: EngineModel + Send + 'static> EngineHandle<M> {
    /// Moves an engine to a new thread.
    ///
    /// # Errors
    /// [`Error::Argument`] if the system cannot start a thread.
    pub fn spawn(engine: Engine<M>) -> Result<Self, Error> {
        let (calls, received) = channel();
        let worker = Worker { engine, sinks: HashMap::new() };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        let started = thread.spawn(move || worker.run(&received));
        started.map_err(|error| Error::Argument(format!("cannot start a thread for the engine: {error}")))?;
        Ok(Self { calls })
    }

    /// Adds a request; its events arrive in the stream.
    ///
    /// # Errors
    /// As [`Engine::submit`], and [`Error::Stopped`].
    pub fn submit(&self, request: Request) -> Result<RequestStream, Error> {
        let (sender, events) = channel();
        let id = self.submit_with(request, Box::new(move |event| sender.send(event).is_ok()))?;
        let handle = self.clone();
        let abort = Some(AbortCall(Box::new(move || handle.abort(id))));
        Ok(RequestStream { id, events, abort })
    }

    /// Adds a request; `sink` receives its events.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_with(&self, request: Request, sink: EventSink) -> Result<RequestId, Error> {
        self.call(move |worker| {
            let samples = request.n;
            let id = worker.engine.submit(request)?;
            worker.sinks.insert(id, (sink, samples));
            Ok(id)
        })?
    }

    /// Ends all samples of a request.
    pub fn abort(&self, request: RequestId) {
        // Without a thread there is nothing to abort.
        let _ = self.calls.send(Box::new(move |worker| {
            worker.engine.abort(request);
        }));
    }

    /// Ends one sample of a request.
    pub fn abort_sample(&self, request: RequestId, sample: usize) {
        let _ = self.calls.send(Box::new(move |worker| {
            worker.engine.abort_sample(request, sample);
        }));
    }

    /// Returns the state of the engine.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn stats(&self) -> Result<EngineStats, Error> {
        self.call(|worker| worker.engine.stats())
    }

    /// Calls `change` with the model between two steps, as [`Engine::with_model`].
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn with_model<R: Send + 'static>(&self, change: impl FnOnce(&mut M) -> R + Send + 'static) -> Result<R, Error> {
        self.call(|worker| worker.engine.with_model(change))
    }

    /// Drops the key/value cache, as [`Engine::sleep`].
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn sleep(&self) -> Result<(), Error> {
        self.call(|worker| worker.engine.sleep())
    }

    /// Allocates the key/value cache again, as [`Engine::wake`].
    ///
    /// # Errors
    /// As [`Engine::wake`], and [`Error::Stopped`].
    pub fn wake(&self) -> Result<(), Error> {
        self.call(|worker| worker.engine.wake())?
    }

    /// Calls `f` on the engine's thread and waits for its result.
    fn call<R: Send + 'static>(&self, f: impl FnOnce(&mut Worker<M>) -> R + Send + 'static) -> Result<R, Error> {
        let (sender, result) = channel();
        let call = move |worker: &mut Worker<M>| {
            // Nobody waits any more if this fails.
            let _ = sender.send(f(worker));
        };
        self.calls.send(Box::new(call)).map_err(|_| Error::Stopped)?;
        result.recv().map_err(|_| Error::Stopped)
    }
}

impl<M: EngineModel> Worker<M> {
    fn run(mut self, calls: &Receiver<Call<M>>) {
        loop {
            if !self.engine.has_work() {
                let Ok(call) = calls.recv() else { return };
                call(&mut self);
            }
            loop {
                match calls.try_recv() {
                    Ok(call) => call(&mut self),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            for event in self.engine.step() {
                self.deliver(event);
            }
        }
    }

    fn deliver(&mut self, event: Event) {
        let (request, ends) = (event.request(), event.ends_sample());
        // A request whose receiver is gone has no sink.
        let Some((sink, samples)) = self.sinks.get_mut(&request) else { return };
        *samples -= usize::from(ends);
        let is_complete = *samples == 0;
        let is_wanted = sink(event);
        if !is_wanted {
            self.engine.abort(request);
        }
        if is_complete || !is_wanted {
            self.sinks.remove(&request);
        }
    }
}

//! Answers as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use serde_json::Value;
use tokio::time::{Instant, Sleep};

use crate::engine::EngineEvent;
use crate::error::{ApiError, typed_response};
use crate::generation::Generation;

/// A comment is sent after this time without events, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The translation of events into chunks.
pub(crate) trait ChunkWriter: Send + Unpin + 'static {
    /// Returns the chunks before the first event.
    fn begin(&mut self) -> Vec<Value>;

    /// Returns the chunks of an event.
    ///
    /// # Errors
    /// An error that ends the stream.
    fn event(&mut self, sample: usize, event: EngineEvent) -> Result<Vec<Value>, ApiError>;

    /// Returns the chunks after the last event.
    fn end(&mut self) -> Vec<Value>;
}

/// The body of a stream.
struct EventBody<W> {
    generation: Generation,
    writer: W,
    begun: bool,
    ended: bool,
    keep_alive: Pin<Box<Sleep>>,
}

/// Returns a response that streams the chunks of `writer`.
pub(crate) fn response(generation: Generation, writer: impl ChunkWriter) -> Response<Body> {
    let keep_alive = Box::pin(tokio::time::sleep(KEEP_ALIVE));
    let body = EventBody { generation, writer, begun: false, ended: false, keep_alive };
    let mut response = typed_response(StatusCode::OK, "text/event-stream; charset=utf-8", Body::new(body));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx would otherwise collect the stream.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<W: ChunkWriter> EventBody<W> {
    /// Appends the events that have arrived; waits for one if there is none.
    fn poll_text(&mut self, context: &mut Context<'_>) -> Poll<String> {
        let mut text = String::new();
        if !self.begun {
            self.begun = true;
            write(&mut text, &self.writer.begin());
        }
        loop {
            match self.generation.poll_next(context) {
                Poll::Ready(Some((sample, event))) => match self.writer.event(sample, event) {
                    Ok(chunks) => write(&mut text, &chunks),
                    Err(error) => {
                        write(&mut text, &[error.json()]);
                        break;
                    }
                },
                Poll::Ready(None) => {
                    write(&mut text, &self.writer.end());
                    break;
                }
                Poll::Pending if text.is_empty() => {
                    ready!(self.keep_alive.as_mut().poll(context));
                    self.keep_alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
                    return Poll::Ready(": waiting\n\n".to_owned());
                }
                Poll::Pending => {
                    self.keep_alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
                    return Poll::Ready(text);
                }
            }
        }
        self.ended = true;
        text += "data: [DONE]\n\n";
        Poll::Ready(text)
    }
}

fn write(text: &mut String, chunks: &[Value]) {
    for chunk in chunks {
        *text += &format!("data: {chunk}\n\n");
    }
}

impl<W: ChunkWriter> http_body::Body for EventBody<W> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let text = ready!(self.poll_text(context));
        Poll::Ready(Some(Ok(Frame::data(text.into()))))
    }
}

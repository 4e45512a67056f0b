//! The server over HTTP, with an engine whose answers are known.

#![allow(clippy::unwrap_used)]

mod chat;
mod client;
mod completions;
mod dashboard;
mod engine;
mod load;
mod openai;
mod page;
mod routes;

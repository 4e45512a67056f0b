//! `rekindle serve`.

mod engine;
mod worker;

use std::env;
use std::path::Path;
use std::sync::Arc;

use rekindle::Error;
use rekindle::engine::{CacheSize, EngineConfig};
use rekindle_serve::{Server, ServerConfig};

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::{open, output};

use engine::ModelEngine;

/// The environment variable of the API key.
const KEY: &str = "REKINDLE_API_KEY";

pub(crate) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open_named(&args.model, &args.adapter, &args.load)?;
    let tokenizer = open::need_tokenizer(&model, tokenizer)?;
    let own = model.adapters().into_iter().find(|name| args.adapter.iter().all(|adapter| adapter.name != *name));
    // An adapter that was given as the model is named after its directory.
    let own = own.map(|name| (name.to_owned(), adapter_name(&args.model)));
    let base = args.served_model_name.clone().unwrap_or_else(|| match &own {
        Some(_) => model.path().display().to_string(),
        None => args.model.display().to_string(),
    });
    let mut limits = EngineConfig::for_device(model.causal_lm().device());
    if let Some(max_sequences) = args.max_sequences {
        limits.max_sequences = max_sequences;
        limits.max_batch_tokens = limits.max_batch_tokens.max(max_sequences);
    }
    limits.cache = args.cache_memory.map_or(CacheSize::Auto, CacheSize::Bytes);
    let engine = ModelEngine::start(model, tokenizer, base, own, &args.adapter, limits)?;
    let key = args.api_key.clone().or_else(|| env::var(KEY).ok()).filter(|key| !key.is_empty());
    let names: Vec<String> = rekindle_serve::Engine::models(&engine).into_iter().map(|model| model.name).collect();
    let config = ServerConfig {
        max_body_bytes: args.max_body_mib << 20,
        max_prompt_tokens: args.max_prompt_tokens,
        max_in_flight: args.max_in_flight,
        ..ServerConfig::default()
    };
    let server = Server::bind(Arc::new(engine), config, &args.host, args.port);
    let mut server = server.map_err(|source| {
        Failure::Missing(format!("cannot listen at {}:{}: {source}; choose another --port", args.host, args.port))
    })?;
    let address = server.address();
    let is_local = address.ip().is_loopback();
    let has_key = key.is_some();
    // Adapters are read from any directory of this machine.
    server.configure(|config| {
        config.api_key = key;
        config.runtime_adapters = is_local || has_key;
    });
    if !is_local && !has_key {
        eprintln!("anyone who reaches {address} can use the model; set --api-key or {KEY} to require a key");
    }
    eprintln!("models: {}", names.join(", "));
    output::line(&format!("http://{address}"))?;
    server.run().map_err(|error| Failure::Missing(format!("the server failed: {error}")))
}

/// Returns the name of an adapter's directory, or of the run that wrote it.
fn adapter_name(dir: &Path) -> String {
    let mut names = dir.components().rev().filter_map(|part| part.as_os_str().to_str());
    let last = names.next().unwrap_or("adapter");
    match names.next() {
        Some(run) if last == "adapter" => run.to_owned(),
        _ => last.to_owned(),
    }
}

impl From<rekindle_serve::EngineError> for Failure {
    fn from(error: rekindle_serve::EngineError) -> Self {
        Self::Configuration(error.message)
    }
}

/// Returns an error of the library for a client.
fn invalid(error: impl Into<Error>) -> rekindle_serve::EngineError {
    rekindle_serve::EngineError::invalid(error.into().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_named_after_its_run() {
        let name = |path: &str| adapter_name(Path::new(path));
        assert_eq!(name("outputs/sql/adapter"), "sql");
        assert_eq!(name("adapters/sql/"), "sql");
        assert_eq!(name("adapter"), "adapter");
        assert_eq!(name("someone/sql-lora"), "sql-lora");
    }
}

//! Tests of hub access against a server on loopback.

#![allow(clippy::unwrap_used)]

mod cache;
mod checkpoint_headers;
mod download;
mod errors;
mod rows;
mod server;
mod upload;

use std::path::PathBuf;

use rekindle_hub::{Error, HubErrorKind, HubOptions, Resolved, resolve};
use server::Server;
use tempfile::TempDir;

/// An empty cache and the options to use it.
struct Client {
    scratch: TempDir,
    endpoint: String,
    revision: Option<&'static str>,
    token: Option<&'static str>,
    local_files_only: bool,
}

impl Client {
    fn of(server: &Server) -> Client {
        let scratch = tempfile::tempdir().unwrap();
        let endpoint = server.endpoint.clone();
        Client { scratch, endpoint, revision: None, token: None, local_files_only: false }
    }

    fn options(&self) -> HubOptions<'static> {
        HubOptions {
            revision: self.revision.map(str::to_owned),
            token: self.token.map(str::to_owned),
            cache_dir: Some(self.scratch.path().to_path_buf()),
            local_files_only: self.local_files_only,
            endpoint: Some(self.endpoint.clone()),
            on_progress: None,
        }
    }

    fn resolve(&self) -> Result<Resolved, Error> {
        resolve("org/model", self.options())
    }

    /// Returns the model's directory in the cache.
    fn repo(&self) -> PathBuf {
        self.scratch.path().join("models--org--model")
    }

    #[track_caller]
    fn fails(&self, kind: HubErrorKind, expected: &str) {
        let error = self.resolve().unwrap_err();
        assert_eq!(error.hub_kind(), Some(kind), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Returns `n` pseudo-random bytes.
fn noise(n: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(n).collect()
}

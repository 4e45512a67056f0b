//! The commit that adds uploaded files to a repository.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Error;

use super::{Api, DELAYS, Failure, PendingFile, Request, refusal, refused, retry};

/// The hub's answer to a commit.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_oid: String,
}

/// Commits the files; large ones are already in storage. Returns the commit.
pub(super) fn commit(api: &Api, files: &[PendingFile<'_>], message: &str) -> Result<String, Error> {
    let Request { name, endpoint, revision, .. } = api.request();
    let url = format!("{endpoint}/api/models/{name}/commit/{revision}");
    let body = operations(files, message)?;
    retry(&DELAYS, || {
        let answer = api.post(&url, "application/x-ndjson", body.as_bytes()).map_err(|failure| {
            // The commit may exist although its response was lost; a second one would add an empty commit.
            Failure { transient: false, ..failure }
        })?;
        if !answer.status().is_success() {
            return Err(refused(api.request(), &refusal(answer), "commit"));
        }
        let committed: Committed = api.parsed(answer)?;
        Ok(committed.commit_oid)
    })
}

/// Returns a JSON object per line: the message, then the files.
fn operations(files: &[PendingFile<'_>], message: &str) -> Result<String, Error> {
    let mut body = String::new();
    let mut line = |key: &str, value: Value| {
        body += &json!({ "key": key, "value": value }).to_string();
        body.push('\n');
    };
    line("header", json!({ "summary": message, "description": "" }));
    for file in files {
        let path = file.path();
        if file.is_large {
            line("lfsFile", json!({ "path": path, "algo": "sha256", "oid": file.hash, "size": file.size }));
        } else {
            let content = base64(&file.read(u64::MAX)?);
            line("file", json!({ "path": path, "encoding": "base64", "content": content }));
        }
    }
    Ok(body)
}

/// Encodes bytes in base64.
pub(super) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

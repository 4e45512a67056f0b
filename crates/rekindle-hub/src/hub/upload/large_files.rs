//! Transfers to large-file storage, by the batch API of Git LFS with the hub's extension for files in parts.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::header::ETAG;

use crate::Error;

use super::super::api::LFS_JSON;
use super::{Api, CHUNK, DELAYS, Failure, JSON, MAIN, PendingFile, Refusal, Request, refusal, refused, retry};

/// Files that are sent at the same time.
const AT_ONCE: usize = 4;

#[derive(Deserialize)]
struct Batch {
    objects: Vec<BatchObject>,
}

/// The instructions for a file.
#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    /// Missing if the storage already has the contents.
    actions: Option<Actions>,
    error: Option<BatchError>,
}

#[derive(Deserialize)]
struct BatchError {
    code: u16,
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    /// For a file in parts: `chunk_size`, and the URL of each part by its number.
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

/// A file and its instructions.
struct Transfer<'a> {
    file: &'a PendingFile<'a>,
    actions: Actions,
}

/// Sends the files that the storage does not have. Calls `on_progress` with the bytes sent so far and in total.
pub(super) fn send(
    api: &Api,
    files: &[&PendingFile<'_>],
    mut on_progress: Option<Box<dyn FnMut(u64, u64) + '_>>,
) -> Result<(), Error> {
    let mut transfers = Vec::new();
    for chunk in files.chunks(CHUNK) {
        transfers.extend(retry(&DELAYS, || instructions(api, chunk))?);
    }
    let total = transfers.iter().map(|transfer| transfer.file.size).sum();
    let count = transfers.len();
    let queue = Mutex::new(transfers.into_iter());
    let (progress, received) = channel();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(count))
            .map(|_| {
                let (progress, queue) = (progress.clone(), &queue);
                scope.spawn(move || {
                    loop {
                        let next = queue.lock().expect("no thread panics while it holds the queue").next();
                        let Some(transfer) = next else { return Ok(()) };
                        if let Err(error) = transfer.send(api, &progress) {
                            // The other threads finish their files, which then need not be sent again.
                            queue.lock().expect("no thread panics while it holds the queue").by_ref().for_each(drop);
                            return Err(error);
                        }
                    }
                })
            })
            .collect();
        drop(progress);
        let mut done: i64 = 0;
        for bytes in received {
            done += bytes;
            if let Some(on_progress) = &mut on_progress {
                on_progress(done.try_into().unwrap_or(0), total);
            }
        }
        workers.into_iter().try_for_each(|worker| worker.join().expect("an upload does not panic"))
    })
}

/// Asks for the instructions for files; leaves out those that the storage has.
fn instructions<'a>(api: &Api, files: &[&'a PendingFile<'a>]) -> Result<Vec<Transfer<'a>>, Failure> {
    let Request { name, endpoint, .. } = api.request();
    let objects: Vec<Value> = files.iter().map(|file| json!({ "oid": file.hash, "size": file.size })).collect();
    let body = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        "ref": { "name": MAIN },
    });
    let url = format!("{endpoint}/{name}.git/info/lfs/objects/batch");
    let answer = api.post(&url, LFS_JSON, body.to_string().as_bytes())?;
    if !answer.status().is_success() {
        return Err(refused(api.request(), &refusal(answer), "upload"));
    }
    let mut transfers = Vec::new();
    for object in api.parsed::<Batch>(answer)?.objects {
        let Some(file) = files.iter().copied().find(|file| file.hash == object.oid) else {
            return Err(api.unexpected_response("it answers about files that were not asked for"));
        };
        if let Some(BatchError { code, message }) = object.error {
            let said = Refusal { status: code, code: None, message: Some(format!("{}: {message}", file.path())) };
            return Err(refused(api.request(), &said, "upload"));
        }
        transfers.extend(object.actions.map(|actions| Transfer { file, actions }));
    }
    Ok(transfers)
}

impl Transfer<'_> {
    fn send(&self, api: &Api, progress: &Sender<i64>) -> Result<(), Error> {
        let Some(upload) = &self.actions.upload else { return Ok(()) };
        let target = href(api, &upload.href);
        match self.chunk_size(api, upload)? {
            None => drop(self.put(api, &target, 0, self.file.size, progress)?),
            Some(chunk) => self.send_parts(api, &target, upload, chunk, progress)?,
        }
        if let Some(verify) = &self.actions.verify {
            let body = json!({ "oid": self.file.hash, "size": self.file.size });
            self.post(api, &href(api, &verify.href), JSON, &body)?;
        }
        Ok(())
    }

    /// Sends the parts in their order, then the list of their ETags to `complete`.
    fn send_parts(
        &self,
        api: &Api,
        complete: &str,
        upload: &Action,
        chunk: u64,
        progress: &Sender<i64>,
    ) -> Result<(), Error> {
        let unexpected = |what: String| api.unexpected_response(&what).error;
        let path = self.file.path();
        let count = self.file.size.div_ceil(chunk);
        let mut parts = Vec::new();
        for number in 1..=count {
            // The numbers may be padded with zeros.
            let url = upload.header.iter().find(|(key, _)| key.parse() == Ok(number)).and_then(|(_, url)| url.as_str());
            let url = url.ok_or_else(|| unexpected(format!("it has no URL for part {number} of {count} of {path}")))?;
            let start = (number - 1) * chunk;
            let etag = self.put(api, url, start, chunk.min(self.file.size - start), progress)?;
            let etag =
                etag.ok_or_else(|| unexpected(format!("the storage gives no ETag for part {number} of {path}")))?;
            parts.push(json!({ "partNumber": number, "etag": etag }));
        }
        self.post(api, complete, LFS_JSON, &json!({ "oid": self.file.hash, "parts": parts }))
    }

    /// Returns the size of the parts, or `None` for a file in one piece.
    fn chunk_size(&self, api: &Api, upload: &Action) -> Result<Option<u64>, Error> {
        let Some(size) = upload.header.get("chunk_size") else { return Ok(None) };
        let number = size.as_u64().or_else(|| size.as_str()?.parse().ok()).filter(|&number| number > 0);
        let wrong = || api.unexpected_response(&format!("chunk_size {size} of {}", self.file.path())).error;
        number.map(Some).ok_or_else(wrong)
    }

    /// Sends a part of the file; returns its ETag.
    fn put(
        &self,
        api: &Api,
        url: &str,
        start: u64,
        length: u64,
        progress: &Sender<i64>,
    ) -> Result<Option<String>, Error> {
        retry(&DELAYS, || {
            let contents = self.file.open(start).map_err(|error| Failure { error, transient: false })?;
            let mut contents = Counted { inner: contents.take(length), read: 0, progress };
            let answer = api.put(url, &mut contents, length).and_then(|answer| match answer.status().is_success() {
                true => Ok(answer.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).map(str::to_owned)),
                false => Err(api.request().refused(&refusal(answer))),
            });
            if answer.is_err() {
                // The bytes are sent again.
                let _ = progress.send(-contents.read);
            }
            answer
        })
    }

    fn post(&self, api: &Api, url: &str, media: &str, body: &Value) -> Result<(), Error> {
        retry(&DELAYS, || {
            let answer = api.post(url, media, body.to_string().as_bytes())?;
            if answer.status().is_success() {
                return Ok(());
            }
            Err(refused(api.request(), &refusal(answer), "upload"))
        })
    }
}

/// A reader that reports its bytes.
struct Counted<'a, R> {
    inner: R,
    read: i64,
    progress: &'a Sender<i64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as i64;
        // The receiver is gone only if the upload has failed.
        let _ = self.progress.send(read as i64);
        Ok(read)
    }
}

/// Returns a URL of the hub at the endpoint in use: behind a mirror, the hub still names itself.
fn href(api: &Api, href: &str) -> String {
    match href.strip_prefix("https://huggingface.co/") {
        Some(path) => format!("{}/{path}", api.request().endpoint),
        None => href.to_owned(),
    }
}

//! A hub server on loopback: the API of several models, and the storage that large files are redirected to.
//!
//! The tests of the binary include this file too.

#[path = "upload_api.rs"]
mod upload_api;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use sha1::{Digest, Sha1};
use sha2::Sha256;

pub(crate) use upload_api::UploadApi;

/// The model used by most tests.
const MODEL: &str = "org/model";

/// The commit of every branch of every model.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One file of the model.
#[derive(Clone, Default)]
pub(crate) struct RemoteFile {
    pub(crate) bytes: Vec<u8>,
    /// True if the file is in the large-file storage.
    pub(crate) is_large: bool,
    /// The offsets in the file at which the next responses are cut off.
    pub(crate) cuts: Vec<usize>,
    /// An announced size that differs from the real one.
    pub(crate) size: Option<u64>,
    /// Bytes to send instead of the real ones.
    pub(crate) sent: Option<Vec<u8>>,
}

impl RemoteFile {
    /// Returns the hub's ETag, which is a checksum.
    pub(crate) fn etag(&self) -> String {
        match self.is_large {
            true => hex(&Sha256::digest(&self.bytes)),
            false => {
                let header = format!("blob {}\0", self.bytes.len());
                hex(&Sha1::new_with_prefix(header).chain_update(&self.bytes).finalize())
            }
        }
    }
}

type Files = BTreeMap<String, RemoteFile>;

/// The hub's contents, its behaviour, and the requests it received.
pub(crate) struct Hub {
    /// The files of `org/model`.
    pub(crate) files: Files,
    /// The files of other models, by name.
    others: BTreeMap<String, Files>,
    /// The commits of branches and tags.
    pub(crate) revisions: BTreeMap<String, String>,
    /// The required token, if any.
    pub(crate) token: Option<String>,
    /// If true, reading requires a licence that nobody has accepted.
    pub(crate) is_gated: bool,
    /// True if `Range` is supported.
    pub(crate) has_ranges: bool,
    /// Error statuses of the next responses.
    pub(crate) failures: Vec<u16>,
    /// An old name that is redirected.
    pub(crate) old_name: Option<String>,
    /// The number of concurrent storage responses to wait for before one begins, and the number so far.
    pub(crate) wait_for: usize,
    pub(crate) most_at_once: usize,
    at_once: usize,
    /// The method, path and range of every request.
    pub(crate) requests: Vec<String>,
    /// True if the storage received a token.
    pub(crate) leaked_token: bool,
    /// Uploads and the behaviour towards them.
    pub(crate) uploads: UploadApi,
}

pub(crate) struct Server {
    pub(crate) endpoint: String,
    hub: Arc<Mutex<Hub>>,
}

impl Server {
    /// Serves `org/model` with these files; safetensors files are stored as large files.
    pub(crate) fn start(files: &[(&str, &[u8])]) -> Server {
        let hub = Arc::new(Mutex::new(Hub {
            files: remote(files),
            others: BTreeMap::new(),
            revisions: [("main".to_owned(), COMMIT.to_owned())].into(),
            token: None,
            is_gated: false,
            has_ranges: true,
            failures: Vec::new(),
            old_name: None,
            wait_for: 0,
            most_at_once: 0,
            at_once: 0,
            requests: Vec::new(),
            leaked_token: false,
            uploads: UploadApi::default(),
        }));
        // Two ports count as two hosts: a token must not be sent from one to the other.
        let (front, storage) = (listen(), listen());
        let storage_address = address(&storage);
        let endpoint = address(&front);
        for (listener, is_storage) in [(front, false), (storage, true)] {
            let (hub, storage_address) = (hub.clone(), storage_address.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (hub, storage_address) = (hub.clone(), storage_address.clone());
                    // A disconnected client is not an error.
                    thread::spawn(move || answer(&stream, &hub, &storage_address, is_storage).ok());
                }
            });
        }
        Server { endpoint, hub }
    }

    /// Also serves another model, or `datasets/org/name`.
    pub(crate) fn add(&self, name: &str, files: &[(&str, &[u8])]) {
        self.hub().others.insert(name.to_owned(), remote(files));
    }

    pub(crate) fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap()
    }

    pub(crate) fn file(&self, name: &str, change: impl FnOnce(&mut RemoteFile)) {
        change(self.hub().files.get_mut(name).unwrap());
    }

    /// Returns the requests since the last call.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.hub().requests)
    }
}

fn remote(files: &[(&str, &[u8])]) -> Files {
    let files = files.iter().map(|(name, bytes)| {
        let is_large = [".safetensors", ".parquet"].iter().any(|ending| name.ends_with(ending));
        ((*name).to_owned(), RemoteFile { bytes: bytes.to_vec(), is_large, ..RemoteFile::default() })
    });
    files.collect()
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn address(listener: &TcpListener) -> String {
    format!("http://{}", listener.local_addr().unwrap())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Default)]
struct Request {
    method: String,
    path: String,
    authorization: Option<String>,
    range: Option<String>,
    accept: Option<String>,
    /// `Content-Length`.
    length: Option<usize>,
    body: Vec<u8>,
}

/// Reads a request. Returns `None` if the connection is to be closed in the middle of its body.
fn read(stream: &TcpStream, hub: &Mutex<Hub>) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let mut request = Request { method: words.next()?, path: words.next()?, ..Request::default() };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        let value = value.trim().to_owned();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value),
            "range" => request.range = Some(value),
            "accept" => request.accept = Some(value),
            "content-length" => request.length = value.parse().ok(),
            _ => {}
        }
    }
    let length = request.length.unwrap_or(0);
    let cut = if request.method == "PUT" { hub.lock().unwrap().uploads.cuts.pop() } else { None };
    let wanted = cut.unwrap_or(length).min(length);
    reader.take(wanted as u64).read_to_end(&mut request.body).ok()?;
    (wanted == length).then_some(request)
}

fn answer(mut stream: &TcpStream, hub: &Mutex<Hub>, storage: &str, is_storage: bool) -> std::io::Result<()> {
    let Some(request) = read(stream, hub) else { return Ok(()) };
    let reply = {
        let mut hub = hub.lock().unwrap();
        let range = request.range.as_deref().map(|range| format!(" {range}")).unwrap_or_default();
        hub.requests.push(format!("{} {}{range}", request.method, request.path));
        hub.leaked_token |= is_storage && request.authorization.is_some();
        match hub.upload(&request, storage, is_storage) {
            Some(reply) => reply,
            None if is_storage => hub.stored(&request),
            None => hub.reply(&request, storage),
        }
    };
    let is_transfer = is_storage && request.method == "GET";
    if is_transfer {
        wait_for_others(hub);
    }
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", reply.status);
    head += &format!("Content-Length: {}\r\n", reply.body.len());
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
        stream.write_all(&reply.body[..end])?;
    }
    if is_transfer {
        hub.lock().unwrap().at_once -= 1;
    }
    Ok(())
}

/// Waits until enough responses are in progress, or until a timeout.
fn wait_for_others(hub: &Mutex<Hub>) {
    hub.lock().unwrap().at_once += 1;
    let since = Instant::now();
    loop {
        let mut hub = hub.lock().unwrap();
        hub.most_at_once = hub.most_at_once.max(hub.at_once);
        if hub.most_at_once >= hub.wait_for || since.elapsed() > Duration::from_secs(3) {
            return;
        }
        drop(hub);
        thread::sleep(Duration::from_millis(5));
    }
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The number of body bytes after which the connection is closed.
    cut: Option<usize>,
}

fn error(status: u16, code: &str) -> Reply {
    let headers = if code.is_empty() { vec![] } else { vec![("X-Error-Code", code.to_owned())] };
    Reply { status, headers, body: br#"{"error": "the server's words"}"#.to_vec(), ..Reply::default() }
}

impl Hub {
    fn reply(&mut self, request: &Request, storage: &str) -> Reply {
        if let Some(status) = self.failures.pop() {
            return error(status, "");
        }
        let right = self.token.as_ref().map(|token| format!("Bearer {token}"));
        if right.is_some() && request.authorization != right {
            // Like the real hub, which does not distinguish private from missing repositories without a token.
            return error(401, if request.authorization.is_some() { "" } else { "RepoNotFound" });
        }
        let mut path = request.path.clone();
        if let Some(old) = &self.old_name
            && path.contains(old.as_str())
        {
            path = path.replace(old.as_str(), MODEL);
            return Reply { status: 307, headers: vec![("Location", path)], ..Reply::default() };
        }
        let (is_api, rest) = match path.strip_prefix("/api/") {
            Some(rest) => (true, rest.trim_start_matches("models/")),
            None => (false, path.trim_start_matches('/')),
        };
        let Some((name, rest)) = self.name_in(rest) else { return error(404, "RepoNotFound") };
        if is_api && rest == "refs" {
            return self.refs();
        }
        if let Some(revision) = rest.strip_prefix("revision/").filter(|_| is_api) {
            return self.info(name, revision);
        }
        match rest.strip_prefix("resolve/").and_then(|rest| rest.split_once('/')) {
            Some((revision, file)) if self.commit_of(revision).is_some() => {
                let (name, file) = (name.to_owned(), file.to_owned());
                self.resolve(&name, &file, request, storage)
            }
            _ => error(404, "RepoNotFound"),
        }
    }

    /// Splits a path into the model, or the dataset as `datasets/org/name`, and the rest.
    fn name_in<'a>(&self, path: &'a str) -> Option<(&'a str, &'a str)> {
        let parts = if path.starts_with("datasets/") { 2 } else { 1 };
        let (end, _) = path.match_indices('/').nth(parts)?;
        let name = &path[..end];
        (name == MODEL || self.others.contains_key(name)).then_some((name, &path[end + 1..]))
    }

    fn files_of(&mut self, name: &str) -> &mut Files {
        self.others.get_mut(name).unwrap_or(&mut self.files)
    }

    fn commit_of(&self, revision: &str) -> Option<&str> {
        match revision {
            COMMIT => Some(COMMIT),
            name => self.revisions.get(&name.replace("%2F", "/")).map(String::as_str),
        }
    }

    fn refs(&self) -> Reply {
        let branches = self
            .revisions
            .keys()
            .map(|name| serde_json::json!({"name": name, "ref": format!("refs/heads/{name}"), "targetCommit": COMMIT}));
        let branches: Vec<_> = branches.collect();
        let body = serde_json::json!({"branches": branches, "tags": [], "converts": []});
        Reply { status: 200, body: body.to_string().into_bytes(), ..Reply::default() }
    }

    fn info(&self, name: &str, revision: &str) -> Reply {
        let Some(commit) = self.commit_of(revision) else { return error(404, "RevisionNotFound") };
        let files = self.others.get(name).unwrap_or(&self.files);
        let files: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"id": name, "sha": commit, "siblings": files});
        Reply { status: 200, body: body.to_string().into_bytes(), ..Reply::default() }
    }

    fn resolve(&mut self, name: &str, file: &str, request: &Request, storage: &str) -> Reply {
        if self.is_gated {
            return error(if request.authorization.is_some() { 403 } else { 401 }, "GatedRepo");
        }
        let Some(remote) = self.files_of(name).get(file) else { return error(404, "EntryNotFound") };
        let size = remote.size.unwrap_or(remote.bytes.len() as u64);
        let etag = remote.etag();
        let commit = ("X-Repo-Commit", COMMIT.to_owned());
        if remote.is_large {
            let at = if name == MODEL { file.to_owned() } else { format!("{name}/{file}") };
            let headers = vec![
                ("Location", format!("{storage}/{at}?signature=x")),
                ("ETag", "\"the redirect's own\"".to_owned()),
                ("X-Linked-ETag", format!("\"{etag}\"")),
                ("X-Linked-Size", size.to_string()),
                commit,
            ];
            return Reply { status: 302, headers, body: b"Snapshot. Redirecting".to_vec(), ..Reply::default() };
        }
        let mut reply = self.contents(name, file, request);
        reply.headers.extend([("ETag", format!("\"{etag}\"")), commit]);
        reply
    }

    fn stored(&mut self, request: &Request) -> Reply {
        let at = request.path.trim_start_matches('/').split('?').next().unwrap_or_default();
        let (name, file) = self.name_in(at).unwrap_or((MODEL, at));
        let mut reply = self.contents(name, file, request);
        // The storage has its own ETags.
        reply.headers.push(("ETag", "\"storage-1\"".to_owned()));
        reply
    }

    fn contents(&mut self, name: &str, file: &str, request: &Request) -> Reply {
        let has_ranges = self.has_ranges;
        let Some(remote) = self.files_of(name).get_mut(file) else { return error(404, "") };
        let mut body = remote.sent.clone().unwrap_or_else(|| remote.bytes.clone());
        let (mut status, mut start, mut headers) = (200, 0, vec![]);
        if let Some(range) = request.range.as_deref().filter(|_| has_ranges) {
            let (from, to) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).unwrap();
            start = from.parse().unwrap();
            let end = to.parse::<usize>().map_or(body.len(), |to| (to + 1).min(body.len()));
            headers.push(("Content-Range", format!("bytes {start}-{}/{}", end - 1, body.len())));
            body = body[start..end].to_vec();
            status = 206;
        }
        let cut = match request.method.as_str() {
            "GET" if !remote.cuts.is_empty() => Some(remote.cuts.remove(0).saturating_sub(start)),
            _ => None,
        };
        Reply { status, headers, body, cut }
    }
}

//! The part of the loopback hub that takes uploads: repositories, large-file storage and commits.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{COMMIT, Files, Hub, RemoteFile, Reply, Request, error, hex};

/// The state of uploads.
#[derive(Default)]
pub(crate) struct UploadApi {
    /// Repositories that are private.
    pub(crate) private: BTreeSet<String>,
    /// A token that may read and not write.
    pub(crate) read_token: Option<String>,
    /// True if the token may not create repositories.
    pub(crate) creates_nothing: bool,
    /// The contents of the storage, by SHA-256.
    pub(crate) storage: BTreeMap<String, Vec<u8>>,
    /// The parts of files that are not complete.
    parts: BTreeMap<(String, u64), Vec<u8>>,
    /// The size of parts; without it, files are sent in one piece.
    pub(crate) chunk_size: Option<usize>,
    /// Statuses of the next transfers to the storage.
    pub(crate) put_failures: Vec<u16>,
    /// The numbers of body bytes after which the connections of the next transfers are closed.
    pub(crate) cuts: Vec<usize>,
    /// Names of files that the repository ignores.
    pub(crate) ignored: BTreeSet<String>,
    /// A refusal of the next commit, and its message.
    pub(crate) refused_commit: Option<(u16, String)>,
    /// The lines of every commit.
    pub(crate) commits: Vec<Vec<Value>>,
    /// True if a transfer was asked to be verified.
    pub(crate) verified: bool,
}

fn reply(body: &Value) -> Option<Reply> {
    Some(Reply { status: 200, body: body.to_string().into_bytes(), ..Reply::default() })
}

fn refuse(status: u16, message: &str) -> Option<Reply> {
    Some(Reply { status, body: json!({ "error": message }).to_string().into_bytes(), ..Reply::default() })
}

impl Hub {
    /// Returns the contents of a file of a repository.
    pub(crate) fn file_of(&self, name: &str, file: &str) -> Option<Vec<u8>> {
        Some(self.others.get(name)?.get(file)?.bytes.clone())
    }

    /// Answers a request that writes, or asks for the visibility of a repository.
    pub(super) fn upload(&mut self, request: &Request, storage: &str, is_storage: bool) -> Option<Reply> {
        let path = request.path.split('?').next().unwrap_or_default();
        if is_storage {
            return self.put(request, path.strip_prefix("/lfs/")?);
        }
        let name = path.strip_prefix("/api/models/").filter(|name| name.matches('/').count() == 1);
        if request.method == "GET" {
            let name = name.filter(|name| self.others.contains_key(*name))?;
            return reply(&json!({ "id": name, "private": self.uploads.private.contains(name) }));
        }
        if request.method != "POST" {
            return None;
        }
        if let Some(status) = self.failures.pop() {
            return Some(error(status, ""));
        }
        let body = || serde_json::from_slice::<Value>(&request.body).unwrap();
        if let Some(oid) = path.strip_prefix("/complete/") {
            return self.complete(oid, &body());
        }
        let given = request.authorization.as_deref().and_then(|given| given.strip_prefix("Bearer "));
        match given {
            None => return Some(error(401, "")),
            given if given == self.uploads.read_token.as_deref() => {
                return refuse(403, "you need write access");
            }
            given if given != self.token.as_deref() => return Some(error(401, "")),
            _ => {}
        }
        if path == "/verify" {
            self.uploads.verified = self.uploads.storage.contains_key(body()["oid"].as_str().unwrap());
            return reply(&json!({}));
        }
        if path == "/api/repos/create" {
            return self.create(&body());
        }
        if let Some(name) = path.strip_prefix('/').and_then(|path| path.strip_suffix(".git/info/lfs/objects/batch")) {
            assert!(self.others.contains_key(name), "{name}");
            assert_eq!(request.accept.as_deref(), Some("application/vnd.git-lfs+json"));
            return self.batch(&body(), storage);
        }
        let rest = path.strip_prefix("/api/models/")?;
        if let Some(name) = rest.strip_suffix("/preupload/main") {
            return self.preupload(name, &body());
        }
        let name = rest.strip_suffix("/commit/main")?;
        let lines = String::from_utf8(request.body.clone()).unwrap();
        self.commit(name, lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn create(&mut self, body: &Value) -> Option<Reply> {
        if self.uploads.creates_nothing {
            return refuse(403, "this token may not create repositories");
        }
        let name = format!("{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
        if self.others.contains_key(&name) {
            return refuse(409, "You already created this model repo");
        }
        if body["private"] == true {
            self.uploads.private.insert(name.clone());
        }
        self.others.insert(name.clone(), Files::new());
        reply(&json!({ "name": name }))
    }

    fn preupload(&mut self, name: &str, body: &Value) -> Option<Reply> {
        let Some(files) = self.others.get(name) else { return refuse(404, "Repository not found") };
        let answer = body["files"].as_array().unwrap().iter().map(|file| {
            let path = file["path"].as_str().unwrap();
            assert!(STANDARD.decode(file["sample"].as_str().unwrap()).unwrap().len() <= 512);
            let is_large = [".safetensors", ".gguf"].iter().any(|ending| path.ends_with(ending));
            json!({
                "path": path,
                "uploadMode": if is_large { "lfs" } else { "regular" },
                "shouldIgnore": self.uploads.ignored.contains(path),
                "oid": files.get(path).map(RemoteFile::etag),
            })
        });
        let answer: Vec<Value> = answer.collect();
        reply(&json!({ "files": answer }))
    }

    fn batch(&self, body: &Value, storage: &str) -> Option<Reply> {
        assert_eq!((&body["operation"], &body["hash_algo"]), (&json!("upload"), &json!("sha256")));
        let objects = body["objects"].as_array().unwrap().iter().map(|object| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
            if self.uploads.storage.contains_key(oid) {
                return json!({ "oid": oid, "size": size });
            }
            // The hub names itself, behind a mirror too.
            let hub = |path: &str| format!("https://huggingface.co/{path}");
            let upload = match self.uploads.chunk_size {
                None => json!({ "href": format!("{storage}/lfs/{oid}?signature=x"), "header": {} }),
                Some(chunk) => {
                    let mut header = json!({ "chunk_size": chunk.to_string() });
                    for part in 1..=size.div_ceil(chunk as u64) {
                        header[format!("{part:05}")] = format!("{storage}/lfs/{oid}/{part}?signature=x").into();
                    }
                    json!({ "href": hub(&format!("complete/{oid}")), "header": header })
                }
            };
            json!({ "oid": oid, "size": size, "actions": { "upload": upload, "verify": { "href": hub("verify") } } })
        });
        let objects: Vec<Value> = objects.collect();
        reply(&json!({ "transfer": "basic", "objects": objects }))
    }

    fn put(&mut self, request: &Request, target: &str) -> Option<Reply> {
        assert_eq!(request.method, "PUT");
        assert_eq!(request.length, Some(request.body.len()), "storage does not take chunked bodies");
        if let Some(status) = self.uploads.put_failures.pop() {
            return Some(error(status, ""));
        }
        if let Some((oid, part)) = target.split_once('/') {
            let part: u64 = part.parse().unwrap();
            self.uploads.parts.insert((oid.to_owned(), part), request.body.clone());
            let headers = vec![("ETag", format!("\"part {part}\""))];
            return Some(Reply { status: 200, headers, ..Reply::default() });
        }
        self.store(target, request.body.clone())
    }

    fn complete(&mut self, oid: &str, body: &Value) -> Option<Reply> {
        assert_eq!(body["oid"], oid);
        let mut whole = Vec::new();
        for (index, part) in body["parts"].as_array().unwrap().iter().enumerate() {
            let number = index as u64 + 1;
            assert_eq!(part, &json!({ "partNumber": number, "etag": format!("\"part {number}\"") }));
            whole.extend_from_slice(&self.uploads.parts[&(oid.to_owned(), number)]);
        }
        self.store(oid, whole)
    }

    fn store(&mut self, oid: &str, bytes: Vec<u8>) -> Option<Reply> {
        if hex(&Sha256::digest(&bytes)) != oid {
            return refuse(400, "the contents do not match the hash");
        }
        self.uploads.storage.insert(oid.to_owned(), bytes);
        reply(&json!({}))
    }

    fn commit(&mut self, name: &str, lines: Vec<Value>) -> Option<Reply> {
        if let Some((status, message)) = self.uploads.refused_commit.take() {
            return refuse(status, &message);
        }
        assert_eq!(lines[0]["key"], "header");
        for line in &lines[1..] {
            let value = &line["value"];
            let (is_large, bytes) = match line["key"].as_str().unwrap() {
                "file" => (false, STANDARD.decode(value["content"].as_str().unwrap()).unwrap()),
                "lfsFile" => match self.uploads.storage.get(value["oid"].as_str().unwrap()) {
                    Some(bytes) => (true, bytes.clone()),
                    None => return refuse(400, "a large file is not in the storage"),
                },
                key => panic!("{key}"),
            };
            let file = RemoteFile { bytes, is_large, ..RemoteFile::default() };
            self.others.get_mut(name).unwrap().insert(value["path"].as_str().unwrap().to_owned(), file);
        }
        self.uploads.commits.push(lines);
        reply(&json!({ "success": true, "commitOid": COMMIT, "commitUrl": format!("/{name}/commit/{COMMIT}") }))
    }
}

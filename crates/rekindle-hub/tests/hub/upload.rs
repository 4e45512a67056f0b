//! Uploads to the loopback hub.

use std::cell::RefCell;
use std::fs;

use rekindle_hub::{Error, HubErrorKind, UploadContent, UploadFile, UploadOptions, Uploaded, check_upload, upload};
use serde_json::json;

use crate::Client;
use crate::server::{COMMIT, Server};

const NAME: &str = "ada/tuned";

/// A hub that one token may write to.
fn hub() -> Server {
    let server = Server::start(&[]);
    server.hub().token = Some("hf_write".to_owned());
    server
}

fn options(server: &Server) -> UploadOptions<'static> {
    UploadOptions {
        token: Some("hf_write".to_owned()),
        endpoint: Some(server.endpoint.clone()),
        message: "Upload a run".to_owned(),
        ..UploadOptions::default()
    }
}

fn file(path: &str, bytes: &[u8]) -> UploadFile {
    UploadFile { path: path.to_owned(), content: UploadContent::Bytes(bytes.to_vec()) }
}

fn weights() -> Vec<u8> {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// An adapter of two large files and two small ones.
fn adapter() -> Vec<UploadFile> {
    vec![
        file("README.md", b"# tuned"),
        file("adapter_config.json", br#"{"peft_type": "LORA"}"#),
        file("adapter_model.safetensors", &weights()),
        file("extra/more.safetensors", b"more weights"),
    ]
}

fn send(server: &Server, files: &[UploadFile]) -> Result<Uploaded, Error> {
    upload(NAME, files, options(server))
}

#[track_caller]
fn fails(result: Result<Uploaded, Error>, kind: HubErrorKind, parts: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.hub_kind(), Some(kind), "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn an_upload_is_one_commit_that_can_be_downloaded() {
    let server = hub();
    let disk = tempfile::tempdir().unwrap();
    let on_disk = disk.path().join("weights");
    fs::write(&on_disk, weights()).unwrap();
    let mut files = adapter();
    files[2].content = UploadContent::File(on_disk);
    let seen = RefCell::new(Vec::new());
    let options = UploadOptions {
        on_progress: Some(Box::new(|done, total| seen.borrow_mut().push((done, total)))),
        ..options(&server)
    };
    let done = upload(NAME, &files, options).unwrap();
    let url = format!("{}/{NAME}", server.endpoint);
    let changed = files.iter().map(|file| file.path.clone()).collect();
    let expected = Uploaded { url, commit: COMMIT.into(), created: true, changed, unchanged: vec![], ignored: vec![] };
    assert_eq!(done, expected);
    let total = (weights().len() + b"more weights".len()) as u64;
    assert_eq!(seen.borrow().last(), Some(&(total, total)));
    {
        let hub = server.hub();
        assert_eq!(hub.uploads.commits.len(), 1);
        assert_eq!(hub.uploads.commits[0][0]["value"], json!({ "summary": "Upload a run", "description": "" }));
        assert_eq!(hub.file_of(NAME, "README.md").unwrap(), b"# tuned");
        assert!(hub.uploads.verified && !hub.leaked_token && hub.uploads.private.is_empty());
    }
    let mut client = Client::of(&server);
    client.token = Some("hf_write");
    let found = rekindle_hub::resolve(NAME, client.options()).unwrap().path;
    assert_eq!(fs::read(found.join("adapter_model.safetensors")).unwrap(), weights());

    // The same files again: nothing is sent or committed.
    server.requests();
    let again = send(&server, &files).unwrap();
    assert_eq!((again.changed.len(), again.unchanged.len(), again.created), (0, 4, false));
    assert_eq!(again.commit, COMMIT);
    let requests = server.requests();
    assert!(
        requests.iter().all(|request| !request.starts_with("PUT") && !request.contains("/commit/")),
        "{requests:?}"
    );
    // One changed file.
    files[0] = file("README.md", b"# tuned again");
    assert_eq!(send(&server, &files).unwrap().changed, ["README.md"]);
    assert_eq!(server.hub().uploads.commits.len(), 2);
}

#[test]
fn a_token_with_write_permission_is_needed() {
    let server = hub();
    server.hub().uploads.read_token = Some("hf_read".to_owned());
    let with = |token: &str| UploadOptions { token: Some(token.to_owned()), ..options(&server) };
    let wrong = upload(NAME, &adapter(), with("hf_wrong"));
    fails(wrong, HubErrorKind::Denied, &["does not accept the token", "with write permission at http", "set HF_TOKEN"]);
    let read = upload(NAME, &adapter(), with("hf_read"));
    fails(read, HubErrorKind::Denied, &["may not create the repository (you need write access)", "write permission"]);
    server.hub().uploads.creates_nothing = true;
    fails(send(&server, &adapter()), HubErrorKind::Denied, &["may not create the repository"]);
    // A token for one repository that exists.
    server.add(NAME, &[]);
    assert!(!send(&server, &adapter()).unwrap().created);
    server.requests();
    let name = upload("tuned", &adapter(), options(&server));
    fails(name, HubErrorKind::Name, &["tuned: hub names have the form organization/model"]);
    check_upload(NAME, &options(&server)).unwrap();
    let error = check_upload("ada/tu ned", &options(&server)).unwrap_err();
    assert!(error.to_string().contains("\"tu ned\" is not a valid hub name: it has ' '"), "{error}");
    assert!(server.requests().is_empty(), "these ask nothing");
}

#[test]
fn a_private_upload_never_goes_to_a_public_repository() {
    let server = hub();
    let private = || UploadOptions { private: true, ..options(&server) };
    assert!(upload(NAME, &adapter(), private()).unwrap().created);
    assert!(server.hub().uploads.private.contains(NAME));
    assert!(!upload(NAME, &adapter(), private()).unwrap().created, "a private repository exists");

    server.add("ada/public", &[("README.md", b"here")]);
    server.requests();
    let refused = upload("ada/public", &adapter(), private());
    fails(refused, HubErrorKind::Public, &["ada/public: it is public", "/ada/public/settings"]);
    let requests = server.requests();
    assert!(
        requests.iter().all(|request| !request.contains("preupload") && !request.starts_with("PUT")),
        "{requests:?}"
    );
    assert_eq!(upload("ada/public", &adapter(), options(&server)).unwrap().changed.len(), 4);
}

#[test]
fn large_files_are_sent_in_parts() {
    let server = hub();
    // 400,000 bytes: five parts, the last one shorter.
    server.hub().uploads.chunk_size = Some(90_000);
    // The connection breaks in the middle of a part, and the next try gets an error.
    server.hub().uploads.cuts = vec![1_000];
    server.hub().uploads.put_failures = vec![500];
    let seen = RefCell::new((0, 0));
    let options = UploadOptions {
        on_progress: Some(Box::new(|done, total| *seen.borrow_mut() = (done, total))),
        ..options(&server)
    };
    upload(NAME, &[file("model.safetensors", &weights())], options).unwrap();
    assert_eq!(*seen.borrow(), (400_000, 400_000), "bytes that were sent twice count once");
    let hub = server.hub();
    assert_eq!(hub.uploads.storage.values().next().unwrap(), &weights());
    let parts = hub.requests.iter().filter(|request| request.starts_with("PUT")).count();
    assert_eq!(parts, 5 + 1, "a part whose connection broke is not listed: it was never read to its end");
    assert!(!hub.leaked_token);
}

#[test]
fn an_interrupted_upload_continues() {
    let server = hub();
    // The storage refuses one of the two large files.
    server.hub().uploads.put_failures = vec![403];
    fails(send(&server, &adapter()), HubErrorKind::Denied, &["denies access"]);
    assert!(server.hub().uploads.commits.is_empty(), "the repository is unchanged");
    let stored = server.hub().uploads.storage.len();
    server.requests();
    assert_eq!(send(&server, &adapter()).unwrap().changed.len(), 4);
    let sent = server.requests().iter().filter(|request| request.starts_with("PUT")).count();
    assert_eq!(sent, 2 - stored, "only what is missing");
}

#[test]
fn busy_hubs_are_asked_again_and_refusals_are_reported() {
    let server = hub();
    server.hub().failures = vec![503, 429];
    send(&server, &adapter()).unwrap();
    server.hub().uploads.refused_commit = Some((400, "\"base_model\" must be a model id".to_owned()));
    let refused = send(&server, &[file("README.md", b"other")]);
    fails(refused, HubErrorKind::Response, &["refuses to commit (\"base_model\" must be a model id)"]);
    // The connection to nowhere.
    let nowhere = UploadOptions { endpoint: Some("http://127.0.0.1:9".to_owned()), ..options(&server) };
    fails(upload(NAME, &adapter(), nowhere), HubErrorKind::Network, &["cannot reach http://127.0.0.1:9"]);
}

#[test]
fn ignored_and_empty_files() {
    let server = hub();
    server.hub().uploads.ignored.insert("notes.txt".to_owned());
    let files = [file("notes.txt", b"mine"), file("empty.safetensors", b""), file("README.md", b"# x")];
    let done = send(&server, &files).unwrap();
    assert_eq!(done.ignored, ["notes.txt"]);
    assert_eq!(done.changed, ["empty.safetensors", "README.md"]);
    assert!(server.requests().iter().all(|request| !request.starts_with("PUT")), "storage refuses empty files");
    let missing = UploadFile { path: "a".into(), content: UploadContent::File("no/such/file".into()) };
    assert!(matches!(send(&server, &[missing]), Err(Error::Io { .. })));
}

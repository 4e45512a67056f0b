//! Tests of interrupted, repeated, concurrent and damaged downloads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::thread;

use rekindle_hub::{HubErrorKind, HubOptions, resolve};

use crate::server::{RemoteFile, Server};
use crate::{Client, noise};

const WEIGHTS: &str = "model.safetensors";

fn model(weights: &[u8]) -> Server {
    Server::start(&[("config.json", b"{}"), (WEIGHTS, weights)])
}

/// Returns the requests for the contents of the weights.
fn of_weights(server: &Server) -> Vec<String> {
    server.requests().into_iter().filter(|request| request.starts_with("GET /model")).collect()
}

#[test]
fn an_interrupted_download_resumes() {
    let weights = noise(1_000_000);
    let server = model(&weights);
    server.file(WEIGHTS, |file| file.cuts = vec![300_000, 700_000]);
    let client = Client::of(&server);
    let seen = RefCell::new(Vec::new());
    let on_progress = |done, total| seen.borrow_mut().push((done, total));
    let options = HubOptions { on_progress: Some(Box::new(on_progress)), ..client.options() };
    let path = resolve("org/model", options).unwrap().path;

    assert_eq!(fs::read(path.join(WEIGHTS)).unwrap(), weights);
    let url = "GET /model.safetensors?signature=x";
    let expected = [url.to_owned(), format!("{url} bytes=300000-999999"), format!("{url} bytes=700000-999999")];
    assert_eq!(of_weights(&server), expected);
    let seen = seen.into_inner();
    assert!(seen.is_sorted(), "no byte is downloaded twice");
    assert!(seen.iter().all(|&(_, total)| total == 1_000_002));
    assert_eq!(seen.last(), Some(&(1_000_002, 1_000_002)));
}

#[test]
fn partial_data_is_kept_for_the_next_run() {
    let weights = noise(100_000);
    let server = model(&weights);
    server.file(WEIGHTS, |file| file.cuts = vec![60_000]);
    let client = Client::of(&server);
    let remote = server.hub().files[WEIGHTS].clone();
    let remove = |done, _| {
        if done >= 60_000 {
            server.hub().files.remove(WEIGHTS);
        }
    };
    let options = HubOptions { on_progress: Some(Box::new(remove)), ..client.options() };
    let error = resolve("org/model", options).unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::NotFound), "{error}");
    assert!(error.to_string().contains("60.0 kB of 100.0 kB of model.safetensors are kept"), "{error}");
    let etag = remote.etag();
    let incomplete = client.repo().join("blobs").join(format!("{etag}.incomplete"));
    assert_eq!(fs::read(&incomplete).unwrap(), weights[..60_000]);
    assert!(!client.repo().join("refs/main").exists(), "the snapshot is incomplete");

    server.hub().files.insert(WEIGHTS.to_owned(), RemoteFile { cuts: vec![], ..remote });
    server.requests();
    let path = client.resolve().unwrap().path;
    assert_eq!(fs::read(path.join(WEIGHTS)).unwrap(), weights);
    assert_eq!(of_weights(&server), ["GET /model.safetensors?signature=x bytes=60000-99999"]);
    assert!(!incomplete.exists());
}

#[test]
fn mismatched_partial_data_is_downloaded_again() {
    let weights = noise(100_000);
    for left in [vec![7; 40_000], vec![7; 100_000], vec![7; 200_000]] {
        let server = model(&weights);
        let client = Client::of(&server);
        let etag = server.hub().files[WEIGHTS].etag();
        fs::create_dir_all(client.repo().join("blobs")).unwrap();
        fs::write(client.repo().join("blobs").join(format!("{etag}.incomplete")), &left).unwrap();
        let path = client.resolve().unwrap().path;
        assert_eq!(fs::read(path.join(WEIGHTS)).unwrap(), weights);
    }
}

#[test]
fn a_server_without_ranges_is_supported() {
    let weights = noise(100_000);
    let server = model(&weights);
    server.hub().has_ranges = false;
    server.file(WEIGHTS, |file| file.cuts = vec![50_000]);
    let client = Client::of(&server);
    let path = client.resolve().unwrap().path;
    assert_eq!(fs::read(path.join(WEIGHTS)).unwrap(), weights);
}

#[test]
fn damaged_data_is_refused() {
    for name in [WEIGHTS, "config.json"] {
        let server = model(&noise(1000));
        server.file(name, |file| {
            let mut damaged = file.bytes.clone();
            damaged[0] ^= 1;
            file.sent = Some(damaged);
        });
        let client = Client::of(&server);
        let etag = server.hub().files[name].etag();
        client.fails(HubErrorKind::Checksum, &format!("and should be {etag}"));
        let blobs: Vec<_> = fs::read_dir(client.repo().join("blobs")).unwrap().map(|entry| entry.unwrap()).collect();
        assert!(blobs.iter().all(|blob| !blob.file_name().to_string_lossy().starts_with(&etag)), "{blobs:?}");
        assert!(!client.repo().join("refs/main").exists());

        server.file(name, |file| file.sent = None);
        client.resolve().unwrap();
    }
}

#[test]
fn a_file_longer_than_announced_is_refused() {
    let server = model(&noise(1000));
    server.file(WEIGHTS, |file| file.size = Some(900));
    Client::of(&server).fails(HubErrorKind::Checksum, "longer than the 900 bytes");
}

#[test]
fn shards_are_downloaded_in_parallel_by_the_index() {
    let names: Vec<_> = (1..=4).map(|n| format!("model-0000{n}-of-00004.safetensors")).collect();
    let map: serde_json::Map<_, _> = names.iter().map(|name| (format!("w{name}"), name.as_str().into())).collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    let contents: Vec<_> = (1..=4).map(|n| noise(n * 1000)).collect();
    let mut files: Vec<(&str, &[u8])> = vec![
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("consolidated.safetensors", b"the same in another layout"),
        ("empty.safetensors", b""),
        ("tokenizer.json", b""),
    ];
    files.extend(names.iter().zip(&contents).map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let server = Server::start(&files);
    let client = Client::of(&server);
    server.hub().wait_for = names.len();
    let resolved = client.resolve().unwrap();

    assert_eq!(server.hub().most_at_once, names.len());
    let found = fs::read_dir(&resolved.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut expected: BTreeSet<_> = names.iter().cloned().collect();
    expected.extend(["config.json", "model.safetensors.index.json", "tokenizer.json"].map(str::to_owned));
    assert_eq!(found.collect::<BTreeSet<_>>(), expected);
    for (name, bytes) in names.iter().zip(&contents) {
        assert_eq!(&fs::read(resolved.path.join(name)).unwrap(), bytes);
    }
}

/// Simulates two processes on one machine.
#[test]
fn concurrent_processes_download_once() {
    let server = model(&noise(500_000));
    let client = Client::of(&server);
    thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| client.resolve().unwrap()));
        let [first, second] = both.map(|one| one.join().unwrap());
        assert_eq!(first, second);
    });
    assert_eq!(of_weights(&server).len(), 1);
}

/// Simulates transient server errors.
#[test]
fn transient_errors_are_retried() {
    let server = model(&noise(1000));
    server.hub().failures = vec![503, 429];
    Client::of(&server).resolve().unwrap();
}

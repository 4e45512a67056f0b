//! Tests of the cache layout and of offline use.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use rekindle_hub::cache::{Prune, list, prune};
use rekindle_hub::{HubErrorKind, HubOptions, adapter_base, resolve};

use crate::Client;
use crate::server::{COMMIT, Server};

const MODEL: [(&str, &[u8]); 6] = [
    ("README.md", b"# A model"),
    ("config.json", b"{\"model_type\": \"qwen3\"}"),
    ("model.safetensors", b"weights"),
    ("original/params.json", b"{}"),
    ("pytorch_model.bin", b"pickled"),
    ("tokenizer.json", b"{}"),
];

#[test]
fn the_layout_equals_that_of_python() {
    let server = Server::start(&MODEL);
    let client = Client::of(&server);
    let resolved = client.resolve().unwrap();
    assert_eq!(resolved.path, client.repo().join("snapshots").join(COMMIT));
    assert_eq!((resolved.commit.as_deref(), resolved.notice), (Some(COMMIT), None));
    assert_eq!(fs::read_to_string(client.repo().join("refs/main")).unwrap(), COMMIT);

    let mut found = BTreeSet::new();
    for entry in fs::read_dir(&resolved.path).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let remote = server.hub().files[&name].clone();
        assert_eq!(fs::read(entry.path()).unwrap(), remote.bytes);
        #[cfg(unix)]
        assert_eq!(fs::read_link(entry.path()).unwrap(), Path::new("../../blobs").join(remote.etag()));
        found.insert(name);
    }
    let needed = ["config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(found, needed.map(str::to_owned).into());
}

#[test]
fn a_complete_snapshot_needs_one_request() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    let first = client.resolve().unwrap();
    server.requests();
    assert_eq!(client.resolve().unwrap(), first);
    assert_eq!(server.requests(), ["GET /api/models/org/model/revision/main"]);
    // The files of a commit never change.
    client.revision = Some(COMMIT);
    assert_eq!(client.resolve().unwrap(), first);
    assert!(server.requests().is_empty());
}

/// Simulates a snapshot left incomplete by Python's library or by a killed process.
#[test]
fn an_incomplete_snapshot_is_completed() {
    let server = Server::start(&MODEL);
    let client = Client::of(&server);
    let path = client.resolve().unwrap().path;
    fs::remove_file(path.join("tokenizer.json")).unwrap();
    fs::remove_file(path.join("config.json")).unwrap();
    let etag = server.hub().files["config.json"].etag();
    fs::remove_file(client.repo().join("blobs").join(&etag)).unwrap();
    server.requests();
    client.resolve().unwrap();
    assert!(path.join("tokenizer.json").exists());
    let fetched: Vec<_> = server.requests().into_iter().filter(|request| request.starts_with("GET /org")).collect();
    // Only the link of the tokenizer was removed, so its blob is not downloaded again.
    assert_eq!(fetched, [format!("GET /org/model/resolve/{COMMIT}/config.json")]);
}

#[test]
fn offline_mode_uses_the_cache() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    client.local_files_only = true;
    client.fails(HubErrorKind::Offline, "there is no such directory; as a name on the hub: the cache has no ");

    client.local_files_only = false;
    let online = client.resolve().unwrap();
    server.requests();
    client.local_files_only = true;
    assert_eq!(client.resolve().unwrap(), online);
    client.revision = Some("v2");
    client.fails(HubErrorKind::Offline, "(revision \"v2\")");
    client.revision = None;
    fs::remove_file(online.path.join("model.safetensors")).unwrap();
    client.fails(HubErrorKind::Offline, "lacks its weights");
    assert!(server.requests().is_empty());
}

#[test]
fn an_unreachable_hub_falls_back_to_the_cache() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    let online = client.resolve().unwrap();
    client.endpoint = unused_address();
    let offline = client.resolve().unwrap();
    assert_eq!(offline.path, online.path);
    let notice = offline.notice.unwrap();
    assert!(notice.contains(&format!("cannot reach {}: ", client.endpoint)), "{notice}");
    assert!(notice.ends_with(&format!("using commit {COMMIT} from the cache")), "{notice}");
}

#[test]
fn an_unreachable_hub_without_cache_is_an_error() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    client.endpoint = unused_address();
    client.fails(HubErrorKind::Network, "onnection refused");
    client.endpoint = "http://no-such-host.invalid".to_owned();
    client.fails(HubErrorKind::Network, "cannot reach http://no-such-host.invalid: ");
    client.endpoint = "huggingface.co".to_owned();
    client.fails(HubErrorKind::Network, "is not a valid URL");
}

/// Returns the address of a port that was just free.
fn unused_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn the_base_of_an_adapter_is_found() {
    let config = br#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#;
    let server = Server::start(&[("adapter_config.json", config), ("adapter_model.safetensors", b"lora")]);
    server.add("org/base", &MODEL);
    let client = Client::of(&server);
    let adapter = client.resolve().unwrap().path;
    assert!(adapter.join("adapter_model.safetensors").exists());
    let base = adapter_base(&adapter).unwrap().unwrap();
    let base = resolve(&base.name_or_path, client.options()).unwrap().path;
    assert_eq!(fs::read(base.join("model.safetensors")).unwrap(), b"weights");
}

#[test]
fn revisions_are_separate_and_old_ones_are_pruned() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    server.hub().revisions.insert("refs/pr/1".to_owned(), COMMIT.to_owned());
    client.revision = Some("refs/pr/1");
    let requested = client.resolve().unwrap();
    assert_eq!(fs::read_to_string(client.repo().join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert!(server.requests()[0].ends_with("/revision/refs%2Fpr%2F1"));

    let old = client.repo().join("snapshots").join("f".repeat(40));
    fs::create_dir(&old).unwrap();
    fs::write(client.repo().join("blobs/half.incomplete"), [0; 100]).unwrap();
    let models = list(client.scratch.path()).unwrap();
    assert_eq!(models.len(), 1);
    assert_eq!(models[0].revisions.len(), 2);
    assert_eq!(models[0].revisions[0].references, ["refs/pr/1"]);
    assert_eq!(prune(client.scratch.path(), Prune::Unreferenced).unwrap().bytes, 100);
    assert!(!old.exists());
    client.local_files_only = true;
    assert_eq!(client.resolve().unwrap(), requested);
}

/// Runs the test below in a subprocess with its own environment variables.
#[test]
fn environment_variables_are_used() {
    let server = Server::start(&MODEL);
    server.hub().token = Some("hf_file".to_owned());
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "hf_file\n").unwrap();
    let run = |offline: &str| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "cache::in_a_subprocess"]).env("REKINDLE_HUB_TEST", "1");
        for variable in ["HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            child.env_remove(variable);
        }
        child.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", home.path()).env("HF_HUB_OFFLINE", offline);
        child.output().unwrap().status.success()
    };
    assert!(!run("1"), "nothing is cached yet");
    assert!(server.requests().is_empty());
    assert!(run("0"));
    assert!(home.path().join("hub/models--org--model/refs/main").exists());
    server.requests();
    assert!(run("1"));
    assert!(server.requests().is_empty());
}

#[test]
fn in_a_subprocess() {
    if std::env::var_os("REKINDLE_HUB_TEST").is_some() {
        resolve("org/model", HubOptions::default()).unwrap();
    }
}

//! Tests of reading headers without downloading the weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rekindle_hub::{
    CheckpointHeaders, Dtype, Error, HubErrorKind, Resolved, TensorSpec, headers, resolve, write_safetensors,
};

use crate::server::{COMMIT, Server};
use crate::{Client, noise};

/// Returns a safetensors file with these tensors of 200 values each.
fn weights(names: &[String]) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("weights");
    let tensors: Vec<_> = names.iter().map(|name| TensorSpec::new(name, Dtype::BF16, [10, 20])).collect();
    write_safetensors(&path, &BTreeMap::new(), &tensors, |_, out| out.write_all(&noise(400))).unwrap();
    fs::read(path).unwrap()
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}.{number}")).collect()
}

/// Serves two shards; the header of the second is longer than the first request.
fn sharded() -> (Server, Vec<String>) {
    let (few, many) = (names("few", 2), names("many", 2000));
    let mut map: Vec<String> = few.iter().map(|name| format!("\"{name}\": \"1.safetensors\"")).collect();
    map.extend(many.iter().map(|name| format!("\"{name}\": \"2.safetensors\"")));
    let index = format!("{{\"weight_map\": {{{}}}}}", map.join(", "));
    let server = Server::start(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("1.safetensors", &weights(&few)),
        ("2.safetensors", &weights(&many)),
    ]);
    (server, [few, many].concat())
}

fn of(client: &Client) -> Result<(Resolved, CheckpointHeaders), Error> {
    headers("org/model", client.options())
}

fn check(found: &CheckpointHeaders, names: &[String]) {
    assert_eq!(found.tensors.len(), names.len());
    for name in names {
        let tensor = &found.tensors[name];
        assert_eq!((tensor.dtype, &tensor.shape[..], tensor.bytes), (Dtype::BF16, &[10, 20][..], 400), "{name}");
    }
    assert_eq!(found.total_bytes(), 400 * names.len() as u64);
}

fn sent(server: &Server) -> Vec<String> {
    server
        .requests()
        .into_iter()
        .filter(|request| request.starts_with("GET /") && request.contains("signature"))
        .collect()
}

fn files(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn headers_are_read_by_range_requests() {
    let (server, names) = sharded();
    let client = Client::of(&server);
    let (resolved, found) = of(&client).unwrap();
    assert_eq!((resolved.commit.as_deref(), found.is_adapter), (Some(COMMIT), false));
    check(&found, &names);
    let mut requests = sent(&server);
    requests.sort();
    let length = server.hub().files["2.safetensors"].bytes.len() - 400 * 2000;
    assert!(length > 100_000, "{length}");
    let expected = [
        format!("GET /1.safetensors?signature=x bytes=0-{}", server.hub().files["1.safetensors"].bytes.len() - 1),
        "GET /2.safetensors?signature=x bytes=0-99999".to_owned(),
        format!("GET /2.safetensors?signature=x bytes=100000-{}", length - 1),
    ];
    assert_eq!(requests, expected);
    assert_eq!(files(&resolved.path), ["config.json", "model.safetensors.index.json"]);

    // A snapshot without weights does not count as a model.
    let error = resolve("org/model", rekindle_hub::HubOptions { local_files_only: true, ..client.options() });
    assert!(error.unwrap_err().to_string().contains("lacks 1.safetensors"));
    // Cached files are not requested.
    client.resolve().unwrap();
    server.requests();
    let (_, again) = of(&client).unwrap();
    assert_eq!(again, found);
    assert_eq!(server.requests().len(), 1, "only the branch is looked up");
}

#[test]
fn a_server_without_ranges_is_disconnected_after_the_header() {
    let (server, names) = sharded();
    server.hub().has_ranges = false;
    check(&of(&Client::of(&server)).unwrap().1, &names);
}

#[test]
fn an_interrupted_header_is_resumed() {
    let (server, names) = sharded();
    server.file("2.safetensors", |file| file.cuts = vec![50_000]);
    check(&of(&Client::of(&server)).unwrap().1, &names);
}

#[test]
fn an_adapter_is_distinguished_from_a_model() {
    let names = names("lora", 3);
    let server = Server::start(&[
        ("adapter_config.json", b"{}"),
        ("config.json", b"{}"),
        ("adapter_model.safetensors", &weights(&names)),
    ]);
    let (_, found) = of(&Client::of(&server)).unwrap();
    assert!(found.is_adapter);
    check(&found, &names);
    let scratch = tempfile::tempdir().unwrap();
    fs::write(scratch.path().join("adapter_config.json"), "{}").unwrap();
    fs::write(scratch.path().join("adapter_model.safetensors"), weights(&names)).unwrap();
    let here = CheckpointHeaders::open(scratch.path()).unwrap();
    assert_eq!((here.is_adapter, &here.tensors), (true, &found.tensors));
}

#[test]
fn an_invalid_header_is_reported() {
    let server = Server::start(&[("config.json", b"{}"), ("model.safetensors", &noise(1000))]);
    let error = of(&Client::of(&server)).unwrap_err();
    assert!(error.to_string().contains("not a safetensors file"), "{error}");
    let whole = weights(&names("a", 3));
    server.file("model.safetensors", |file| file.bytes = whole[..whole.len() - 1].to_vec());
    let error = of(&Client::of(&server)).unwrap_err();
    assert!(error.to_string().contains("truncated: tensor"), "{error}");
    server.hub().files.clear();
    let error = of(&Client::of(&server)).unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::Weights), "{error}");
}

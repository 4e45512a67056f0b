//! Tests of the errors for names that cannot be resolved, and of their advice.

use rekindle_hub::HubErrorKind;

use crate::Client;
use crate::server::Server;

const MODEL: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", b"weights")];

#[test]
fn an_unaccepted_licence_is_reported() {
    let server = Server::start(&MODEL);
    server.hub().is_gated = true;
    let mut client = Client::of(&server);
    client.token = Some("hf_other");
    client.fails(HubErrorKind::Denied, &format!("accept it at {}/org/model", server.endpoint));
}

#[test]
fn a_private_model_needs_an_accepted_token() {
    let server = Server::start(&MODEL);
    server.hub().token = Some("hf_right".to_owned());
    let mut client = Client::of(&server);
    client.token = Some("hf_wrong");
    client.fails(HubErrorKind::Denied, "does not accept the token (the server's words)");
    client.token = Some("hf_right");
    client.resolve().unwrap();
    assert!(!server.hub().leaked_token, "the storage is a different host");
}

#[test]
fn a_missing_model_or_revision_is_reported() {
    let server = Server::start(&MODEL);
    let mut client = Client::of(&server);
    client.revision = Some("v9");
    client.fails(HubErrorKind::NotFound, r#"it has no branch, tag or commit "v9"; it has "main""#);

    let error = rekindle_hub::resolve("org/modle", client.options()).unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::NotFound), "{error}");
    assert!(error.to_string().contains("org/modle: "), "{error}");
    let expected = format!("there is no such directory; as a name on the hub: {} has no such model", server.endpoint);
    assert!(error.to_string().contains(&expected), "{error}");
}

#[test]
fn a_renamed_model_is_found() {
    let server = Server::start(&MODEL);
    server.hub().old_name = Some("old/name".to_owned());
    let client = Client::of(&server);
    let resolved = rekindle_hub::resolve("old/name", client.options()).unwrap();
    assert!(resolved.path.join("model.safetensors").exists());
}

#[test]
fn a_repository_with_only_pickled_weights_is_refused() {
    let server = Server::start(&[("config.json", b"{}"), ("pytorch_model.bin", b"pickled")]);
    let client = Client::of(&server);
    client.fails(HubErrorKind::Weights, "weights are pickled (\"pytorch_model.bin\")");
    assert!(!client.repo().exists(), "nothing was downloaded");
}

#[test]
fn a_disk_that_is_too_small_is_reported() {
    let server = Server::start(&MODEL);
    server.file("model.safetensors", |file| file.size = Some(1 << 60));
    let client = Client::of(&server);
    client.fails(HubErrorKind::Space, "the download needs 1152921.5 TB");
    let requests = server.requests();
    assert!(requests.iter().all(|request| !request.starts_with("GET /org")), "{requests:?}");
}

#[test]
fn a_server_that_is_not_a_hub_is_reported() {
    let server = Server::start(&MODEL);
    server.hub().revisions.insert("main".to_owned(), "not a commit".to_owned());
    let client = Client::of(&server);
    client.fails(HubErrorKind::Response, "it names no commit");
    // Valid JSON with the wrong fields.
    server.hub().failures = vec![200];
    client.fails(HubErrorKind::Response, "did not respond like a Hugging Face hub (missing field");
}

//! Tests of dataset repositories.

use std::fs;
use std::path::Path;

use rekindle_hub::{DatasetPart, Error, HubErrorKind, HubOptions, ResolvedRows, resolve_rows};

use crate::server::{COMMIT, Server};
use crate::{Client, noise};

fn server(files: &[(&str, &[u8])]) -> Server {
    let server = Server::start(&[]);
    server.add("datasets/org/rows", files);
    server
}

fn rows(client: &Client, split: &str) -> Result<ResolvedRows, Error> {
    resolve_rows("org/rows", &DatasetPart { subset: None, split: split.to_owned() }, client.options())
}

/// Returns the requests to the storage.
fn contents(server: &Server) -> Vec<String> {
    server
        .requests()
        .into_iter()
        .filter(|request| request.starts_with("GET /datasets/") && request.contains("?signature"))
        .collect()
}

const TRAIN: [&str; 2] = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];

#[test]
fn only_the_files_of_the_split_are_downloaded_into_the_shared_cache() {
    let (first, second) = (noise(3000), noise(2000));
    let server = server(&[
        ("README.md", b"# Rows"),
        (TRAIN[1], &second),
        (TRAIN[0], &first),
        ("data/test-00000-of-00001.parquet", b"held out"),
        ("train.jsonl", b"{}"),
    ]);
    let client = Client::of(&server);
    let found = rows(&client, "train").unwrap();
    let snapshot = client.scratch.path().join("datasets--org--rows/snapshots").join(COMMIT);
    assert_eq!(found.files, TRAIN.map(|file| snapshot.join(file)));
    assert_eq!((found.commit.as_deref(), found.notice), (Some(COMMIT), None));
    assert_eq!((fs::read(&found.files[0]).unwrap(), fs::read(&found.files[1]).unwrap()), (first, second));
    #[cfg(unix)]
    assert!(fs::read_link(&found.files[0]).unwrap().starts_with(Path::new("../../../blobs")));
    assert_eq!(contents(&server).len(), 2);

    // Cached files are looked up but not downloaded; offline they are not even looked up.
    assert_eq!(rows(&client, "train").unwrap().files, found.files);
    assert!(contents(&server).is_empty());
    let offline = Client { local_files_only: true, ..client };
    assert_eq!(rows(&offline, "train").unwrap().files, found.files);
    let error = rows(&offline, "test").unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::Offline));
    assert!(error.to_string().contains("it has no split \"test\""), "{error}");
    // Simulates a piece that another process has not downloaded yet.
    fs::remove_file(&found.files[1]).unwrap();
    let error = rows(&offline, "train").unwrap_err();
    assert!(error.to_string().contains("lacks data/train-00001-of-00002.parquet"), "{error}");
}

#[test]
fn missing_rows_splits_and_revisions_are_reported() {
    let server = server(&[("rows.csv", b"a,b")]);
    let client = Client::of(&server);
    let error = rows(&client, "train").unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::Rows));
    assert!(error.to_string().starts_with("org/rows: it holds no Parquet, JSON or JSON Lines files"), "{error}");
    let part = DatasetPart { subset: None, split: "train".to_owned() };
    let error = resolve_rows("org/none", &part, client.options()).unwrap_err();
    assert_eq!(error.hub_kind(), Some(HubErrorKind::NotFound));
    assert!(error.to_string().contains("has no such dataset"), "{error}");
    let options = HubOptions { revision: Some("v9".to_owned()), ..client.options() };
    let error = resolve_rows("org/rows", &part, options).unwrap_err();
    assert!(error.to_string().contains("no branch, tag or commit \"v9\"; it has \"main\""), "{error}");
    let error = rows(&Client::of(&crate::rows::server(&[("a.jsonl", b"{}")])), "dev").unwrap_err();
    assert!(error.to_string().contains("only files without a split, which are \"train\""), "{error}");
}

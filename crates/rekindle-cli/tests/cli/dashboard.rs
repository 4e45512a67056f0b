//! `rekindle dashboard`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;

use crate::{Scratch, command, run};

#[test]
fn a_finished_run_is_shown() {
    let scratch = Scratch::new();
    scratch.train(&[]).ok();
    let mut child = command()
        .args(["dashboard", &scratch.path("").display().to_string(), "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut url = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
    let address = url.trim().strip_prefix("http://").unwrap();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    assert!(get("/").contains("<title>Rekindle runs</title>"));
    let runs = get("/api/runs");
    assert!(runs.contains("\"name\":\"out\",\"running\":false") && runs.contains("\"max_steps\":2.0"), "{runs}");
    let metrics = get("/api/metrics?run=out&from=0");
    assert!(metrics.contains("\"step\":2"), "{metrics}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_wrong_directory_or_address_is_reported() {
    run("dashboard no/such/runs").fails(1, &["no/such/runs is no directory", "output directory of a run"]);
    run("dashboard . --listen here").fails(2, &["\"here\" is not an address such as 127.0.0.1:8001"]);
    let scratch = Scratch::new();
    let file = scratch.path("run.toml").display().to_string();
    crate::rekindle(["train", "--dashboard", &file]).fails(2, &["put --dashboard at the end"]);
}

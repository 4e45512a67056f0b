//! The dashboard over HTTP, and its page in Chromium.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use rekindle_serve::{Dashboard, DashboardConfig};
use serde_json::{Value, json};

/// A dashboard over two runs, of which one is running.
struct Shown {
    dir: tempfile::TempDir,
    address: SocketAddr,
    /// The lock that a trainer would hold.
    _lock: File,
}

fn step(step: u32, loss: f64) -> String {
    let epoch = f64::from(step) / 4.0;
    let line = json!({
        "step": step, "epoch": epoch, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 100,
        "trained_tokens": 50, "tokens_per_second": 200.0, "seconds": f64::from(step), "memory": 1_u64 << 30,
        "peak_memory": 1_u64 << 31,
    });
    format!("{line}\n")
}

impl Shown {
    fn new(listen: &str, stops: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |run: &str, config: &str, lines: &[String]| {
            let run = dir.path().join(run);
            fs::create_dir(&run).unwrap();
            fs::write(run.join("run.toml"), config).unwrap();
            fs::write(run.join("metrics.jsonl"), lines.concat()).unwrap();
        };
        write("live", "[train]\nmax_steps = 8\n", &[step(1, 3.0), step(2, 2.0)]);
        let mut lines: Vec<String> = (1..=4).map(|n| step(n, 2.0 / f64::from(n))).collect();
        for line in &mut lines {
            *line = line.replace('}', ",\"rewards/margins\":0.25}");
        }
        lines.push("{\"step\": 2, \"eval_loss\": 0.75, \"eval_tokens\": 9}\n".to_owned());
        lines.push("{\"step\": 4, \"eval_loss\": 1.0, \"eval_tokens\": 9}\n".to_owned());
        let sample = json!({ "step": 4, "sample": 1, "prompt": "What?", "output": "<b>whale</b>", "new_tokens": 2, "ended": true });
        lines.push(format!("{sample}\n"));
        write("done", "[train]\nnum_train_epochs = 1\n", &lines);
        let lock = File::open(dir.path().join("live")).unwrap();
        lock.lock().unwrap();
        let config = DashboardConfig { dir: dir.path().to_owned(), depth: 2, stops };
        let dashboard = Dashboard::bind(config, listen.parse().unwrap()).unwrap();
        let address = dashboard.address();
        dashboard.spawn();
        Self { dir, address, _lock: lock }
    }

    fn ask(&self, method: &str, path: &str, headers: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.address.port())).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
    }

    fn stop(&self, run: &str) -> (u16, Value) {
        self.ask("POST", &format!("/api/stop?run={run}"), "Host: localhost:1\r\nContent-Type: application/json\r\n")
    }

    fn is_asked_to_stop(&self, run: &str) -> bool {
        self.dir.path().join(run).join("stop").exists()
    }
}

#[test]
fn metrics_are_read_in_pieces() {
    let shown = Shown::new("127.0.0.1:0", true);
    let (status, first) = shown.ask("GET", "/api/metrics?run=live&from=0", "Host: 127.0.0.1\r\n");
    assert_eq!((status, first["lines"].as_array().unwrap().len()), (200, 2));
    let from = format!("from={}&generation={}", first["offset"], first["generation"].as_str().unwrap());
    let path = shown.dir.path().join("live/metrics.jsonl");
    let mut file = File::options().append(true).open(path).unwrap();
    file.write_all(step(3, 1.0).as_bytes()).unwrap();
    let (_, second) = shown.ask("GET", &format!("/api/metrics?run=live&{from}"), "Host: 127.0.0.1\r\n");
    assert_eq!(second["lines"], json!([serde_json::from_str::<Value>(&step(3, 1.0)).unwrap()]));
    let (status, _) = shown.ask("GET", "/api/metrics?run=..%2Fsecret&from=0", "Host: 127.0.0.1\r\n");
    assert_eq!(status, 400, "only runs that were found are read");
    assert_eq!(shown.ask("GET", "/other", "Host: 127.0.0.1\r\n").0, 404);
}

#[test]
fn only_a_page_of_this_machine_stops_a_running_run() {
    let shown = Shown::new("127.0.0.1:0", true);
    assert_eq!(shown.stop("done").0, 400, "it is not running");
    assert_eq!(shown.ask("POST", "/api/stop?run=live", "Host: localhost\r\nContent-Type: text/plain\r\n").0, 415);
    let (status, error) = shown.ask("GET", "/api/runs", "Host: evil.example:80\r\n");
    assert_eq!(status, 403, "{error}");
    assert!(!shown.is_asked_to_stop("live") && !shown.is_asked_to_stop("done"));
    assert_eq!(shown.stop("live").0, 200);
    assert!(shown.is_asked_to_stop("live"));

    let open = Shown::new("0.0.0.0:0", true);
    let (status, error) = open.stop("live");
    assert_eq!(status, 403);
    assert!(error["error"]["message"].as_str().unwrap().contains("stops no runs"), "{error}");
    assert!(!open.is_asked_to_stop("live"));
    assert_eq!(open.ask("GET", "/api/runs", "Host: machine.example\r\n").0, 200);
}

/// Drives the page with `dashboard_test.mjs`, if Node (20 or newer) and Chromium are installed.
#[test]
fn the_dashboard_in_chromium() {
    if !crate::page::has_chromium() {
        return;
    }
    let shown = Shown::new("127.0.0.1:0", true);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http/dashboard_test.mjs");
    assert!(Path::new(script).exists());
    let mut command = Command::new("node");
    command.arg("--experimental-websocket").arg(script).arg(format!("http://{}/", shown.address)).arg(shown.dir.path());
    command.args(std::env::var_os("REKINDLE_SCREENSHOTS"));
    assert!(command.status().unwrap().success(), "dashboard_test.mjs failed");
}

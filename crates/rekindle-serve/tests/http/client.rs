//! A plain HTTP client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rekindle_serve::{Server, ServerConfig, ServerStop};
use serde_json::{Value, json};

use crate::engine::Scripted;

/// A server on a free port, which stops when the test ends.
pub(crate) struct Served {
    pub(crate) engine: Arc<Scripted>,
    pub(crate) address: SocketAddr,
    pub(crate) stopper: ServerStop,
    pub(crate) thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Starts a server.
pub(crate) fn serve(config: ServerConfig) -> Served {
    let engine = Arc::new(Scripted::default());
    let config = ServerConfig { shutdown_timeout: Duration::from_secs(5), ..config };
    let server = Server::bind(engine.clone(), config, "127.0.0.1", 0).unwrap();
    let (address, stopper) = (server.address(), server.stopper());
    let thread = Some(std::thread::spawn(|| server.run().unwrap()));
    Served { engine, address, stopper, thread }
}

/// A response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// Returns the message, `param` and `code` of an error.
    pub(crate) fn error(&self) -> (u16, String, Value, Value) {
        let error = &self.json()["error"];
        assert!(error["type"].is_string(), "{error}");
        (self.status, error["message"].as_str().unwrap().to_owned(), error["param"].clone(), error["code"].clone())
    }

    /// Returns the chunks of a stream, which must end with `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"), "{}", self.text());
        let text = self.text();
        let mut events: Vec<&str> = text.split_terminator("\n\n").filter(|event| !event.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

impl Served {
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends a request with these header lines and returns the connection.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{headers}\r\n");
        // A server that refuses a large body may close the connection before all of it was sent.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        stream
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Response {
        read(self.send(method, path, &format!("Connection: close\r\n{headers}"), body))
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.request("GET", path, "", b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
    }

    /// Asks for a chat completion with further fields.
    pub(crate) fn chat(&self, user: &str, fields: Value) -> Response {
        self.post("/v1/chat/completions", &chat_body(user, fields))
    }

    /// Asks for a completion with further fields.
    pub(crate) fn complete(&self, prompt: impl Into<Value>, fields: Value) -> Response {
        let mut body = json!({"model": "base/model", "prompt": prompt.into()});
        extend(&mut body, fields);
        self.post("/v1/completions", &body)
    }
}

pub(crate) fn chat_body(user: &str, fields: Value) -> Value {
    let mut body = json!({"model": "base/model", "messages": [{"role": "user", "content": user}]});
    extend(&mut body, fields);
    body
}

fn extend(body: &mut Value, fields: Value) {
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
}

/// Reads a response to its end.
pub(crate) fn read(stream: TcpStream) -> Response {
    let mut reader = BufReader::new(stream);
    let (status, headers) = read_head(&mut reader);
    let header = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let mut body = Vec::new();
    if header("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).unwrap();
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    } else {
        let length = header("content-length").unwrap().parse().unwrap();
        body.resize(length, 0);
        reader.read_exact(&mut body).unwrap();
    }
    Response { status, headers, body }
}

/// Reads status and headers.
pub(crate) fn read_head(reader: &mut impl BufRead) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status: {line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    (status, headers)
}

//! `serve` and `chat` with the quickstart's model.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Scratch, command, golden, rekindle, run};

const QUESTION: &str = "What is a whale?";

/// A server on a free port.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(more: &[&str]) -> Self {
        let mut command = command();
        command.arg("serve").arg(golden("../../examples/quickstart/base"));
        command.args(["--served-model-name", "base", "--port", "0", "--device", "cpu"]).args(more);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| panic!("no address: {line:?}")).to_owned();
        Self { child, address }
    }

    /// Returns the status and the body of a response.
    fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let (status, body) = self.request("POST", path, &body.to_string());
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    fn chat(&self, model: &str) -> String {
        let messages = json!([{"role": "user", "content": QUESTION}]);
        let answer =
            self.post("/v1/chat/completions", &json!({"model": model, "messages": messages, "temperature": 0}));
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }
}

/// Trains an adapter of the quickstart's model for a few steps.
fn adapter(scratch: &Scratch) -> String {
    let [base, rows] = ["base", "train.jsonl"].map(|name| golden("../../examples/quickstart").join(name));
    let out = scratch.path("json");
    let text = format!(
        "output_dir = {out:?}\ndevice = \"cpu\"\n[model]\nname_or_path = {base:?}\nmax_seq_length = 128\n[lora]\nr = 8\n\
         lora_alpha = 16\n[data]\ntrain = {rows:?}\n[train]\nmax_steps = 30\nlearning_rate = 8e-3\n"
    );
    let file = scratch.write("json.toml", text);
    rekindle(["train", &file]).ok();
    out.join("adapter").display().to_string()
}

#[test]
fn the_server_answers_as_generate_does_and_adapters_come_and_go() {
    let scratch = Scratch::new();
    let adapter = adapter(&scratch);
    let base = golden("../../examples/quickstart/base").display().to_string();
    let generate = |more: &[&str]| {
        let line = ["generate", "--model", &base, "--device", "cpu", "--chat", QUESTION, "--json"];
        rekindle(line.iter().chain(more)).answer()["text"].as_str().unwrap().to_owned()
    };
    let (plain, tuned) = (generate(&[]), generate(&["--adapter", &adapter]));
    assert_ne!(plain, tuned);

    let server = Server::start(&["--adapter", &format!("json={adapter}")]);
    assert_eq!((server.chat("base"), server.chat("json"), server.chat("base")), (plain.clone(), tuned.clone(), plain));
    let load = json!({"lora_name": "again", "lora_path": adapter});
    server.post("/v1/load_lora_adapter", &load);
    assert_eq!(server.chat("again"), tuned);
    assert_eq!(server.request("POST", "/v1/load_lora_adapter", &load.to_string()).0, 400);
    let replace = json!({"lora_name": "again", "lora_path": adapter, "load_inplace": true});
    server.post("/v1/load_lora_adapter", &replace);
    assert_eq!(server.chat("again"), tuned);
    server.post("/v1/unload_lora_adapter", &json!({"lora_name": "again"}));
    let (status, body) = server.request("GET", "/v1/models", "");
    assert!(status == 200 && body.contains("\"json\"") && !body.contains("\"again\""), "{body}");
    let missing = json!({"lora_name": "x", "lora_path": "/no/such/adapter"});
    let (status, body) = server.request("POST", "/v1/load_lora_adapter", &missing.to_string());
    assert!(status == 400 && body.contains("/no/such/adapter"), "{body}");
}

/// The cache has the size that was asked for, and at least a page.
#[test]
fn the_cache_has_a_size() {
    let base = golden("../../examples/quickstart/base");
    let base = base.display();
    let serve = |more: &str| run(&format!("serve {base} --device cpu --port 0 {more}"));
    serve("--cache-memory 100B").fails(2, &["make it larger"]);
    serve("--cache-memory 4").fails(2, &["make it larger"]);
    serve("--cache-memory much").fails(2, &["24GiB"]);
    serve("--max-sequences 0").fails(2, &["max_sequences is 0"]);
    let server = Server::start(&["--max-sequences", "600", "--cache-memory", "1MiB"]);
    let long = json!({"model": "base", "prompt": "a b ".repeat(2000), "max_tokens": 1});
    let (status, body) = server.request("POST", "/v1/completions", &long.to_string());
    assert_eq!(status, 400, "{body}");
}

/// A prompt far beyond the context is refused without encoding it, which would take gigabytes.
#[test]
fn large_prompts_take_little_memory() {
    let server = Server::start(&[]);
    let text = "a b ".repeat(2 << 20);
    let turn = json!({"model": "base", "messages": [{"role": "user", "content": text}]}).to_string();
    let plain = json!({"model": "base", "prompt": text}).to_string();
    thread::scope(|scope| {
        for (path, body) in [("/v1/chat/completions", &turn), ("/v1/completions", &plain)].repeat(4) {
            let server = &server;
            scope.spawn(move || {
                let (status, answer) = server.request("POST", path, body);
                let answer: Value = serde_json::from_str(&answer).unwrap();
                assert_eq!(
                    (status, answer["error"]["code"].as_str()),
                    (400, Some("context_length_exceeded")),
                    "{answer}"
                );
            });
        }
    });
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(kib < 1 << 20, "{kib} KiB");
    let answer = server.post("/v1/completions", &json!({"model": "base", "prompt": "A whale is", "max_tokens": 3}));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[test]
fn texts_stops_and_streams() {
    let mut server = Server::start(&[]);
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let whole = server.chat("base");
    let word = whole.split(' ').nth(2).unwrap();
    let body = json!({"model": "base", "messages": messages, "temperature": 0, "stop": word});
    let cut = server.post("/v1/chat/completions", &body);
    assert_eq!(cut["choices"][0]["message"]["content"], whole[..whole.find(word).unwrap()]);
    assert_eq!(cut["choices"][0]["stop_reason"], word);

    let body = json!({"model": "base", "messages": messages, "temperature": 0, "stream": true});
    let (_, events) = server.request("POST", "/v1/chat/completions", &body.to_string());
    let chunks = events.lines().filter_map(|line| line.strip_prefix("data: ").filter(|data| *data != "[DONE]"));
    let chunks: Vec<Value> = chunks.map(|data| serde_json::from_str(data).unwrap()).collect();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole);

    let tokens = server.post("/tokenize", &json!({"messages": messages}));
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]}))["prompt"].clone();
    assert_eq!(text, format!("<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"));
    let same = json!({"model": "base", "prompt": tokens["tokens"], "max_tokens": 100, "temperature": 0});
    assert_eq!(server.post("/v1/completions", &same)["choices"][0]["text"], whole);
    let sampled = |seed| {
        let body = json!({"model": "base", "prompt": "The", "n": 2, "seed": seed, "return_token_ids": true});
        server.post("/v1/completions", &body)["choices"].clone()
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));

    #[cfg(unix)]
    {
        Command::new("kill").args(["-INT", &server.child.id().to_string()]).status().unwrap();
        assert!(server.child.wait().unwrap().success());
    }
}

/// Runs the checks of `openai_client.py` with the Python of `REKINDLE_CLIENT_PYTHON`, which has the packages `openai` and
/// `jsonschema`.
#[test]
fn the_python_client() {
    let Some(python) = std::env::var_os("REKINDLE_CLIENT_PYTHON") else {
        eprintln!("not run: REKINDLE_CLIENT_PYTHON is not set");
        return;
    };
    let server = Server::start(&[]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/openai_client.py");
    assert!(Command::new(python).arg(script).arg(&server.address).status().unwrap().success(), "it failed");
}

/// Returns the exit code, the answers and what went to stderr of a chat with these lines.
fn chat(more: &[&str], lines: &str) -> (i32, String, String) {
    let mut command = command();
    command.arg("chat").arg(golden("../../examples/quickstart/base")).args(["--device", "cpu", "--temperature", "0"]);
    let mut child =
        command.args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_chat_remembers_its_turns_and_compares_adapters() {
    let scratch = Scratch::new();
    let adapter = adapter(&scratch);
    let saved = scratch.path("saved.jsonl");
    let lines = format!(
        "{QUESTION}\n/adapter off\n/retry\n/adapter on\n/retry\n/save {}\n/reset\n/system Be brief.\n{QUESTION}\n",
        saved.display()
    );
    let (code, answers, notes) = chat(&["--adapter", &format!("json={adapter}")], &lines);
    assert_eq!(code, 0, "{notes}");
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 4, "{answers:?}");
    assert!(answers[0] == answers[2] && answers[0] != answers[1], "{answers:?}");
    assert!(notes.contains("json (active)"), "{notes}");
    let row: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    assert_eq!(
        row["messages"],
        json!([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answers[2]}])
    );
    // The conversation is the prompt of the next answer: a long one does not fit.
    let many = format!("{QUESTION}\n").repeat(40);
    let (code, _, notes) = chat(&["--max-seq-length", "100"], &many);
    assert!(code == 2 && notes.contains("/reset begins a new one"), "{notes}");
    let (code, _, notes) = chat(&[], "/adapter on\n");
    assert!(code == 2 && notes.contains("--adapter NAME=DIR"), "{notes}");
}

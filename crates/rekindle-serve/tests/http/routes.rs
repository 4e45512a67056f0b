use std::io::{BufReader, Read, Write};
use std::time::{Duration, Instant};

use rekindle_serve::ServerConfig;
use serde_json::{Value, json};

use crate::client::{read, read_head, serve};

const JSON: &str = "Content-Type: application/json\r\n";

#[test]
fn models_and_adapters() {
    let served = serve(ServerConfig { runtime_adapters: true, ..ServerConfig::default() });
    let names = || -> Vec<Value> {
        served.get("/v1/models").json()["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect()
    };
    assert_eq!(names(), ["base/model"]);
    assert_eq!(served.get("/v1/models/base/model").json()["max_model_len"], 2000);
    assert_eq!(served.get("/v1/models/base%2Fmodel").json()["object"], "model");
    assert_eq!(served.get("/v1/models/other").error().0, 404);

    let load = |body: Value| served.post("/v1/load_lora_adapter", &body);
    assert_eq!(load(json!({"lora_name": "sql", "lora_path": "/adapters/sql"})).status, 200);
    assert_eq!(names(), ["base/model", "sql"]);
    let adapter = served.get("/v1/models/sql").json();
    assert_eq!((&adapter["parent"], &adapter["root"]), (&json!("base/model"), &json!("/adapters/sql")));
    let (status, message, ..) = load(json!({"lora_name": "sql", "lora_path": "/b"})).error();
    assert_eq!((status, message.as_str()), (400, "an adapter \"sql\" is loaded already"));
    assert_eq!(load(json!({"lora_name": "sql", "lora_path": "/b", "load_inplace": true})).status, 200);
    assert_eq!(load(json!({"lora_name": "x", "lora_path": "/missing"})).error().0, 404);
    assert_eq!(load(json!({"lora_name": "x"})).error().2, "lora_path");
    let unload = |name: &str| served.post("/v1/unload_lora_adapter", &json!({"lora_name": name}));
    assert_eq!((unload("sql").status, unload("sql").error().0), (200, 404));
    assert_eq!(names(), ["base/model"]);

    let closed = serve(ServerConfig::default());
    let body = json!({"lora_name": "sql", "lora_path": "/a"});
    let (status, message, ..) = closed.post("/v1/load_lora_adapter", &body).error();
    assert!(status == 403 && message.contains("API key"), "{message}");
}

#[test]
fn tokens() {
    let served = serve(ServerConfig::default());
    let answer = served.post("/tokenize", &json!({"prompt": "hé", "return_token_strs": true})).json();
    assert_eq!((&answer["tokens"], &answer["count"]), (&json!([104, 195, 169]), &json!(3)));
    assert_eq!((&answer["max_model_len"], &answer["token_strs"][0]), (&json!(2000), &json!("h")));
    let chat =
        served.post("/tokenize", &json!({"messages": [{"role": "user", "content": "x"}], "model": "base/model"}));
    assert_eq!(chat.json()["count"], "user: x\nassistant: ".len());
    assert_eq!(served.post("/detokenize", &json!({"tokens": [104, 195, 169]})).json(), json!({"prompt": "hé"}));
    assert_eq!(served.post("/detokenize", &json!({"tokens": [999]})).error().2, "tokens");
    assert_eq!(served.post("/tokenize", &json!({"model": "base/model"})).error().2, "messages");
    assert_eq!(served.post("/tokenize", &json!({"prompt": "x", "model": "y"})).error().0, 404);
}

#[test]
fn the_page_health_and_metrics() {
    let served = serve(ServerConfig { api_key: Some("secret".to_owned()), ..ServerConfig::default() });
    let page = served.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let html = page.text();
    assert!(html.contains("/v1/chat/completions") && !html.contains("http://") && !html.contains("https://"));
    assert_eq!(served.get("/health").json(), json!({"status": "ok"}));
    let body = json!({"model": "base/model", "prompt": "say hi"}).to_string();
    let auth = format!("{JSON}Authorization: Bearer secret\r\n");
    assert_eq!(served.request("POST", "/v1/completions", &auth, body.as_bytes()).status, 200);
    let metrics = served.get("/metrics");
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = metrics.text();
    for line in [
        "rekindle:prompt_tokens_total{model_name=\"base/model\"} 6",
        "rekindle:generation_tokens_total{model_name=\"base/model\"} 3",
        "rekindle:request_success_total{model_name=\"base/model\",finished_reason=\"stop\"} 1",
        "rekindle:time_to_first_token_seconds_count{model_name=\"base/model\"} 1",
        "rekindle:inter_token_latency_seconds_count{model_name=\"base/model\"} 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
}

#[test]
fn keys() {
    let served = serve(ServerConfig { api_key: Some("secret".to_owned()), ..ServerConfig::default() });
    let models = |headers: &str| served.request("GET", "/v1/models", headers, b"");
    let refused = models("");
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    assert_eq!((refused.error().0, refused.error().3), (401, json!("invalid_api_key")));
    assert_eq!(models("Authorization: Bearer wrong\r\n").error().1, "the API key is wrong");
    assert_eq!(models("Authorization: Basic secret\r\n").error().0, 401);
    assert_eq!(models("Authorization: Bearer secret\r\n").status, 200);
    // Nothing behind the key is told to others, not even the routes.
    assert_eq!(served.get("/v1/nothing").error().0, 401);
    assert_eq!(served.post("/tokenize", &json!({"prompt": "x"})).error().0, 401);
}

#[test]
fn wrong_paths_methods_and_bodies() {
    let served = serve(ServerConfig { max_body_bytes: 1000, ..ServerConfig::default() });
    assert_eq!(served.get("/v1/nothing").error().1, "there is no route /v1/nothing");
    let (status, message, ..) = served.get("/v1/completions").error();
    assert_eq!((status, message.as_str()), (405, "/v1/completions does not take GET"));
    let post = |headers: &str, body: &[u8]| served.request("POST", "/v1/completions", headers, body).error();
    assert_eq!(post("Content-Type: text/plain\r\n", b"{}").0, 415);
    assert_eq!(post("", b"{}").1, "the content type is missing; it must be application/json");
    for (body, part) in [
        (&b"{\"model\""[..], "not valid JSON: EOF"),
        (b"", "not valid JSON"),
        (b"[]", "the body is a list, not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{\"model\": \"base/model\", \"prompt\": \"\xff\"}", "not valid JSON"),
    ] {
        let (status, message, ..) = post(JSON, body);
        assert!(status == 400 && message.contains(part), "{message}");
    }
    let deep = [b"[".repeat(400), b"]".repeat(400)].concat();
    assert_eq!(post(JSON, &deep).0, 400);
    let (status, message, ..) = post(JSON, &[b' '; 1001]);
    assert_eq!((status, message.as_str()), (413, "the body is larger than the limit of 1000 bytes"));
    // The same without a length.
    let mut stream = served.connect();
    let chunk = format!("{:x}\r\n{}\r\n", 2000, " ".repeat(2000));
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n"
    )
    .unwrap();
    assert_eq!(read(stream).status, 413);
    assert_eq!(served.get("/health").status, 200);
}

#[test]
fn a_large_prompt_gets_a_clear_answer() {
    let served = serve(ServerConfig::default());
    let (status, message, _, code) = served.complete("x".repeat(10 << 20), json!({})).error();
    assert_eq!((status, code), (400, json!("context_length_exceeded")), "{message}");
    assert_eq!(served.complete("say hi", json!({})).status, 200);
}

#[test]
fn a_body_that_does_not_come() {
    let served = serve(ServerConfig { body_timeout: Duration::from_millis(100), ..ServerConfig::default() });
    let mut stream = served.connect();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: 100\r\n\r\n{{").unwrap();
    assert_eq!(read(stream).status, 408);
}

/// Waits until the engine runs `count` requests.
fn wait_for(served: &crate::client::Served, count: usize) {
    let start = Instant::now();
    while served.engine.running.load(std::sync::atomic::Ordering::SeqCst) != count {
        assert!(start.elapsed() < Duration::from_secs(10), "the engine does not run {count} requests");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_leaves_ends_its_request() {
    let served = serve(ServerConfig::default());
    for stream in [false, true] {
        let body = crate::client::chat_body("hang", json!({"stream": stream, "n": 2})).to_string();
        let connection = served.send("POST", "/v1/chat/completions", JSON, body.as_bytes());
        wait_for(&served, 1);
        drop(connection);
        wait_for(&served, 0);
    }
    assert!(served.get("/metrics").text().contains("finished_reason=\"abort\"} 4"));
}

#[test]
fn the_queue_has_a_limit() {
    let served = serve(ServerConfig { max_in_flight: 3, ..ServerConfig::default() });
    let body = crate::client::chat_body("hang", json!({"n": 2})).to_string();
    let connection = served.send("POST", "/v1/chat/completions", JSON, body.as_bytes());
    wait_for(&served, 1);
    let refused = served.chat("say x", json!({"n": 2}));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.error().3, "rate_limit_exceeded");
    assert_eq!(served.chat("say x", json!({})).status, 200);
    drop(connection);
    wait_for(&served, 0);
    let start = Instant::now();
    while served.chat("say x", json!({"n": 3})).status != 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "the places are not given back");
    }
}

#[test]
fn a_reader_that_is_slow_holds_up_nobody() {
    let served = serve(ServerConfig::default());
    let body = crate::client::chat_body("letters", json!({"stream": true, "n": 64})).to_string();
    let slow = served.send("POST", "/v1/chat/completions", JSON, body.as_bytes());
    // The engine ends although nobody reads, and others are answered.
    wait_for(&served, 0);
    assert_eq!(served.chat("say hi", json!({})).json()["choices"][0]["message"]["content"], "hi");
    // All of it is still there.
    let chunks = read(slow).chunks();
    let letters: usize =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).map(str::len).sum();
    assert_eq!(letters, 64 * (crate::engine::MAX_LEN - "user: letters\nassistant: ".len()));
}

#[test]
fn a_shutdown_lets_answers_end() {
    let mut served = serve(ServerConfig::default());
    let body = crate::client::chat_body("slow hello, this takes a while", json!({"stream": true})).to_string();
    let mut reader = BufReader::new(served.send("POST", "/v1/chat/completions", JSON, body.as_bytes()));
    assert_eq!(read_head(&mut reader).0, 200);
    served.stopper.stop();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"stop\"") && rest.contains("data: [DONE]"), "{rest}");
    served.thread.take().unwrap().join().unwrap();
    assert!(std::net::TcpStream::connect(served.address).is_err());
}

#[test]
fn a_shutdown_does_not_wait_forever() {
    let engine = std::sync::Arc::new(crate::engine::Scripted::default());
    let config = ServerConfig { shutdown_timeout: Duration::from_millis(200), ..ServerConfig::default() };
    let server = rekindle_serve::Server::bind(engine.clone(), config, "127.0.0.1", 0).unwrap();
    let (address, stopper) = (server.address(), server.stopper());
    let thread = Some(std::thread::spawn(|| server.run().unwrap()));
    let mut served = crate::client::Served { engine, address, stopper, thread };
    let body = crate::client::chat_body("hang", json!({})).to_string();
    let _connection = served.send("POST", "/v1/chat/completions", JSON, body.as_bytes());
    wait_for(&served, 1);
    served.stopper.stop();
    served.thread.take().unwrap().join().unwrap();
    wait_for(&served, 0);
}

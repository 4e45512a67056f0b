use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rekindle_serve::ServerConfig;
use serde_json::json;

use crate::client::{chat_body, serve};

/// 64 streams, of which every second is cut at some point, leave no request behind.
#[test]
fn streams_cut_at_random() {
    let served = serve(ServerConfig::default());
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for client in 0..64u64 {
            let (served, answered) = (&served, &answered);
            scope.spawn(move || {
                let text = format!("slow number {client} of many");
                if client % 2 == 0 {
                    let body = chat_body(&text, json!({"stream": true})).to_string();
                    let headers = "Content-Type: application/json\r\n";
                    let connection = served.send("POST", "/v1/chat/completions", headers, body.as_bytes());
                    std::thread::sleep(Duration::from_millis(client * 3));
                    drop(connection);
                    return;
                }
                let chunks = served.chat(&text, json!({"stream": true})).chunks();
                let found: String =
                    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
                assert_eq!(found, text[5..]);
                answered.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(answered.load(Ordering::SeqCst), 32);
    let start = std::time::Instant::now();
    while served.engine.running.load(Ordering::SeqCst) > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "requests of clients that left still run");
        std::thread::sleep(Duration::from_millis(5));
    }
}

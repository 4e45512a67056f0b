use std::process::Command;

use rekindle_serve::ServerConfig;
use serde_json::json;

use crate::client::serve;

/// Returns true if Node and Chromium are installed; says so if not.
pub(crate) fn has_chromium() -> bool {
    let is_installed = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let installed = is_installed("node") && is_installed("chromium");
    if !installed {
        assert!(std::env::var_os("REKINDLE_REQUIRE_CHROMIUM").is_none(), "node or chromium is not installed");
        eprintln!("not run: node or chromium is not installed");
    }
    installed
}

/// Drives the chat page with `page_test.mjs`, if Node (20 or newer) and Chromium are installed.
#[test]
fn the_page_in_chromium() {
    if !has_chromium() {
        return;
    }
    let served = serve(ServerConfig { runtime_adapters: true, ..ServerConfig::default() });
    served.post("/v1/load_lora_adapter", &json!({"lora_name": "sql", "lora_path": "/a"}));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http/page_test.mjs");
    let mut command = Command::new("node");
    // Node 20 has WebSocket behind this flag, and later versions without it.
    command.arg("--experimental-websocket").arg(script).arg(format!("http://{}/", served.address));
    command.args(std::env::var_os("REKINDLE_SCREENSHOTS"));
    assert!(command.status().unwrap().success(), "page_test.mjs failed");
    let requests = served.engine.requests.lock().unwrap();
    assert!(requests.iter().any(|request| request.contains("adapter: Some(\"sql\")")), "{requests:?}");
}

use std::process::Command;

use rekindle_serve::ServerConfig;

use crate::client::serve;

/// Runs the checks of `openai_client.py` with the Python of `REKINDLE_CLIENT_PYTHON`, which has the package `openai`.
#[test]
fn the_python_client() {
    let Some(python) = std::env::var_os("REKINDLE_CLIENT_PYTHON") else {
        eprintln!("not run: REKINDLE_CLIENT_PYTHON is not set");
        return;
    };
    let served = serve(ServerConfig { api_key: Some("secret".to_owned()), ..ServerConfig::default() });
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http/openai_client.py");
    let status = Command::new(python).arg(script).arg(format!("http://{}/v1", served.address)).status().unwrap();
    assert!(status.success(), "openai_client.py failed");
}

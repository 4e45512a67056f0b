//! The arguments of `rekindle dashboard`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = DASHBOARD)]
pub(crate) struct DashboardArgs {
    /// The output directory of a run, or a directory of such directories
    #[arg(value_name = "DIR", default_value = "outputs")]
    pub(crate) dir: PathBuf,
    /// The address to listen at; other machines reach 0.0.0.0:8001, and cannot stop runs from there [default:
    /// 127.0.0.1:8001]
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
}

/// Parses an address, which may accidentally be the next argument.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    found.ok_or_else(|| {
        format!("\"{text}\" is not an address such as 127.0.0.1:8001; without an address, put --dashboard at the end")
    })
}

const DASHBOARD: &str = "\
The page shows losses, throughput, memory and samples of the runs in DIR while they are written, compares runs, and can
stop a running run with a checkpoint. It loads nothing from the network. Creating a file named `stop` in a run's output
directory stops the run in the same way.

Examples:
  rekindle dashboard outputs
  rekindle dashboard outputs/run --listen 127.0.0.1:9000
  rekindle train run.toml --dashboard";

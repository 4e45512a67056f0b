//! `rekindle dashboard`, and `rekindle train --dashboard`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use rekindle_serve::{Dashboard, DashboardConfig};

use crate::args::DashboardArgs;
use crate::failure::Failure;
use crate::output;

/// The default port.
const PORT: u16 = 8001;

pub(crate) fn run(args: &DashboardArgs) -> Result<(), Failure> {
    if !args.dir.is_dir() {
        let dir = args.dir.display();
        return Err(Failure::Missing(format!(
            "{dir} is no directory; pass the output directory of a run, or its parent"
        )));
    }
    let dashboard = listen(args.dir.clone(), 2, args.listen)?;
    output::line(&format!("http://{}", dashboard.address()))?;
    dashboard.run().map_err(|error| Failure::Missing(format!("the dashboard failed: {error}")))
}

/// Serves a run, and the runs beside it, in the background.
pub(crate) fn start(output_dir: &Path, address: Option<SocketAddr>) -> Result<(), Failure> {
    let parent = output_dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dashboard = listen(parent.to_owned(), 1, address)?;
    eprintln!("dashboard http://{}", dashboard.address());
    dashboard.spawn();
    Ok(())
}

/// Listens at the given address, or at the default one; if that is in use, at any free port.
fn listen(dir: PathBuf, depth: usize, address: Option<SocketAddr>) -> Result<Dashboard, Failure> {
    let config = DashboardConfig { dir, depth, stops: true };
    let default = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let bound = match address {
        Some(address) => Dashboard::bind(config, address),
        None => Dashboard::bind(config.clone(), default)
            .or_else(|_| Dashboard::bind(config, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))),
    };
    let bound = bound.map_err(|source| {
        let address = address.unwrap_or(default);
        Failure::Missing(format!("cannot listen at {address}: {source}; choose another address"))
    })?;
    let address = bound.address();
    if !address.ip().is_loopback() {
        eprintln!("anyone who reaches {address} can read the metrics and samples of these runs");
    }
    Ok(bound)
}

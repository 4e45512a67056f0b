//! Check of the free space on the cache's disk.

use std::path::Path;

use crate::{Error, HubErrorKind};

use super::failure::Request;

/// Checks that `directory` has space for `needed` more bytes.
///
/// # Errors
/// [`HubErrorKind::Space`], with both numbers. The check passes if the file system does not report its free space.
pub(crate) fn check(request: &Request, directory: &Path, needed: u64) -> Result<(), Error> {
    match fs4::available_space(directory) {
        Ok(free) if free < needed => Err(full(request, directory, needed, free)),
        _ => Ok(()),
    }
}

fn full(request: &Request, directory: &Path, needed: u64, free: u64) -> Error {
    let reason =
        format!("the download needs {}, but only {} are free at {directory:?}; {WAY_OUT}", bytes(needed), bytes(free));
    request.error(HubErrorKind::Space, reason)
}

/// The remedy for a full disk.
pub(crate) const WAY_OUT: &str = "free some space, or set HF_HUB_CACHE to a directory on another disk";

/// Formats `n` in the unit that leaves up to three digits before the point.
pub(crate) fn bytes(n: u64) -> String {
    let mut scaled = n as f64;
    for unit in ["bytes", "kB", "MB", "GB"] {
        if scaled < 999.95 {
            return if unit == "bytes" { format!("{n} bytes") } else { format!("{scaled:.1} {unit}") };
        }
        scaled /= 1000.0;
    }
    format!("{scaled:.1} TB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_scaled_to_a_unit() {
        let cases = [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1_000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (8_044_936_192, "8.0 GB"),
            (u64::MAX, "18446744.1 TB"),
        ];
        for (n, expected) in cases {
            assert_eq!(bytes(n), expected);
        }
    }
}

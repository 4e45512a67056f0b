//! Downloads with a progress bar.

use std::path::PathBuf;

use rekindle::ModelSource;

use crate::failure::Failure;
use crate::progress;

/// Returns the directory of `source`; downloads missing files.
pub(crate) fn directory(source: ModelSource<'_>) -> Result<PathBuf, Failure> {
    let found = source.on_download(progress::downloading()).fetch()?;
    say(found.notice.as_slice());
    Ok(found.path)
}

/// Prints notices about the origin of files.
pub(crate) fn say(notices: &[String]) {
    for notice in notices {
        eprintln!("{notice}");
    }
}

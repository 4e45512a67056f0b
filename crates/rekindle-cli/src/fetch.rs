//! Names on the hub turned into directories, with a bar while something comes.

use std::path::PathBuf;

use rekindle::Source;

use crate::failure::Failure;
use crate::progress;

/// The directory of `source`, downloaded where that is needed.
pub(crate) fn directory(source: Source<'_>) -> Result<PathBuf, Failure> {
    let found = source.on_download(progress::downloading()).fetch()?;
    say(found.notice.as_slice());
    Ok(found.path)
}

/// What the user should know about where files came from.
pub(crate) fn say(notices: &[String]) {
    for notice in notices {
        eprintln!("{notice}");
    }
}

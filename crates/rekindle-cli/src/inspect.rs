//! `rekindle inspect`.

use crate::args::InspectArgs;
use crate::failure::Failure;
use crate::{fetch, output};

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let (found, notice) = args.hub.source(&args.path).inspect()?;
    fetch::say(notice.as_slice());
    if args.json {
        return output::line(&serde_json::to_string(&found).expect("facts are JSON"));
    }
    output::line(&found.to_string())
}

//! `rekindle completions`.

use clap::CommandFactory as _;

use crate::args::{Args, CompletionsArgs};
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "rekindle", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

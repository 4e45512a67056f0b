//! The `rekindle` command: training from run files, evaluation, generation, chat, serving, merging, quantization, export,
//! uploads, a dashboard of runs, and inspection of checkpoints, the hub's cache and this machine.
//!
//! Results are printed to stdout, progress and errors to stderr. Exit codes: 0 success, 1 failure (a model or adapter
//! that is missing or invalid, a result that cannot be written), 2 usage or configuration, 3 data, 4 insufficient
//! memory, 5 network or hub, 6 non-finite value, 7 another rank failed, 130 interrupted with a checkpoint.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod args;
#[cfg(feature = "network")]
mod cache;
mod chat;
mod completions;
#[cfg(feature = "serve")]
mod dashboard;
mod data;
mod doctor;
mod dry_run;
mod eval;
mod export;
mod failure;
mod fetch;
mod generate;
mod generate_rows;
mod init;
mod inspect;
mod merge;
mod open;
mod output;
mod plan;
mod progress;
#[cfg(feature = "network")]
mod push;
mod quantize;
mod quickstart;
mod ranks;
mod rewards;
#[cfg(feature = "serve")]
mod serve;
mod signals;
mod train;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Data(command) => data::run(&command),
        Command::Train(args) => train::run(&args),
        Command::Rewards(command) => rewards::run(&command),
        Command::Plan(args) => plan::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(&args),
        #[cfg(feature = "serve")]
        Command::Dashboard(args) => dashboard::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Export(command) => export::run(&command),
        #[cfg(feature = "network")]
        Command::Push(args) => push::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        #[cfg(feature = "network")]
        Command::Cache(command) => cache::run(&command),
        Command::Doctor => doctor::run(),
        Command::Completions(args) => completions::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                // Another rank prints it.
                Failure::Interrupted(text) | Failure::OtherRank(text) if text.is_empty() => {}
                Failure::Interrupted(text) => eprintln!("{text}"),
                failure => eprintln!("error: {failure}"),
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

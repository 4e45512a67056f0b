//! `rekindle data`: the rows of a run as they are trained.

mod stats;
mod view;

use std::io::{IsTerminal, stdout};

use rekindle::RowEncoder;
use rekindle::run::RunConfig;

use crate::args::{DataCommand, PreviewArgs, RunFileArgs};
use crate::failure::Failure;
use crate::train::TerminalObserver;
use crate::{fetch, output};

pub(crate) use view::{Style, facts, view};

pub(crate) fn run(command: &DataCommand) -> Result<(), Failure> {
    match command {
        DataCommand::Preview(args) => preview(args),
        DataCommand::Stats(args) => stats::run(args),
    }
}

/// Reads the run's configuration, and the encoder of its rows.
fn open(args: &RunFileArgs) -> Result<(RunConfig, RowEncoder), Failure> {
    let config = RunConfig::load(&args.run_file, &args.overrides)?;
    let observer = TerminalObserver::default();
    let (mut loader, _) = config.loader(&observer)?;
    fetch::say(&loader.fetch()?.notices);
    let encoder = loader.row_encoder()?;
    Ok((config, encoder))
}

fn preview(args: &PreviewArgs) -> Result<(), Failure> {
    let (config, encoder) = open(&args.run)?;
    let source = if args.eval {
        config.eval_source().ok_or_else(|| {
            Failure::Configuration("[data] has neither eval nor eval_fraction; omit --eval".to_owned())
        })?
    } else {
        config.train_source()
    };
    let (dataset, found) = encoder.encode(&source)?;
    eprintln!("{source}: {found}");
    let per_row = dataset.task().examples_per_row();
    let count = dataset.len() / per_row;
    let shown = match args.row {
        None => 0..args.rows.min(count),
        Some(row) if (1..=count).contains(&row) => row - 1..row,
        Some(row) => {
            return Err(Failure::Configuration(format!("--row {row} is out of range; the rows are 1 to {count}")));
        }
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = if stdout().is_terminal() && !no_color { Style::Colour } else { Style::Plain };
    for example in shown.flat_map(|row| row * per_row..(row + 1) * per_row) {
        let row = example / per_row + 1;
        let example = dataset.example(example);
        if args.json {
            output::line(&view::json(&example, encoder.tokenizer(), row))?;
            continue;
        }
        let text = view(&example, encoder.tokenizer(), style);
        if !output::piece(&format!("row {row} of {count}, {}\n{text}\n\n", facts(&example)))? {
            break;
        }
    }
    Ok(())
}

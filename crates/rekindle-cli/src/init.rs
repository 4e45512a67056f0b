//! `rekindle init`: a first run file, in which a comment explains every key.

use std::fmt::{Display, Write as _};
use std::path::Path;

use rekindle::run::{ModelArguments, SAMPLE_SEED};
use rekindle::{
    DataSource, DeviceKind, Error, ErrorKind, GradientCheckpointing, Loader, RowSample, StepCount, Suggestion, counted,
    show_bytes, write_atomic,
};
use toml::Value;

use crate::args::InitArgs;
use crate::failure::Failure;
use crate::{output, progress};

pub(crate) fn run(args: &InitArgs) -> Result<(), Failure> {
    let out = &args.out;
    if out.exists() {
        return Err(Failure::Configuration(format!(
            "{} already exists; choose another file with --out, or remove it",
            out.display()
        )));
    }
    let data = DataSource::new(&args.data);
    let (suggestion, held_out) = match &args.eval {
        Some(eval) => (rekindle::suggest(loader(args), args.device, &data, Some(&DataSource::new(eval)))?, false),
        None => held_out(args, &data)?,
    };
    eprintln!("{}: {}", args.data.display(), suggestion.rows);
    if let Some(rows) = &suggestion.eval_rows {
        eprintln!("{}: {rows}", args.eval.as_ref().unwrap_or(&args.data).display());
    }
    eprintln!("{}", memory(&suggestion));
    if let Some(time) = &suggestion.time {
        eprintln!("{} take {time}", counted(suggestion.steps, "step"));
    }
    write_atomic(out, text(args, &suggestion, held_out).as_bytes()).map_err(Error::from)?;
    eprintln!("next: rekindle train {} --dry-run", out.display());
    output::line(&out.display().to_string())
}

/// The share of rows to hold out if there are none to evaluate.
const HELD_OUT: f64 = 0.05;
/// The minimum number of rows for holding some out.
const FEWEST: usize = 20;

/// Returns a suggestion; with true if rows are held out, which needs enough rows.
fn held_out(args: &InitArgs, data: &DataSource) -> Result<(Suggestion, bool), Error> {
    let sample = RowSample { held_out: Some(HELD_OUT), seed: SAMPLE_SEED, max_rows: None };
    // The same rows are read for both parts.
    let kept = data.clone().sample(sample).cache(true);
    match rekindle::suggest(loader(args), args.device, &kept, Some(&kept.clone().held_out_rows())) {
        Ok(suggestion) if suggestion.rows.rows + 1 >= FEWEST => Ok((suggestion, true)),
        Ok(_) => Ok((rekindle::suggest(loader(args), args.device, data, None)?, false)),
        // One row alone cannot be parted.
        Err(error) if error.kind() == ErrorKind::Configuration => {
            Ok((rekindle::suggest(loader(args), args.device, data, None)?, false))
        }
        Err(error) => Err(error),
    }
}

fn loader(args: &InitArgs) -> Loader<'static> {
    let arguments = ModelArguments {
        revision: args.hub.revision.clone(),
        cache_dir: args.hub.cache_dir.clone(),
        local_files_only: args.hub.local_files_only,
        ..ModelArguments::new(&args.model)
    };
    Loader::new(arguments).on_download(progress::downloading())
}

/// Formats the memory of the run, compared with the free memory.
fn memory(suggestion: &Suggestion) -> String {
    let Suggestion { estimated, free, fits, .. } = suggestion;
    let takes = format!("the run takes about {}", gib(*estimated));
    match free {
        None => format!("{takes}; free memory of {} is not known", suggestion.device),
        Some(free) if *fits => format!("{takes} of {} free", gib(*free)),
        Some(free) => format!(
            "{takes}, more than nine tenths of the {} free: it may not fit; use a smaller model or shorter rows",
            gib(*free)
        ),
    }
}

/// Formats bytes.
fn gib(bytes: u64) -> String {
    show_bytes(bytes as usize)
}

/// The lines of a run file, with comments beside them.
#[derive(Default)]
struct Lines(String);

/// The column of comments.
const COLUMN: usize = 37;

impl Lines {
    fn line(&mut self, text: &str) {
        self.0 += text;
        self.0.push('\n');
    }

    fn section(&mut self, name: &str) {
        self.line(&format!("\n[{name}]"));
    }

    fn key(&mut self, key: &str, value: impl Into<Value>, why: impl Display) {
        let setting = format!("{key} = {}", value.into());
        writeln!(self.0, "{setting:<COLUMN$} # {why}").expect("writing to a string");
    }

    /// Writes a key as a comment, because it keeps its default.
    fn without(&mut self, setting: &str, why: &str) {
        writeln!(self.0, "{:<COLUMN$} # {why}", format!("# {setting}")).expect("writing to a string");
    }
}

fn text(args: &InitArgs, suggestion: &Suggestion, held_out: bool) -> String {
    let mut lines = Lines::default();
    let stem = args.out.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy());
    lines.line("# Written by `rekindle init` as a starting point. A comment explains each key.");
    lines.line(&format!(
        "# `rekindle train {} --dry-run` summarizes the run; `rekindle train --help` lists the other keys.",
        args.out.display()
    ));
    lines.line("# Paths are relative to the current directory.\n");
    lines.key(
        "output_dir",
        path(&Path::new("outputs").join(&*stem)),
        "directory for adapter/, report.html and metrics.jsonl",
    );
    lines.key(
        "seed",
        3407,
        "seed of the adapter, the order of rows and dropout; on the CPU it makes runs bit-identical",
    );
    let device = match args.device {
        DeviceKind::Auto => format!("an NVIDIA GPU, else the CPU; here {}", suggestion.device),
        _ => "as requested".to_owned(),
    };
    lines.key("device", args.device.to_string(), device);
    model(&mut lines, args, suggestion);
    lora(&mut lines, suggestion);
    data(&mut lines, args, suggestion, held_out);
    train(&mut lines, suggestion);
    lines.0
}

fn model(lines: &mut Lines, args: &InitArgs, suggestion: &Suggestion) {
    let Suggestion { max_seq_length, most, longer, window, rows, .. } = suggestion;
    lines.section("model");
    lines.key("name_or_path", path(&args.model), "a directory, or a name on the hub");
    if let Some(revision) = &args.hub.revision {
        lines.key("revision", revision.clone(), "the branch, tag or commit");
    }
    if let Some(dir) = &args.hub.cache_dir {
        lines.key("cache_dir", path(dir), "directory for downloads");
    }
    if args.hub.local_files_only {
        lines.key("local_files_only", true, "do not use the network");
    }
    let why = match longer {
        0 => format!("every row fits: the longest has {}", counted(rows.longest, "token")),
        _ => format!(
            "99 of 100 rows have at most {}; {longer} are longer; the model's window is {window}",
            counted(*most, "token")
        ),
    };
    lines.key("max_seq_length", *max_seq_length as i64, why);
    if suggestion.is_quantized {
        lines.without("load_in_4bit", "the checkpoint is already quantized");
    } else {
        let why = match (suggestion.load_in_4bit, suggestion.free) {
            (true, _) => {
                format!("QLoRA: dense weights would take about {}", gib(suggestion.estimated_dense))
            }
            (false, Some(free)) => format!("dense weights fit: {} are free", gib(free)),
            (false, None) => "true: weights in NF4, a quarter of the memory".to_owned(),
        };
        lines.key("load_in_4bit", suggestion.load_in_4bit, why);
    }
}

fn lora(lines: &mut Lines, suggestion: &Suggestion) {
    lines.section("lora");
    if suggestion.is_adapter {
        lines.without("r", "the given adapter is continued, with its settings");
    } else {
        let r = suggestion.r as i64;
        lines.key("r", r, "rank, on all linears of a block: 8 for a style, 32 or more for much new knowledge");
        lines.key("lora_alpha", 2 * r, "the adapter's output is multiplied by lora_alpha / r = 2, a usual value");
        lines.key("lora_dropout", 0.0, "0.05 to 0.1 if the evaluation loss rises while the training loss falls");
    }
}

fn data(lines: &mut Lines, args: &InitArgs, suggestion: &Suggestion, held_out: bool) {
    lines.section("data");
    lines.key("train", path(&args.data), &suggestion.rows);
    match (&args.eval, &suggestion.eval_rows) {
        (Some(eval), Some(rows)) => lines.key("eval", path(eval), rows),
        (None, Some(rows)) if held_out => {
            let rows = counted(rows.rows, "row");
            let why = format!("{rows} held out to evaluate; eval = \"heldout.jsonl\" names a file instead");
            lines.key("eval_fraction", HELD_OUT, why);
        }
        _ => lines.without("eval = \"heldout.jsonl\"", "rows never trained on distinguish learning from memorizing"),
    }
    let (value, why) = match suggestion.longer {
        0 => ("error", "a longer row is an error before the run starts".to_owned()),
        rows => {
            let rows = counted(rows, "longer row");
            ("drop", format!("omitted: {rows}; \"truncate\" and \"split\" use them"))
        }
    };
    lines.key("overlong", value, why);
}

fn train(lines: &mut Lines, suggestion: &Suggestion) {
    let Suggestion { train, steps, rows, .. } = suggestion;
    lines.section("train");
    let (batch, passes) = (train.per_device_train_batch_size, train.gradient_accumulation_steps);
    let why = if suggestion.free.is_some() { memory(suggestion) } else { "rows of one pass".to_owned() };
    lines.key("per_device_train_batch_size", batch as i64, why);
    lines.key(
        "gradient_accumulation_steps",
        passes as i64,
        format!("effective batch size {}; how it is split does not change the result", batch * passes),
    );
    let (value, why) = match suggestion.use_gradient_checkpointing {
        GradientCheckpointing::Off => (
            Value::Boolean(false),
            "activations fit; \"unsloth\" keeps a fraction of them, and takes 1.2 times as long on a GPU",
        ),
        GradientCheckpointing::Host => (
            Value::String("unsloth".to_owned()),
            "blocks are recomputed in the backward pass, which saves most activations",
        ),
        _ => (Value::Boolean(true), "blocks are recomputed in the backward pass, which saves most activations"),
    };
    lines.key("use_gradient_checkpointing", value, why);
    lines.key(
        "num_train_epochs",
        // Whole numbers, as they are written by hand.
        train.epochs() as i64,
        format!("{} in {}; more rows need fewer epochs", counted(rows.examples, "row"), counted(*steps, "step")),
    );
    lines.key(
        "learning_rate",
        train.learning_rate.unwrap_or(2e-4),
        "usual for LoRA; the first key to tune, from 5e-5 to 1e-3",
    );
    lines.key("lr_scheduler_type", "cosine", "decreases to 0 along half a cosine");
    let (warmup, logging) = (train.warmup(), train.logging_steps.of(*steps) as i64);
    lines.key("warmup_steps", steps_value(warmup), "a share of all steps, until Adam's moments are reliable");
    lines.key("logging_steps", logging, "steps between lines in the terminal; metrics.jsonl has every step");
    if let Some(every) = train.eval_steps {
        let evaluations = counted(train.timetable(rows.examples).evaluations(), "evaluation");
        lines.key("eval_steps", steps_value(every), format!("{evaluations}, and one before the first step"));
    }
    if train.eval_samples > 0 {
        lines.key(
            "eval_samples",
            train.eval_samples as i64,
            "prompts of eval to answer at each evaluation, for report.html",
        );
        lines.key(
            "sample_max_new_tokens",
            train.sample_max_new_tokens as i64,
            "maximum tokens of an answer; each is a pass through the model",
        );
    }
    if let Some(every) = train.save_steps {
        lines.key("save_steps", steps_value(every), "steps between checkpoints");
    }
}

fn steps_value(steps: StepCount) -> Value {
    match steps {
        StepCount::Steps(steps) => Value::Integer(steps as i64),
        StepCount::Share(share) => Value::Float(share),
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

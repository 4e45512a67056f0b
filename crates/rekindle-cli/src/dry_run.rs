//! `rekindle train --dry-run`: the resolved run file, with a summary of the run in comments.

use rekindle::run::TrainingRun;
use rekindle::{Dataset, Error, OptimizerConfig, Timetable, TokenTime, counted, show_bytes};

use crate::failure::Failure;
use crate::{data, output};

/// The number of examples to show.
const SHOWN: usize = 2;
/// The number of lines to show of an example, and of characters in a line.
const LINES: usize = 12;
const WIDTH: usize = 200;

/// Prints the configuration and the summary; `refusal` is the error that the run would end with in its output
/// directory.
pub(crate) fn print(run: &TrainingRun, refusal: Option<&Error>) -> Result<(), Failure> {
    let TrainingRun { config, model, tokenizer, train_rows, eval_rows, .. } = run;
    let train = train_rows.dataset();

    let mut facts: Vec<String> =
        refusal.map(|refusal| format!("the run would be refused: {refusal}")).into_iter().collect();
    facts.push(trainable(run));
    facts.extend(model.memory_report().to_string().lines().map(str::to_owned));
    facts.extend(model.causal_lm().context_extension().map(|extension| format!("rope_scaling {extension}")));
    facts.push(train_rows.to_string());
    facts.extend(eval_rows.as_ref().map(ToString::to_string));
    facts.push(steps(run, train));
    // The length of completions that the model samples is not known.
    let samples = config.train.method.has_rollouts();
    if !config.train.optimizer_in_bwd && !samples {
        facts.push(time(run)?);
    }
    if let Some(tokenizer) = tokenizer.as_ref().filter(|_| !samples) {
        facts.extend(model.end_token_notice(tokenizer, train)?);
    }
    for example in train.examples().take(SHOWN) {
        facts.push(data::facts(&example));
        let text = data::view(&example, tokenizer.as_ref(), data::Style::Plain);
        facts.extend(text.lines().take(LINES).map(|line| format!("  {}", shorten(line))));
    }
    let comments: String = facts.iter().map(|fact| format!("# {fact}\n")).collect();
    output::line(&format!("{}\n{comments}# a dry run: nothing was written", config.to_toml()))
}

/// Returns the number of trained parameters, and the memory for training them.
pub(crate) fn trainable(run: &TrainingRun) -> String {
    let model = run.model.causal_lm();
    let trained = model.params().numel();
    let all = model.num_parameters() + if model.lora().is_some() { trained } else { 0 };
    let share = 100.0 * trained as f64 / all as f64;
    // Parameters and gradients are f32.
    let bytes = show_bytes(4 * trained);
    let state = OptimizerConfig::from(&run.config.train).state_bytes(model);
    let state = show_bytes(state.device + state.host);
    format!(
        "{trained} of {all} parameters are trained ({share:.2} %): {bytes} of parameters, {bytes} of gradients, {state} of \
         optimizer state"
    )
}

fn steps(run: &TrainingRun, train: &Dataset) -> String {
    let config = &run.config.train;
    let packs = config.rows(train, run.model.causal_lm().max_seq_length()).len();
    let Timetable { total, steps_per_epoch, warmup, .. } = config.timetable(packs);
    let epochs = total as f64 / steps_per_epoch as f64;
    let packed = match config.packing {
        true => format!(" ({} in {})", counted(train.len(), "example"), counted(packs, "pack")),
        false => String::new(),
    };
    let rows = match config.method.has_rollouts() {
        true => counted(config.rows_per_step(), "completion"),
        false => counted(config.rows_per_step().min(packs), "row"),
    };
    format!(
        "{} of {rows}{packed}, {epochs:.2} epochs of {}; {} of warm-up",
        counted(total, "step"),
        counted(steps_per_epoch, "step"),
        counted(warmup, "step")
    )
}

/// Estimates the duration of the run from a timed pass.
fn time(run: &TrainingRun) -> Result<String, Failure> {
    let TrainingRun { config, model, train_rows, eval_rows, .. } = run;
    let train = train_rows.dataset();
    let times = config.train.timetable(config.train.rows(train, model.causal_lm().max_seq_length()).len());
    let eval_tokens = eval_rows.as_ref().map_or(0, |eval| eval.report().tokens);
    let time = TokenTime::measure(model, train, &config.train)?;
    Ok(format!("the run takes {}", time.run(&config.train, &times, train_rows.report().tokens, eval_tokens)))
}

fn shorten(line: &str) -> String {
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line.to_owned(),
    }
}

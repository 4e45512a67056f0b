//! `rekindle train --dry-run`: what a run would do, as a run file with the facts in comments.

use rekindle::{Dataset, OptimizerConfig};

use crate::failure::Failure;
use crate::train::Job;
use crate::{data, output};

/// Examples that are shown.
const SHOWN: usize = 2;
/// Lines of an example that are shown, and characters of a line.
const LINES: usize = 12;
const WIDTH: usize = 200;

pub(crate) fn print(job: &Job) -> Result<(), Failure> {
    let Job { config, model, tokenizer } = job;
    let (source, eval_source) = (config.data.train_source(&config.model), config.data.eval_source(&config.model));
    let (train, found) = model.encode(tokenizer.as_ref(), &source)?;
    let eval = eval_source.as_ref().map(|source| model.encode(tokenizer.as_ref(), source)).transpose()?;

    let mut facts = vec![trainable(job)];
    facts.extend(model.causal_lm().widened().map(|widened| format!("rope_scaling {widened}")));
    facts.push(format!("{source}: {found}"));
    if let (Some(source), Some((_, found))) = (&eval_source, &eval) {
        facts.push(format!("{source}: {found}"));
    }
    facts.push(steps(job, &train));
    for example in train.examples().take(SHOWN) {
        facts.push(data::facts(&example));
        let text = data::view(&example, tokenizer.as_ref(), data::Style::Plain);
        facts.extend(text.lines().take(LINES).map(|line| format!("  {}", shorten(line))));
    }
    let comments: String = facts.iter().map(|fact| format!("# {fact}\n")).collect();
    output::line(&format!("{}\n{comments}# a dry run: nothing was written", config.to_toml()))
}

/// How much is trained, and what it takes beside the weights.
pub(crate) fn trainable(job: &Job) -> String {
    let model = job.model.causal_lm();
    let trained = model.params().numel();
    let all = model.num_parameters() + if model.lora().is_some() { trained } else { 0 };
    let share = 100.0 * trained as f64 / all as f64;
    // Parameters and gradients are f32.
    let mb = 4e-6 * trained as f64;
    let state = OptimizerConfig::from(&job.config.train).state_bytes(model);
    format!(
        "{trained} of {all} parameters are trained ({share:.2} %): {:.1} MB, {:.1} MB of gradients and {:.1} MB of \
         optimizer state",
        mb,
        mb,
        1e-6 * (state.device + state.host) as f64
    )
}

fn steps(job: &Job, train: &Dataset) -> String {
    let config = &job.config.train;
    let packs = config.rows(train, job.model.causal_lm().max_seq_length()).len();
    let total = config.total_steps(packs);
    let rows = config.rows_per_step();
    let epochs = match config.max_steps {
        Some(steps) => steps as f64 * rows as f64 / packs as f64,
        None => config.num_train_epochs,
    };
    let warmup = config.resolved_warmup(total);
    let packed = if config.packing { format!(" ({} examples in {packs} packs)", train.len()) } else { String::new() };
    format!("{total} steps of {rows} rows{packed}, {epochs:.2} times through the data; {warmup} steps of warm-up")
}

fn shorten(line: &str) -> String {
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line.to_owned(),
    }
}

//! `rekindle train --dry-run`: what a run would do, as a run file with the facts in comments.

use rekindle::{Dataset, Example, IGNORED, OptimizerConfig, Tokenizer};

use crate::failure::Failure;
use crate::output;
use crate::train::Job;

/// Examples that are shown.
const SHOWN: usize = 2;
/// Characters of an example that are shown.
const WIDTH: usize = 400;

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
        facts.extend(show(&example, tokenizer.as_ref()));
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
    let total = config.total_steps(train.len());
    let rows = config.rows_per_step();
    let epochs = match config.max_steps {
        Some(steps) => steps as f64 * rows as f64 / train.len() as f64,
        None => config.num_train_epochs,
    };
    let warmup = config.resolved_warmup(total);
    format!("{total} steps of {rows} rows, {epochs:.2} times through the data; {warmup} steps of warm-up")
}

/// An example and, where that is not all of it, the part that is learned.
fn show(example: &Example<'_>, tokenizer: Option<&Tokenizer>) -> Vec<String> {
    let learned: Vec<u32> = example
        .input_ids
        .iter()
        .zip(example.labels)
        .filter(|(_, label)| **label != IGNORED)
        .map(|(id, _)| *id)
        .collect();
    let text = |ids: &[u32]| {
        let text = tokenizer.and_then(|tokenizer| tokenizer.decode(ids, false).ok());
        shorten(&text.map_or_else(|| format!("{ids:?}"), |text| format!("{text:?}")))
    };
    let mut lines = vec![format!("{}: {}", example.row, text(example.input_ids))];
    if learned.len() < example.input_ids.len() {
        lines.push(format!("{}, learned: {}", example.row, text(&learned)));
    }
    lines
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

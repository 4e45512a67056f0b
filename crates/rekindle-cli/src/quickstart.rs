//! `rekindle quickstart`: unpacks the example, shows the base model, fine-tunes it, and shows the difference.

mod unpack;

use std::env;
use std::path::Path;
use std::time::Instant;

use rekindle::run::{RunConfig, TrainOptions, TrainingRun};
use rekindle::{ChatPrompt, DataSource, Error, GenerationConfig, Model, Tokenizer, TrainReport};
use serde::Deserialize;

use crate::args::QuickstartArgs;
use crate::failure::Failure;
use crate::progress::duration;
use crate::train::TerminalObserver;
use crate::{output, progress};

/// The number of held-out rows whose answers are shown.
const SHOWN: usize = 3;
/// The maximum length of an answer; correct answers are shorter.
const MOST_TOKENS: usize = 64;

pub(crate) fn run(args: &QuickstartArgs) -> Result<(), Failure> {
    let start = Instant::now();
    let dir = &args.out;
    let run_file = unpack::unpack(dir)?;
    let config = RunConfig::load(run_file, &[])?;
    let options = TrainOptions { overwrite: true, ..TrainOptions::default() };
    let observer = TerminalObserver::default();
    let mut job = TrainingRun::open(config, options, &observer)?;
    let held_out = held_out();

    output::line("1. The base model answers in plain words.\n")?;
    let loss = evaluate(&job, dir)?;
    output::line(&look(&job, &held_out)?.describe(loss))?;

    output::line("2. A LoRA adapter learns from 400 examples to answer in JSON.\n")?;
    let report = job.train(&observer)?;

    output::line("3. The base model with the adapter:\n")?;
    let loss = report.evals.last().map_or(f64::NAN, |eval| eval.eval_loss);
    output::line(&look(&job, &held_out)?.describe(loss))?;

    output::line(&ending(dir, &job, &report, start.elapsed().as_secs_f64()))
}

/// Returns the model's most likely answer.
fn answer(model: &Model, tokenizer: &Tokenizer, question: &str, most: usize) -> Result<String, Failure> {
    let prompt = ChatPrompt::new(None, question).encode(tokenizer).map_err(Error::from)?;
    let eos_ids = model.end_tokens(Some(tokenizer))?;
    let config = GenerationConfig { max_new_tokens: most, eos_ids, ..GenerationConfig::default() };
    Ok(model.generate_text(tokenizer, &prompt, &config, &[], |_| true)?.text)
}

/// A held-out question, and its correct answer.
struct Question {
    text: String,
    right: String,
}

/// The model's answers to the held-out questions.
struct Look {
    shown: Vec<(String, String)>,
    right: usize,
    of: usize,
}

impl Look {
    fn describe(&self, loss: f64) -> String {
        let mut text =
            format!("   held-out loss {loss:.3}; {} of {} held-out answers exactly right\n", self.right, self.of);
        for (question, answer) in &self.shown {
            text += &format!("\n   Q  {question}\n   A  {answer}\n");
        }
        text
    }
}

fn held_out() -> Vec<Question> {
    #[derive(Deserialize)]
    struct Row {
        messages: [Turn; 2],
    }
    #[derive(Deserialize)]
    struct Turn {
        content: String,
    }
    let rows = unpack::HELD_OUT.lines();
    rows.map(|line| {
        let Row { messages: [question, right] } =
            serde_json::from_str(line).expect("every held-out row is a question and an answer");
        Question { text: question.content, right: right.content }
    })
    .collect()
}

fn evaluate(job: &TrainingRun, dir: &Path) -> Result<f64, Failure> {
    let data = DataSource::new(dir.join("heldout.jsonl"));
    Ok(job.model.evaluate(job.tokenizer.as_ref(), &data, &mut progress::rows())?.loss)
}

fn look(job: &TrainingRun, questions: &[Question]) -> Result<Look, Failure> {
    let (model, tokenizer): (&Model, &Tokenizer) =
        (&job.model, job.tokenizer.as_ref().expect("the example has a tokenizer"));
    let mut look = Look { shown: Vec::new(), right: 0, of: questions.len() };
    for (index, question) in questions.iter().enumerate() {
        let said = answer(model, tokenizer, &question.text, MOST_TOKENS)?;
        look.right += usize::from(said == question.right);
        if index < SHOWN {
            look.shown.push((question.text.clone(), said));
        }
    }
    Ok(look)
}

fn ending(dir: &Path, job: &TrainingRun, report: &TrainReport, seconds: f64) -> String {
    let dir = dir.display();
    let adapter = report.saved.as_deref().map_or_else(|| format!("{dir}/adapter"), |path| path.display().to_string());
    let trained = job.model.causal_lm().params().numel();
    let command = command(env::current_exe().ok().as_deref());
    format!(
        "\
Done in {}. The adapter, {trained} numbers in PEFT's format, is in {adapter}; {dir}/report.html shows
how it learned.

Try next:
  {command} generate --model {dir}/base --adapter {adapter} --chat \"What is a whale?\"
  {command} train {dir}/run.toml train.max_steps=240 --overwrite
Then put your own rows and model into a copy of {dir}/run.toml.",
        duration(seconds)
    )
}

/// Returns the command that runs this program: through Cargo if it is in Cargo's build directory.
fn command(executable: Option<&Path>) -> &'static str {
    let built = executable.and_then(Path::parent).is_some_and(|dir| dir.ends_with("target/release"));
    if built { "cargo run --release --" } else { "rekindle" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_commands_work_where_this_one_did() {
        assert_eq!(command(Some(Path::new("/src/rekindle/target/release/rekindle"))), "cargo run --release --");
        assert_eq!(command(Some(Path::new("/usr/bin/rekindle"))), "rekindle");
        assert_eq!(command(None), "rekindle");
    }

    #[test]
    fn every_held_out_answer_is_json() {
        let questions = held_out();
        assert_eq!(questions.len(), 60);
        for question in questions {
            serde_json::from_str::<serde_json::Value>(&question.right).unwrap();
        }
    }
}

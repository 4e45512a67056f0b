//! The inputs of `rekindle quickstart`: text for a small base model, its tokenizer, and an instruction set.
//!
//! Everything is drawn from one closed world ([`world`]): people who buy things and make trips, forty animals, small
//! sums. The base model is trained on plain prose about it and on questions answered in plain sentences. The
//! instruction set asks the same questions and answers in JSON, so that a short fine-tuning run changes how the model
//! answers but not what it knows. The output depends only on the constants below.

mod author;
mod base;
mod drill;
mod instructions;
mod prose;
mod scene;
mod tokenizer;
mod world;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use rand::RngExt;
use rekindle::Tokenizer;
use serde_json::Value;

use author::Author;
pub(crate) use base::make;
use instructions::{Instruction, Sets};

const SEED: u64 = 7;
/// The number of rows, about 3.8 million tokens.
const CORPUS_ROWS: usize = 100_000;

/// Writes the base corpus to the file `out`: JSON lines, `{"text": …}` or `{"messages": […]}`.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write_corpus(out: &Path) -> Result<(), Box<dyn Error>> {
    write_lines(out, corpus(CORPUS_ROWS))
}

/// Trains the tokenizer on a corpus that [`write_corpus`] wrote and writes its files into the folder `out_dir`.
///
/// # Errors
/// If `corpus` cannot be read or contains an invalid row, or a file cannot be written.
pub(crate) fn train_tokenizer(corpus: &Path, out_dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut texts = Vec::new();
    for (number, line) in BufReader::new(File::open(corpus)?).lines().enumerate() {
        let row = serde_json::from_str(&line?)?;
        texts.extend(
            texts_of(&row).ok_or_else(|| {
                format!("{} line {}: neither \"text\" nor \"messages\"", corpus.display(), number + 1)
            })?,
        );
    }
    fs::create_dir_all(out_dir)?;
    tokenizer::train(texts, out_dir)
}

/// Writes `train.jsonl` and `heldout.jsonl` into the folder `out`.
///
/// # Errors
/// If a file cannot be written.
pub(crate) fn write_instructions(out: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(out)?;
    let Sets { train, held_out } = Sets::new(SEED);
    write_lines(&out.join("train.jsonl"), train.iter().map(Instruction::row))?;
    write_lines(&out.join("heldout.jsonl"), held_out.iter().map(Instruction::row))
}

/// Returns documents of exactly `length` tokens for the base model: corpus rows it was not trained on, drawn with
/// `seed` and concatenated until the document is full. On average every other row repeats an earlier row of its
/// document, so that distant context is useful.
///
/// # Errors
/// If the tokenizer cannot encode a row.
pub(crate) fn long_documents(
    tokenizer: &Tokenizer,
    seed: u64,
    count: usize,
    length: usize,
) -> Result<Vec<Vec<u32>>, Box<dyn Error>> {
    let mut author = Author::new(seed, Sets::new(SEED).held_out_scenes());
    let mut document = || {
        let mut rows: Vec<Vec<u32>> = Vec::new();
        while rows.iter().map(Vec::len).sum::<usize>() < length {
            let again = !rows.is_empty() && author.rng.random_bool(0.5);
            rows.push(match again {
                true => rows[author.rng.random_range(0..rows.len())].clone(),
                false => base::ids(&author.row(), tokenizer)?,
            });
        }
        let mut ids = rows.concat();
        ids.truncate(length);
        Ok(ids)
    };
    (0..count).map(|_| document()).collect()
}

fn corpus(rows: usize) -> impl Iterator<Item = Value> {
    let mut author = Author::new(SEED, Sets::new(SEED).held_out_scenes());
    (0..rows).map(move |_| author.row())
}

fn write_lines(path: &Path, rows: impl Iterator<Item = Value>) -> Result<(), Box<dyn Error>> {
    let mut file = BufWriter::new(File::create(path)?);
    for row in rows {
        writeln!(file, "{row}")?;
    }
    Ok(file.flush()?)
}

/// Returns the texts of a row. Messages include their role, as in the chat template, so that the roles become tokens
/// too.
fn texts_of(row: &Value) -> Option<Vec<String>> {
    if let Some(text) = row["text"].as_str() {
        return Some(vec![text.to_owned()]);
    }
    let messages = row["messages"].as_array()?;
    messages
        .iter()
        .map(|message| Some(format!("{}\n{}", message["role"].as_str()?, message["content"].as_str()?)))
        .collect()
}

#[cfg(test)]
mod tests;

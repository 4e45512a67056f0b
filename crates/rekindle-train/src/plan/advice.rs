//! Changes that make a job fit, in the order of their cost.

use core::fmt;

use rekindle_models::{GradientCheckpointing, LoadIn, is_quantized};
use serde::Serialize;

use super::{PassRows, PlannedRun, Planner, show};
use crate::{Error, Optim};

/// A change of the run file, in addition to those before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryChange {
    /// The keys and values, in the notation of a run file.
    pub set: String,
    /// The peak of the job with the change.
    pub peak: usize,
}

impl fmt::Display for MemoryChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.set, show(self.peak))
    }
}

/// Returns changes after which `rows` of the job fit, and true if they suffice. Each change includes those before it;
/// changes that save nothing are omitted.
pub(super) fn advise(job: &PlannedRun, rows: &PassRows, available: usize) -> Result<(Vec<MemoryChange>, bool), Error> {
    let mut search = Search {
        peak: Planner::new(job.clone())?.plan(rows)?.peak,
        job: job.clone(),
        rows: rows.clone(),
        available,
        changes: Vec::new(),
    };
    let fits = search.keep_less()?
        || search.quantize()?
        || search.accumulate()?
        || search.shrink_state()?
        || search.shorten()?;
    Ok((search.changes, fits))
}

/// A job with the changes so far.
struct Search {
    job: PlannedRun,
    rows: PassRows,
    available: usize,
    peak: usize,
    changes: Vec<MemoryChange>,
}

impl Search {
    /// Keeps a change if it saves memory; returns true if the job then fits.
    fn try_out(&mut self, job: PlannedRun, rows: PassRows, set: String) -> Result<bool, Error> {
        let peak = Planner::new(job.clone())?.plan(&rows)?.peak;
        if peak >= self.peak {
            return Ok(false);
        }
        self.changes.push(MemoryChange { set, peak });
        (self.job, self.rows, self.peak) = (job, rows, peak);
        Ok(peak <= self.available)
    }

    fn keep_less(&mut self) -> Result<bool, Error> {
        let (least, text) = if self.job.load.device.is_cpu() {
            (GradientCheckpointing::Block, "true")
        } else {
            (GradientCheckpointing::Host, "\"unsloth\"")
        };
        if self.job.train.use_gradient_checkpointing == least {
            return Ok(false);
        }
        let mut job = self.job.clone();
        job.train.use_gradient_checkpointing = least;
        self.try_out(job, self.rows.clone(), format!("train.use_gradient_checkpointing = {text}"))
    }

    /// Quantizes the base of an adapter, unless it is quantized already.
    fn quantize(&mut self) -> Result<bool, Error> {
        let is_four_bit = matches!(self.job.load.load_in, Some(LoadIn::FourBit(_)));
        if self.job.lora.is_none() || is_quantized(&self.job.json) || is_four_bit {
            return Ok(false);
        }
        let mut job = self.job.clone();
        job.load.load_in = Some(LoadIn::FourBit(None));
        self.try_out(job, self.rows.clone(), "model.load_in_4bit = true".to_owned())
    }

    /// Splits a pass into the largest parts that fit, or into single rows.
    fn accumulate(&mut self) -> Result<bool, Error> {
        let train = &self.job.train;
        let (size, passes) = (train.per_device_train_batch_size, train.gradient_accumulation_steps);
        let parts = (2..=size).filter(|parts| size.is_multiple_of(*parts));
        for parts in parts.collect::<Vec<_>>() {
            let (size, passes) = (size / parts, passes * parts);
            let mut rows = self.rows.clone();
            rows.lengths.truncate(size);
            let mut job = self.job.clone();
            (job.train.per_device_train_batch_size, job.train.gradient_accumulation_steps) = (size, passes);
            let fits = Planner::new(job.clone())?.takes(&rows, self.available)?;
            if fits || size == 1 {
                let set = format!(
                    "train.per_device_train_batch_size = {size} with train.gradient_accumulation_steps = {passes}"
                );
                return self.try_out(job, rows, set);
            }
        }
        Ok(false)
    }

    fn shrink_state(&mut self) -> Result<bool, Error> {
        let (optim, text) = match self.job.train.optim {
            Optim::Adamw => (Optim::Adamw8bit, "adamw_8bit"),
            Optim::Lion => (Optim::Lion8bit, "lion_8bit"),
            _ => return Ok(false),
        };
        let mut job = self.job.clone();
        job.train.optim = optim;
        self.try_out(job, self.rows.clone(), format!("train.optim = \"{text}\""))
    }

    fn shorten(&mut self) -> Result<bool, Error> {
        let longest = self.rows.lengths.iter().copied().max().unwrap_or(0);
        let length = Planner::new(self.job.clone())?.longest_sequence(self.rows.lengths.len(), self.available)?;
        if length == 0 || length >= longest {
            return Ok(false);
        }
        let lengths = self.rows.lengths.iter().map(|&row| row.min(length)).collect();
        let mut job = self.job.clone();
        job.load.max_seq_length = length;
        self.try_out(
            job,
            PassRows { lengths },
            format!("model.max_seq_length = {length}, with data.overlong for longer rows"),
        )
    }
}

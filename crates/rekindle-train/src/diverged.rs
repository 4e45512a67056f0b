//! A diagnosis of a step whose loss or gradient is not finite.

use core::fmt;
use std::path::PathBuf;

use rekindle_models::NonFinite;

/// A run that stopped because a value is infinite or not a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Diverged {
    /// The optimizer step, from 1; for an evaluation, the steps before it.
    pub step: usize,
    /// `loss`, `grad_norm` or `eval_loss`.
    pub what: &'static str,
    /// The value.
    pub value: f64,
    /// The first non-finite weight, output or gradient, found by repeating the step.
    pub found: Option<NonFinite>,
    /// File and line of the affected rows; all rows of the step if none stands out.
    pub rows: Vec<(PathBuf, usize)>,
    /// True if `rows` are all rows of the step.
    pub all_rows: bool,
    /// Suggestions, one sentence each.
    pub advice: Vec<String>,
    /// The last checkpoint before the step.
    pub checkpoint: Option<PathBuf>,
}

/// The maximum number of rows in a message.
const SHOWN: usize = 8;

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: {} is {}", self.step, self.what, self.value)?;
        if let Some(found) = &self.found {
            write!(f, "; {found}")?;
        }
        let shown: Vec<String> =
            self.rows.iter().take(SHOWN).map(|(path, line)| format!("{}:{line}", path.display())).collect();
        let rest = self.rows.len() - shown.len();
        if !shown.is_empty() {
            write!(f, "\n  rows: {}", shown.join(", "))?;
            if rest > 0 {
                write!(f, " and {rest} more")?;
            }
            if self.all_rows && self.rows.len() > 1 {
                f.write_str(" (all rows of the step)")?;
            }
        }
        for advice in &self.advice {
            write!(f, "\n  try: {advice}")?;
        }
        match &self.checkpoint {
            Some(path) => write!(f, "\n  the last good checkpoint is {}", path.display()),
            None => f.write_str("\n  there is no earlier checkpoint; set save_steps to write them"),
        }
    }
}

impl core::error::Error for Diverged {}

//! What is known of a step whose loss or gradient is not finite.

use core::fmt;
use std::path::PathBuf;

use rekindle_models::NonFinite;

/// A run that stopped because a number is infinite or not a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Diverged {
    /// The optimizer step, from 1 on; of an evaluation, the steps done before it.
    pub step: usize,
    /// `loss`, `grad_norm` or `eval_loss`.
    pub what: &'static str,
    /// What it became.
    pub value: f64,
    /// Where it began, found by going through the step again.
    pub found: Option<NonFinite>,
    /// File and line of the rows that it comes from; all of the step when none stands out.
    pub rows: Vec<(PathBuf, usize)>,
    /// True if `rows` are all of the step.
    pub all_rows: bool,
    /// What to try, one sentence each.
    pub advice: Vec<String>,
    /// The last checkpoint before it.
    pub checkpoint: Option<PathBuf>,
}

/// Rows that a message names.
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
                f.write_str(" (all of the step)")?;
            }
        }
        for advice in &self.advice {
            write!(f, "\n  try: {advice}")?;
        }
        match &self.checkpoint {
            Some(path) => write!(f, "\n  the last good checkpoint is {}", path.display()),
            None => f.write_str("\n  there is no checkpoint before it (save_steps makes them)"),
        }
    }
}

impl core::error::Error for Diverged {}

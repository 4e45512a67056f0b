//! The file that records the positions an adapter was trained with.

use std::path::Path;

use rekindle_hub::{read_json, write_atomic};
use rekindle_rope::Positions;

use crate::{CausalLm, Error};

/// Writes [`Positions::FILE`] into the adapter's directory `dir`: an adapter has no `config.json` to record them.
///
/// # Errors
/// [`Error::File`] when the system refuses.
pub fn save_positions(positions: &Positions, dir: &Path) -> Result<(), Error> {
    let text = format!("{:#}\n", positions.to_json());
    Ok(write_atomic(&dir.join(Positions::FILE), text.as_bytes())?)
}

/// Returns the positions that the adapter in `dir` was trained with, if they differ from its base's.
///
/// # Errors
/// [`Error::File`] and [`Error::Config`] for a file that is broken.
pub fn saved_positions(dir: &Path) -> Result<Option<Positions>, Error> {
    let path = dir.join(Positions::FILE);
    if !path.exists() {
        return Ok(None);
    }
    let positions = Positions::from_json(&read_json(&path)?);
    positions.map(Some).map_err(|error| Error::Config { path, problems: vec![error.to_string()] })
}

impl CausalLm {
    /// Fails if this model's positions differ from those that the adapter in `dir` was trained with.
    pub(crate) fn check_positions(&self, dir: &Path) -> Result<(), Error> {
        let Some(saved) = saved_positions(dir)? else { return Ok(()) };
        let wanted = saved.rope(self.config.head_dim()).map_err(|error| Error::Argument(error.to_string()))?;
        if wanted == *self.config.rope() {
            return Ok(());
        }
        let ours = self.context_extension().map_or("its own".to_owned(), |extension| extension.positions.to_string());
        Err(Error::Argument(format!(
            "the adapter in {} was trained with RoPE {saved} ({}), but this model has {ours}; load the model with the \
             parameters of that file and without another rope_scaling",
            dir.display(),
            Positions::FILE,
        )))
    }
}

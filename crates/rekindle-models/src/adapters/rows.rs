//! Adapters for batches whose tokens have different ones.

use rekindle_lora::{Adaptable, RowAdapter};

use super::InactiveAdapter;
use crate::{CausalLm, Error};

impl CausalLm {
    /// Copies the factors of an adapter, active or not, to the model's device for
    /// [`DecodeBatch::adapt`](crate::DecodeBatch::adapt). Returns `None` if batches cannot mix it with others: it has more
    /// than factors of linears outside experts, or it or the active adapter starts from a changed base (PiSSA, OLoRA).
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's, [`Error::Device`] when the active one cannot be read.
    pub fn row_adapter(&self, name: &str) -> Result<Option<RowAdapter>, Error> {
        let found = match self.active_adapter() {
            Some(active) if active == name => self.active(),
            _ => self.adapters.inactive.get(name).cloned(),
        };
        self.device().check()?;
        let Some(InactiveAdapter { adapter, base_delta }) = found else { return Err(self.unknown(name)) };
        if !base_delta.is_empty() || self.check_base().is_err() {
            return Ok(None);
        }
        let groups = self.decoder.adaptable().filter_map(Adaptable::linears);
        Ok(RowAdapter::new(&adapter, groups, self.device(), self.dtype()))
    }
}

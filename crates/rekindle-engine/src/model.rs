//! The model of an engine.

use rekindle_models::{CausalLm, Error};

/// A model that an engine computes with: owned or borrowed.
pub trait EngineModel {
    /// Returns the model.
    fn causal_lm(&self) -> &CausalLm;

    /// Returns the model for changes; `None` if it is borrowed immutably.
    fn causal_lm_mut(&mut self) -> Option<&mut CausalLm>;

    /// Returns true if the adapter of this name is active or can be activated.
    fn has_adapter(&mut self, name: &str) -> bool {
        let is_owned = self.causal_lm_mut().is_some();
        let model = self.causal_lm();
        model.active_adapter() == Some(name) || is_owned && model.adapters().contains(&name)
    }

    /// Activates the adapter of this name.
    ///
    /// # Errors
    /// As [`CausalLm::set_adapter`], and [`Error::Argument`] for another adapter of a borrowed model.
    fn activate(&mut self, name: &str) -> Result<(), Error> {
        if self.causal_lm().active_adapter() == Some(name) {
            return Ok(());
        }
        match self.causal_lm_mut() {
            Some(model) => model.set_adapter(name),
            None => Err(Error::Argument(format!(
                "adapter {name:?} is not active, and the engine borrows its model; activate it with set_adapter, or give \
                 the engine the model"
            ))),
        }
    }
}

impl EngineModel for CausalLm {
    fn causal_lm(&self) -> &CausalLm {
        self
    }

    fn causal_lm_mut(&mut self) -> Option<&mut CausalLm> {
        Some(self)
    }
}

impl EngineModel for &CausalLm {
    fn causal_lm(&self) -> &CausalLm {
        self
    }

    fn causal_lm_mut(&mut self) -> Option<&mut CausalLm> {
        None
    }
}

impl EngineModel for &mut CausalLm {
    fn causal_lm(&self) -> &CausalLm {
        self
    }

    fn causal_lm_mut(&mut self) -> Option<&mut CausalLm> {
        Some(self)
    }
}

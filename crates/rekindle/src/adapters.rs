//! Several adapters on one model, by name.

use std::path::Path;

use rekindle_lora::{Combination, LoraConfig};
use rekindle_models::DEFAULT_ADAPTER;
use rekindle_train::save_adapter;

use crate::{Error, Model};

/// Named adapters. At most one is active: it is used in computation and trained. The others stay inactive in host
/// memory.
///
/// [`get_peft_model`](Model::get_peft_model) and [`load_adapter`](Model::load_adapter) attach an adapter called
/// `"default"`, as in PEFT.
///
/// ```no_run
/// use rekindle::{Combination, FastLanguageModel};
///
/// # fn main() -> Result<(), rekindle::Error> {
/// let mut model = FastLanguageModel::from_pretrained("Qwen/Qwen3-0.6B").load_model()?;
/// model.load_adapter_as("sql", "outputs/sql/adapter")?;
/// model.load_adapter_as("chat", "outputs/chat/adapter")?; // now active; "sql" is inactive
/// model.set_adapter("sql")?;
/// model.add_weighted_adapter("both", &[("sql", 0.7), ("chat", 0.3)], Combination::Cat)?;
/// model.delete_adapter("chat")?;
/// model.save_adapter("both", "outputs/both")?;
/// # Ok(())
/// # }
/// ```
impl Model {
    /// Returns the names of all adapters, sorted.
    pub fn adapters(&self) -> Vec<&str> {
        self.causal_lm().adapters()
    }

    /// Returns the name of the active adapter.
    pub fn active_adapter(&self) -> Option<&str> {
        self.causal_lm().active_adapter()
    }

    /// Adds a new adapter with a name and activates it; the previous one becomes inactive.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that is invalid or matches nothing, and for a name that exists or cannot be
    /// a directory's.
    pub fn add_adapter(&mut self, name: &str, config: &LoraConfig) -> Result<(), Error> {
        self.causal_lm_mut().add_adapter_as(name, config)?;
        self.note_carried_tables();
        Ok(())
    }

    /// Loads an adapter from PEFT's files under a name and activates it; the previous one becomes inactive. The
    /// tokenizer and chat template remain those of the first adapter ([`load_tokenizer`](Self::load_tokenizer)).
    ///
    /// # Errors
    /// As [`load_adapter`](Self::load_adapter), and for a name that exists or cannot be a directory's.
    pub fn load_adapter_as(&mut self, name: &str, name_or_path: impl AsRef<Path>) -> Result<(), Error> {
        let dir = self.find(name_or_path.as_ref())?;
        self.causal_lm_mut().load_adapter_as(name, &dir)?;
        self.note(name_or_path.as_ref(), &dir, false);
        Ok(())
    }

    /// Adds an adapter combined from others, given as names and weights, and activates it.
    ///
    /// # Errors
    /// [`Error::Model`] for adapters that cannot be combined this way, and for an unknown name, or a new name that
    /// exists or cannot be a directory's.
    pub fn add_weighted_adapter(
        &mut self,
        name: &str,
        adapters: &[(&str, f64)],
        combination: Combination,
    ) -> Result<(), Error> {
        Ok(self.causal_lm_mut().add_weighted_adapter(name, adapters, combination)?)
    }

    /// Activates the adapter of this name; the previous one becomes inactive.
    ///
    /// # Errors
    /// [`Error::Model`] for an unknown name.
    pub fn set_adapter(&mut self, name: &str) -> Result<(), Error> {
        Ok(self.causal_lm_mut().set_adapter(name)?)
    }

    /// Deactivates the adapter, so that the model is its base until [`set_adapter`](Self::set_adapter).
    ///
    /// # Errors
    /// [`Error::Model`] if the device fails.
    pub fn disable_adapter(&mut self) -> Result<(), Error> {
        Ok(self.causal_lm_mut().disable_adapter()?)
    }

    /// Deletes the adapter of this name. If it was active, the model is its base afterwards.
    ///
    /// # Errors
    /// [`Error::Model`] for an unknown name.
    pub fn delete_adapter(&mut self, name: &str) -> Result<(), Error> {
        Ok(self.causal_lm_mut().delete_adapter(name)?)
    }

    /// Writes only the adapter of this name, with the tokenizer's files.
    ///
    /// # Errors
    /// [`Error::Train`] for an unknown name, or if the files cannot be written.
    pub fn save_adapter(&self, name: &str, dir: impl AsRef<Path>) -> Result<(), Error> {
        Ok(save_adapter(self.causal_lm(), name, dir.as_ref(), &self.companions(None)?)?)
    }

    /// Returns the model with one adapter combined from several, given as directories or names on the hub, and weights.
    /// A single adapter with weight 1 is loaded unchanged.
    ///
    /// # Errors
    /// As [`load_adapter`](Self::load_adapter) and [`add_weighted_adapter`](Self::add_weighted_adapter).
    pub fn load_weighted_adapters(
        mut self,
        adapters: &[(impl AsRef<Path>, f64)],
        combination: Combination,
    ) -> Result<Self, Error> {
        if let [(alone, 1.0)] = adapters {
            return self.load_adapter(alone);
        }
        let names: Vec<String> = (1..=adapters.len()).map(|number| format!("{DEFAULT_ADAPTER}-{number}")).collect();
        for (name, (adapter, _)) in names.iter().zip(adapters) {
            self.load_adapter_as(name, adapter)?;
        }
        let weights: Vec<(&str, f64)> = names.iter().map(String::as_str).zip(adapters.iter().map(|a| a.1)).collect();
        self.add_weighted_adapter(DEFAULT_ADAPTER, &weights, combination)?;
        names.iter().try_for_each(|name| self.delete_adapter(name))?;
        Ok(self)
    }

    /// Attaches the adapter called `"default"`, replacing an earlier one.
    pub(crate) fn put(&mut self, name_or_path: &Path) -> Result<(), Error> {
        let dir = self.find(name_or_path)?;
        self.causal_lm_mut().load_adapter(&dir)?;
        self.note(name_or_path, &dir, true);
        Ok(())
    }

    /// Records the notices about the adapter `adapter` in `dir`.
    fn note(&mut self, adapter: &Path, dir: &Path, replaces: bool) {
        let tokenizer = self.files_mut().put_adapter(dir, replaces);
        self.notices.extend(tokenizer);
        let unknown = self.causal_lm().adapter_config().into_iter().flat_map(|config| config.unknown_fields());
        let unknown: Vec<String> = unknown.map(str::to_owned).collect();
        let name = adapter.display();
        self.notices
            .extend(unknown.iter().map(|key| format!("{name}: the key \"{key}\" is unknown and has no effect")));
        if self.causal_lm().adapter_changes_nothing() {
            self.notices.push(format!(
                "{}: this adapter is untrained (every B·A is zero): it does not change the model",
                adapter.display()
            ));
        }
    }
}

//! Several adapters on one model, by name. One at most is on it; the others wait in host memory.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_kernels::{Weight, to_f32};
use rekindle_lora::{
    Adapter, Combination, EmbeddingTable, Factors, InitLoraWeights, LoraConfig, initial_magnitude, to_plain, weighted,
};

use crate::names::{EMBED, module};
use crate::{CausalLm, Error};

/// What an adapter is called that was given no name, as in PEFT.
pub const DEFAULT_ADAPTER: &str = "default";

/// An adapter as it is trained, and what the base has to lose for it.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) adapter: Adapter,
    /// By the linear's name; nothing unless it starts from the weights.
    pub(crate) taken: BTreeMap<String, Factors>,
}

impl Held {
    /// The adapter for the base as it was.
    pub(crate) fn into_plain(self) -> Adapter {
        let Self { mut adapter, taken } = self;
        let init = adapter.config.lora().init_lora_weights.clone();
        if init.changes_base() || init == InitLoraWeights::Loftq {
            adapter.config = adapter.config.plain(init.changes_base());
        }
        for (name, start) in taken {
            if let Some(now) = adapter.factors.get_mut(&name) {
                *now = to_plain(now, &start);
            }
        }
        adapter
    }
}

impl CausalLm {
    /// The names of all adapters, sorted: the one that is on the model and those that wait.
    pub fn adapters(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.waiting.keys().map(String::as_str).chain(self.active_adapter()).collect();
        names.sort_unstable();
        names
    }

    /// The name of the adapter that is on the model, which is the one that is trained.
    pub fn active_adapter(&self) -> Option<&str> {
        self.adapter_config.is_some().then_some(self.adapter_name.as_str())
    }

    /// Puts a new adapter on the model under a name of its own, as [`add_adapter`](Self::add_adapter). The one that was
    /// on it waits.
    ///
    /// # Errors
    /// As [`add_adapter`](Self::add_adapter), and [`Error::Argument`] for a name that is taken or cannot be a
    /// directory's.
    pub fn add_adapter_as(&mut self, name: &str, config: &LoraConfig) -> Result<(), Error> {
        self.check_new(name)?;
        self.put_new(name, config)
    }

    /// Puts a saved adapter on the model under a name of its own, as [`load_adapter`](Self::load_adapter). The one that
    /// was on it waits.
    ///
    /// # Errors
    /// As [`load_adapter`](Self::load_adapter), and [`Error::Argument`] for a name that is taken or cannot be a
    /// directory's.
    pub fn load_adapter_as(&mut self, name: &str, dir: &Path) -> Result<(), Error> {
        self.check_new(name)?;
        self.put_saved(name, dir)
    }

    /// Puts an adapter on the model that is made of others ([`weighted`]): their names, and what each counts.
    ///
    /// # Errors
    /// [`Error::Lora`] for adapters that cannot be combined so, [`Error::Argument`] for a name that is taken, cannot be
    /// a directory's, or is no adapter's.
    pub fn add_weighted_adapter(
        &mut self,
        name: &str,
        adapters: &[(&str, f64)],
        combination: Combination,
    ) -> Result<(), Error> {
        self.check_new(name)?;
        let found = adapters.iter().map(|(name, weight)| Ok((*name, self.adapter_called(name)?, *weight)));
        let found: Vec<(&str, Adapter, f64)> = found.collect::<Result<_, Error>>()?;
        let found: Vec<(&str, &Adapter, f64)> = found.iter().map(|(name, a, weight)| (*name, a, *weight)).collect();
        let made = weighted(&found, combination, &self.modules())?;
        self.make_way(name)?;
        self.place(name, made)
    }

    /// The adapter of this name as it is now, as [`adapter`](Self::adapter).
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's, [`Error::Device`] when it cannot be read.
    pub fn adapter_called(&self, name: &str) -> Result<Adapter, Error> {
        let held = match self.active_adapter() {
            Some(active) if active == name => self.held(),
            _ => self.waiting.get(name).cloned(),
        };
        self.device.check()?;
        held.map(Held::into_plain).ok_or_else(|| self.unknown(name))
    }

    /// Puts the adapter of this name on the model; the one that was on it waits. Every adapter comes back bit for bit.
    ///
    /// An optimizer belongs to the parameters that it was made for: make a new one.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's, [`Error::File`] when the base's checkpoint is gone that an
    /// adapter starts from, [`Error::Device`] when the present one cannot be read.
    pub fn set_adapter(&mut self, name: &str) -> Result<(), Error> {
        if self.active_adapter() == Some(name) {
            return Ok(());
        }
        let Some(Held { adapter, taken }) = self.waiting.get(name).cloned() else { return Err(self.unknown(name)) };
        self.disable_adapter()?;
        self.take_again(&taken, adapter.config.lora())?;
        self.place(name, adapter)?;
        self.waiting.remove(name);
        Ok(())
    }

    /// Takes the adapter off the model, which is then its base; [`set_adapter`](Self::set_adapter) puts it on again.
    /// Without one nothing happens.
    ///
    /// # Errors
    /// [`Error::Device`] when it cannot be read; it then stays.
    pub fn disable_adapter(&mut self) -> Result<(), Error> {
        let Some(held) = self.held() else { return Ok(()) };
        self.device.check()?;
        let name = core::mem::take(&mut self.adapter_name);
        self.remove_adapter();
        self.waiting.insert(name, held);
        Ok(())
    }

    /// Forgets the adapter of this name. If it was on the model, that is its base then.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's.
    pub fn delete_adapter(&mut self, name: &str) -> Result<(), Error> {
        if self.active_adapter() == Some(name) {
            self.remove_adapter();
        } else if self.waiting.remove(name).is_none() {
            return Err(self.unknown(name));
        }
        Ok(())
    }

    /// Whether the adapter that is on the model changes no logit: every B·A is zero, and lengths, biases and modules
    /// beside them are the base's. So it is with one that was saved before it was trained.
    pub fn adapter_changes_nothing(&self) -> bool {
        let Some(Held { adapter, taken }) = self.held() else { return false };
        if !taken.is_empty() || !adapter.is_zero() {
            return false;
        }
        let same = |weight: &Weight, values: &[f32]| to_f32(weight.matrix(&self.params)) == values;
        let lengths = |(name, factors): (&String, &Factors)| {
            let Some(lengths) = &factors.magnitude else { return true };
            let weight = &self.linear(name).weight;
            let w = to_f32(weight.matrix(&self.params));
            let start = initial_magnitude(&w, weight.dims(), factors, adapter.config.lora().scale_of(name));
            // PEFT sums in f32.
            lengths.iter().zip(start).all(|(m, start)| (m - start).abs() <= 1e-5 * start)
        };
        // What the base has in the place of saved modules; a head that was the table is what that was.
        let table = self.replaced.embed.as_ref().unwrap_or(&self.embed);
        let head = self.replaced.head.as_ref().unwrap_or(&self.head).as_ref().unwrap_or(table);
        let bias =
            |(name, bias): (&String, &Vec<f32>)| self.linear(name).bias.as_ref().is_some_and(|base| same(base, bias));
        // A table that the adapter brought; one of another number of rows is carried as the base has it.
        let brought = |(name, brought): (&String, &EmbeddingTable)| {
            let has_head = name != module(EMBED) && !self.config.tie_word_embeddings;
            same(if has_head { head } else { table }, &brought.values)
        };
        adapter.biases.iter().all(bias)
            && adapter.tables.iter().all(brought)
            && adapter
                .saved
                .iter()
                .all(|(name, (_, saved))| same(if name == module(EMBED) { table } else { head }, saved))
            && adapter.factors.iter().all(lengths)
    }

    /// Takes off what is on the model, for an adapter of this name to come: another one waits, one of this name goes.
    pub(crate) fn make_way(&mut self, name: &str) -> Result<(), Error> {
        if self.active_adapter() == Some(name) {
            self.remove_adapter();
        }
        self.disable_adapter()?;
        self.waiting.remove(name);
        Ok(())
    }

    fn check_new(&self, name: &str) -> Result<(), Error> {
        if self.adapters().contains(&name) {
            return Err(Error::Argument(format!(
                "there is an adapter \"{name}\" already; choose another name, or delete_adapter it first"
            )));
        }
        // Saved, an adapter of a name is a directory beside files.
        if name.is_empty() || name.contains(['/', '\\', '.']) || name.chars().any(char::is_control) {
            return Err(Error::Argument(format!(
                "adapter name {name:?} cannot be a directory's; give one of letters, digits, - and _"
            )));
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        let known: Vec<String> = self.adapters().iter().map(|name| format!("{name:?}")).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Error::Argument(format!("there is no adapter {name:?}; the model has {known}"))
    }
}

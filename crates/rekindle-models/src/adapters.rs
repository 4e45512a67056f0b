//! Several adapters on one model, by name. At most one is active; the others stay in host memory.

mod attach;
mod base_delta;
mod rows;

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_kernels::{Device, Weight, to_f32};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{
    Adaptable, Adapter, Combination, EmbeddingTable, InitLoraWeights, LoraConfig, LoraFactors, initial_magnitude,
    to_plain, weighted,
};

pub(crate) use base_delta::{BaseDelta, quantization_plan};
pub use base_delta::{LoftqBase, loftq_base};

use crate::{CausalLm, Error, Role};

/// The name of an adapter without a name of its own, as in PEFT.
pub const DEFAULT_ADAPTER: &str = "default";

/// The adapters of a model.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    pub(crate) active: Option<ActiveAdapter>,
    /// The inactive adapters, by name.
    pub(crate) inactive: BTreeMap<String, InactiveAdapter>,
    /// The frozen tables that the active adapter is saved with.
    pub(crate) carried: Vec<Role>,
    /// The initial B·A that the active adapter subtracted from the base.
    pub(crate) base_delta: BaseDelta,
}

/// The adapter whose parameters are those of the model.
#[derive(Debug)]
pub(crate) struct ActiveAdapter {
    pub(crate) name: String,
    pub(crate) config: AdapterConfig,
}

/// An inactive adapter and the initial B·A to subtract from the base when it is activated.
#[derive(Clone, Debug)]
pub(crate) struct InactiveAdapter {
    pub(crate) adapter: Adapter,
    /// The initial factors by the linear's name; empty unless they were computed from the weights.
    pub(crate) base_delta: BTreeMap<String, LoraFactors>,
}

impl InactiveAdapter {
    /// Returns the adapter for the base as it is in its checkpoint.
    pub(crate) fn into_plain(self) -> Adapter {
        let Self { mut adapter, base_delta } = self;
        let init = adapter.config.lora().init_lora_weights.clone();
        if init.changes_base() || init == InitLoraWeights::Loftq {
            adapter.config = adapter.config.plain(init.changes_base());
        }
        for (name, start) in base_delta {
            if let Some(now) = adapter.factors.get_mut(&name) {
                *now = to_plain(now, &start);
            }
        }
        adapter
    }
}

impl CausalLm {
    /// Returns one sentence for each kind of linears that an adapter on CUDA computes more slowly than others.
    pub fn slower_on_cuda(&self) -> Vec<String> {
        if !matches!(self.device(), Device::Cuda(_)) || self.adapters.active.is_none() {
            return Vec::new();
        }
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        let groups = self.decoder.adaptable().filter_map(Adaptable::linears);
        for group in groups.filter(|group| group.has_separate_products()) {
            let names = group.linears().iter().map(|linear| linear.name.rsplit('.').next().unwrap_or(&linear.name));
            *found.entry(names.collect::<Vec<_>>().join(", ")).or_default() += 1;
        }
        let sentence = |(names, layers): (String, usize)| {
            format!(
                "{names} of {layers} {} are separate products on CUDA, which is slower than one for all of them: some are \
                 quantized and others are not; load them alike (skip_modules)",
                if layers == 1 { "layer" } else { "layers" }
            )
        };
        found.into_iter().map(sentence).collect()
    }

    /// Returns the names of all adapters, active and inactive, sorted.
    pub fn adapters(&self) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.adapters.inactive.keys().map(String::as_str).chain(self.active_adapter()).collect();
        names.sort_unstable();
        names
    }

    /// Returns the name of the active adapter, the one that is trained.
    pub fn active_adapter(&self) -> Option<&str> {
        self.adapters.active.as_ref().map(|active| active.name.as_str())
    }

    /// Adds a new adapter under a name of its own and activates it, as [`add_adapter`](Self::add_adapter). The one that
    /// was active becomes inactive.
    ///
    /// # Errors
    /// As [`add_adapter`](Self::add_adapter), and [`Error::Argument`] for a name that is taken or cannot be a
    /// directory's.
    pub fn add_adapter_as(&mut self, name: &str, config: &LoraConfig) -> Result<(), Error> {
        self.check_new(name)?;
        self.attach_new(name, config)
    }

    /// Loads a saved adapter under a name of its own and activates it, as [`load_adapter`](Self::load_adapter). The one
    /// that was active becomes inactive.
    ///
    /// # Errors
    /// As [`load_adapter`](Self::load_adapter), and [`Error::Argument`] for a name that is taken or cannot be a
    /// directory's.
    pub fn load_adapter_as(&mut self, name: &str, dir: &Path) -> Result<(), Error> {
        self.check_new(name)?;
        self.attach_saved(name, dir)
    }

    /// Adds an adapter that combines others ([`weighted`]), given by name with their weights, and activates it.
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
        self.detach_for(name)?;
        self.attach(name, made)
    }

    /// Returns the current state of the adapter of this name, like [`adapter`](Self::adapter).
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's, [`Error::Device`] when it cannot be read.
    pub fn adapter_called(&self, name: &str) -> Result<Adapter, Error> {
        let adapter = match self.active_adapter() {
            Some(active) if active == name => self.active(),
            _ => self.adapters.inactive.get(name).cloned(),
        };
        self.device().check()?;
        adapter.map(InactiveAdapter::into_plain).ok_or_else(|| self.unknown(name))
    }

    /// Activates the adapter of this name; the one that was active becomes inactive. Every adapter comes back bit for
    /// bit.
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
        let inactive = self.adapters.inactive.get(name).cloned();
        let Some(InactiveAdapter { adapter, base_delta }) = inactive else { return Err(self.unknown(name)) };
        self.disable_adapter()?;
        self.subtract_init_again(&base_delta, adapter.config.lora())?;
        self.attach(name, adapter)?;
        self.adapters.inactive.remove(name);
        Ok(())
    }

    /// Deactivates the adapter; the model is then its base. [`set_adapter`](Self::set_adapter) activates it again.
    /// Without an active adapter nothing happens.
    ///
    /// # Errors
    /// [`Error::Device`] when it cannot be read; it then stays.
    pub fn disable_adapter(&mut self) -> Result<(), Error> {
        let Some((adapter, name)) = self.active().zip(self.active_adapter().map(str::to_owned)) else { return Ok(()) };
        self.device().check()?;
        self.remove_adapter();
        self.adapters.inactive.insert(name, adapter);
        Ok(())
    }

    /// Deletes the adapter of this name. If it was active, the model is then its base.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is no adapter's.
    pub fn delete_adapter(&mut self, name: &str) -> Result<(), Error> {
        if self.active_adapter() == Some(name) {
            self.remove_adapter();
        } else if self.adapters.inactive.remove(name).is_none() {
            return Err(self.unknown(name));
        }
        Ok(())
    }

    /// Returns true if the active adapter is untrained: every B·A is zero, and magnitudes, biases and saved modules equal the
    /// base's, so that it does not change the model.
    pub fn adapter_changes_nothing(&self) -> bool {
        let Some(InactiveAdapter { adapter, base_delta }) = self.active() else { return false };
        if !base_delta.is_empty() || !adapter.is_zero() {
            return false;
        }
        let same = |weight: &Weight, values: &[f32]| to_f32(weight.matrix(&self.params)) == values;
        let magnitudes = |(name, factors): (&String, &LoraFactors)| {
            let Some(magnitudes) = &factors.magnitude else { return true };
            let weight = &self.linear(name).weight;
            let w = to_f32(weight.matrix(&self.params));
            let start = initial_magnitude(&w, weight.dims(), factors, adapter.config.lora().scale_of(name));
            // PEFT sums in f32.
            magnitudes.iter().zip(start).all(|(m, start)| (m - start).abs() <= 1e-5 * start)
        };
        let bias =
            |(name, bias): (&String, &Vec<f32>)| self.linear(name).bias.as_ref().is_some_and(|base| same(base, bias));
        // The base's tables in the place of saved modules.
        let (embedding, head) = (self.decoder.embedding(false), self.decoder.head(false));
        let is_embedding = |name: &String| *name == self.config.names.module(Role::Embedding);
        // A table that the adapter brought; one of another number of rows is carried as the base has it.
        let brought = |(name, table): (&String, &EmbeddingTable)| {
            let is_head = !is_embedding(name) && !self.config.tie_word_embeddings();
            same(if is_head { head } else { embedding }, &table.values)
        };
        adapter.biases.iter().all(bias)
            && adapter.tables.iter().all(brought)
            && adapter
                .saved
                .iter()
                .all(|(name, (_, saved))| same(if is_embedding(name) { embedding } else { head }, saved))
            && adapter.factors.iter().all(magnitudes)
    }

    /// Makes the model its base, for an adapter of this name to be attached: another one becomes inactive, one of this
    /// name is deleted.
    pub(crate) fn detach_for(&mut self, name: &str) -> Result<(), Error> {
        if self.active_adapter() == Some(name) {
            self.remove_adapter();
        }
        self.disable_adapter()?;
        self.adapters.inactive.remove(name);
        Ok(())
    }

    fn check_new(&self, name: &str) -> Result<(), Error> {
        if self.adapters().contains(&name) {
            return Err(Error::Argument(format!(
                "an adapter \"{name}\" already exists; choose another name, or call delete_adapter first"
            )));
        }
        // Saved, an adapter of a name is a directory beside files.
        if name.is_empty() || name.contains(['/', '\\', '.']) || name.chars().any(char::is_control) {
            return Err(Error::Argument(format!(
                "adapter name {name:?} cannot be used as a directory name; use letters, digits, - and _"
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

//! Attaching adapters to a model, and detaching them.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::Dtype;
use rekindle_kernels::{DType, Group, Params, ParamsBuilder, Weight, from_f32, stacked, to_f32};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{
    AdaptableModules, Adapter, EmbeddingTable, ExpertProjection, InitLoraWeights, Linear, LinearModule, LoraConfig,
    LoraFactors, LoraInit, initial_magnitude,
};

use super::{ActiveAdapter, DEFAULT_ADAPTER, InactiveAdapter};
use crate::families::SCORE;
use crate::layers::expert_names;
use crate::parameters::{ExpertStack, LayerRole};
use crate::spec::{FeedForwardSpec, LinearSpec};
use crate::{CausalLm, Error, ModelConfig, Role};

/// The modules with a row for each token id.
const TABLES: [Role; 2] = [Role::Embedding, Role::Head];

impl ModelConfig {
    /// The modules that an adapter can target or save.
    pub fn modules(&self) -> AdaptableModules {
        let linear = |layer: usize, linear: LinearSpec| {
            let [out, input] = linear.shape;
            let name = self.names.module(Role::Layer(layer, LayerRole::Weight(linear.role)));
            LinearModule { name, input, out, has_bias: linear.bias }
        };
        let layers = self.spec.layers.iter().enumerate();
        let hidden = self.spec.hidden_size;
        let (mut linears, mut experts, mut joined) = (Vec::new(), Vec::new(), Vec::new());
        for (index, layer) in layers {
            linears.extend(layer.linears(hidden).into_iter().map(|spec| linear(index, spec)));
            let FeedForwardSpec::Moe(moe) = &layer.feed_forward else { continue };
            for stack in ExpertStack::ALL {
                let names = expert_names(&self.names, index, moe, stack, hidden);
                let [_, input] = moe.expert_shape(stack, hidden);
                let is_only_stacked = self.names.experts.only_stacked;
                let projection = ExpertProjection { names, experts: moe.experts, input, is_only_stacked };
                linears.extend(projection.linears());
                if projection.names.outputs.len() > 1 {
                    joined.extend(projection.joined());
                }
                experts.push(projection);
            }
        }
        let table = [self.spec.vocab_size, self.spec.hidden_size];
        let savable = [(Role::Embedding, table), (Role::Head, self.head_shape())];
        let savable = savable.map(|(role, shape)| (self.names.module(role), shape)).to_vec();
        AdaptableModules { linears, savable, tied: self.spec.head.tied, experts, joined }
    }
}

impl CausalLm {
    /// The modules that an adapter can target or save.
    pub fn modules(&self) -> AdaptableModules {
        self.config.modules()
    }

    /// Adds a new adapter to the linears that `config` targets and activates it, replacing the one without a name of its
    /// own ([`DEFAULT_ADAPTER`]). [`add_adapter_as`](Self::add_adapter_as) adds one beside others.
    ///
    /// With `init_lora_weights` = `"pissa"`, `"pissa_niter_N"` or `"olora"` the initial B·A is subtracted from the base
    /// ([`rekindle_lora::split_weight`]) until the adapter is deactivated, so that the model is unchanged at step 0.
    /// [`adapter`](Self::adapter) is the same function on the base as it was. bf16 weights are rounded once more by the
    /// subtraction.
    ///
    /// # Errors
    /// [`Error::Lora`] for a configuration that is invalid or matches nothing, [`Error::Argument`] when all
    /// weights are trained or the base cannot start such an adapter, [`Error::File`] when its checkpoint is gone.
    pub fn add_adapter(&mut self, config: &LoraConfig) -> Result<(), Error> {
        self.attach_new(DEFAULT_ADAPTER, config)
    }

    pub(crate) fn attach_new(&mut self, name: &str, config: &LoraConfig) -> Result<(), Error> {
        let config = &self.with_trained_score(config);
        config.validate()?;
        let modules = self.modules();
        let targets = modules.targets(config)?;
        modules.check_expert_dropout(config, &targets)?;
        let saved = modules.saved(config)?;
        self.check_placeable()?;
        let source = self.init_source(config, &targets)?;
        // From here on only the device can fail, or a weight that is not finite where the adapter starts from it: the
        // earlier adapter may be detached.
        self.detach_for(name)?;
        let mut factors = BTreeMap::new();
        let starts = self.initial_factors(config, &targets, source)?;
        for (target, mut start) in targets.iter().zip(starts) {
            if config.use_dora {
                start.magnitude = Some(self.initial_magnitude(target, &start, config.scale_of(target)));
            }
            factors.insert(target.clone(), start);
        }
        let bias = |linear: &LinearModule| {
            let bias = self.linear(&linear.name).bias.as_ref().expect("the module says that it has one");
            (linear.name.clone(), to_f32(bias.matrix(&self.params)))
        };
        let biases = modules.biased(config.bias, |name| factors.contains_key(name)).into_iter().map(bias).collect();
        let saved = saved.into_iter().map(|name| {
            let is_head = name == self.config.names.module(Role::Head);
            let weight = if is_head { self.decoder.head(true) } else { self.decoder.embedding(true) };
            (name, (weight.dims(), to_f32(weight.matrix(&self.params))))
        });
        let saved: BTreeMap<_, _> = saved.collect();
        let config = &modules.with_target_parameters(config, &targets);
        let config = self.config.names.excluding_kept(config);
        let mut config = AdapterConfig::new(&config, Some(&self.provenance.name_or_path), &targets);
        config.set_revision(self.provenance.revision.as_deref());
        if config.lora().init_lora_weights == InitLoraWeights::Loftq {
            config.set_codes(self.quantized_format(&targets[0]).expect("the source is quantized"));
        }
        let carried = self.unsaved_tables(&saved);
        self.attach(name, Adapter { config, factors, biases, saved, tables: BTreeMap::new() })?;
        self.adapters.carried = carried;
        Ok(())
    }

    /// Returns the configuration of a new adapter, which trains the head of a reward model too, as PEFT's adapters for
    /// sequence classification do.
    pub(crate) fn with_trained_score(&self, config: &LoraConfig) -> LoraConfig {
        let mut config = config.clone();
        if self.has_score_head() && !config.modules_to_save.iter().any(|module| module == SCORE) {
            config.modules_to_save.push(SCORE.to_owned());
        }
        config
    }

    /// Returns the magnitudes that leave a linear's function unchanged.
    fn initial_magnitude(&self, target: &str, start: &LoraFactors, scale: f64) -> Vec<f32> {
        let weight = &self.linear(target).weight;
        // A CUDA device computes the norms of W, which are those of W + s·B·A where B is zero.
        if start.b.iter().all(|&b| b == 0.0)
            && let Some(norms) = stacked::row_norms_squared(weight)
        {
            return norms.into_iter().map(f32::sqrt).collect();
        }
        let dense = to_f32(weight.matrix(&self.params));
        initial_magnitude(&dense, weight.dims(), start, scale)
    }

    /// Returns the tables that a new adapter has to carry because the checkpoint has them with other rows: those that it
    /// does not train itself. One stands for both where they are tied.
    fn unsaved_tables(&self, saved: &BTreeMap<String, ([usize; 2], Vec<f32>)>) -> Vec<Role> {
        if !self.provenance.resized {
            return Vec::new();
        }
        // A score has no row for a token id.
        let is_table = |role: &Role| *role == Role::Embedding || !self.has_score_head();
        let is_saved = |role: &Role| saved.contains_key(&self.config.names.module(*role));
        let mut tables: Vec<Role> = TABLES.into_iter().filter(|role| is_table(role) && !is_saved(role)).collect();
        if self.config.tie_word_embeddings() {
            tables.truncate(1);
        }
        tables
    }

    /// Loads a saved adapter and activates it, replacing the one without a name of its own ([`DEFAULT_ADAPTER`]).
    /// [`load_adapter_as`](Self::load_adapter_as) adds one beside others.
    ///
    /// # Errors
    /// [`Error::Lora`] when the files are unreadable or do not match this model exactly, [`Error::Argument`] when it was
    /// trained with other positions.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<(), Error> {
        self.attach_saved(DEFAULT_ADAPTER, dir)
    }

    pub(crate) fn attach_saved(&mut self, name: &str, dir: &Path) -> Result<(), Error> {
        self.check_positions(dir)?;
        let adapter = Adapter::load(dir, &self.modules())?;
        self.check_placeable()?;
        self.check_quantized_format(dir, &adapter)?;
        self.detach_for(name)?;
        self.attach(name, adapter)
    }

    /// The active adapter as it is now, for the base as its checkpoint holds it. An adapter whose initial B·A was
    /// subtracted from the base has twice the rank here ([`rekindle_lora::to_plain`]).
    pub fn adapter(&self) -> Option<Adapter> {
        self.active().map(InactiveAdapter::into_plain)
    }

    /// The active adapter as it is trained.
    pub(super) fn active(&self) -> Option<InactiveAdapter> {
        let config = self.adapter_config().cloned()?;
        let (mut factors, mut biases) = (BTreeMap::new(), BTreeMap::new());
        for (name, trained) in self.decoder.adaptable().flat_map(|part| part.trained(&self.params)) {
            factors.extend(trained.factors.map(|(f, _)| (name.clone(), f)));
            biases.extend(trained.bias.map(|bias| (name, bias)));
        }
        let vocabulary = &self.decoder.vocabulary;
        let embedding = vocabulary.embedding.trained();
        let mut head = vocabulary.head.as_ref().and_then(Weight::trained);
        if self.config.tie_word_embeddings() && config.lora().ensure_weight_tying {
            head = embedding;
        }
        let saved = [(Role::Embedding, embedding), (Role::Head, head)].into_iter();
        let saved = saved
            .filter_map(|(role, at)| Some((self.config.names.module(role), (at?.dims(), self.params.values(at?)))))
            .collect();
        let table = |&role: &Role| (self.config.names.module(role), self.carried_table(role));
        let tables = self.adapters.carried.iter().map(table).collect();
        let base_delta = self.adapters.base_delta.factors();
        Some(InactiveAdapter { adapter: Adapter { config, factors, biases, saved, tables }, base_delta })
    }

    /// Returns a frozen table that the adapter carries, as it is on the model.
    fn carried_table(&self, role: Role) -> EmbeddingTable {
        let vocabulary = &self.decoder.vocabulary;
        let trains_embedding = vocabulary.embedding.trained().is_some();
        let is_tied = self.config.tie_word_embeddings() && !trains_embedding;
        let weight = match &vocabulary.head {
            Some(head) if role == Role::Head && !is_tied => head,
            Some(head) if trains_embedding => head,
            _ => &vocabulary.embedding,
        };
        let dtype = match self.dtype() {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        EmbeddingTable { shape: weight.dims(), dtype, values: to_f32(weight.matrix(&self.params)) }
    }

    /// Returns the modules whose weights the active adapter carries without training them, such as `model.embed_tokens`:
    /// the checkpoint has them with another number of rows, or the adapter brought them.
    pub fn carried_tables(&self) -> Vec<&str> {
        let names = &self.config.names;
        let name = |role: &Role| if *role == Role::Head { names.head } else { names.embedding };
        self.adapters.carried.iter().map(name).collect()
    }

    /// Deletes the active adapter; the model is then its base. Without an active adapter nothing happens.
    pub fn remove_adapter(&mut self) {
        if self.adapters.active.take().is_none() {
            return;
        }
        self.adapters.carried.clear();
        self.drop_params();
        let mut params = ParamsBuilder::new(self.device(), self.dtype());
        for part in self.decoder.adaptable_mut() {
            part.adapt(&mut params, 0, |_| LoraInit::default());
        }
        self.restore_vocabulary();
        self.params = params.build();
        self.restore_base();
    }

    /// Drops the parameters of an adapter. On CUDA their copies keep the matrices of weights and factors, which the weights
    /// are about to leave one after another.
    fn drop_params(&mut self) {
        self.params = Params::none(self.device(), self.dtype());
    }

    /// Attaches an adapter to the base, and makes it the active one.
    pub(crate) fn attach(&mut self, name: &str, adapter: Adapter) -> Result<(), Error> {
        self.check_placeable()?;
        self.check_fp8(&adapter)?;
        self.restore_vocabulary();
        self.drop_params();
        let mut params = ParamsBuilder::new(self.device(), self.dtype());
        let Adapter { config, mut factors, mut biases, saved, tables } = adapter;
        for (site, part) in self.decoder.adaptable_mut().enumerate() {
            part.adapt(&mut params, site as u32, |linear| LoraInit {
                factors: factors.remove(linear).map(|f| (f, config.lora().scale_of(linear))),
                bias: biases.remove(linear),
            });
        }
        let is_tied = self.config.tie_word_embeddings() && config.lora().ensure_weight_tying;
        if !(saved.is_empty() && tables.is_empty()) {
            self.decoder.base_vocabulary = Some(self.decoder.vocabulary.clone());
        }
        let is_carried = |role: &Role| tables.contains_key(&self.config.names.module(*role));
        self.adapters.carried = TABLES.into_iter().filter(is_carried).collect();
        let (device, dtype) = (self.device().clone(), self.dtype());
        let vocabulary = &mut self.decoder.vocabulary;
        for (module, EmbeddingTable { shape, values, .. }) in tables {
            let table = Weight::Frozen(from_f32(values, shape, &device, dtype));
            if module == self.config.names.module(Role::Head) && !self.config.spec.head.tied {
                vocabulary.head = Some(table);
            } else {
                vocabulary.embedding = table;
            }
        }
        for (module, (shape, values)) in saved {
            let is_head = module == self.config.names.module(Role::Head);
            if is_head && is_tied {
                continue; // The table is the head.
            }
            let group = if module == SCORE { Group::Default } else { Group::Embedding };
            let at = params.push_in(group, format!("{module}.weight"), &shape, true, &values);
            let trained = Weight::Trained(at);
            if is_head {
                vocabulary.head = Some(trained);
                continue;
            }
            if self.config.spec.head.tied && !is_tied && vocabulary.head.is_none() {
                // The head stays what the table was.
                vocabulary.head = Some(vocabulary.embedding.clone());
            }
            vocabulary.embedding = trained;
        }
        self.params = params.build();
        self.adapters.active = Some(ActiveAdapter { name: name.to_owned(), config });
        Ok(())
    }

    /// Restores the frozen weights of modules that an adapter trained whole.
    fn restore_vocabulary(&mut self) {
        if let Some(base) = self.decoder.base_vocabulary.take() {
            self.decoder.vocabulary = base;
        }
    }

    fn check_placeable(&self) -> Result<(), Error> {
        if self.adapters.active.is_none() && self.params.numel() > 0 {
            return Err(Error::Argument(
                "all weights of this model are trained; to add an adapter, load it with full_finetuning = \
                 false"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Refuses what the products in fp8 do not compute.
    fn check_fp8(&self, adapter: &Adapter) -> Result<(), Error> {
        if self.decoder.fp8().is_none() {
            return Ok(());
        }
        let has_magnitude = |factors: &LoraFactors| factors.magnitude.is_some();
        let option = match adapter {
            Adapter { factors, .. } if factors.values().any(has_magnitude) => "use_dora = true",
            Adapter { biases, .. } if !biases.is_empty() => "bias = \"all\" or \"lora_only\"",
            _ => return Ok(()),
        };
        Err(Error::Argument(format!("fp8 products do not support adapters with {option}; set fp8 = false")))
    }

    pub(crate) fn linear(&self, name: &str) -> &Linear {
        self.decoder.linears().find(|linear| linear.name == name).expect("the names are this model's")
    }
}

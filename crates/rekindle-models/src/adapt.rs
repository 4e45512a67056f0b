//! Adapters on a model: making, placing and taking them off.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::DType;
use rekindle_hub::Dtype;
use rekindle_kernels::{Group, ParamsBuilder, Weight, from_f32, to_f32};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{
    Adaptation, Adapter, EmbeddingTable, GradientCheckpointing, InitLoraWeights, Linear, LoraConfig, Module, Modules,
    initial_magnitude, match_targets,
};

use crate::adapters::{DEFAULT_ADAPTER, Held};
use crate::block::Block;
use crate::names::{EMBED, HEAD, Projection, module};
use crate::{CausalLm, Error, ModelConfig};

/// The base's weights of modules that an adapter replaces.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replaced {
    pub(crate) embed: Option<Weight>,
    /// Within: `None` where the table is the head.
    pub(crate) head: Option<Option<Weight>>,
}

impl ModelConfig {
    /// What an adapter can be on.
    pub fn modules(&self) -> Modules {
        let c = self;
        let linear = |layer, projection: Projection| {
            let [out, input] = projection.shape(c);
            Module { name: projection.module(layer), input, out, has_bias: projection.has_bias(c) }
        };
        let linears = (0..c.num_hidden_layers).flat_map(|layer| Projection::ALL.map(|p| linear(layer, p))).collect();
        let savable = [EMBED, HEAD].map(|name| (module(name).to_owned(), [c.vocab_size, c.hidden_size])).to_vec();
        Modules { linears, savable, tied: c.tie_word_embeddings }
    }
}

impl CausalLm {
    /// What an adapter can be on.
    pub fn modules(&self) -> Modules {
        self.config.modules()
    }

    /// Puts a new adapter on the linears that `config` targets, replacing the one without a name of its own
    /// ([`DEFAULT_ADAPTER`]). [`add_adapter_as`](Self::add_adapter_as) adds one beside others.
    ///
    /// With `init_lora_weights` = `"pissa"`, `"pissa_niter_N"` or `"olora"` the base loses what the adapter starts with
    /// ([`rekindle_lora::taken`]), until the adapter is taken off. [`adapter`](Self::adapter) stands for the same function
    /// on the base as it was. Where the weights are bf16, what is left of them is rounded once more.
    ///
    /// # Errors
    /// [`Error::Lora`] for a configuration that is invalid or matches nothing, [`Error::Argument`] when all
    /// weights are trained or the base cannot start such an adapter, [`Error::File`] when its checkpoint is gone.
    pub fn add_adapter(&mut self, config: &LoraConfig) -> Result<(), Error> {
        self.put_new(DEFAULT_ADAPTER, config)
    }

    pub(crate) fn put_new(&mut self, name: &str, config: &LoraConfig) -> Result<(), Error> {
        config.validate()?;
        let modules = self.modules();
        let targets = match_targets(config, &modules.names())?;
        let saved = modules.saved(config)?;
        self.check_placeable()?;
        let source = self.start_source(config, &targets)?;
        // From here on only the device can fail, or a weight that is not finite where the adapter starts from it: the
        // earlier adapter may go.
        self.make_way(name)?;
        let mut factors = BTreeMap::new();
        let starts = self.starts(config, &targets, source)?;
        for (target, mut start) in targets.iter().zip(starts) {
            let linear = self.linear(target);
            let [out, input] = linear.weight.dims();
            if config.use_dora {
                let dense = to_f32(linear.weight.matrix(&self.params));
                start.magnitude = Some(initial_magnitude(&dense, [out, input], &start, config.scale_of(target)));
            }
            factors.insert(target.clone(), start);
        }
        let bias = |linear: &Module| {
            let bias = self.linear(&linear.name).bias.as_ref().expect("the module says that it has one");
            (linear.name.clone(), to_f32(bias.matrix(&self.params)))
        };
        let biases = modules.biased(config.bias, |name| factors.contains_key(name)).into_iter().map(bias).collect();
        let saved = saved.into_iter().map(|name| {
            let weight = if name == module(HEAD) { self.head.as_ref().unwrap_or(&self.embed) } else { &self.embed };
            (name, (weight.dims(), to_f32(weight.matrix(&self.params))))
        });
        let saved: BTreeMap<_, _> = saved.collect();
        let mut config = AdapterConfig::new(config, Some(&self.name_or_path), &targets);
        config.set_revision(self.revision.as_deref());
        if config.lora().init_lora_weights == InitLoraWeights::Loftq {
            config.set_codes(self.codes(&targets[0]).expect("the source is in codes"));
        }
        let carried = self.unsaved_tables(&saved);
        self.place(name, Adapter { config, factors, biases, saved, tables: BTreeMap::new() })?;
        self.carried = carried;
        Ok(())
    }

    /// Returns the tables that a new adapter has to carry because the checkpoint has them with other rows: those that it
    /// does not train itself. One stands for both where they are tied.
    fn unsaved_tables(&self, saved: &BTreeMap<String, ([usize; 2], Vec<f32>)>) -> Vec<&'static str> {
        if !self.resized {
            return Vec::new();
        }
        let mut tables: Vec<&str> =
            [EMBED, HEAD].into_iter().filter(|name| !saved.contains_key(module(name))).collect();
        if self.config.tie_word_embeddings {
            tables.truncate(1);
        }
        tables
    }

    /// Puts a saved adapter on the model, replacing the one without a name of its own ([`DEFAULT_ADAPTER`]).
    /// [`load_adapter_as`](Self::load_adapter_as) adds one beside others.
    ///
    /// # Errors
    /// [`Error::Lora`] when the files are unreadable or do not match this model exactly, [`Error::Argument`] when it was
    /// trained with other positions.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<(), Error> {
        self.put_saved(DEFAULT_ADAPTER, dir)
    }

    pub(crate) fn put_saved(&mut self, name: &str, dir: &Path) -> Result<(), Error> {
        self.check_positions(dir)?;
        let adapter = Adapter::load(dir, &self.modules())?;
        self.check_placeable()?;
        self.check_codes(dir, &adapter)?;
        self.make_way(name)?;
        self.place(name, adapter)
    }

    /// The adapter as it is now, if there is one: for the base as its checkpoint has it. One that the base lost a part to
    /// has twice the rank here ([`rekindle_lora::to_plain`]).
    pub fn adapter(&self) -> Option<Adapter> {
        self.held().map(Held::into_plain)
    }

    /// The adapter as it is trained.
    pub(crate) fn held(&self) -> Option<Held> {
        let config = self.adapter_config.clone()?;
        let (mut factors, mut biases) = (BTreeMap::new(), BTreeMap::new());
        for (name, trained) in self.blocks.iter().flat_map(Block::groups).flat_map(|group| group.trained(&self.params))
        {
            factors.extend(trained.factors.map(|(f, _)| (name.clone(), f)));
            biases.extend(trained.bias.map(|bias| (name, bias)));
        }
        let embed = self.replaced.embed.as_ref().and(self.embed.trained());
        let mut head = self.replaced.head.as_ref().and(self.head.as_ref().and_then(Weight::trained));
        if self.config.tie_word_embeddings && config.lora().ensure_weight_tying {
            head = embed;
        }
        let saved = [(EMBED, embed), (HEAD, head)].into_iter();
        let saved = saved
            .filter_map(|(name, at)| Some((module(name).to_owned(), (at?.dims(), self.params.values(at?)))))
            .collect();
        let tables = self.carried.iter().map(|name| (module(name).to_owned(), self.carried_table(name))).collect();
        Some(Held { adapter: Adapter { config, factors, biases, saved, tables }, taken: self.taken.factors() })
    }

    /// Returns a frozen table that the adapter carries, as it is on the model.
    fn carried_table(&self, name: &str) -> EmbeddingTable {
        let tied = self.config.tie_word_embeddings && self.embed.trained().is_none();
        let weight = match &self.head {
            Some(head) if name == HEAD && !tied => head,
            Some(head) if self.embed.trained().is_some() => head,
            _ => &self.embed,
        };
        let dtype = match self.dtype {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        EmbeddingTable { shape: weight.dims(), dtype, values: to_f32(weight.matrix(&self.params)) }
    }

    /// Returns the modules whose weights the adapter on the model carries without training them, such as
    /// `model.embed_tokens`: the checkpoint has them with another number of rows, or the adapter brought them.
    pub fn carried_tables(&self) -> Vec<&str> {
        self.carried.iter().map(|name| module(name)).collect()
    }

    /// Takes the adapter off and forgets it; the model is then its base. Without an adapter nothing happens.
    pub fn remove_adapter(&mut self) {
        if self.adapter_config.take().is_none() {
            return;
        }
        self.carried.clear();
        let mut params = ParamsBuilder::new(&self.device, self.dtype);
        for group in self.blocks.iter_mut().flat_map(Block::groups_mut) {
            group.adapt(&mut params, 0, |_| Adaptation::default());
        }
        self.restore();
        self.params = params.build();
        self.put_back();
    }

    /// What becomes of activations between forward and backward: what the adapter asks for, otherwise what was set
    /// for the model.
    pub fn gradient_checkpointing(&self) -> GradientCheckpointing {
        match self.lora().map(|lora| lora.use_gradient_checkpointing) {
            None | Some(GradientCheckpointing::Off) => self.checkpointing,
            Some(asked) => asked,
        }
    }

    /// Sets it for the adapter or, where there is none, for the model: for training all weights, and for adapters to
    /// come that ask for nothing.
    pub fn set_gradient_checkpointing(&mut self, checkpointing: GradientCheckpointing) {
        match &mut self.adapter_config {
            Some(config) => config.lora_mut().use_gradient_checkpointing = checkpointing,
            None => self.checkpointing = checkpointing,
        }
    }

    /// Puts an adapter onto the base.
    pub(crate) fn place(&mut self, called: &str, adapter: Adapter) -> Result<(), Error> {
        self.check_placeable()?;
        self.restore();
        let mut params = ParamsBuilder::new(&self.device, self.dtype);
        let Adapter { config, mut factors, mut biases, saved, tables } = adapter;
        for (site, group) in self.blocks.iter_mut().flat_map(Block::groups_mut).enumerate() {
            group.adapt(&mut params, site as u32, |linear| Adaptation {
                factors: factors.remove(&linear.name).map(|f| (f, config.lora().scale_of(&linear.name))),
                bias: biases.remove(&linear.name),
            });
        }
        self.carried = [EMBED, HEAD].into_iter().filter(|name| tables.contains_key(module(name))).collect();
        for (name, EmbeddingTable { shape, values, .. }) in tables {
            let table = Weight::Frozen(from_f32(values, shape, &self.device, self.dtype));
            if name == module(HEAD) && !self.config.tie_word_embeddings {
                let head = self.head.replace(table);
                self.replaced.head.get_or_insert(head);
            } else {
                let embed = core::mem::replace(&mut self.embed, table);
                self.replaced.embed.get_or_insert(embed);
            }
        }
        let tied = self.config.tie_word_embeddings && config.lora().ensure_weight_tying;
        for (name, (shape, values)) in saved {
            if name == module(HEAD) && tied {
                continue; // The table is the head.
            }
            let at = params.push_in(Group::Embedding, format!("{name}.weight"), &shape, true, &values);
            let trained = Weight::Trained(at);
            if name == module(HEAD) {
                let head = self.head.replace(trained);
                self.replaced.head.get_or_insert(head);
                continue;
            }
            if self.config.tie_word_embeddings && !tied && self.head.is_none() {
                // The head stays what the table was.
                self.replaced.head = Some(self.head.replace(self.embed.clone()));
            }
            let embed = core::mem::replace(&mut self.embed, trained);
            self.replaced.embed.get_or_insert(embed);
        }
        self.params = params.build();
        self.adapter_config = Some(config);
        called.clone_into(&mut self.adapter_name);
        Ok(())
    }

    /// Puts back the frozen weights of modules that were trained whole.
    fn restore(&mut self) {
        if let Some(embed) = self.replaced.embed.take() {
            self.embed = embed;
        }
        if let Some(head) = self.replaced.head.take() {
            self.head = head;
        }
    }

    fn check_placeable(&self) -> Result<(), Error> {
        if self.adapter_config.is_none() && self.params.numel() > 0 {
            return Err(Error::Argument(
                "all weights are trained; an adapter goes onto a model loaded with full_finetuning = false".to_owned(),
            ));
        }
        Ok(())
    }

    pub(crate) fn linear(&self, name: &str) -> &Linear {
        let mut linears = self.blocks.iter().flat_map(Block::groups).flat_map(|group| group.linears());
        linears.find(|linear| linear.name == name).expect("the names are this model's")
    }
}

//! PEFT's files: `adapter_config.json` and the tensor names of `adapter_model.safetensors`.
//!
//! The field list is that of PEFT 0.21; fields that a later version adds are kept as they are.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{BLOCK_LINEARS, Bias, Error, InitLoraWeights, LoraConfig, ModulePattern, TargetModules};

mod keys;
pub(crate) mod stacked;

pub use keys::TensorKey;

/// The file with the adapter's configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file with the adapter's tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// The contents of an `adapter_config.json`.
///
/// Unknown fields are kept and written back. Reading fails for fields that change the result and are not supported.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    fields: Map<String, Value>,
    lora: LoraConfig,
}

/// Fields that change which weights are used or how, unless they are null, false or empty.
const UNSUPPORTED: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Fields that are read, or that do not affect the result of a trained adapter.
const SUPPORTED: [&str; 30] = [
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
];

/// Initializations that also replace the base weights, which PEFT repeats whenever it loads such an adapter.
const CHANGES_BASE: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

impl AdapterConfig {
    /// Returns the configuration of an adapter that was created from `lora` on the linears `modules` (their full names).
    ///
    /// `"all-linear"`, and the default on a model with fused linears, become a list of the last segments of `modules`, as in
    /// PEFT: not every program that reads adapters knows the word.
    pub fn new(lora: &LoraConfig, base_model_name_or_path: Option<&str>, modules: &[String]) -> Self {
        let mut lora = lora.clone();
        let is_default = lora.target_modules == TargetModules::from(BLOCK_LINEARS);
        let is_fused = |module: &String| crate::targets::is_fused(module);
        if lora.target_modules == TargetModules::AllLinear || is_default && modules.iter().any(is_fused) {
            let mut names: Vec<&str> = modules.iter().map(|m| m.rsplit('.').next().unwrap_or(m)).collect();
            names.sort_unstable();
            names.dedup();
            lora.target_modules = names.into();
        }
        lora.target_modules = crate::targets::spelled_out(lora.target_modules, modules);
        if lora.finetune_last_n_layers.take().is_some() {
            // PEFT has no such argument; full names express it for any targets.
            lora.target_modules = TargetModules::Names(modules.to_vec());
        }
        let fields = json!({
            "alpha_pattern": alphas(&lora),
            "auto_mapping": null,
            "base_model_name_or_path": base_model_name_or_path,
            "bias": lora.bias,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": lora.init_lora_weights,
            "layers_pattern": lora.layers_pattern,
            "layers_to_transform": lora.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(lora.lora_alpha),
            "lora_dropout": lora.lora_dropout,
            "modules_to_save": (!lora.modules_to_save.is_empty()).then_some(&lora.modules_to_save),
            "peft_type": "LORA",
            "r": lora.r,
            "rank_pattern": lora.rank_pattern,
            "revision": null,
            "target_modules": lora.target_modules,
            "task_type": if lora.modules_to_save.iter().any(|module| module == SCORE) { REWARD_TASK } else { "CAUSAL_LM" },
            "use_dora": lora.use_dora,
            "use_rslora": lora.use_rslora,
        });
        let mut fields = fields.as_object().expect("the literal above is an object").clone();
        if !lora.target_parameters.is_empty() {
            fields.insert("target_parameters".to_owned(), json!(lora.target_parameters));
        }
        if let Some(excluded) = &lora.exclude_modules {
            fields.insert("exclude_modules".to_owned(), json!(excluded));
        }
        if lora.ensure_weight_tying && lora.modules_to_save.iter().any(|module| module != SCORE) {
            fields.insert("ensure_weight_tying".to_owned(), Value::from(true));
        }
        Self { fields, lora }
    }

    /// Returns true for an adapter of a reward model, which brings the score head.
    pub fn is_reward_model(&self) -> bool {
        self.lora.modules_to_save.iter().any(|module| module == SCORE)
    }

    /// Reads the text of an `adapter_config.json`. Absent fields have PEFT's defaults (`r` and `lora_alpha` are 8).
    ///
    /// # Errors
    /// [`Error::AdapterConfig`] with one sentence for each field that is malformed, or that changes the result and is
    /// not supported.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| problems(vec![format!("not a JSON object: {error}")]))?;
        let mut reader = FieldReader { fields: &fields, problems: Vec::new() };
        let lora = reader.lora();
        if !reader.problems.is_empty() {
            return Err(problems(reader.problems));
        }
        Ok(Self { fields, lora })
    }

    /// Reads the file of the adapter in `dir`, as [`from_json`](Self::from_json).
    ///
    /// # Errors
    /// [`Error::File`] if there is none, and those of `from_json`.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let value: Value = rekindle_hub::read_json(&dir.join(CONFIG_FILE))?;
        Self::from_json(&value.to_string())
    }

    /// Returns the text of the file, indented by two and sorted by key as PEFT writes it.
    pub fn to_json(&self) -> String {
        let mut value = Value::Object(self.fields.clone());
        value.sort_all_objects();
        format!("{value:#}")
    }

    /// Returns the arguments that the adapter was created with. `random_state`, which the file does not contain, has its
    /// default.
    pub fn lora(&self) -> &LoraConfig {
        &self.lora
    }

    /// Returns the arguments for changes that do not affect the adapter itself.
    pub fn lora_mut(&mut self) -> &mut LoraConfig {
        &mut self.lora
    }

    /// Returns the configuration of the adapter in its plain form, whose initial B·A is not subtracted from the base and which
    /// needs no quantization. `doubled` is for [`to_plain`](crate::to_plain): twice the rank at the same scale.
    #[must_use]
    pub fn plain(&self, doubled: bool) -> Self {
        let mut plain = self.clone();
        let lora = &mut plain.lora;
        lora.init_lora_weights = InitLoraWeights::Default;
        if doubled {
            let grown = if lora.use_rslora { core::f64::consts::SQRT_2 } else { 2.0 };
            lora.r *= 2;
            lora.lora_alpha *= grown;
            lora.rank_pattern.0.values_mut().for_each(|r| *r *= 2);
            lora.alpha_pattern.0.values_mut().for_each(|alpha| *alpha *= grown);
        }
        let changed = [
            ("init_lora_weights", json!(true)),
            ("r", json!(lora.r)),
            ("lora_alpha", number(lora.lora_alpha)),
            ("rank_pattern", json!(lora.rank_pattern)),
            ("alpha_pattern", alphas(lora)),
        ];
        plain.fields.extend(changed.map(|(key, value)| (key.to_owned(), value)));
        plain
    }

    /// Returns the configuration of an adapter combined from this one and others: plain factors of rank `r` and scale 1 on
    /// `target_modules`, and this configuration otherwise.
    #[must_use]
    pub fn combined(&self, r: usize, target_modules: TargetModules) -> Self {
        let (mut fields, kept) = (self.fields.clone(), &self.lora);
        let lora = LoraConfig {
            lora_alpha: r as f64,
            lora_dropout: kept.lora_dropout,
            target_modules,
            target_parameters: kept.target_parameters.clone(),
            random_state: kept.random_state,
            ..LoraConfig::new(r)
        };
        // All other fields are as in a new file.
        let new = Self::new(&lora, None, &[]).fields;
        let own = ["base_model_name_or_path", "revision"];
        fields.extend(new.into_iter().filter(|(key, _)| !own.contains(&key.as_str())));
        fields.retain(|key, _| !["exclude_modules", "ensure_weight_tying"].contains(&key.as_str()));
        Self { fields, lora }
    }

    /// Returns the description of the quantized base that LoftQ initialized the adapter for, or `None` for other adapters.
    pub fn codes(&self) -> Option<&Map<String, Value>> {
        self.fields.get("loftq_config").and_then(Value::as_object).filter(|codes| !codes.is_empty())
    }

    /// Sets the description of the quantized base. PEFT keeps the object and uses it only for new adapters.
    pub fn set_codes(&mut self, codes: Map<String, Value>) {
        self.fields.insert("loftq_config".to_owned(), Value::Object(codes));
    }

    /// Returns the name or path of the base model.
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        self.fields.get("base_model_name_or_path").and_then(Value::as_str)
    }

    /// Sets the branch, tag or commit of the base model.
    pub fn set_revision(&mut self, revision: Option<&str>) {
        self.fields.insert("revision".to_owned(), Value::from(revision));
    }

    /// Returns fields that PEFT 0.21 does not have and that are neither null, false nor empty. They are kept, but have no
    /// effect.
    pub fn unknown_fields(&self) -> Vec<&str> {
        let known = |key: &&str| UNSUPPORTED.contains(key) || SUPPORTED.contains(key);
        let set = self.fields.iter().filter(|(_, value)| is_set(value)).map(|(key, _)| key.as_str());
        set.filter(|key| !known(key)).collect()
    }
}

/// The module of a reward model's head.
const SCORE: &str = "score";

/// The task of adapters of reward models.
const REWARD_TASK: &str = "SEQ_CLS";

struct FieldReader<'a> {
    fields: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl FieldReader<'_> {
    fn lora(&mut self) -> LoraConfig {
        self.choice("peft_type", &["LORA"], true);
        self.choice("task_type", &["CAUSAL_LM", REWARD_TASK], false);
        for key in UNSUPPORTED {
            if let Some(value) = self.fields.get(key).filter(|value| is_set(value)) {
                self.problems.push(format!("{key} = {value} is not supported"));
            }
        }
        let r = self.typed("r", "a rank of at least 1").unwrap_or(8);
        if r == 0 {
            self.problems.push("r is 0; expected a rank of at least 1".to_owned());
        }
        let lora_dropout = self.typed("lora_dropout", "a probability").unwrap_or(0.0);
        if !(0.0..1.0).contains(&lora_dropout) {
            self.problems.push(format!("lora_dropout is {lora_dropout}; expected at least 0 and below 1"));
        }
        let layers: Option<List<usize>> = self.typed("layers_to_transform", "a block number or a list of them");
        // PEFT takes an empty list for "every block".
        let layers_to_transform = layers.map(List::into_list).filter(|layers| !layers.is_empty());
        let target_modules = self.target_modules();
        let modules_to_save = self.modules_to_save();
        let saves_tables = modules_to_save.iter().any(|module| module != SCORE);
        if layers_to_transform.is_some() && !matches!(target_modules, TargetModules::Names(_)) {
            self.problems.push("layers_to_transform needs target_modules to be a list of names".to_owned());
        }
        let rank_pattern: ModulePattern<usize> = self.typed("rank_pattern", "ranks by name").unwrap_or_default();
        let alpha_pattern: ModulePattern<f64> = self.typed("alpha_pattern", "numbers by name").unwrap_or_default();
        self.problems.extend(rank_pattern.invalid("rank_pattern").chain(alpha_pattern.invalid("alpha_pattern")));
        for (key, _) in rank_pattern.0.iter().filter(|(_, r)| **r == 0) {
            self.problems.push(format!("rank_pattern \"{key}\" is 0; expected a rank of at least 1"));
        }
        let lora_alpha: f64 = self.typed("lora_alpha", "a number").unwrap_or(8.0);
        for alpha in alpha_pattern.0.values().chain([&lora_alpha]).filter(|alpha| !alpha.is_finite()) {
            self.problems.push(format!("lora_alpha is {alpha}; expected a finite number"));
        }
        LoraConfig {
            r,
            lora_alpha,
            use_rslora: self.typed("use_rslora", "true or false").unwrap_or(false),
            lora_dropout,
            target_modules,
            layers_to_transform,
            init_lora_weights: self.init(),
            bias: self.bias(),
            target_parameters: self.names("target_parameters").unwrap_or_default(),
            exclude_modules: self.typed("exclude_modules", "a list of names or a string").filter(is_not_empty),
            layers_pattern: self.names("layers_pattern"),
            rank_pattern,
            alpha_pattern,
            modules_to_save,
            // Without such modules it means nothing.
            ensure_weight_tying: self.typed("ensure_weight_tying", "true or false").unwrap_or(false) || !saves_tables,
            use_dora: self.typed("use_dora", "true or false").unwrap_or(false),
            ..LoraConfig::default()
        }
    }

    /// Reads the modules that are saved whole. For sequence classification PEFT adds the names that heads have anywhere,
    /// also a second time.
    fn modules_to_save(&mut self) -> Vec<String> {
        let names = self.names("modules_to_save").unwrap_or_default();
        if self.fields.get("task_type").and_then(Value::as_str) != Some(REWARD_TASK) {
            return names;
        }
        let mut kept = vec![SCORE.to_owned()];
        kept.extend(names.into_iter().filter(|name| ![SCORE, "classifier"].contains(&name.as_str())));
        kept
    }

    fn target_modules(&mut self) -> TargetModules {
        let targets = self.typed("target_modules", "a list of names or a string");
        if targets.is_none() && !self.fields.get("target_modules").is_some_and(is_set) {
            if self.fields.get("target_parameters").is_some_and(is_set) {
                return TargetModules::Names(Vec::new());
            }
            self.problems.push("target_modules is missing".to_owned());
        }
        targets.unwrap_or(TargetModules::AllLinear)
    }

    fn bias(&mut self) -> Bias {
        let Some(value) = self.fields.get("bias").filter(|value| !value.is_null()) else { return Bias::None };
        let word = value.as_str().unwrap_or_default();
        Bias::try_from(word.to_owned()).unwrap_or_else(|error| {
            self.problems.push(error.to_string());
            Bias::None
        })
    }

    /// Reads a list of names, or one name. Absence and an empty list are `None`.
    fn names(&mut self, key: &str) -> Option<Vec<String>> {
        let list: Option<List<String>> = self.typed(key, "a list of names");
        list.map(List::into_list).filter(|names| !names.is_empty())
    }

    fn init(&mut self) -> InitLoraWeights {
        let init: InitLoraWeights = self.typed("init_lora_weights", "true, false or a name").unwrap_or_default();
        let name = self.fields.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if CHANGES_BASE.iter().any(|method| name.starts_with(method)) {
            self.problems.push(format!(
                "init_lora_weights = \"{name}\" changes the base weights and is not supported; in PEFT, save the \
                 adapter with path_initial_model_for_weight_conversion to make it a plain one"
            ));
        }
        init
    }

    /// Checks that a field is one of the words, or absent if it is not `required`.
    fn choice(&mut self, key: &str, words: &[&str], required: bool) {
        match self.fields.get(key) {
            None | Some(Value::Null) if required => self.problems.push(format!("{key} is missing")),
            None | Some(Value::Null) => {}
            Some(value) if value.as_str().is_some_and(|word| words.contains(&word)) => {}
            Some(value) => self.problems.push(format!("{key} = {value} is not supported; supported: {words:?}")),
        }
    }

    fn typed<T: DeserializeOwned>(&mut self, key: &str, expected: &str) -> Option<T> {
        let value = self.fields.get(key).filter(|value| !value.is_null())?;
        let typed = serde_json::from_value(value.clone()).ok();
        if typed.is_none() {
            self.problems.push(format!("{key} is {value}; expected {expected}"));
        }
        typed
    }
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum List<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> List<T> {
    fn into_list(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

fn is_not_empty(targets: &TargetModules) -> bool {
    *targets != TargetModules::Names(Vec::new())
}

/// Returns true if a field is set to anything but null, false or an empty value.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

fn alphas(lora: &LoraConfig) -> Value {
    lora.alpha_pattern.0.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect()
}

/// Returns 32 rather than 32.0, because PEFT declares `lora_alpha` as an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) { json!(value as i64) } else { json!(value) }
}

fn problems(problems: Vec<String>) -> Error {
    Error::AdapterConfig { problems }
}

#[cfg(test)]
mod tests;

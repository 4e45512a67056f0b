mod advice;
mod bias;
mod init;
mod lists;
mod loftq;
mod pattern;
mod scale;
mod targets;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::error::nearest_hint;

pub use bias::Bias;
pub use init::InitLoraWeights;
pub use loftq::LoftqConfig;
pub use pattern::ModulePattern;
pub use targets::TargetModules;

/// The seven linears of a decoder block, the default of [`LoraConfig::target_modules`].
pub const BLOCK_LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Fused linears, each of which replaces several of [`BLOCK_LINEARS`].
pub const FUSED_LINEARS: [&str; 2] = ["qkv_proj", "gate_up_proj"];

/// The modules that [`LoraConfig::modules_to_save`] accepts.
pub const SAVABLE: [&str; 3] = ["embed_tokens", "lm_head", "score"];

/// The arguments of `get_peft_model`, under the names that PEFT and Unsloth give them.
///
/// An adapted linear computes `y = x·Wᵀ + s·(dropout(x)·Aᵀ)·Bᵀ` with `s` = [`LoraConfig::scale`].
///
/// ```
/// # use rekindle_lora::LoraConfig;
/// let config = LoraConfig::new(16).lora_alpha(32.0).target_modules(["q_proj", "v_proj"]);
/// assert_eq!(config.scale(), 2.0);
/// config.validate()?;
/// # Ok::<(), rekindle_lora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// The rank: A is `[r, in]`, B is `[out, r]`. Default 16.
    pub r: usize,
    /// The numerator of the scale. Default 16.
    pub lora_alpha: f64,
    /// True if the scale is `lora_alpha / √r` (arXiv:2312.03732) instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Dropout probability of the adapter's input, in `[0, 1)`. Default 0.
    pub lora_dropout: f64,
    /// The biases of the base model that are trained. Default none.
    pub bias: Bias,
    /// The linears that get an adapter. Default [`BLOCK_LINEARS`], or all linears of a layer if some of those are fused.
    pub target_modules: TargetModules,
    /// Parameters of experts that get an adapter for each expert, such as `mlp.experts.gate_up_proj`; gate and up of an expert
    /// then share one, as in PEFT on transformers 5, whose layout the adapter's file has.
    #[serde(deserialize_with = "lists::names_or_none", skip_serializing_if = "Vec::is_empty")]
    pub target_parameters: Vec<String>,
    /// Targets to exclude: names, or a regular expression for whole names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// The numbers of the blocks that get adapters. Default: all. Needs a list in `target_modules`, as in PEFT.
    #[serde(deserialize_with = "lists::numbers", skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// The segments that precede the block number in a module's name, if the number is not its third segment.
    #[serde(deserialize_with = "lists::names", skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<Vec<String>>,
    /// The number of blocks, counted from the end, that get adapters. Not in PEFT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finetune_last_n_layers: Option<usize>,
    /// Ranks of some modules instead of `r`.
    #[serde(skip_serializing_if = "ModulePattern::is_empty")]
    pub rank_pattern: ModulePattern<usize>,
    /// `lora_alpha` of some modules.
    #[serde(skip_serializing_if = "ModulePattern::is_empty")]
    pub alpha_pattern: ModulePattern<f64>,
    /// The modules that are trained in full and saved with the adapter: `embed_tokens`, `lm_head`.
    #[serde(deserialize_with = "lists::names_or_none", skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// True if a tied embedding table and head stay tied when `modules_to_save` names one of them. Default true. PEFT's
    /// default is false, which trains a copy of one and leaves the other unchanged.
    pub ensure_weight_tying: bool,
    /// True if the rows of W + s·B·A are scaled to trained magnitudes (DoRA, arXiv:2402.09353). Default false.
    pub use_dora: bool,
    /// Seed of the initial A (and of dropout). Default 3407.
    pub random_state: u64,
    /// The initial values of A and B. Default true.
    pub init_lora_weights: InitLoraWeights,
    /// Arguments of `init_lora_weights` = `"loftq"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_config: Option<LoftqConfig>,
}

impl LoraConfig {
    /// Returns a configuration with rank `r` and defaults otherwise.
    pub fn new(r: usize) -> Self {
        Self { r, ..Self::default() }
    }

    /// Sets the numerator of the scale.
    #[must_use]
    pub fn lora_alpha(mut self, lora_alpha: f64) -> Self {
        self.lora_alpha = lora_alpha;
        self
    }

    /// Sets whether the scale is `lora_alpha / √r`.
    #[must_use]
    pub fn use_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Sets the dropout probability of the adapter's input.
    #[must_use]
    pub fn lora_dropout(mut self, lora_dropout: f64) -> Self {
        self.lora_dropout = lora_dropout;
        self
    }

    /// Sets the trained biases.
    #[must_use]
    pub fn bias(mut self, bias: Bias) -> Self {
        self.bias = bias;
        self
    }

    /// Sets the adapted linears: a list of names, or a string with a regular expression or `"all-linear"`.
    #[must_use]
    pub fn target_modules(mut self, target_modules: impl Into<TargetModules>) -> Self {
        self.target_modules = target_modules.into();
        self
    }

    /// Chooses parameters of experts by the ends of their names.
    #[must_use]
    pub fn target_parameters(mut self, parameters: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.target_parameters = parameters.into_iter().map(Into::into).collect();
        self
    }

    /// Restricts the adapters to these blocks.
    #[must_use]
    pub fn layers_to_transform(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers_to_transform = Some(layers.into_iter().collect());
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn random_state(mut self, random_state: u64) -> Self {
        self.random_state = random_state;
        self
    }

    /// Excludes some of the targets: a list of names, or a string with a regular expression.
    #[must_use]
    pub fn exclude_modules(mut self, exclude_modules: impl Into<TargetModules>) -> Self {
        self.exclude_modules = Some(exclude_modules.into());
        self
    }

    /// Restricts the adapters to the last `n` blocks.
    #[must_use]
    pub fn finetune_last_n_layers(mut self, n: usize) -> Self {
        self.finetune_last_n_layers = Some(n);
        self
    }

    /// Sets the rank of some modules.
    #[must_use]
    pub fn rank_pattern<S: Into<String>>(mut self, ranks: impl IntoIterator<Item = (S, usize)>) -> Self {
        self.rank_pattern = ModulePattern(ranks.into_iter().map(|(key, r)| (key.into(), r)).collect());
        self
    }

    /// Sets `lora_alpha` of some modules.
    #[must_use]
    pub fn alpha_pattern<S: Into<String>>(mut self, alphas: impl IntoIterator<Item = (S, f64)>) -> Self {
        self.alpha_pattern = ModulePattern(alphas.into_iter().map(|(key, alpha)| (key.into(), alpha)).collect());
        self
    }

    /// Trains `embed_tokens` or `lm_head` in full.
    #[must_use]
    pub fn modules_to_save(mut self, modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.modules_to_save = modules.into_iter().map(Into::into).collect();
        self
    }

    /// Sets whether a tied embedding table and head stay tied when one of them is trained.
    #[must_use]
    pub fn ensure_weight_tying(mut self, ensure_weight_tying: bool) -> Self {
        self.ensure_weight_tying = ensure_weight_tying;
        self
    }

    /// Sets whether the adapter is a DoRA.
    #[must_use]
    pub fn use_dora(mut self, use_dora: bool) -> Self {
        self.use_dora = use_dora;
        self
    }

    /// Sets the initial values of A and B.
    #[must_use]
    pub fn init_lora_weights(mut self, init_lora_weights: InitLoraWeights) -> Self {
        self.init_lora_weights = init_lora_weights;
        self
    }

    /// Checks everything that can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Config`] with one sentence for each argument that is out of range or not supported.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        if self.r == 0 {
            problems.push("r is 0; it must be at least 1 (usual: 8 to 64)".to_owned());
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            let usual = self.r.max(1);
            problems.push(format!("lora_alpha is {}; it must be above 0 (usual: r = {usual})", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            problems.push(format!(
                "lora_dropout is {}; it must be at least 0 and below 1 (usual: 0 to 0.1)",
                self.lora_dropout
            ));
        }
        for (key, r) in &self.rank_pattern.0 {
            if *r == 0 {
                problems.push(format!("rank_pattern \"{key}\" is 0; it must be at least 1"));
            }
        }
        for (key, alpha) in &self.alpha_pattern.0 {
            if !(alpha.is_finite() && *alpha > 0.0) {
                problems.push(format!("alpha_pattern \"{key}\" is {alpha}; it must be above 0"));
            }
        }
        for module in self.modules_to_save.iter().filter(|module| !SAVABLE.contains(&module.as_str())) {
            let hint = nearest_hint(module, SAVABLE);
            problems.push(format!("modules_to_save \"{module}\" is not supported; use embed_tokens, lm_head, or score of a reward model{hint}"));
        }
        if self.target_modules == TargetModules::Names(Vec::new()) && self.target_parameters.is_empty() {
            problems.push(match self.modules_to_save[..] {
                [] => "target_modules is empty; nothing would be trained (usual: \"all-linear\")".to_owned(),
                _ => "target_modules is empty; an adapter with modules_to_save also needs at least one linear (usual: \
                      \"all-linear\")"
                    .to_owned(),
            });
        }
        if self.finetune_last_n_layers == Some(0) {
            problems.push("finetune_last_n_layers is 0; remove it to adapt every block".to_owned());
        }
        if self.finetune_last_n_layers.is_some() && self.layers_to_transform.is_some() {
            problems.push(
                "finetune_last_n_layers and layers_to_transform exclude each other; remove one of \
                     them"
                    .to_owned(),
            );
        }
        if self.layers_pattern.is_some() && self.layers_to_transform.is_none() {
            problems.push(
                "layers_pattern has no effect without layers_to_transform; set both, or remove \
                 it"
                .to_owned(),
            );
        }
        match (&self.layers_to_transform, &self.target_modules) {
            (Some(layers), _) if layers.is_empty() => {
                problems.push("layers_to_transform is empty; remove it to adapt every block".to_owned());
            }
            (Some(_), TargetModules::Regex(_) | TargetModules::AllLinear) => problems.push(
                "layers_to_transform needs target_modules to be a list of names, such as [\"q_proj\", \"v_proj\"]"
                    .to_owned(),
            ),
            _ => {}
        }
        problems.extend(self.init_lora_weights.problem());
        problems.extend(self.loftq_config.and_then(LoftqConfig::problem));
        if self.loftq_config.is_some() && self.init_lora_weights != InitLoraWeights::Loftq {
            problems.push("loftq_config applies only to init_lora_weights = \"loftq\"; remove it".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config { problems }) }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 16.0,
            use_rslora: false,
            lora_dropout: 0.0,
            bias: Bias::None,
            target_modules: BLOCK_LINEARS.into(),
            target_parameters: Vec::new(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            finetune_last_n_layers: None,
            rank_pattern: ModulePattern::default(),
            alpha_pattern: ModulePattern::default(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: true,
            use_dora: false,
            random_state: 3407,
            init_lora_weights: InitLoraWeights::Default,
            loftq_config: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(config: &LoraConfig) -> String {
        config.validate().expect_err("the configuration is wrong").to_string()
    }

    #[test]
    fn scale_is_alpha_over_r_or_over_its_root() {
        let config = LoraConfig::new(16).lora_alpha(32.0);
        assert_eq!(config.scale(), 2.0);
        assert_eq!(config.use_rslora(true).scale(), 8.0);
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let config: LoraConfig = serde_json::from_value(json!({})).expect("valid");
        assert_eq!(config, LoraConfig::new(16));
        config.validate().expect("valid");
    }

    #[test]
    fn every_spelling_is_read_and_written_back() {
        for value in [json!({ "target_modules": "ALL-linear" }), json!({ "target_modules": ".*q_proj" })] {
            let config: LoraConfig = serde_json::from_value(value).expect("valid");
            let again = serde_json::from_value(serde_json::to_value(&config).expect("serializes")).expect("valid");
            assert_eq!(config, again);
        }
        let config: LoraConfig = serde_json::from_value(json!({
            "r": 8, "lora_alpha": 16, "bias": "lora_only", "target_modules": ["q_proj"],
            "layers_to_transform": 3, "init_lora_weights": "gaussian"
        }))
        .expect("valid");
        let expected = LoraConfig::new(8).target_modules(["q_proj"]).layers_to_transform([3]).bias(Bias::LoraOnly);
        assert_eq!(config, expected.init_lora_weights(InitLoraWeights::Gaussian));
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let error = serde_json::from_value::<LoraConfig>(json!({ "lora_alfa": 32 })).expect_err("misspelt");
        assert!(error.to_string().contains("unknown field `lora_alfa`"), "{error}");
    }

    #[test]
    fn an_unknown_bias_names_the_choices() {
        let error = serde_json::from_value::<LoraConfig>(json!({ "bias": "lora" })).expect_err("unknown");
        let expected = "bias \"lora\" is unknown; use \"none\", \"all\" or \"lora_only\"; nearest: \"lora_only\"";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn every_bad_argument_is_listed() {
        let text = message(&LoraConfig::new(0).lora_dropout(1.5).lora_alpha(f64::NAN).modules_to_save(["lm_haed"]));
        assert!(text.contains("r is 0"), "{text}");
        assert!(text.contains("lora_dropout is 1.5"), "{text}");
        assert!(
            text.contains(
                "modules_to_save \"lm_haed\" is not supported; use embed_tokens, lm_head, or score of a reward model; nearest: \"lm_head\""
            ),
            "{text}"
        );
        assert!(text.contains("lora_alpha is NaN"), "{text}");
    }

    #[test]
    fn dropout_may_be_zero_but_not_one() {
        LoraConfig::new(4).lora_dropout(0.0).validate().expect("valid");
        assert!(message(&LoraConfig::new(4).lora_dropout(1.0)).contains("lora_dropout is 1;"));
    }

    #[test]
    fn layers_need_a_list_of_names() {
        let text = message(&LoraConfig::new(4).target_modules("all-linear").layers_to_transform([0]));
        assert!(text.contains("layers_to_transform needs target_modules to be a list"), "{text}");
    }

    #[test]
    fn an_unknown_init_names_the_choices() {
        let config = LoraConfig::new(4).init_lora_weights(InitLoraWeights::Other("gausian".to_owned()));
        assert!(message(&config).ends_with("\"olora\" or \"loftq\"; nearest: \"gaussian\""), "{}", message(&config));
    }

    #[test]
    fn loftq_takes_what_its_codes_can_give() {
        let config = |init: &str, loftq: serde_json::Value| {
            let json = json!({ "init_lora_weights": init, "loftq_config": loftq });
            serde_json::from_value::<LoraConfig>(json).expect("well-formed")
        };
        config("loftq", json!({})).validate().expect("valid");
        config("loftq", json!({ "loftq_bits": 8, "loftq_iter": 1 })).validate().expect("valid");
        assert!(message(&config("loftq", json!({ "loftq_iter": 5 }))).contains("loftq_iter is 5; only 1"));
        assert!(message(&config("loftq", json!({ "loftq_bits": 2 }))).contains("loftq_bits is 2; it must be 4 or 8"));
        assert!(
            message(&config("pissa", json!({}))).contains("loftq_config applies only to init_lora_weights = \"loftq\"")
        );
    }

    #[test]
    fn every_init_is_written_as_it_is_read() {
        for (name, init) in [
            (json!(true), InitLoraWeights::Default),
            (json!(false), InitLoraWeights::Random),
            (json!("pissa"), InitLoraWeights::Pissa),
            (json!("pissa_niter_16"), InitLoraWeights::PissaNiter(16)),
            (json!("olora"), InitLoraWeights::Olora),
            (json!("loftq"), InitLoraWeights::Loftq),
            (json!("pissa_niter_"), InitLoraWeights::Other("pissa_niter_".to_owned())),
        ] {
            let config: LoraConfig = serde_json::from_value(json!({ "init_lora_weights": name })).expect("valid");
            assert_eq!(config.init_lora_weights, init);
            assert_eq!(serde_json::to_value(&config).expect("serializes")["init_lora_weights"], name);
            assert_eq!(config.validate().is_err(), matches!(init, InitLoraWeights::Other(_)));
        }
    }
}

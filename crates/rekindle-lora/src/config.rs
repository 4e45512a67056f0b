use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Error;
use crate::error::nearest_hint;

/// The seven linears of a decoder block, the default of [`LoraConfig::target_modules`].
pub const BLOCK_LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

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
    /// Whether the scale is `lora_alpha / √r` (arXiv:2312.03732) instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability in `[0, 1)` with which an element of x is dropped on its way to A. Default 0.
    pub lora_dropout: f64,
    /// Which biases of the base model are trained. Default none.
    pub bias: Bias,
    /// Which linears get an adapter. Default [`BLOCK_LINEARS`].
    pub target_modules: TargetModules,
    /// Block numbers that get adapters; all of them when absent. Needs a list of `target_modules`, as in PEFT.
    #[serde(deserialize_with = "one_or_many", skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Seed of the initial A (and of dropout). Default 3407.
    pub random_state: u64,
    /// Whether a block's activations are recomputed in the backward pass instead of being kept. Default false.
    pub use_gradient_checkpointing: bool,
    /// How A and B start. Default true.
    pub init_lora_weights: InitLoraWeights,
}

/// Which biases of the base model are trained along with the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum Bias {
    /// `"none"`.
    #[default]
    None,
    /// `"all"`: every bias of the model.
    All,
    /// `"lora_only"`: the biases of adapted linears.
    LoraOnly,
}

/// The linears that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// A linear whose name is one of these, or ends with a dot and one of these.
    Names(Vec<String>),
    /// A linear whose whole name matches this regular expression.
    Regex(String),
    /// `"all-linear"`: every linear except the output layer, `lm_head`.
    AllLinear,
}

/// The initial values of A and B.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: A uniform in ±1/√in (Kaiming with a = √5), B zero, so that training starts at the base model.
    #[default]
    Default,
    /// `false`: A uniform in ±1/√in, B uniform in ±1/√r. Not the base model; for tests.
    Random,
    /// `"gaussian"`: A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// Another method's name. An adapter that started with it can be loaded; a new one cannot be made.
    Other(String),
}

impl LoraConfig {
    /// A configuration with rank `r` and otherwise the defaults.
    pub fn new(r: usize) -> Self {
        Self { r, ..Self::default() }
    }

    /// Sets the numerator of the scale.
    #[must_use]
    pub fn lora_alpha(mut self, lora_alpha: f64) -> Self {
        self.lora_alpha = lora_alpha;
        self
    }

    /// Chooses `lora_alpha / √r` as the scale.
    #[must_use]
    pub fn use_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Sets the probability of dropping an element of the adapter's input.
    #[must_use]
    pub fn lora_dropout(mut self, lora_dropout: f64) -> Self {
        self.lora_dropout = lora_dropout;
        self
    }

    /// Chooses the trained biases.
    #[must_use]
    pub fn bias(mut self, bias: Bias) -> Self {
        self.bias = bias;
        self
    }

    /// Chooses the adapted linears: a list of names, or a string with a regular expression or `"all-linear"`.
    #[must_use]
    pub fn target_modules(mut self, target_modules: impl Into<TargetModules>) -> Self {
        self.target_modules = target_modules.into();
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

    /// Chooses recomputation of activations.
    #[must_use]
    pub fn use_gradient_checkpointing(mut self, use_gradient_checkpointing: bool) -> Self {
        self.use_gradient_checkpointing = use_gradient_checkpointing;
        self
    }

    /// Chooses the initial values of A and B.
    #[must_use]
    pub fn init_lora_weights(mut self, init_lora_weights: InitLoraWeights) -> Self {
        self.init_lora_weights = init_lora_weights;
        self
    }

    /// What `(x·Aᵀ)·Bᵀ` is multiplied with: `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
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
        if self.bias != Bias::None {
            problems.push(format!("bias \"{}\" is not supported by this version; use \"none\"", self.bias.name()));
        }
        if self.target_modules == TargetModules::Names(Vec::new()) {
            problems.push("target_modules is empty; nothing would be trained (usual: \"all-linear\")".to_owned());
        }
        match (&self.layers_to_transform, &self.target_modules) {
            (Some(layers), _) if layers.is_empty() => {
                problems.push("layers_to_transform is empty; leave it out to adapt every block".to_owned());
            }
            (Some(_), TargetModules::Regex(_) | TargetModules::AllLinear) => problems.push(
                "layers_to_transform needs target_modules to be a list of names, such as [\"q_proj\", \"v_proj\"]"
                    .to_owned(),
            ),
            _ => {}
        }
        if let InitLoraWeights::Other(name) = &self.init_lora_weights {
            let hint = nearest_hint(name, ["gaussian"]);
            problems.push(format!(
                "init_lora_weights \"{name}\" is not supported by this version; use true, false or \"gaussian\"{hint}"
            ));
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
            layers_to_transform: None,
            random_state: 3407,
            use_gradient_checkpointing: false,
            init_lora_weights: InitLoraWeights::Default,
        }
    }
}

impl Bias {
    /// The name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

impl TryFrom<String> for Bias {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        let known = [Self::None, Self::All, Self::LoraOnly];
        known.into_iter().find(|bias| bias.name() == name).ok_or_else(|| {
            let hint = nearest_hint(&name, known.map(Self::name));
            let problem = format!("bias \"{name}\" is none of \"none\", \"all\" and \"lora_only\"{hint}");
            Error::Config { problems: vec![problem] }
        })
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl From<&str> for TargetModules {
    /// A string is a regular expression, except `"all-linear"` in any case of letters.
    fn from(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") { Self::AllLinear } else { Self::Regex(text.to_owned()) }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Names(names) => names.serialize(serializer),
            Self::Regex(pattern) => serializer.serialize_str(pattern),
            Self::AllLinear => serializer.serialize_str("all-linear"),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "target_modules must be a list of names or a string")]
        enum Raw {
            Names(Vec<String>),
            Text(String),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Names(names) => Self::Names(names),
            Raw::Text(text) => text.as_str().into(),
        })
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Other(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "init_lora_weights must be true, false or a name such as \"gaussian\"")]
        enum Raw {
            Flag(bool),
            Name(String),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Flag(true) => Self::Default,
            Raw::Flag(false) => Self::Random,
            Raw::Name(name) if name == "gaussian" => Self::Gaussian,
            Raw::Name(name) => Self::Other(name),
        })
    }
}

/// `3` and `[3]` are the same list.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<usize>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Raw {
        One(usize),
        Many(Vec<usize>),
    }
    match Option::<Raw>::deserialize(deserializer) {
        Ok(raw) => Ok(raw.map(|raw| match raw {
            Raw::One(layer) => vec![layer],
            Raw::Many(layers) => layers,
        })),
        Err(_) => Err(D::Error::custom("layers_to_transform must be a block number or a list of them")),
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
        let expected = "bias \"lora\" is none of \"none\", \"all\" and \"lora_only\"; nearest: \"lora_only\"";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn every_bad_argument_is_listed() {
        let text = message(&LoraConfig::new(0).lora_dropout(1.5).bias(Bias::All).lora_alpha(f64::NAN));
        assert!(text.contains("r is 0"), "{text}");
        assert!(text.contains("lora_dropout is 1.5"), "{text}");
        assert!(text.contains("bias \"all\" is not supported by this version; use \"none\""), "{text}");
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
        assert!(message(&config).ends_with("use true, false or \"gaussian\"; nearest: \"gaussian\""));
    }
}

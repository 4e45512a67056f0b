use serde_json::{Map, Value, json};

use super::skip::SkipPattern;
use crate::element::parse_float;
use crate::fp8::Fp8Rules;
use crate::{Dtype, Error, QuantConfig, QuantFormat, QuantType};

/// The `quantization_config` of a checkpoint's config.json, with the keys of transformers' `BitsAndBytesConfig`,
/// `Mxfp4Config`, `FineGrainedFP8Config` or `FbgemmFp8Config`, or of compressed-tensors.
///
/// Unknown keys and the order of all keys are preserved when the value is written back. Absent keys have transformers'
/// defaults. The block size is not among the keys: it is part of each weight's quant_state.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizationConfig {
    format: QuantFormat,
    compute_dtype: Dtype,
    quant_storage: Dtype,
    threshold: f32,
    has_fp16_weight: bool,
    skip_modules: Option<Vec<SkipPattern>>,
    fp8: Option<Fp8Rules>,
    entries: Map<String, Value>,
}

/// The `quant_method` of gpt-oss.
const MXFP4: &str = "mxfp4";

/// LLM.int8()'s outlier threshold.
const THRESHOLD: f32 = 6.0;

/// The module that transformers leaves unquantized when the list is null: the output layer of a causal language model.
const DEFAULT_SKIP: &str = "lm_head";

impl QuantizationConfig {
    /// Reads the value of `quantization_config`.
    ///
    /// As in transformers, a value without `quant_method` is treated as bitsandbytes' if it requests 4 or 8 bits.
    /// `_load_in_4bit` and `_load_in_8bit` are used when the names without underscore are absent.
    ///
    /// # Errors
    /// [`Error::QuantMethod`] for another method, [`Error::QuantType`], and [`Error::Config`] for values of the wrong
    /// type and if both formats or neither are requested.
    pub fn parse(value: &Value) -> Result<Self, Error> {
        let entries = value
            .as_object()
            .ok_or_else(|| Error::config("quantization_config", &format!("is {}, expected an object", shown(value))))?;
        let keys = Keys(entries);
        match keys.get("quant_method") {
            None => {}
            Some(Value::String(method)) if method == "bitsandbytes" => {}
            Some(Value::String(method)) if method == MXFP4 => return Ok(Self::mxfp4(entries.clone())),
            Some(Value::String(method)) => match Fp8Rules::parse(method, entries)? {
                Some(rules) => return Ok(Self::fp8(rules, entries.clone())),
                None => return Err(Error::QuantMethod { got: shortened(method) }),
            },
            Some(other) => return Err(keys.expected("quant_method", other, "a string")),
        }
        let four_bit = keys.flag("load_in_4bit")?.or(keys.flag("_load_in_4bit")?).unwrap_or(false);
        let eight_bit = keys.flag("load_in_8bit")?.or(keys.flag("_load_in_8bit")?).unwrap_or(false);
        let format = match (four_bit, eight_bit) {
            (true, false) => QuantFormat::FourBit(QuantConfig {
                quant_type: keys.text("bnb_4bit_quant_type")?.unwrap_or(QuantType::Fp4.name()).parse()?,
                double_quant: keys.flag("bnb_4bit_use_double_quant")?.unwrap_or(false),
                ..QuantConfig::default()
            }),
            (false, true) => QuantFormat::Int8,
            (true, true) => {
                return Err(Error::config("load_in_4bit and load_in_8bit", "are both true; set only one of them"));
            }
            (false, false) => {
                return Err(Error::config("load_in_4bit or load_in_8bit", "must be true, but both are false"));
            }
        };
        Ok(Self {
            format,
            compute_dtype: parse_float(keys.text("bnb_4bit_compute_dtype")?.unwrap_or("float32"))?,
            quant_storage: match keys.text("bnb_4bit_quant_storage")? {
                None => Dtype::U8,
                Some(name) => storage(name)?,
            },
            threshold: keys.threshold()?,
            has_fp16_weight: keys.flag("llm_int8_has_fp16_weight")?.unwrap_or(false),
            skip_modules: keys.patterns("llm_int8_skip_modules")?,
            fp8: None,
            entries: entries.clone(),
        })
    }

    fn mxfp4(entries: Map<String, Value>) -> Self {
        Self::without_options(QuantFormat::Mxfp4, entries)
    }

    fn fp8(rules: Fp8Rules, entries: Map<String, Value>) -> Self {
        Self { fp8: Some(rules.clone()), ..Self::without_options(QuantFormat::Fp8(rules.scaling), entries) }
    }

    /// A format that has none of bitsandbytes' options.
    fn without_options(format: QuantFormat, entries: Map<String, Value>) -> Self {
        Self {
            format,
            compute_dtype: Dtype::BF16,
            quant_storage: Dtype::U8,
            threshold: THRESHOLD,
            has_fp16_weight: false,
            skip_modules: None,
            fp8: None,
            entries,
        }
    }

    /// Creates the configuration of a checkpoint in this format. `skip_modules` stay unquantized; `None` means `lm_head`.
    /// `compute_dtype` is that of 4-bit products.
    pub fn new(format: QuantFormat, compute_dtype: Dtype, skip_modules: Option<Vec<String>>) -> Self {
        let (eight_bit, compute_dtype, quant_type, double_quant) = match format {
            QuantFormat::FourBit(config) => (false, compute_dtype, config.quant_type, config.double_quant),
            QuantFormat::Int8 => (true, Dtype::F32, QuantType::Fp4, false),
            QuantFormat::Mxfp4 => {
                let entries = [("modules_to_not_convert", json!(skip_modules)), ("quant_method", json!(MXFP4))];
                return Self::mxfp4(entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect());
            }
            QuantFormat::Fp8(scaling) => {
                let (rules, entries) = Fp8Rules::created(scaling, skip_modules.as_deref());
                return Self::fp8(rules, entries);
            }
        };
        // All keys that transformers writes, in its sorted order.
        let entries = [
            ("_load_in_4bit", json!(!eight_bit)),
            ("_load_in_8bit", json!(eight_bit)),
            ("bnb_4bit_compute_dtype", json!(compute_dtype.torch_name())),
            ("bnb_4bit_quant_storage", json!("uint8")),
            ("bnb_4bit_quant_type", json!(quant_type.name())),
            ("bnb_4bit_use_double_quant", json!(double_quant)),
            ("llm_int8_enable_fp32_cpu_offload", json!(false)),
            ("llm_int8_has_fp16_weight", json!(false)),
            ("llm_int8_skip_modules", json!(skip_modules)),
            ("llm_int8_threshold", json!(THRESHOLD)),
            ("load_in_4bit", json!(!eight_bit)),
            ("load_in_8bit", json!(eight_bit)),
            ("quant_method", json!("bitsandbytes")),
        ];
        // A name that is not a supported expression is matched literally; transformers, too, finds no such module.
        let pattern = |name: &String| SkipPattern::parse(name).unwrap_or_else(|_| SkipPattern::literal(name));
        Self {
            format,
            compute_dtype,
            quant_storage: Dtype::U8,
            threshold: THRESHOLD,
            has_fp16_weight: false,
            skip_modules: skip_modules.as_ref().map(|names| names.iter().map(pattern).collect()),
            fp8: None,
            entries: entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect(),
        }
    }

    /// Returns the value to write.
    pub fn to_json(&self) -> Value {
        Value::Object(self.entries.clone())
    }

    /// Returns the key of the list of modules that are not quantized; `None` where tensors alone say it.
    pub fn skip_key(&self) -> Option<&'static str> {
        match (self.format, &self.fp8) {
            (_, Some(rules)) => Some(rules.skip_key),
            (QuantFormat::Mxfp4, None) => None,
            _ => Some("llm_int8_skip_modules"),
        }
    }

    /// Returns the format of the linear layers. Block sizes are not among the keys: that of a parsed configuration is the
    /// default, and each 4-bit weight has its own.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Returns `bnb_4bit_compute_dtype`, the type 4-bit weights are decoded to for a product.
    pub fn compute_dtype(&self) -> Dtype {
        self.compute_dtype
    }

    /// Returns `bnb_4bit_quant_storage`, the type packed codes are viewed as.
    pub fn quant_storage(&self) -> Dtype {
        self.quant_storage
    }

    /// Returns `llm_int8_threshold`, the smallest magnitude of an outlier activation.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Returns `llm_int8_has_fp16_weight`: if true, weights stay 16-bit and are quantized at each product.
    pub fn has_fp16_weight(&self) -> bool {
        self.has_fp16_weight
    }

    /// Returns true if the linear `module` (`model.layers.0.mlp.up_proj`, without `.weight`) stays unquantized.
    ///
    /// The rule is that of transformers 5: an entry of `llm_int8_skip_modules` matches either as a regular expression
    /// from the start of the name to the end of a component (`model.layers.1` does not match in `model.layers.11`), or
    /// as a suffix of the name. Without a list, `lm_head` is skipped. Embeddings are not linears and are never
    /// quantized. In MXFP4 are the experts alone, whatever the list says. compressed-tensors has
    /// a rule of its own: names that match whole, or regular expressions from the start of the name.
    pub fn skips(&self, module: &str) -> bool {
        if let Some(rules) = &self.fp8 {
            return rules.skips(module);
        }
        if self.format == QuantFormat::Mxfp4 {
            return !module.contains(".experts.");
        }
        match &self.skip_modules {
            None => module.ends_with(DEFAULT_SKIP),
            Some(patterns) => patterns.iter().any(|pattern| pattern.skips(module)),
        }
    }
}

/// The types that packed codes can be viewed as.
const STORAGE: [Dtype; 6] = [Dtype::U8, Dtype::I8, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];

fn storage(name: &str) -> Result<Dtype, Error> {
    Dtype::from_torch_name(name).filter(|dtype| STORAGE.contains(dtype)).ok_or_else(|| {
        let known = "uint8, int8, float16, bfloat16, float32 or float64";
        Error::config("bnb_4bit_quant_storage", &format!("is {:?}, expected {known}", shortened(name)))
    })
}

/// The keys of an object, with checked access.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Keys<'a> {
    /// Returns `None` if the key is absent or null, which means the default.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.expected(key, value, "true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.expected(key, value, "a string"))
    }

    fn threshold(&self) -> Result<f32, Error> {
        let key = "llm_int8_threshold";
        let Some(value) = self.get(key) else { return Ok(THRESHOLD) };
        let threshold = value.as_f64().filter(|t| (0.0..=f64::from(f32::MAX)).contains(t));
        threshold.map(|t| t as f32).ok_or_else(|| self.expected(key, value, "a number from 0 up"))
    }

    /// Returns a list of module names.
    pub(crate) fn names(&self, key: &str) -> Result<Option<Vec<&'a str>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = |found: &Value| self.expected(key, found, "a list of module names");
        let names = value.as_array().ok_or_else(|| wrong(value))?;
        names.iter().map(|name| name.as_str().ok_or_else(|| wrong(name))).collect::<Result<_, _>>().map(Some)
    }

    /// Returns a list of modules to skip.
    pub(crate) fn patterns(&self, key: &str) -> Result<Option<Vec<SkipPattern>>, Error> {
        let Some(names) = self.names(key)? else { return Ok(None) };
        names.into_iter().map(|name| SkipPattern::parse_in(key, name)).collect::<Result<_, _>>().map(Some)
    }

    /// Returns the value of a key that has one of `supported`, whatever its case.
    pub(crate) fn one_of(&self, key: &str, supported: &[&'static str]) -> Result<Option<&'static str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_str().and_then(|text| supported.iter().find(|name| name.eq_ignore_ascii_case(text)));
        let list = || supported.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
        found.copied().map(Some).ok_or_else(|| self.expected(key, value, &list()))
    }

    pub(crate) fn expected(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::config(key, &format!("is {}, expected {expected}", shown(value)))
    }
}

/// Formats JSON for a message.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => format!("{:?}", shortened(text)),
        other => other.to_string(),
    }
}

/// Shortens text for a message, so that a damaged file cannot flood it.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 4-bit `quantization_config` as found on the Hub.
    const NF4: &str = r#"{"_load_in_4bit":true,"_load_in_8bit":false,"bnb_4bit_compute_dtype":"bfloat16","bnb_4bit_quant_storage":"uint8","bnb_4bit_quant_type":"nf4","bnb_4bit_use_double_quant":true,"llm_int8_enable_fp32_cpu_offload":false,"llm_int8_has_fp16_weight":false,"llm_int8_skip_modules":["lm_head","model.layers.3.mlp"],"llm_int8_threshold":6.0,"load_in_4bit":true,"load_in_8bit":false,"quant_method":"bitsandbytes","someone":{"s":"note"}}"#;

    fn parse(json: &str) -> Result<QuantizationConfig, Error> {
        QuantizationConfig::parse(&serde_json::from_str(json).expect("JSON"))
    }

    #[test]
    fn reads_and_rewrites_every_key() {
        let config = parse(NF4).expect("valid");
        assert_eq!(config.format(), QuantFormat::FourBit(QuantConfig::default()));
        assert_eq!((config.compute_dtype(), config.quant_storage()), (Dtype::BF16, Dtype::U8));
        assert_eq!((config.threshold(), config.has_fp16_weight()), (6.0, false));
        assert!(config.skips("lm_head") && config.skips("model.layers.3.mlp.up_proj"));
        assert!(!config.skips("model.layers.30.mlp.up_proj"));
        assert_eq!(config.to_json().to_string(), NF4);
    }

    #[test]
    fn mxfp4_is_on_experts() {
        let json = r#"{"modules_to_not_convert":["lm_head"],"quant_method":"mxfp4"}"#;
        let config = parse(json).expect("valid");
        assert_eq!((config.format(), config.to_json().to_string().as_str()), (QuantFormat::Mxfp4, json));
        assert!(config.skips("model.layers.0.q_proj"));
        assert!(!config.skips("model.layers.0.mlp.experts.3.down_proj"));
        assert_eq!(QuantizationConfig::new(QuantFormat::Mxfp4, Dtype::BF16, Some(vec!["lm_head".to_owned()])), config);
    }

    #[test]
    fn defaults_match_transformers() {
        let config = parse(r#"{"load_in_4bit": true}"#).expect("valid");
        let fp4 = QuantConfig { quant_type: QuantType::Fp4, double_quant: false, ..QuantConfig::default() };
        assert_eq!(config.format(), QuantFormat::FourBit(fp4));
        assert_eq!((config.compute_dtype(), config.threshold()), (Dtype::F32, 6.0));
        assert!(config.skips("lm_head") && !config.skips("model.layers.0.mlp.up_proj"));
        let config = parse(r#"{"quant_method": "bitsandbytes", "_load_in_8bit": true, "llm_int8_skip_modules": []}"#);
        let config = config.expect("valid");
        assert_eq!(config.format(), QuantFormat::Int8);
        assert!(!config.skips("lm_head"), "an empty list skips nothing");
    }

    #[test]
    fn created_configs_read_back() {
        let skip = ["lm_head".to_owned(), "score".to_owned()];
        let four_bit = QuantFormat::FourBit(QuantConfig::default());
        let config = QuantizationConfig::new(four_bit, Dtype::BF16, Some(skip.to_vec()));
        let text = config.to_json().to_string();
        assert_eq!(
            text,
            NF4.replace(r#""model.layers.3.mlp""#, r#""score""#).replace(r#","someone":{"s":"note"}"#, "")
        );
        assert_eq!(parse(&text), Ok(config));
        let odd = QuantizationConfig::new(QuantFormat::Int8, Dtype::F32, Some(vec!["a(b".to_owned()]));
        assert!(odd.skips("a(b.c") && !odd.skips("ab"));
        let int8 = QuantizationConfig::new(QuantFormat::Int8, Dtype::F32, None);
        assert_eq!((int8.format(), int8.threshold()), (QuantFormat::Int8, 6.0));
        assert!(int8.to_json()["llm_int8_skip_modules"].is_null() && int8.skips("lm_head"));
    }

    #[test]
    fn errors_name_the_key_and_the_expected_value() {
        for (from, to, message) in [
            (
                r#""bitsandbytes""#,
                r#""gptq""#,
                r#"quant_method "gptq" is not supported; supported: "bitsandbytes" (nf4, fp4, int8), "mxfp4", "fp8","#,
            ),
            (r#""bitsandbytes""#, "7", "quant_method is 7, expected a string"),
            (r#""load_in_8bit":false"#, r#""load_in_8bit":true"#, "load_in_4bit and load_in_8bit are both true"),
            (r#""load_in_4bit":true,"load"#, r#""load_in_4bit":false,"load"#, "must be true, but both are false"),
            (r#""load_in_4bit":true,"load"#, r#""load_in_4bit":1,"load"#, "load_in_4bit is 1, expected true or false"),
            (r#""nf4""#, r#""int4""#, r#"unknown quant_type "int4""#),
            (r#""bfloat16""#, r#""float8""#, r#"dtype "float8""#),
            (r#""uint8""#, r#""int4""#, r#"bnb_4bit_quant_storage is "int4", expected uint8"#),
            ("6.0", "-1", "llm_int8_threshold is -1, expected a number from 0 up"),
            ("6.0", "1e39", "llm_int8_threshold is 1e+39"),
            (r#"["lm_head","#, r#"[3,"#, "llm_int8_skip_modules is 3, expected a list"),
            (r#""lm_head","#, r#""a|b","#, r#"llm_int8_skip_modules has "a|b""#),
        ] {
            assert!(NF4.contains(from), "{from}");
            let error = parse(&NF4.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains(message), "{to}: {error}");
        }
        assert!(parse("[]").expect_err("a list").to_string().contains("is a list, expected an object"));
    }
}

//! The `quantization_config` of fp8 checkpoints.

use regex::Regex;
use serde_json::{Map, Value, json};

use super::{BLOCK, Fp8Scaling};
use crate::Error;
use crate::bnb::{Keys, SkipPattern, shown};

/// The scales of a checkpoint's fp8 weights, and the modules that have them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fp8Rules {
    pub(crate) scaling: Fp8Scaling,
    /// The key of the list of modules that are not quantized.
    pub(crate) skip_key: &'static str,
    modules: Modules,
}

#[derive(Debug, Clone, PartialEq)]
enum Modules {
    /// All linears but these, by the rule of transformers; without a list, all but the head.
    AllBut(Option<Vec<SkipPattern>>),
    /// The rule of compressed-tensors.
    Targets { targets: Vec<NameRule>, ignore: Vec<NameRule> },
}

impl Fp8Rules {
    /// Reads the configuration of an fp8 method of transformers; `None` for another method.
    ///
    /// # Errors
    /// [`Error::Config`] with the key and the value that is not supported.
    pub(crate) fn parse(method: &str, entries: &Map<String, Value>) -> Result<Option<Self>, Error> {
        let keys = Keys(entries);
        match method {
            FINE_GRAINED => fine_grained(&keys).map(Some),
            FBGEMM => {
                let (skip_key, modules) = skipped(&keys, &[MODULES_TO_NOT_CONVERT])?;
                Ok(Some(Self { scaling: Fp8Scaling::Row, skip_key, modules }))
            }
            COMPRESSED_TENSORS => compressed_tensors(&keys).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns the rules for weights that are quantized while loading, and the configuration to write: that of
    /// compressed-tensors, which applies no quantization to activations.
    pub(crate) fn created(scaling: Fp8Scaling, skip_modules: Option<&[String]>) -> (Self, Map<String, Value>) {
        // A name that is not a supported expression is matched literally.
        let pattern = |name: &String| SkipPattern::parse(name).unwrap_or_else(|_| SkipPattern::literal(name));
        let patterns: Option<Vec<_>> = skip_modules.map(|names| names.iter().map(pattern).collect());
        let ignore = match &patterns {
            None => vec!["lm_head".to_owned()],
            Some(patterns) => patterns.iter().flat_map(SkipPattern::to_ignore).collect(),
        };
        let mut weights = json!({
            "dynamic": false, "num_bits": 8, "strategy": strategy(scaling), "symmetric": true, "type": "float"
        });
        if scaling == Fp8Scaling::Block {
            weights["block_structure"] = json!([BLOCK, BLOCK]);
        }
        let group = json!({
            "input_activations": null, "output_activations": null, "targets": [LINEAR], "weights": weights
        });
        let entries = [
            ("config_groups", json!({"group_0": group})),
            ("format", json!(FLOAT_QUANTIZED)),
            (IGNORE, json!(ignore)),
            ("kv_cache_scheme", Value::Null),
            ("quant_method", json!(COMPRESSED_TENSORS)),
            ("quantization_status", json!("compressed")),
        ];
        let rules = Self { scaling, skip_key: IGNORE, modules: Modules::AllBut(patterns) };
        (rules, entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect())
    }

    /// Returns true if the linear `module` is not quantized.
    pub(crate) fn skips(&self, module: &str) -> bool {
        match &self.modules {
            Modules::AllBut(None) => module.ends_with("lm_head"),
            Modules::AllBut(Some(patterns)) => patterns.iter().any(|pattern| pattern.skips(module)),
            Modules::Targets { targets, ignore } => {
                let matches = |rules: &[NameRule]| rules.iter().any(|rule| rule.matches(module));
                !matches(targets) || matches(ignore)
            }
        }
    }
}

const FINE_GRAINED: &str = "fp8";
const FBGEMM: &str = "fbgemm_fp8";
const COMPRESSED_TENSORS: &str = "compressed-tensors";
const FLOAT_QUANTIZED: &str = "float-quantized";
const LINEAR: &str = "Linear";
const MODULES_TO_NOT_CONVERT: &str = "modules_to_not_convert";
const IGNORE: &str = "ignore";

fn strategy(scaling: Fp8Scaling) -> &'static str {
    match scaling {
        Fp8Scaling::Tensor => "tensor",
        Fp8Scaling::Row => "channel",
        Fp8Scaling::Block => "block",
    }
}

/// transformers' `FineGrainedFP8Config`. Where a key is absent, its defaults apply.
fn fine_grained(keys: &Keys<'_>) -> Result<Fp8Rules, Error> {
    // The formats of checkpoints that name it.
    keys.one_of("fmt", &["e4m3"])?;
    // Of activations, which are not quantized here.
    keys.one_of("activation_scheme", &["dynamic", "static"])?;
    // Each weight's scales have a dtype, which says it too.
    keys.one_of("scale_fmt", &["float", "ue8m0"])?;
    keys.one_of("expert_dtype", &["fp8"])?;
    if let Some(list) = keys.get("modules_to_convert").filter(|list| **list != json!([])) {
        return Err(keys.expected("modules_to_convert", list, "null: only linears can be in fp8"));
    }
    const BLOCK_SIZE: &str = "weight_block_size";
    let scaling = match keys.0.get(BLOCK_SIZE) {
        Some(Value::Null) => Fp8Scaling::Tensor,
        None => Fp8Scaling::Block,
        Some(size) if *size == json!([BLOCK, BLOCK]) => Fp8Scaling::Block,
        Some(size) => {
            return Err(Error::config(
                BLOCK_SIZE,
                &format!("is {size}, expected [{BLOCK}, {BLOCK}], or null for one scale per weight"),
            ));
        }
    };
    let (skip_key, modules) = skipped(keys, &[MODULES_TO_NOT_CONVERT, "ignored_layers"])?;
    Ok(Fp8Rules { scaling, skip_key, modules })
}

/// Reads the list of modules that are not quantized, under the first of `names` that is there.
fn skipped(keys: &Keys<'_>, names: &[&'static str]) -> Result<(&'static str, Modules), Error> {
    let found = names.iter().find(|name| keys.get(name).is_some());
    let key = *found.unwrap_or(&names[0]);
    Ok((key, Modules::AllBut(keys.patterns(key)?)))
}

/// The configuration of compressed-tensors.
fn compressed_tensors(keys: &Keys<'_>) -> Result<Fp8Rules, Error> {
    if keys.one_of("format", &[FLOAT_QUANTIZED])?.is_none() {
        return Err(Error::config("format", &format!("is not given, expected {FLOAT_QUANTIZED:?}")));
    }
    keys.one_of("quantization_status", &["compressed"])?;
    for key in ["kv_cache_scheme", "sparsity_config", "transform_config"] {
        let is_empty = |value: &Value| *value == json!({}) || value["format"] == "dense";
        if let Some(value) = keys.get(key).filter(|value| !is_empty(value)) {
            return Err(keys.expected(key, value, "null: only fp8 weights are supported"));
        }
    }
    const GROUPS: &str = "config_groups";
    let groups = keys.get(GROUPS).unwrap_or(&Value::Null);
    let groups = groups.as_object().filter(|groups| !groups.is_empty());
    let groups = groups.ok_or_else(|| {
        Error::config(GROUPS, "is not an object with one entry or more, which name the linears and their format")
    })?;
    let mut targets = Vec::new();
    let mut scaling: Option<(Fp8Scaling, &str)> = None;
    for (name, group) in groups {
        let within = |error| match error {
            Error::Config { reason } => Error::Config { reason: format!("{GROUPS}.{name}: {reason}") },
            other => other,
        };
        let (found, more) = config_group(group).map_err(within)?;
        if let Some((other, first)) = scaling.filter(|(other, _)| *other != found) {
            let reason = format!(
                "has groups with two strategies, {:?} in {first} and {:?} in {name}; supported is one for all linears",
                strategy(other),
                strategy(found)
            );
            return Err(Error::config(GROUPS, &reason));
        }
        scaling = Some((found, name));
        targets.extend(more);
    }
    let (scaling, _) = scaling.expect("there is a group");
    let ignore = name_rules(keys, IGNORE)?;
    Ok(Fp8Rules { scaling, skip_key: IGNORE, modules: Modules::Targets { targets, ignore } })
}

/// The scales of a group and its targets.
fn config_group(group: &Value) -> Result<(Fp8Scaling, Vec<NameRule>), Error> {
    let object = |key: &str, value: &Value| match value.as_object() {
        Some(object) => Ok(object.clone()),
        None => Err(Error::config(key, &format!("is {}, expected an object", shown(value)))),
    };
    let group = object("the group", group)?;
    let keys = Keys(&group);
    keys.one_of("format", &[FLOAT_QUANTIZED])?;
    if let Some(value) = keys.get("output_activations") {
        return Err(keys.expected("output_activations", value, "null"));
    }
    let weights = object("weights", keys.get("weights").unwrap_or(&Value::Null))?;
    let keys_of_weights = Keys(&weights);
    keys_of_weights
        .one_of("type", &["float"])?
        .ok_or_else(|| Error::config("type", "is not given, expected \"float\""))?;
    let supported = [("num_bits", json!(8)), ("symmetric", json!(true)), ("dynamic", json!(false))];
    for (key, only) in &supported {
        if let Some(value) = keys_of_weights.get(key).filter(|value| *value != only) {
            return Err(keys_of_weights.expected(key, value, &only.to_string()));
        }
    }
    let scaling = match keys_of_weights.one_of("strategy", &["tensor", "channel", "block"])? {
        None | Some("tensor") => Fp8Scaling::Tensor,
        Some("channel") => Fp8Scaling::Row,
        Some(_) => {
            let structure = keys_of_weights.get("block_structure").unwrap_or(&Value::Null);
            if *structure != json!([BLOCK, BLOCK]) && *structure != json!("128x128") {
                return Err(Error::config("block_structure", &format!("is {structure}, expected [{BLOCK}, {BLOCK}]")));
            }
            Fp8Scaling::Block
        }
    };
    Ok((scaling, name_rules(&keys, "targets")?))
}

/// Reads a list of rules for names.
fn name_rules(keys: &Keys<'_>, key: &str) -> Result<Vec<NameRule>, Error> {
    keys.names(key)?.unwrap_or_default().into_iter().map(|text| NameRule::parse(key, text)).collect()
}

/// A target of compressed-tensors: the name of a module, a regular expression after `re:` that matches from its start, or
/// a class.
#[derive(Debug, Clone)]
struct NameRule {
    text: String,
    regex: Option<Regex>,
}

impl NameRule {
    fn parse(key: &str, text: &str) -> Result<Self, Error> {
        let regex = match text.strip_prefix("re:") {
            None => None,
            Some(pattern) => Some(Regex::new(&format!("^(?:{pattern})")).map_err(|error| {
                let problem = error.to_string();
                let last = problem.lines().last().unwrap_or_default().trim().to_owned();
                let shown: String = text.chars().take(40).collect();
                Error::config(key, &format!("has {shown:?}, which is not supported as a regular expression: {last}"))
            })?),
        };
        Ok(Self { text: text.to_owned(), regex })
    }

    fn matches(&self, module: &str) -> bool {
        match &self.regex {
            Some(regex) => regex.is_match(module),
            None => self.text == module || self.text == LINEAR,
        }
    }
}

impl PartialEq for NameRule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bnb::QuantizationConfig;
    use crate::{Dtype, QuantFormat};

    const QWEN: &str = r#"{"activation_scheme":"dynamic","fmt":"e4m3","modules_to_not_convert":["lm_head","model.layers.0.mlp.gate"],"quant_method":"fp8","weight_block_size":[128,128]}"#;
    const CHANNEL: &str = r#"{"config_groups":{"group_0":{"input_activations":{"dynamic":true,"num_bits":8,"strategy":"token","type":"float"},"output_activations":null,"targets":["Linear"],"weights":{"dynamic":false,"group_size":null,"num_bits":8,"strategy":"channel","symmetric":true,"type":"float"}}},"format":"float-quantized","ignore":["lm_head","re:.*mlp\\.gate$"],"kv_cache_scheme":null,"quant_method":"compressed-tensors","quantization_status":"compressed"}"#;

    fn parse(json: &str) -> Result<QuantizationConfig, Error> {
        QuantizationConfig::parse(&serde_json::from_str(json).expect("JSON"))
    }

    #[test]
    fn the_methods_of_transformers_are_read_and_rewritten() {
        let fp8 = QuantFormat::Fp8;
        let config = parse(QWEN).expect("valid");
        assert_eq!((config.format(), config.to_json().to_string().as_str()), (fp8(Fp8Scaling::Block), QWEN));
        assert!(config.skips("lm_head") && config.skips("model.layers.0.mlp.gate"));
        assert!(!config.skips("model.layers.0.mlp.gate_proj") && !config.skips("model.layers.1.mlp.gate"));
        let tensor = QWEN.replace("[128,128]", "null").replace("dynamic", "static");
        assert_eq!(parse(&tensor).expect("valid").format(), fp8(Fp8Scaling::Tensor));
        let config = parse(r#"{"quant_method":"fp8","ignored_layers":["q_proj"],"scale_fmt":"ue8m0"}"#).expect("valid");
        assert_eq!(config.format(), fp8(Fp8Scaling::Block));
        assert!(config.skips("model.layers.0.attention.q_proj") && !config.skips("lm_head"));
        let config = parse(r#"{"quant_method":"fbgemm_fp8","activation_scale_ub":1200.0}"#).expect("valid");
        assert_eq!(config.format(), fp8(Fp8Scaling::Row));
        assert!(config.skips("lm_head") && !config.skips("model.layers.0.mlp.up_proj"));
        let config = parse(CHANNEL).expect("valid");
        assert_eq!((config.format(), config.to_json().to_string().as_str()), (fp8(Fp8Scaling::Row), CHANNEL));
        assert!(config.skips("lm_head") && config.skips("model.layers.3.mlp.gate"));
        assert!(!config.skips("model.layers.3.mlp.gate_proj") && !config.skips("model.lm_head"), "names match whole");
        let some = CHANNEL.replace(r#"["Linear"]"#, r#"["re:model\\.layers\\.\\d+\\.mlp"]"#);
        let config = parse(&some).expect("valid");
        assert!(config.skips("model.layers.3.attention.q_proj") && !config.skips("model.layers.3.mlp.up_proj"));
        let block = CHANNEL.replace(r#""channel""#, r#""block","block_structure":[128,128]"#);
        assert_eq!(parse(&block).expect("valid").format(), fp8(Fp8Scaling::Block));
    }

    #[test]
    fn created_configs_skip_the_same_modules_when_they_are_read() {
        let names = ["lm_head", "v_proj", "model.layers.1.", r"model\.layers\.\d+\.mlp", "a(b"].map(str::to_owned);
        for skip in [None, Some(&names[..]), Some(&[])] {
            for scaling in [Fp8Scaling::Tensor, Fp8Scaling::Row, Fp8Scaling::Block] {
                let format = QuantFormat::Fp8(scaling);
                let created = QuantizationConfig::new(format, Dtype::BF16, skip.map(<[_]>::to_vec));
                let read = QuantizationConfig::parse(&created.to_json()).expect("valid");
                assert_eq!((read.format(), read.to_json()), (format, created.to_json()));
                for module in ["lm_head", "model.layers.1.attention.v_proj", "model.layers.1.attention.q_proj"]
                    .into_iter()
                    .chain(["model.layers.11.attention.q_proj", "model.layers.3.mlp.up_proj", "a(b.c", "ab"])
                {
                    assert_eq!(read.skips(module), created.skips(module), "{module} with {skip:?}");
                }
            }
        }
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        for (json, from, to, message) in [
            (QWEN, "[128,128]", "[64,128]", "weight_block_size is [64,128], expected [128, 128], or null"),
            (QWEN, "\"e4m3\"", "\"e5m2\"", "fmt is \"e5m2\", expected \"e4m3\""),
            (QWEN, "\"dynamic\"", "\"none\"", "activation_scheme is \"none\", expected \"dynamic\" or \"static\""),
            (QWEN, "\"fmt\":\"e4m3\"", "\"expert_dtype\":\"fp4\"", "expert_dtype is \"fp4\", expected \"fp8\""),
            (QWEN, "\"fmt\":\"e4m3\"", "\"scale_fmt\":7", "scale_fmt is 7, expected"),
            (QWEN, "\"fmt\":\"e4m3\"", "\"modules_to_convert\":[\"embed\"]", "modules_to_convert is a list"),
            (QWEN, "\"lm_head\",", "\"a|b\",", "modules_to_not_convert has \"a|b\""),
            (
                CHANNEL,
                "float-quantized",
                "pack-quantized",
                "format is \"pack-quantized\", expected \"float-quantized\"",
            ),
            (CHANNEL, "\"format\":\"float-quantized\",", "", "format is not given"),
            (CHANNEL, "\"channel\"", "\"group\"", "config_groups.group_0: strategy is \"group\", expected"),
            (CHANNEL, "\"channel\"", "\"block\",\"block_structure\":[64,64]", "block_structure is [64,64]"),
            (CHANNEL, ":null,\"num_bits\":8", ":null,\"num_bits\":4", "group_0: num_bits is 4, expected 8"),
            (CHANNEL, "true,\"type\":\"float\"}}", "true,\"type\":\"int\"}}", "type is \"int\", expected \"float\""),
            (CHANNEL, "\"symmetric\":true", "\"symmetric\":false", "symmetric is false, expected true"),
            (CHANNEL, "_scheme\":null", "_scheme\":{\"num_bits\":8}", "kv_cache_scheme is an object, expected null"),
            (CHANNEL, "\"compressed\"}", "\"frozen\"}", "quantization_status is \"frozen\", expected \"compressed\""),
            (CHANNEL, "re:.*mlp", "re:(?!a)mlp", "ignore has \"re:(?!a)mlp"),
            (CHANNEL, "\"config_groups\"", "\"groups\"", "config_groups is not an object"),
        ] {
            assert!(json.contains(from), "{from}");
            let error = parse(&json.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains(message), "{to}: {error}");
        }
        let mixed = CHANNEL.replace(
            r#""group_0":"#,
            r#""first":{"targets":["q_proj"],"weights":{"type":"float","strategy":"tensor"}},"group_0":"#,
        );
        let error = parse(&mixed).expect_err("two strategies").to_string();
        assert!(error.contains("two strategies, \"tensor\" in first and \"channel\" in group_0"), "{error}");
    }
}

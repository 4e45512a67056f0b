use serde_json::{Map, Value};

use crate::parameter_reader::ParameterReader;
use crate::{Error, Scaling};

/// The lengths stored next to the scaling parameters in `config.json`.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) max: Option<usize>,
    pub(crate) outer_original: Option<usize>,
}

/// Each supported type with the parameters it uses.
const TYPES: [(&str, &[&str]); 7] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &["factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
    ),
    ("llama3", &["factor", ORIGINAL, "low_freq_factor", "high_freq_factor"]),
    ("longrope", &["factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"]),
    (PROPORTIONAL, &["factor"]),
];

/// Keys accepted with every type: settings read elsewhere, and annotations that never change a frequency.
const COMMON: [&str; 8] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "finetuned",
    "llama_4_scaling_beta",
    "max_position_embeddings",
    ORIGINAL,
];

/// The type whose `partial_rotary_factor` leaves dimensions in the rotation, with a frequency of 0.
pub(crate) const PROPORTIONAL: &str = "proportional";

const ORIGINAL: &str = "original_max_position_embeddings";

impl Scaling {
    /// Reads the rule from `rope_parameters` or `rope_scaling`; returns `None` if the reader has problems to report. Dimensions
    /// of the rotary embedding, and those among them whose frequency is not 0.
    pub(crate) fn read(
        reader: &mut ParameterReader<'_>,
        parameters: &Map<String, Value>,
        window: Window,
        [rotary_dim, rotated_dim]: [usize; 2],
    ) -> Result<Option<Self>, Error> {
        let name = reader.string("rope_type").or_else(|| reader.string("type"));
        if name.is_none() && parameters.keys().any(|key| !COMMON.contains(&key.as_str())) {
            for (key, _) in parameters.iter().filter(|(_, value)| value.is_object()) {
                reader.problem(key, "is an object: parameters for each layer type are not supported");
            }
            reader.problem("rope_type", "is missing");
            return Ok(None);
        }
        let name = name.unwrap_or("default");
        let Some((_, used)) = TYPES.iter().find(|(known, _)| *known == name) else {
            let supported = TYPES.map(|(known, _)| known).join(", ");
            return Err(Error::UnknownType { name: name.to_owned(), supported });
        };
        for key in parameters.keys().map(String::as_str) {
            if reader.has(key) && !used.contains(&key) && !COMMON.contains(&key) {
                reader.problem(key, &format!("has no effect with rope_type \"{name}\"; remove it"));
            }
        }
        Ok(match name {
            "linear" => read_linear(reader),
            "dynamic" => read_dynamic(reader, window, rotary_dim),
            "yarn" => read_yarn(reader, window),
            "llama3" => read_llama3(reader, window),
            PROPORTIONAL => {
                let factor = reader.positive("factor").unwrap_or(1.0);
                Some(Self::Proportional { factor, pairs: rotated_dim / 2 })
            }
            "longrope" => read_longrope(reader, window, rotary_dim),
            _ => Some(Self::Default),
        })
    }
}

fn read_linear(reader: &mut ParameterReader<'_>) -> Option<Scaling> {
    let factor = reader.positive("factor");
    Some(Scaling::Linear { factor: reader.require("factor", factor)? })
}

fn read_dynamic(reader: &mut ParameterReader<'_>, window: Window, rotary_dim: usize) -> Option<Scaling> {
    let factor = reader.positive("factor");
    let factor = reader.require("factor", factor);
    if window.max.is_none() {
        reader.problem("factor", "needs the window, and max_position_embeddings is missing");
    }
    if rotary_dim < 4 {
        reader.problem("rope_type", &format!("\"dynamic\" needs at least 4 rotary dimensions, not {rotary_dim}"));
        return None;
    }
    Some(Scaling::Dynamic { factor: factor?, window: window.max? })
}

fn read_yarn(reader: &mut ParameterReader<'_>, window: Window) -> Option<Scaling> {
    let original = read_original(reader, window);
    let factor = read_factor(reader, window, original);
    let given = reader.positive("attention_factor");
    // As in transformers, zero means "not given" for these four.
    let nonzero = |value: Option<f64>| value.filter(|v| *v != 0.0);
    let mscale = nonzero(reader.number("mscale"));
    let mscale_all_dim = nonzero(reader.number("mscale_all_dim"));
    let beta_fast = nonzero(reader.number("beta_fast")).unwrap_or(32.0);
    let beta_slow = nonzero(reader.number("beta_slow")).unwrap_or(1.0);
    if beta_slow <= 0.0 || beta_fast < beta_slow {
        reader.problem("beta_fast", &format!("({beta_fast}) must be at least beta_slow ({beta_slow}), both above 0"));
    }
    let truncate = reader.bool("truncate").unwrap_or(true);
    let factor = factor?;

    let m = |scale: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
    };
    let attention_factor = given.unwrap_or_else(|| match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all_dim)) => m(mscale) / m(all_dim),
        _ => m(1.0),
    });
    Some(Scaling::Yarn { factor, original: original?, attention_factor, beta_fast, beta_slow, truncate })
}

fn read_llama3(reader: &mut ParameterReader<'_>, window: Window) -> Option<Scaling> {
    let [factor, low, high] = ["factor", "low_freq_factor", "high_freq_factor"].map(|key| {
        let value = reader.positive(key);
        reader.require(key, value)
    });
    let original = read_original(reader, window);
    let (low, high) = (low?, high?);
    if high <= low {
        reader.problem("high_freq_factor", &format!("({high}) must be above low_freq_factor ({low})"));
    }
    Some(Scaling::Llama3 { factor: factor?, low_freq_factor: low, high_freq_factor: high, original: original? })
}

fn read_longrope(reader: &mut ParameterReader<'_>, window: Window, rotary_dim: usize) -> Option<Scaling> {
    let [short_factor, long_factor] = ["short_factor", "long_factor"].map(|key| {
        let value = reader.positives(key, rotary_dim / 2);
        reader.require(key, value)
    });
    let original = read_original(reader, window);
    let factor = read_factor(reader, window, original);
    let given = reader.positive("attention_factor");
    let (factor, original) = (factor?, original?);
    let attention_factor =
        given.unwrap_or_else(|| if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() });
    if !attention_factor.is_finite() {
        reader.problem(ORIGINAL, &format!("is {original}; expected a number above 1"));
    }
    Some(Scaling::LongRope { short_factor: short_factor?, long_factor: long_factor?, original, attention_factor })
}

/// Reads P from next to the parameters (where Phi-3 stores it), from inside them, or falls back to the window.
fn read_original(reader: &mut ParameterReader<'_>, window: Window) -> Option<usize> {
    let inner = reader.count(ORIGINAL);
    let original = window.outer_original.or(inner).or(window.max);
    reader.require(ORIGINAL, original)
}

/// Reads the growth of the window, which YaRN and LongRoPE checkpoints may imply as `max_position_embeddings / P`.
fn read_factor(reader: &mut ParameterReader<'_>, window: Window, original: Option<usize>) -> Option<f64> {
    let given = reader.positive("factor");
    let ratio = || Some(window.max? as f64 / original? as f64);
    let factor = given.or_else(ratio);
    reader.require("factor", factor)
}

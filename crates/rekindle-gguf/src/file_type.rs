//! File types, and the recipe of tensor types that each stands for.

use std::fmt;
use std::str::FromStr;

use crate::{Error, GgmlType};

/// The precision of a file as a whole: the name that `llama-quantize` gives a mixture of tensor types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
#[non_exhaustive]
pub enum GgufFileType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Bfloat16.
    BF16,
    /// 8 bits.
    Q8_0,
    /// 4 bits.
    Q4_0,
    /// 4 bits with minima.
    Q4_1,
    /// 5 bits.
    Q5_0,
    /// 5 bits with minima.
    Q5_1,
    /// 2 to 4 bits.
    Q2_K,
    /// 3 bits.
    Q3_K_S,
    /// 3 to 5 bits.
    Q3_K_M,
    /// 3 to 5 bits, more of the latter.
    Q3_K_L,
    /// 4 bits, with 5 in the first layers.
    Q4_K_S,
    /// 4 and 6 bits.
    Q4_K_M,
    /// 5 bits.
    Q5_K_S,
    /// 5 and 6 bits.
    Q5_K_M,
    /// 6 bits.
    Q6_K,
    /// 4 bits with unevenly spaced values.
    IQ4_NL,
    /// MXFP4 for experts, 8 bits for the rest.
    MXFP4_MOE,
}

use GgufFileType as T;

/// File type, its number in `general.file_type`, its name, and the type of most tensors.
const TABLE: [(GgufFileType, u32, &str, GgmlType); 19] = [
    (T::F32, 0, "f32", GgmlType::F32),
    (T::F16, 1, "f16", GgmlType::F16),
    (T::Q4_0, 2, "q4_0", GgmlType::Q4_0),
    (T::Q4_1, 3, "q4_1", GgmlType::Q4_1),
    (T::Q8_0, 7, "q8_0", GgmlType::Q8_0),
    (T::Q5_0, 8, "q5_0", GgmlType::Q5_0),
    (T::Q5_1, 9, "q5_1", GgmlType::Q5_1),
    (T::Q2_K, 10, "q2_k", GgmlType::Q2_K),
    (T::Q3_K_S, 11, "q3_k_s", GgmlType::Q3_K),
    (T::Q3_K_M, 12, "q3_k_m", GgmlType::Q3_K),
    (T::Q3_K_L, 13, "q3_k_l", GgmlType::Q3_K),
    (T::Q4_K_S, 14, "q4_k_s", GgmlType::Q4_K),
    (T::Q4_K_M, 15, "q4_k_m", GgmlType::Q4_K),
    (T::Q5_K_S, 16, "q5_k_s", GgmlType::Q5_K),
    (T::Q5_K_M, 17, "q5_k_m", GgmlType::Q5_K),
    (T::Q6_K, 18, "q6_k", GgmlType::Q6_K),
    (T::IQ4_NL, 25, "iq4_nl", GgmlType::IQ4_NL),
    (T::BF16, 32, "bf16", GgmlType::BF16),
    (T::MXFP4_MOE, 38, "mxfp4_moe", GgmlType::MXFP4),
];

/// Short names of the mixtures that are used most.
const ALIASES: [(&str, GgufFileType); 4] =
    [("q3_k", T::Q3_K_M), ("q4_k", T::Q4_K_M), ("q5_k", T::Q5_K_M), ("mxfp4", T::MXFP4_MOE)];

impl GgufFileType {
    /// Returns all file types in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, u32, &'static str, GgmlType) {
        TABLE.iter().find(|row| row.0 == self).expect("the table lists every file type")
    }

    /// Returns the value of `general.file_type`.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// Returns the name, such as `q4_k_m`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Returns the type of most tensors.
    pub fn default_type(self) -> GgmlType {
        self.row().3
    }
}

impl fmt::Display for GgufFileType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for GgufFileType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let lower = text.to_ascii_lowercase();
        let alias = || ALIASES.iter().find(|(name, _)| *name == lower).map(|(_, kind)| *kind);
        Self::all().find(|kind| kind.name() == lower).or_else(alias).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            Error::Model(format!("the GGUF type \"{text}\" is unknown; use one of {}", names.join(", ")))
        })
    }
}

/// The properties of a model that decide the types of its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecipeModel {
    /// Number of layers.
    pub layers: u64,
    /// Query heads for each key/value head.
    pub heads_per_kv_head: u64,
    /// Number of experts of a layer; 0 for a dense model.
    pub experts: u64,
    /// True if the embedding table is the output layer.
    pub tied: bool,
    /// True for models that llama.cpp counts as 70B: 80 layers of the architectures `llama` and `qwen2`.
    pub is_70b: bool,
    /// True if importances are used.
    pub has_importance: bool,
}

/// The tensor types of a file.
///
/// # Source
/// `llama-quantize`'s choice of types; `goldens/recipes.json` holds its choices for small models.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    file_type: GgufFileType,
    model: RecipeModel,
}

/// The part that a tensor plays, as far as its name tells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Output,
    Embedding,
    Value,
    Key,
    AttentionOutput,
    FeedForwardDown,
    Other,
}

impl Recipe {
    /// Returns the recipe of a file type for a model.
    ///
    /// # Errors
    /// [`Error::Model`] for `mxfp4_moe` and a dense model, which would have no tensor of that type.
    pub fn new(file_type: GgufFileType, model: RecipeModel) -> Result<Self, Error> {
        if file_type == T::MXFP4_MOE && model.experts == 0 {
            return Err(Error::Model(
                "mxfp4_moe stores experts in MXFP4, and this model has none; use q4_k_m or q8_0".to_owned(),
            ));
        }
        Ok(Self { file_type, model })
    }

    /// Returns the type of the tensor with this name and shape, outermost dimension first.
    pub fn tensor_type(&self, name: &str, shape: &[u64]) -> GgmlType {
        let is_matrix = shape.iter().filter(|extent| **extent > 1).count() > 1;
        let is_weight = name.ends_with("weight") && is_matrix;
        // Norms, routers, convolutions and small tables stay exact.
        if !is_weight
            || name.contains("_norm.weight")
            || name.contains("ffn_gate_inp.weight")
            || name.contains("ssm_conv1d")
        {
            return GgmlType::F32;
        }
        let chosen = self.file_type.default_type();
        if !chosen.is_quantized() {
            return chosen;
        }
        let columns = shape.last().copied().unwrap_or(1);
        let chosen = self.mixture(part(name), layer(name), shape, chosen);
        fitting(chosen, columns)
    }

    /// Returns the type in the mixture, whatever the columns are.
    fn mixture(&self, part: Part, layer: u64, shape: &[u64], base: GgmlType) -> GgmlType {
        let RecipeModel { layers, heads_per_kv_head, experts, tied, is_70b, has_importance } = self.model;
        let columns = shape.last().copied().unwrap_or(1);
        let is_grouped = heads_per_kv_head >= 4;
        let more = layer < layers / 8 || layer >= 7 * layers / 8 || (layer.saturating_sub(layers / 8)) % 3 == 2;
        if part == Part::Output || (tied && part == Part::Embedding) {
            let fits = columns.is_multiple_of(base.block_size() as u64);
            return match (self.file_type, base) {
                (T::MXFP4_MOE, _) | (_, GgmlType::Q8_0) => GgmlType::Q8_0,
                _ if !fits => GgmlType::Q8_0,
                _ => GgmlType::Q6_K,
            };
        }
        if self.file_type == T::MXFP4_MOE {
            return if shape.len() > 2 { GgmlType::MXFP4 } else { GgmlType::Q8_0 };
        }
        match part {
            Part::Value => {
                let chosen = match self.file_type {
                    T::Q2_K if is_grouped => GgmlType::Q4_K,
                    T::Q2_K => GgmlType::Q3_K,
                    T::Q3_K_M if layer < 2 => GgmlType::Q5_K,
                    T::Q3_K_M => GgmlType::Q4_K,
                    T::Q3_K_L => GgmlType::Q5_K,
                    T::IQ4_NL if is_grouped => GgmlType::Q5_K,
                    T::Q4_K_M | T::Q5_K_M if more => GgmlType::Q6_K,
                    T::Q4_K_S if layer < 4 => GgmlType::Q5_K,
                    _ => base,
                };
                match chosen {
                    _ if experts == 8 => GgmlType::Q8_0,
                    GgmlType::Q3_K | GgmlType::Q4_K if is_70b => GgmlType::Q5_K,
                    chosen => chosen,
                }
            }
            Part::Key if experts == 8 => GgmlType::Q8_0,
            Part::FeedForwardDown => match self.file_type {
                T::Q2_K => GgmlType::Q3_K,
                T::Q3_K_M if layer < layers / 16 => GgmlType::Q5_K,
                T::Q3_K_M => GgmlType::Q4_K,
                T::Q3_K_L => GgmlType::Q5_K,
                T::Q4_K_M | T::Q5_K_M if more => GgmlType::Q6_K,
                T::Q4_K_S if layer < layers / 8 => GgmlType::Q5_K,
                T::IQ4_NL if layer < layers / 8 && !has_importance => GgmlType::Q5_K,
                T::Q4_0 if layer < layers / 8 && has_importance => GgmlType::Q4_1,
                T::Q5_0 if layer < layers / 8 && has_importance => GgmlType::Q5_1,
                _ => base,
            },
            Part::AttentionOutput => match self.file_type {
                T::Q2_K | T::Q3_K_S | T::Q3_K_M | T::IQ4_NL | T::Q4_K_S | T::Q4_K_M if experts == 8 => GgmlType::Q5_K,
                _ if experts == 8 => base,
                T::Q2_K => GgmlType::Q3_K,
                T::Q3_K_M => GgmlType::Q4_K,
                T::Q3_K_L => GgmlType::Q5_K,
                _ => base,
            },
            _ => base,
        }
    }
}

fn part(name: &str) -> Part {
    let has = |text: &str| name.contains(text);
    match name {
        "output.weight" => Part::Output,
        "token_embd.weight" => Part::Embedding,
        _ if has("attn_qkv.weight") || has("attn_kv_b.weight") || has("attn_v.weight") => Part::Value,
        _ if has("attn_k.weight") => Part::Key,
        _ if has("attn_output.weight") => Part::AttentionOutput,
        _ if has("ffn_down") => Part::FeedForwardDown,
        _ => Part::Other,
    }
}

/// Returns the layer in a name such as `blk.12.ffn_down.weight`.
fn layer(name: &str) -> u64 {
    let number = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Returns a type whose blocks fit the columns: the given one, one with smaller blocks, or F16.
fn fitting(kind: GgmlType, columns: u64) -> GgmlType {
    let fits = |kind: GgmlType| columns.is_multiple_of(kind.block_size() as u64);
    if fits(kind) {
        return kind;
    }
    let smaller = match kind {
        GgmlType::Q2_K | GgmlType::Q3_K => GgmlType::Q4_0,
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        other => other,
    };
    if fits(smaller) { smaller } else { GgmlType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_in_any_case() {
        for kind in GgufFileType::all() {
            assert_eq!(kind.name().to_uppercase().parse::<GgufFileType>().unwrap(), kind);
        }
        assert_eq!("Q4_K".parse::<GgufFileType>().unwrap(), T::Q4_K_M);
        let error = "q4".parse::<GgufFileType>().unwrap_err().to_string();
        assert!(error.contains("\"q4\" is unknown") && error.contains("q4_k_m"), "{error}");
    }

    /// The recipes of `llama-quantize` for models of several sizes.
    #[test]
    fn tensor_types_are_those_of_llama_cpp() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../goldens/recipes.json")).unwrap();
        let mut compared = 0;
        for model in golden["models"].as_array().unwrap() {
            let number = |key: &str| model[key].as_u64().unwrap();
            let facts = RecipeModel {
                layers: number("layers"),
                heads_per_kv_head: number("heads") / number("kv_heads"),
                experts: 0,
                tied: model["tied"].as_bool().unwrap(),
                is_70b: number("layers") == 80,
                has_importance: false,
            };
            for (file_type, tensors) in model["types"].as_object().unwrap() {
                let recipe = Recipe::new(file_type.parse().unwrap(), facts).unwrap();
                for (name, expected) in tensors.as_object().unwrap() {
                    let shape: Vec<u64> =
                        model["shapes"][name].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
                    let mut layer = 0;
                    for run in expected.as_str().unwrap().split(' ') {
                        let (kind, count) = run.split_once('*').unwrap_or((run, "0"));
                        let names: Vec<String> = match count.parse::<u64>().unwrap() {
                            0 => vec![name.clone()],
                            count => (layer..layer + count).map(|layer| format!("blk.{layer}.{name}")).collect(),
                        };
                        layer += names.len() as u64;
                        for name in names {
                            let got = recipe.tensor_type(&name, &shape);
                            assert_eq!(got.name(), kind, "{file_type} {name} of {facts:?}");
                            compared += 1;
                        }
                    }
                }
            }
        }
        assert!(compared > 10_000, "{compared}");
    }

    #[test]
    fn tensors_that_stay_exact() {
        let recipe = Recipe::new(T::Q4_K_M, RecipeModel { layers: 16, ..RecipeModel::default() }).unwrap();
        for (name, shape) in [
            ("blk.0.attn_norm.weight", &[256][..]),
            ("blk.0.attn_q.bias", &[256]),
            ("blk.0.ffn_gate_inp.weight", &[8, 256]),
            ("rope_freqs.weight", &[32]),
        ] {
            assert_eq!(recipe.tensor_type(name, shape), GgmlType::F32, "{name}");
        }
        assert!(Recipe::new(T::MXFP4_MOE, RecipeModel::default()).is_err());
    }

    #[test]
    fn rows_that_are_no_whole_blocks_have_smaller_blocks() {
        let cases = [(T::Q4_K_M, GgmlType::Q5_0), (T::Q5_K_M, GgmlType::Q5_1), (T::Q6_K, GgmlType::Q8_0)];
        for (file_type, expected) in cases {
            let recipe = Recipe::new(file_type, RecipeModel { layers: 16, ..RecipeModel::default() }).unwrap();
            assert_eq!(recipe.tensor_type("blk.4.attn_q.weight", &[8, 96]), expected);
            assert_eq!(recipe.tensor_type("blk.4.attn_q.weight", &[8, 100]), GgmlType::F16);
        }
    }
}

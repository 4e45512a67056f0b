//! From the metadata of a file to a decoder: the inverse of `describe`.
//!
//! Metadata that a file leaves out has the value that llama.cpp takes for it.

use super::describe::YARN_TRUNCATE;
use super::{
    ARCHITECTURES, AttentionScale, Factors, GgufArchitecture, GgufDecoder, GgufDelta, GgufExperts, GgufLayer, GgufRope,
    GgufRopeScaling, Mixtures, Windows,
};
use crate::{Error, GgufModel, MetadataArray, MetadataValue};

/// The limits of llama.cpp; a damaged file must not fill the memory with layers or experts.
const MOST_LAYERS: u64 = 512;
const MOST_EXPERTS: u64 = 512;

impl GgufArchitecture {
    /// Returns the architecture of a file, and its decoder.
    ///
    /// If several families have the same architecture, returns the first.
    ///
    /// # Errors
    /// [`Error::Malformed`] for metadata that is missing or invalid; [`Error::Model`] for an architecture that is not
    /// supported, and for layers that differ in their sizes.
    pub fn read(model: &GgufModel) -> Result<(Self, GgufDecoder), Error> {
        let name = model.metadata("general.architecture").and_then(MetadataValue::as_str);
        let name = name.ok_or_else(|| Error::malformed(model.path(), "general.architecture is missing"))?;
        let is_mixture = model.metadata(&format!("{name}.expert_count")).and_then(MetadataValue::as_u64) > Some(0);
        let found = ARCHITECTURES
            .iter()
            .find(|architecture| architecture.name == name && is_mixture == (architecture.mixtures != Mixtures::None));
        let architecture = *found.ok_or_else(|| {
            let mut names: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
            names.sort_unstable();
            names.dedup();
            let experts = if is_mixture { " with experts" } else { "" };
            Error::Model(format!(
                "{} has the architecture \"{name}\"{experts}, which cannot be loaded; supported: {}",
                model.path().display(),
                names.join(", ")
            ))
        })?;
        let reader = DecoderReader { model, architecture };
        Ok((architecture, reader.decoder()?))
    }
}

struct DecoderReader<'a> {
    model: &'a GgufModel,
    architecture: GgufArchitecture,
}

impl DecoderReader<'_> {
    fn malformed(&self, reason: String) -> Error {
        Error::malformed(self.model.path(), reason)
    }

    fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.model.metadata(&format!("{}.{key}", self.architecture.name))
    }

    /// Returns a positive integer, or the one value of a list with an entry for each layer.
    fn size(&self, key: &str) -> Result<Option<u64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let one = match value.as_integers() {
            None => value.as_u64(),
            Some(list) => {
                if let Some(other) = list.iter().find(|entry| Some(*entry) != list.first()) {
                    return Err(Error::Model(format!(
                        "{}: {}.{key} is {} in one layer and {other} in another; layers that differ in their sizes are not \
                         supported",
                        self.model.path().display(),
                        self.architecture.name,
                        list[0]
                    )));
                }
                list.first().copied()
            }
        };
        match one.filter(|value| (1..=u64::from(u32::MAX)).contains(value)) {
            Some(value) => Ok(Some(value)),
            None => {
                Err(self.malformed(format!("{}.{key} is {value}; expected a positive integer", self.architecture.name)))
            }
        }
    }

    fn needed_size(&self, key: &str) -> Result<u64, Error> {
        self.size(key)?.ok_or_else(|| self.malformed(format!("{}.{key} is missing", self.architecture.name)))
    }

    /// Returns a number. One in f32 is the shortest decimal that rounds to it, such as 1e-6.
    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match value {
            MetadataValue::F32(value) => value.to_string().parse().ok(),
            other => other.as_f64(),
        };
        match number.filter(|number: &f64| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.malformed(format!("{}.{key} is {value}; expected a number", self.architecture.name))),
        }
    }

    /// Returns a number above 0; 0 counts as absent, as in llama.cpp.
    fn positive(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.number(key)? {
            Some(number) if number < 0.0 => {
                Err(self.malformed(format!("{}.{key} is {number}; expected a number above 0", self.architecture.name)))
            }
            found => Ok(found.filter(|number| *number > 0.0)),
        }
    }

    fn decoder(&self) -> Result<GgufDecoder, Error> {
        let GgufArchitecture { name, factors, is_parallel, .. } = self.architecture;
        let table = self.model.tensor("token_embd.weight");
        let table = table.ok_or_else(|| self.malformed("the tensor token_embd.weight is missing".to_owned()))?;
        let embedding_length = self.needed_size("embedding_length")?;
        let count = self.needed_size("block_count")?;
        if count > MOST_LAYERS {
            return Err(self.malformed(format!("{name}.block_count is {count}; expected at most {MOST_LAYERS}")));
        }
        let heads = self.needed_size("attention.head_count")?;
        let head_dim = self.size("attention.key_length")?.unwrap_or(embedding_length / heads);
        if let Some(width) = self.size("attention.value_length")?.filter(|width| *width != head_dim) {
            return Err(Error::Model(format!(
                "values have {width} channels and keys {head_dim}, which is not supported"
            )));
        }
        let windows = self.windows(count as usize)?;
        let window = if windows.contains(&true) { self.size("attention.sliding_window")? } else { None };
        let has_windows = window.is_some();
        let ropes = self.ropes(head_dim, has_windows)?;
        let linear = self.linear_layers(count as usize)?;
        let layer = |(index, is_windowed): (usize, bool)| {
            let rotates = self.architecture.rotates(index, is_windowed, has_windows);
            let (id, is_linear) = (if is_windowed { ropes.len() - 1 } else { 0 }, linear[index]);
            let rope = (rotates && !is_linear).then_some(id);
            GgufLayer { window: window.filter(|_| is_windowed), rope, is_linear }
        };
        let layers: Vec<GgufLayer> = windows.into_iter().enumerate().map(layer).collect();
        let implied_scale = (head_dim as f64).sqrt().recip();
        let attention_scale = match self.architecture.attention_scale {
            AttentionScale::Gemma(layers) if layers as u64 == count => {
                ((embedding_length / heads).max(1) as f64).sqrt().recip()
            }
            AttentionScale::Stored => self.positive("attention.scale")?.unwrap_or(implied_scale),
            _ => implied_scale,
        };
        let scale = |key: &str| {
            let found = self.positive(key)?;
            Ok::<_, Error>(found.filter(|factor| factors == Factors::All && *factor != 1.0))
        };
        let is_gemma = name.starts_with("gemma");
        let query_growth = match (name, self.positive("attention.temperature_scale")?, &ropes[0].scaling) {
            ("mistral3", Some(beta), &GgufRopeScaling::Yarn { original, .. }) => Some((beta, original)),
            _ => None,
        };
        Ok(GgufDecoder {
            vocab_size: table.shape.first().copied().unwrap_or(0),
            context_length: self.needed_size("context_length")?,
            embedding_length,
            feed_forward_length: self.feed_forward_length()?,
            experts: self.experts()?,
            delta: self.delta()?,
            heads,
            kv_heads: self.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            norm_epsilon: self
                .number(self.architecture.epsilon_key())?
                .ok_or_else(|| self.malformed(format!("{name}.{} is missing", self.architecture.epsilon_key())))?,
            is_parallel,
            is_tied: self.model.tensor("output.weight").is_none(),
            has_attention_biases: self.model.tensor("blk.0.attn_q.bias").is_some(),
            attention_scale,
            attention_softcap: match name {
                "gemma2" => Some(self.positive("attn_logit_softcapping")?.unwrap_or(50.0)),
                _ => None,
            },
            logit_softcap: match self.positive("final_logit_softcapping")? {
                None if name == "gemma2" => Some(30.0),
                found => found.filter(|_| is_gemma),
            },
            embedding_scale: match scale("embedding_scale")? {
                None if is_gemma => Some((embedding_length as f64).sqrt()),
                found => found,
            },
            residual_scale: scale("residual_scale")?,
            logit_multiplier: match factors {
                Factors::Logits => self.positive("logit_scale")?,
                // The file has the divisor.
                _ => scale("logit_scale")?.map(f64::recip),
            },
            query_growth,
            layers,
            ropes,
        })
    }

    /// Returns the width of the feed-forward half, or of an expert.
    fn feed_forward_length(&self) -> Result<u64, Error> {
        let stacked = self.model.tensor("blk.0.ffn_gate_exps.weight");
        match (self.architecture.mixtures, self.size("expert_feed_forward_length")?) {
            (Mixtures::Qwen(_) | Mixtures::GptOss, Some(width)) => Ok(width),
            (Mixtures::Qwen(_) | Mixtures::GptOss, None) => {
                stacked.and_then(|tensor| tensor.shape.get(1).copied()).ok_or_else(|| {
                    self.malformed(format!("{}.expert_feed_forward_length is missing", self.architecture.name))
                })
            }
            _ => self.needed_size("feed_forward_length"),
        }
    }

    fn experts(&self) -> Result<Option<GgufExperts>, Error> {
        let normalizes = match self.architecture.mixtures {
            Mixtures::None => return Ok(None),
            Mixtures::Mixtral => true,
            Mixtures::Qwen(normalizes) => normalizes,
            Mixtures::GptOss => true,
        };
        let shared_feed_forward_length = match self.size("expert_shared_feed_forward_length")? {
            Some(width) => Some(width),
            None => self.model.tensor("blk.0.ffn_gate_shexp.weight").and_then(|tensor| tensor.shape.first().copied()),
        };
        let (count, used) = (self.needed_size("expert_count")?, self.needed_size("expert_used_count")?);
        if count > MOST_EXPERTS {
            let name = self.architecture.name;
            return Err(self.malformed(format!("{name}.expert_count is {count}; expected at most {MOST_EXPERTS}")));
        }
        Ok(Some(GgufExperts {
            count,
            used,
            shared_feed_forward_length,
            normalizes,
            is_clamped: self.architecture.mixtures == Mixtures::GptOss,
        }))
    }

    /// Returns the sizes of linear attention, if the architecture has it.
    fn delta(&self) -> Result<Option<GgufDelta>, Error> {
        if !self.architecture.has_linear_layers {
            return Ok(None);
        }
        let (key_heads, value_heads) = (self.needed_size("ssm.group_count")?, self.needed_size("ssm.time_step_rank")?);
        let (key_dim, width) = (self.needed_size("ssm.state_size")?, self.needed_size("ssm.inner_size")?);
        let name = self.architecture.name;
        if !value_heads.is_multiple_of(key_heads) || !width.is_multiple_of(value_heads) {
            return Err(self.malformed(format!(
                "{name}.ssm.time_step_rank is {value_heads}, which must be a multiple of {name}.ssm.group_count {key_heads} \
                 and divide {name}.ssm.inner_size {width}"
            )));
        }
        let conv_width = self.needed_size("ssm.conv_kernel")?;
        Ok(Some(GgufDelta { key_heads, value_heads, key_dim, value_dim: width / value_heads, conv_width }))
    }

    /// Returns for each layer if it has linear attention.
    fn linear_layers(&self, layers: usize) -> Result<Vec<bool>, Error> {
        if !self.architecture.has_linear_layers {
            return Ok(vec![false; layers]);
        }
        match self.get("attention.recurrent_layers") {
            None => {
                let interval = self.size("full_attention_interval")?.unwrap_or(4);
                Ok((1..=layers as u64).map(|number| !number.is_multiple_of(interval)).collect())
            }
            Some(MetadataValue::Array(MetadataArray::Bool(linear))) if linear.len() == layers => Ok(linear.clone()),
            Some(value) => Err(self.malformed(format!(
                "{}.attention.recurrent_layers is {value}; expected a list of {layers} booleans",
                self.architecture.name
            ))),
        }
    }

    /// Returns for each layer if it has a window.
    fn windows(&self, layers: usize) -> Result<Vec<bool>, Error> {
        let name = self.architecture.name;
        let every = match name {
            "gemma2" | "gpt-oss" => 2,
            "gemma3" => 6,
            "phi3" => 0,
            _ => 4,
        };
        let is_read = self.architecture.windows != Windows::Ignored || name == "phi3";
        if !is_read || self.size("attention.sliding_window")?.is_none() {
            return Ok(vec![false; layers]);
        }
        let by_period = |period: u64| {
            (0..layers as u64).map(|index| period == 0 || index % period < period - 1).collect::<Vec<bool>>()
        };
        match self.get("attention.sliding_window_pattern") {
            None => Ok(by_period(every)),
            Some(MetadataValue::Array(MetadataArray::Bool(pattern))) if pattern.len() == layers => Ok(pattern.clone()),
            Some(value) => match value.as_u64() {
                Some(period) => Ok(by_period(period)),
                None => Err(self.malformed(format!(
                    "{name}.attention.sliding_window_pattern is {value}; expected a number or a list of {layers} booleans"
                ))),
            },
        }
    }

    /// Returns the rotary embedding of layers without a window, and that of layers with one if it is another.
    fn ropes(&self, head_dim: u64, has_windows: bool) -> Result<Vec<GgufRope>, Error> {
        let base = self.positive("rope.freq_base")?.unwrap_or(10_000.0);
        let dimensions = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        let rope = GgufRope { base, dimensions, scaling: self.rope_scaling(base, dimensions)? };
        if self.architecture.windows != Windows::Listed || !has_windows {
            return Ok(vec![rope]);
        }
        let implied = if self.architecture.name == "gemma3" { 10_000.0 } else { base };
        let windowed = self.positive("rope.freq_base_swa")?.unwrap_or(implied);
        if self.architecture.scales_windowed {
            if windowed != base {
                return Err(Error::Model(format!(
                    "{}: layers with a window have the rotary base {windowed} and others {base}, which is not supported",
                    self.model.path().display()
                )));
            }
            return Ok(vec![rope]);
        }
        let base = windowed;
        let windowed = GgufRope { base, dimensions, scaling: GgufRopeScaling::None };
        Ok(if windowed == rope { vec![rope] } else { vec![rope, windowed] })
    }

    fn rope_scaling(&self, base: f64, dimensions: u64) -> Result<GgufRopeScaling, Error> {
        let name = self.architecture.name;
        let original = || {
            Ok::<_, Error>(match self.size("rope.scaling.original_context_length")? {
                Some(original) => original,
                None => self.needed_size("context_length")?,
            })
        };
        if let Some(divisors) = self.divisors("rope_freqs.weight", dimensions)? {
            return Ok(GgufRopeScaling::Divisors(divisors));
        }
        let pair = (
            self.divisors("rope_factors_short.weight", dimensions)?,
            self.divisors("rope_factors_long.weight", dimensions)?,
        );
        if let (Some(short), Some(long)) = pair {
            let attention_factor = self.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
            return Ok(GgufRopeScaling::Long { short, long, original: original()?, attention_factor });
        }
        let kind = self.get("rope.scaling.type").and_then(MetadataValue::as_str);
        let factor = match self.positive("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.positive("rope.scale_linear")?,
        };
        match (kind, factor) {
            (Some("yarn"), Some(factor)) => {
                let own = 1.0 + 0.1 * factor.ln();
                // With a multiplier, llama.cpp divides by the factor that it belongs to, as DeepSeek does.
                let multiplier = self.number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
                let given = self.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
                let attention_factor = match multiplier {
                    0.0 => given * own,
                    multiplier => given * own / (1.0 + 0.1 * multiplier * factor.ln()),
                };
                let beta_fast = self.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0);
                let beta_slow = self.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0);
                let (attention_factor, original) = (shortest(attention_factor), original()?);
                // llama.cpp's own files do not have it: it always rounds, and OpenAI's models do not.
                let is_gpt_oss = self.architecture.mixtures == Mixtures::GptOss;
                let truncate = !is_gpt_oss || self.get(YARN_TRUNCATE) == Some(&MetadataValue::Bool(true));
                Ok(GgufRopeScaling::Yarn { factor, original, attention_factor, beta_fast, beta_slow, truncate })
            }
            (None | Some("linear"), Some(factor)) if factor != 1.0 => Ok(GgufRopeScaling::Linear { factor }),
            (None | Some("none" | "linear"), _) => Ok(GgufRopeScaling::None),
            (Some(other), _) => Err(Error::Model(format!(
                "{}: {name}.rope.scaling.type is \"{other}\" of base {base}, which is not supported; supported: none, \
                 linear, yarn, and longrope with its factors",
                self.model.path().display()
            ))),
        }
    }

    /// Returns the divisors of rotary frequencies in a vector, if it exists.
    fn divisors(&self, tensor: &str, dimensions: u64) -> Result<Option<Vec<f32>>, Error> {
        let Some(found) = self.model.tensor(tensor) else { return Ok(None) };
        if found.shape != [dimensions / 2] {
            return Err(self.malformed(format!(
                "tensor {tensor:?} has shape {:?}; expected {} divisors",
                found.shape,
                dimensions / 2
            )));
        }
        let values = found.to_f32()?;
        match values.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
            None => Ok(Some(values)),
            Some(value) => Err(self.malformed(format!("tensor {tensor:?} has the divisor {value}"))),
        }
    }
}

/// Returns the shortest decimal that is the same in f32.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

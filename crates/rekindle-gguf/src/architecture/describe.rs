//! The metadata of a decoder, and the refusal of what an architecture does not compute.

use super::{
    AttentionScale, Factors, GgufArchitecture, GgufDecoder, GgufDelta, GgufDescription, GgufExperts, GgufLayer,
    GgufRopeScaling, Mixtures, Windows,
};
use crate::{Error, MetadataValue};

/// The key that tells if YaRN rounds the dimensions between which it changes the frequencies.
pub(super) const YARN_TRUNCATE: &str = "rope.scaling.yarn_truncate";

/// Returns the metadata of a decoder as the architecture has it.
pub(super) fn description(architecture: &GgufArchitecture, decoder: &GgufDecoder) -> Result<GgufDescription, Error> {
    let mut out = Describer { architecture, metadata: Vec::new(), vectors: Vec::new(), notices: Vec::new() };
    out.sizes(decoder)?;
    out.experts(decoder)?;
    out.linear_attention(decoder)?;
    out.attention_scale(decoder)?;
    out.scales(decoder)?;
    out.windows(decoder)?;
    out.positions(decoder)?;
    let Describer { metadata, vectors, notices, .. } = out;
    Ok(GgufDescription { metadata, vectors, notices })
}

struct Describer<'a> {
    architecture: &'a GgufArchitecture,
    metadata: Vec<(String, MetadataValue)>,
    vectors: Vec<(String, Vec<f32>)>,
    notices: Vec<String>,
}

impl Describer<'_> {
    fn set(&mut self, key: &str, value: impl Into<MetadataValue>) {
        self.metadata.push((format!("{}.{key}", self.architecture.name), value.into()));
    }

    fn set_size(&mut self, key: &str, value: u64) -> Result<(), Error> {
        let value = u32::try_from(value).map_err(|_| self.refused(&format!("{key} is {value}")))?;
        self.set(key, value);
        Ok(())
    }

    fn refused(&self, what: &str) -> Error {
        let name = self.architecture.name;
        Error::Model(format!("{what}, which llama.cpp's architecture \"{name}\" does not support"))
    }

    fn sizes(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        self.set_size("vocab_size", decoder.vocab_size)?;
        self.set_size("context_length", decoder.context_length)?;
        self.set_size("embedding_length", decoder.embedding_length)?;
        self.set_size("block_count", decoder.layers.len() as u64)?;
        self.set_size("feed_forward_length", decoder.feed_forward_length)?;
        self.set_size("attention.head_count", decoder.heads)?;
        self.set_size("attention.head_count_kv", decoder.kv_heads)?;
        self.set_size("attention.key_length", decoder.head_dim)?;
        self.set_size("attention.value_length", decoder.head_dim)?;
        let GgufArchitecture { name, is_parallel, .. } = *self.architecture;
        if (name == "chatglm" || is_parallel) && decoder.heads * decoder.head_dim != decoder.embedding_length {
            let width = decoder.heads * decoder.head_dim;
            let embedding = decoder.embedding_length;
            return Err(self.refused(&format!("the heads have {width} channels and the embedding {embedding}")));
        }
        if decoder.is_parallel != is_parallel {
            let what = if is_parallel { "do not have" } else { "have" };
            return Err(self.refused(&format!("the halves of layers {what} one LayerNorm before them")));
        }
        if is_parallel && decoder.has_attention_biases {
            return Err(self.refused("the linears of attention have biases"));
        }
        if is_parallel && !decoder.is_tied {
            return Err(self.refused("the output layer is not the embedding table"));
        }
        self.set(self.architecture.epsilon_key(), decoder.norm_epsilon as f32);
        Ok(())
    }

    fn experts(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let (normalizes, has_width) = match (self.architecture.mixtures, decoder.experts) {
            (Mixtures::None, None) => return Ok(()),
            (Mixtures::None, Some(_)) => return Err(self.refused("layers have experts")),
            (_, None) => return Err(self.refused("layers have no experts")),
            (Mixtures::Mixtral, _) => (true, false),
            (Mixtures::Qwen(normalizes), _) => (normalizes, true),
            (Mixtures::GptOss, _) => (true, true),
        };
        let Some(GgufExperts { count, used, shared_feed_forward_length, normalizes: wanted, is_clamped }) =
            decoder.experts
        else {
            return Ok(());
        };
        if is_clamped != (self.architecture.mixtures == Mixtures::GptOss) {
            let what = if is_clamped { "have" } else { "do not have" };
            return Err(self.refused(&format!("experts {what} biases and a clamped SwiGLU")));
        }
        if wanted != normalizes {
            let what = if wanted { "sum to 1" } else { "do not sum to 1" };
            return Err(self.refused(&format!("the weights of a token's experts {what}")));
        }
        self.set_size("expert_count", count)?;
        self.set_size("expert_used_count", used)?;
        if has_width {
            self.set_size("expert_feed_forward_length", decoder.feed_forward_length)?;
        }
        match shared_feed_forward_length {
            Some(width) if self.architecture.has_shared_expert => {
                self.set_size("expert_shared_feed_forward_length", width)
            }
            Some(_) => Err(self.refused("every token uses an expert beside the chosen ones")),
            None if self.architecture.has_shared_expert => Err(self.refused("no expert is used by every token")),
            None => Ok(()),
        }
    }

    fn linear_attention(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let linear: Vec<bool> = decoder.layers.iter().map(|layer| layer.is_linear).collect();
        if !self.architecture.has_linear_layers {
            return match linear.iter().position(|is_linear| *is_linear) {
                Some(layer) => Err(self.refused(&format!("layer {layer} has linear attention"))),
                None => Ok(()),
            };
        }
        let Some(GgufDelta { key_heads, value_heads, key_dim, value_dim, conv_width }) = decoder.delta else {
            return Err(self.refused("no layer has linear attention"));
        };
        if key_dim != value_dim {
            let what = format!("linear attention has values of {value_dim} channels and keys of {key_dim}");
            return Err(self.refused(&what));
        }
        self.set_size("ssm.conv_kernel", conv_width)?;
        self.set_size("ssm.state_size", key_dim)?;
        self.set_size("ssm.group_count", key_heads)?;
        self.set_size("ssm.time_step_rank", value_heads)?;
        self.set_size("ssm.inner_size", value_heads * value_dim)?;
        // Older versions of llama.cpp read the interval alone.
        let is_every = |interval: &usize| {
            linear.iter().enumerate().all(|(layer, is_linear)| *is_linear == ((layer + 1) % interval != 0))
        };
        if let Some(interval) = (2..=linear.len()).find(is_every) {
            self.set("full_attention_interval", interval as u32);
        }
        self.set("attention.recurrent_layers", linear);
        Ok(())
    }

    fn attention_scale(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let head_dim = (decoder.head_dim as f64).sqrt().recip();
        let implied = match self.architecture.attention_scale {
            AttentionScale::Gemma(layers) if layers == decoder.layers.len() => {
                ((decoder.embedding_length / decoder.heads.max(1)) as f64).sqrt().recip()
            }
            _ => head_dim,
        };
        let scale = decoder.attention_scale;
        if (scale / implied - 1.0).abs() < 1e-6 {
            return Ok(());
        }
        if self.architecture.attention_scale != AttentionScale::Stored {
            return Err(self.refused(&format!("the attention scores are multiplied with {scale} instead of {implied}")));
        }
        self.set("attention.scale", scale as f32);
        Ok(())
    }

    fn scales(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let GgufArchitecture { name, factors, .. } = *self.architecture;
        match decoder.attention_softcap {
            Some(cap) if name == "gemma2" => self.set("attn_logit_softcapping", cap as f32),
            Some(cap) => return Err(self.refused(&format!("attention scores are capped at {cap}"))),
            None if name == "gemma2" => return Err(self.refused("attention scores are not capped")),
            None => {}
        }
        match decoder.logit_softcap {
            Some(cap) if name.starts_with("gemma") => self.set("final_logit_softcapping", cap as f32),
            Some(cap) => return Err(self.refused(&format!("logits are capped at {cap}"))),
            None if name == "gemma2" => return Err(self.refused("logits are not capped")),
            None => {}
        }
        if factors == Factors::All {
            self.set("logit_scale", decoder.logit_multiplier.map_or(1.0, f64::recip) as f32);
            self.set("residual_scale", decoder.residual_scale.unwrap_or(1.0) as f32);
            self.set("embedding_scale", decoder.embedding_scale.unwrap_or(1.0) as f32);
            return Ok(());
        }
        let mut scales_logits = decoder.logit_multiplier.is_some();
        if factors == Factors::Logits {
            self.set("logit_scale", decoder.logit_multiplier.unwrap_or(1.0) as f32);
            scales_logits = false;
        }
        // Gemma's √embedding_length is a part of its architectures.
        let scales_embeddings = decoder.embedding_scale.is_some_and(|scale| {
            !(name.starts_with("gemma") && (scale / (decoder.embedding_length as f64).sqrt() - 1.0).abs() < 1e-6)
        });
        if scales_embeddings || decoder.residual_scale.is_some() || scales_logits {
            return Err(self.refused("embeddings, residuals or logits are multiplied with a factor"));
        }
        Ok(())
    }

    fn windows(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let mut windows: Vec<u64> = decoder.layers.iter().filter_map(|layer| layer.window).collect();
        windows.dedup();
        let window = match windows[..] {
            [] => {
                // Gemma 2 always has windows.
                return if self.architecture.name == "gemma2" {
                    Err(self.refused("no layer has a window"))
                } else {
                    Ok(())
                };
            }
            [window] => window,
            _ => return Err(self.refused("layers have windows of different lengths")),
        };
        let listed = match self.architecture.windows {
            Windows::Listed => true,
            Windows::ListedIn64Layers => decoder.layers.len() == 64,
            Windows::Ignored => {
                if window < decoder.context_length {
                    self.notices.push(format!(
                        "llama.cpp ignores the attention window of {window} tokens of this model: longer texts have \
                         other results than in training"
                    ));
                }
                return Ok(());
            }
        };
        if !listed {
            return Err(self.refused("layers have a window, but there are not 64 layers"));
        }
        self.set_size("attention.sliding_window", window)?;
        let pattern: Vec<bool> = decoder.layers.iter().map(|layer| layer.window.is_some()).collect();
        self.set("attention.sliding_window_pattern", pattern);
        Ok(())
    }

    fn positions(&mut self, decoder: &GgufDecoder) -> Result<(), Error> {
        let has_windows = decoder.layers.iter().any(|layer| layer.window.is_some());
        let rotates = |(index, layer): (usize, &GgufLayer)| {
            !layer.is_linear && self.architecture.rotates(index, layer.window.is_some(), has_windows)
        };
        let wrong =
            decoder.layers.iter().enumerate().find(|(index, layer)| rotates((*index, layer)) != layer.rope.is_some());
        if let Some((index, layer)) = wrong {
            let positions = if layer.rope.is_some() { "positions" } else { "no positions" };
            return Err(self.refused(&format!("layer {index} has {positions}")));
        }
        let of = |has_window: bool| {
            let mut ids = decoder.layers.iter().filter(|layer| layer.window.is_some() == has_window);
            let first = ids.find_map(|layer| layer.rope);
            first.and_then(|id| decoder.ropes.get(id))
        };
        let Some(rope) = of(false).or_else(|| of(true)) else { return Err(self.refused("no layer has positions")) };
        self.set_size("rope.dimension_count", rope.dimensions)?;
        self.set("rope.freq_base", rope.base as f32);
        if self.architecture.has_linear_layers {
            // The pairs of a text's one axis, dealt to three axes in turn.
            let pairs = (rope.dimensions / 2) as i32;
            self.set("rope.dimension_sections", vec![(pairs + 2) / 3, (pairs + 1) / 3, pairs / 3, 0]);
        }
        if let Some(windowed) = of(true).filter(|windowed| *windowed != rope) {
            let is_listed = self.architecture.windows == Windows::Listed;
            if !is_listed || windowed.scaling != GgufRopeScaling::None || windowed.dimensions != rope.dimensions {
                return Err(self.refused("layers with a window have other rotary positions"));
            }
            self.set("rope.freq_base_swa", windowed.base as f32);
        } else if has_windows
            && self.architecture.windows == Windows::Listed
            && !self.architecture.scales_windowed
            && rope.scaling != GgufRopeScaling::None
        {
            return Err(self.refused("layers with a window have scaled rotary positions"));
        }
        if let Some((beta, window)) = decoder.query_growth {
            let original = match rope.scaling {
                GgufRopeScaling::Yarn { original, .. } => Some(original),
                _ => None,
            };
            if self.architecture.name != "mistral3" || original != Some(window) {
                return Err(self.refused("queries grow with the position"));
            }
            self.set("attention.temperature_scale", beta as f32);
        }
        self.rope_scaling(&rope.scaling)
    }

    fn rope_scaling(&mut self, scaling: &GgufRopeScaling) -> Result<(), Error> {
        match scaling {
            GgufRopeScaling::None => {}
            GgufRopeScaling::Linear { factor } => {
                self.set("rope.scaling.type", "linear");
                self.set("rope.scaling.factor", *factor as f32);
            }
            GgufRopeScaling::Yarn { factor, original, attention_factor, beta_fast, beta_slow, truncate } => {
                if self.architecture.mixtures == Mixtures::GptOss {
                    // Not a key of llama.cpp.
                    self.set(YARN_TRUNCATE, *truncate);
                }
                if !truncate && self.architecture.mixtures == Mixtures::GptOss {
                    self.notices.push(
                        "llama.cpp rounds the dimensions between which YaRN changes the frequencies, and this model does not: \
                         logits differ slightly"
                            .to_owned(),
                    );
                } else if !truncate {
                    return Err(
                        self.refused("the dimensions between which YaRN changes the frequencies are not rounded")
                    );
                }
                self.set("rope.scaling.type", "yarn");
                self.set("rope.scaling.factor", *factor as f32);
                self.set_size("rope.scaling.original_context_length", *original)?;
                self.set("rope.scaling.yarn_beta_fast", *beta_fast as f32);
                self.set("rope.scaling.yarn_beta_slow", *beta_slow as f32);
                // llama.cpp multiplies with YaRN's own factor.
                let own = 1.0 + 0.1 * factor.ln();
                self.set("rope.scaling.attn_factor", (attention_factor / own) as f32);
            }
            GgufRopeScaling::Divisors(divisors) => {
                if !self.architecture.has_divisors {
                    return Err(self.refused("rotary frequencies have divisors of their own (rope_type llama3)"));
                }
                self.vectors.push(("rope_freqs.weight".to_owned(), divisors.clone()));
            }
            GgufRopeScaling::Long { short, long, original, attention_factor } => {
                if self.architecture.name != "phi3" {
                    return Err(
                        self.refused("rotary frequencies depend on the length of the text (rope_type longrope)")
                    );
                }
                self.set("rope.scaling.type", "longrope");
                self.set_size("rope.scaling.original_context_length", *original)?;
                self.set("rope.scaling.attn_factor", *attention_factor as f32);
                self.vectors.push(("rope_factors_long.weight".to_owned(), long.clone()));
                self.vectors.push(("rope_factors_short.weight".to_owned(), short.clone()));
            }
        }
        Ok(())
    }
}

//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused `qkv_proj` and `gate_up_proj`, LongRoPE, and in Phi-4-mini a rotation of a
//! part of each head.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionMask, AttentionSpec, GatedSpec, Projections};

/// As in transformers' `Phi3ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Phi3ForCausalLM", model_type: "phi3", section: None, names: TensorNames::LLAMA, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults { rms_norm_eps: 1e-5, ..ClassDefaults::default() };
    let dimensions = Dimensions::read(config, defaults);
    config.only("embd_pdrop", 0.0);
    config.only("resid_pdrop", 0.0);
    config.only("attention_bias", false);
    let attention = AttentionSpec { projections: Projections::Fused, ..dimensions.attention() };
    let gated = GatedSpec { fused: true, ..dimensions.gated() };
    let layer = dimensions.layer(attention, gated);
    let masks = vec![config.window(AttentionMask::Full); dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}

//! Features that a spec can describe and this version does not compute.

use super::{
    Activation, AttentionMask, AttentionSpec, FeedForwardSpec, GatedSpec, LayerSpec, ModelSpec, NormKind, NormSpec,
    NormWeight, OutputGate, Projections,
};

impl ModelSpec {
    /// Lists, by name, what this version cannot compute for documents of up to `max_seq_length` tokens; empty for a
    /// model that it can.
    pub fn unsupported(&self, max_seq_length: usize) -> Vec<String> {
        let mut list = Features::default();
        let embedding = &self.embedding;
        list.push(embedding.per_layer_input.is_some(), || "per-layer embeddings".to_owned());
        list.norm(&self.final_norm);
        for layer in &self.layers {
            layer.unsupported(max_seq_length, &mut list);
            let Some(&AttentionSpec { rope, query_scale, head_dim, .. }) = layer.attention() else { continue };
            let rope = rope.filter(|_| query_scale.is_some()).and_then(|rope| self.ropes.get(rope.id.0));
            list.push(rope.is_some_and(|rope| rope.rotary_dim() < head_dim), || {
                "queries scaled by position with partial rotary positions".to_owned()
            });
        }
        list.0
    }
}

/// Features by name, each once.
#[derive(Default)]
struct Features(Vec<String>);

impl Features {
    fn push(&mut self, used: bool, name: impl FnOnce() -> String) {
        if used {
            let name = name();
            if !self.0.contains(&name) {
                self.0.push(name);
            }
        }
    }

    fn norm(&mut self, norm: &NormSpec) {
        self.push(norm.weight == NormWeight::None, || "norms without a weight".to_owned());
    }

    fn gated(&mut self, gated: &GatedSpec) {
        self.activation(gated.activation);
    }

    fn activation(&mut self, activation: Activation) {
        self.push(activation == Activation::Xielu, || "the activation xIELU".to_owned());
    }
}

impl LayerSpec {
    fn unsupported(&self, max_seq_length: usize, list: &mut Features) {
        if let Some(attention) = self.attention() {
            attention.unsupported(max_seq_length, list);
        }
        match &self.feed_forward {
            FeedForwardSpec::Gated(gated) => list.gated(gated),
            FeedForwardSpec::Plain { activation, .. } => {
                list.push(true, || "a feed-forward half without a gate".to_owned());
                list.activation(*activation);
            }
            FeedForwardSpec::Moe(moe) => {
                let clamped = matches!(moe.activation, Activation::ClampedSwiglu { .. });
                list.push(moe.bias && !clamped, || "biases of experts without clamped SwiGLU".to_owned());
                list.push(clamped && !moe.bias, || "clamped SwiGLU of experts without biases".to_owned());
                let known = clamped || moe.activation == Activation::Silu;
                list.push(!known, || "experts with another activation than SiLU or clamped SwiGLU".to_owned());
            }
        }
        let norms = &self.norms;
        let post = norms.post_attention.is_some() || norms.post_feed_forward.is_some();
        list.push(post && self.residual_multiplier.is_some(), || {
            "a residual multiplier beside norms after attention or the feed-forward half".to_owned()
        });
        let all = [&norms.pre_attention, &norms.post_attention, &norms.pre_feed_forward, &norms.post_feed_forward];
        all.into_iter().flatten().for_each(|norm| list.norm(norm));
        let other = post || norms.pre_feed_forward.is_some() || self.residual_multiplier.is_some();
        list.push(self.parallel && other, || {
            "attention and feed-forward in parallel with other norms than one before both".to_owned()
        });
    }
}

impl AttentionSpec {
    fn unsupported(&self, max_seq_length: usize, list: &mut Features) {
        match self.mask {
            AttentionMask::Full | AttentionMask::Sliding(_) => {}
            AttentionMask::Chunked(chunk) => list.push(chunk < max_seq_length, || {
                format!("chunked attention (chunks of {chunk}, below max_seq_length {max_seq_length})")
            }),
        }
        if let Some(qk) = &self.qk_norm {
            list.norm(&qk.norm);
            list.push(qk.norm.kind == NormKind::Layer, || "LayerNorm of queries and keys".to_owned());
            list.push(qk.full_width && qk.after_rope, || {
                "query and key norms over the whole width after the rotation".to_owned()
            });
        }
        let known = self.value_norm.is_none_or(|norm| (norm.kind, norm.weight) == (NormKind::Rms, NormWeight::None));
        list.push(!known, || "value norms other than RMSNorm without a weight".to_owned());
        let fused = self.value_norm.is_some() && self.projections == Projections::Fused;
        list.push(fused, || "value norms behind fused projections".to_owned());
        let scales = self.query_scale.is_some_and(|scale| scale.window < max_seq_length + scale.offset);
        list.push(scales && (self.rope.is_none() || self.qk_norm.is_some()), || {
            "queries scaled by position in layers without rotary positions or with query and key norms".to_owned()
        });
        let projections = match self.projections {
            Projections::Separate | Projections::Fused | Projections::ValuesAreKeys => None,
            Projections::SharedKeys { .. } => Some("keys and values shared between layers"),
            Projections::Latent { .. } => Some("multi-head latent attention"),
        };
        list.push(projections.is_some(), || projections.unwrap_or_default().to_owned());
        list.push(self.output_gate == Some(OutputGate::Projection), || "a gate on the result of attention".to_owned());
    }
}

#[cfg(test)]
mod tests;

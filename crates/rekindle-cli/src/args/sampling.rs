//! The arguments that limit which tokens are sampled, of every command that generates.

use rekindle::GenerationConfig;

#[derive(Debug, clap::Args)]
pub(crate) struct SamplingFilterArgs {
    /// Sample from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Sample from the most likely tokens whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Sample from tokens at least P times as likely as the most likely one; 0 for all
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// Divide the positive logits of tokens that already occurred by R, and multiply the negative ones; 1 for none
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f32,
}

impl SamplingFilterArgs {
    /// Returns a configuration with these filters and the defaults of everything else.
    pub(crate) fn config(&self) -> GenerationConfig {
        let Self { top_k, top_p, min_p, repetition_penalty } = *self;
        GenerationConfig { top_k, top_p, min_p, repetition_penalty, ..GenerationConfig::default() }
    }
}

//! Steps of one token of each of several sequences on a GPU, recorded and replayed.

use std::collections::BTreeMap;

use rekindle_kernels::decode_step::{self, Draw, Drawn, DrawnTokens, RecordedStep, StepInputs, StepToken, Workspace};
use rekindle_kernels::{Device, Params, Tensor};

use super::{DecodeBatch, DecodeStates, Decoder};
use crate::layers::Context;
use crate::{CausalLm, Error, RouterPass};

/// The recorded steps of a model, by their number of rows.
///
/// They contain the addresses of the weights and of one [`DecodeStates`]. Create new ones after either has changed, for
/// example after an adapter was loaded.
#[derive(Debug, Default)]
pub struct DecodeSteps {
    /// By the number of rows, and whether adapters are on.
    steps: BTreeMap<(usize, bool), DecodeStep>,
    workspace: Workspace,
}

#[derive(Debug)]
struct DecodeStep {
    inputs: StepInputs,
    recorded: RecordedStep,
}

/// A step that the device computes.
#[derive(Debug)]
#[must_use = "its tokens are read by `wait`"]
pub struct PendingStep {
    key: (usize, bool),
    tokens: DrawnTokens,
}

impl PendingStep {
    /// Waits for the step and returns the token chosen in each row.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    pub fn wait(self) -> Result<Vec<Drawn>, Error> {
        Ok(self.tokens.wait()?)
    }
}

impl DecodeSteps {
    /// Returns the reason why steps are not recorded, if they cannot be.
    pub fn refusal(&self) -> Option<&str> {
        self.steps.values().find_map(|step| step.recorded.refusal())
    }
}

/// Returns the number of rows of the step for this many tokens: few sizes, so that few steps are recorded.
fn step_rows(tokens: usize) -> usize {
    match tokens {
        0..=2 => tokens.max(1),
        3..=8 => tokens.next_power_of_two(),
        9..=64 => tokens.next_multiple_of(8),
        65..=128 => tokens.next_multiple_of(16),
        _ => tokens.next_multiple_of(32),
    }
}

impl CausalLm {
    /// Returns true if [`begin_step`](Self::begin_step) runs on this model's device and can compute its layers.
    pub fn has_steps(&self) -> bool {
        matches!(self.device(), Device::Cuda(_)) && self.decoder.shares_prefixes()
    }

    /// Adds one token to each of several sequences and begins to choose the token after it, without waiting for the device.
    /// `previous` is the step before, if the device still computes it and chooses some of the tokens ([`StepId::Chosen`](decode_step::StepId::Chosen)).
    /// The step is recorded when it is needed for the second time with its number of rows.
    ///
    /// # Panics
    /// If [`has_steps`](Self::has_steps) is false, and for a chosen token without its step.
    pub fn begin_step(
        &self,
        tokens: &[StepToken<'_>],
        previous: Option<&PendingStep>,
        states: &mut DecodeStates,
        steps: &mut DecodeSteps,
        adapters: bool,
    ) -> PendingStep {
        let device = self.device();
        let rows = step_rows(tokens.len());
        let pages = states.pages;
        let most = self.max_seq_length().div_ceil(rekindle_kernels::paged_attention::PAGE).min(pages);
        let DecodeSteps { steps, workspace } = steps;
        let key = (rows, adapters);
        steps.entry(key).or_insert_with(|| DecodeStep {
            inputs: StepInputs::new(device, rows, most),
            recorded: RecordedStep::default(),
        });
        let previous = previous.and_then(|step| steps.get(&step.key)).map(|step| &step.inputs);
        // The page behind the last one belongs to no sequence.
        steps[&key].inputs.write(tokens, pages as u32, previous);
        let step = steps.get_mut(&key).expect("it was inserted above");
        let head = self.decoder.lm_head(&self.params, adapters);
        let batch = DecodeBatch::of_step(step.inputs.batch().clone());
        step.recorded.run(device, workspace, || {
            let hidden = self.decoder.decode_step(&self.params, &step.inputs, states, &batch, adapters);
            step.inputs.choose(&head, &hidden);
        });
        PendingStep { key, tokens: step.inputs.drawn(tokens.len()) }
    }

    /// Chooses a token from each row of hidden states, without their logits on the host.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    ///
    /// # Panics
    /// If there are not as many rows as draws, and on other devices than a GPU.
    pub fn draw(&self, hidden: &Tensor<2>, draws: &[Draw], adapters: bool) -> Result<Vec<Drawn>, Error> {
        Ok(decode_step::draw(&self.decoder.lm_head(&self.params, adapters), hidden, draws)?)
    }
}

impl Decoder {
    /// Returns the normalized hidden states of the tokens of a step, and adds them to `states`.
    fn decode_step(
        &self,
        params: &Params,
        inputs: &StepInputs,
        states: &mut DecodeStates,
        batch: &DecodeBatch,
        adapters: bool,
    ) -> Tensor<2> {
        let ropes: Vec<_> = self.ropes.iter().map(|tables| inputs.angles(tables)).collect();
        let router = RouterPass::Off;
        let ctx = Context {
            params,
            ropes: &ropes,
            documents: &[],
            sequences: None,
            dropout: None,
            adapters,
            rows: &[],
            router,
        };
        let h = inputs.embed(&self.embedding(adapters).matrix(params));
        let h = self.decode_layers(ctx, h, states, batch);
        self.norm.forward(params, &h, 0).0
    }
}

#[cfg(test)]
mod tests {
    use super::step_rows;

    #[test]
    fn steps_have_few_sizes() {
        assert_eq!([1, 2, 3, 5, 8, 9, 64, 65, 130, 512].map(step_rows), [1, 2, 4, 8, 8, 16, 64, 80, 160, 512]);
        let sizes: std::collections::BTreeSet<usize> = (1..=512).map(step_rows).collect();
        assert_eq!(sizes.len(), 27);
    }
}

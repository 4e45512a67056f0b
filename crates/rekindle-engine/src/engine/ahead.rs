//! Steps that a GPU computes while the host still reads the tokens of the step before.
//!
//! A step of single tokens is begun before the tokens of the last one are known: its inputs are where that step puts its
//! choices. A sample that turns out to have ended computes one token too many, which is dropped.

use rekindle_kernels::decode_step::{StepId, StepToken};
use rekindle_models::PendingStep;

use super::Engine;
use super::compute::Choice;
use crate::EngineModel;
use crate::scheduler::{Part, SampleId};

/// A step whose tokens the host has not read.
#[derive(Debug)]
pub(super) struct StepAhead {
    parts: Vec<Part>,
    pending: PendingStep,
    adapters: bool,
}

impl<M: EngineModel> Engine<M> {
    /// Begins a step of single tokens with the choice of the ones after them. Returns `None` if the device has no such
    /// steps, or if a part needs more than that.
    pub(super) fn begin_step(&mut self, parts: &[Part], adapters: bool) -> Option<StepAhead> {
        let lm = self.model.causal_lm();
        if !lm.has_steps() {
            return None;
        }
        let token = |part: &Part| {
            let cached = self.scheduler.get(part.id).expect("it was scheduled");
            let sequence = &self.sequences[&part.id];
            let is_next = part.count == 1 && part.start + 1 == cached.tokens.len() && sequence.prompt.is_none();
            // The first token of several samples is chosen from the same logits.
            let is_next = is_next && part.start >= sequence.settings.prompt_tokens;
            let draw = sequence.draw_on_device(0).filter(|_| is_next)?;
            let id = StepId::Known(cached.tokens[part.start]);
            Some(StepToken { id, position: part.start, pages: &cached.pages, draw })
        };
        let tokens: Vec<StepToken<'_>> = parts.iter().map(token).collect::<Option<_>>()?;
        let states = self.states.as_mut().expect("the engine is awake");
        let pending = lm.begin_step(&tokens, None, states, &mut self.steps, adapters);
        Some(StepAhead { parts: parts.to_vec(), pending, adapters })
    }

    /// Begins the step after `step`, whose tokens are not known. Returns `None` if something else is to be computed first:
    /// a sample that waits, a choice that needs its logits on the host, a page that another sample holds.
    pub(super) fn begin_next(&mut self, step: &StepAhead) -> Option<StepAhead> {
        let running = |part: &&Part| self.sequences.contains_key(&part.id);
        if !self.scheduler.can_run_ahead() || step.parts.iter().filter(running).count() != self.scheduler.running() {
            return None;
        }
        let continues = |part: &Part| self.sequences.get(&part.id).is_some_and(|sequence| !sequence.ends_by_length());
        let rows: Vec<(usize, SampleId)> = step
            .parts
            .iter()
            .enumerate()
            .filter(|(_, part)| continues(part))
            .map(|(row, part)| (row, part.id))
            .collect();
        let draws: Vec<_> = rows.iter().map(|(_, id)| self.sequences[id].draw_on_device(1)).collect::<Option<_>>()?;
        let ids: Vec<SampleId> = rows.iter().map(|&(_, id)| id).collect();
        if rows.is_empty() || !self.scheduler.reserve_ahead(&ids) {
            return None;
        }
        let (mut parts, mut tokens) = (Vec::new(), Vec::new());
        for (&(row, id), draw) in rows.iter().zip(draws) {
            let cached = self.scheduler.get(id).expect("it runs");
            let position = cached.tokens.len();
            parts.push(Part { id, start: position, count: 1 });
            tokens.push(StepToken { id: StepId::Chosen(row), position, pages: &cached.pages, draw });
        }
        let states = self.states.as_mut().expect("the engine is awake");
        let lm = self.model.causal_lm();
        let pending = lm.begin_step(&tokens, Some(&step.pending), states, &mut self.steps, step.adapters);
        self.counts.steps += 1;
        Some(StepAhead { parts, pending, adapters: step.adapters })
    }

    /// Waits for a step and takes its tokens.
    pub(super) fn end_step(&mut self, step: StepAhead) {
        let StepAhead { parts, pending, .. } = step;
        match pending.wait() {
            Ok(drawn) => {
                self.counts.computed_tokens += parts.len() as u64;
                // Samples may have ended since the step began.
                for (part, drawn) in parts.iter().zip(drawn) {
                    if self.sequences.contains_key(&part.id) {
                        self.scheduler.computed(part);
                        self.next_token(part.id, Choice::Drawn(drawn));
                    }
                }
            }
            Err(error) => {
                let running: Vec<SampleId> =
                    parts.iter().map(|part| part.id).filter(|id| self.sequences.contains_key(id)).collect();
                self.fail_all(running.into_iter(), &error.into());
            }
        }
    }
}

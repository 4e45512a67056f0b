//! The computation of a step: hidden states, and the choice of tokens from them.

use std::sync::Arc;

use rekindle_kernels::decode_step::Drawn;
use rekindle_kernels::{Tensor, embedding};
use rekindle_models::{DecodeBatch, RowAdapter};

use super::Engine;
use crate::request::{Event, FinishReason};
use crate::scheduler::{Part, SampleId};
use crate::sequence::{Refused, Row};
use crate::{EngineModel, Error};

/// The origin of a sample's next token.
pub(super) enum Choice<'a> {
    /// Logits on the host, from which it is still to be chosen.
    Logits(&'a [f32]),
    /// The choice of the model's device.
    Drawn(Drawn),
}

/// Rows whose logits exist at once.
const LOGIT_ROWS: usize = 32;

impl<M: EngineModel> Engine<M> {
    /// Computes parts of samples in a batch of their own, and chooses the next tokens of those that are complete. With
    /// `adapters`, all have the active one; in `own`, each part has its adapter, if any.
    pub(super) fn compute(&mut self, parts: &[Part], adapters: bool, own: &[Option<Arc<RowAdapter>>]) {
        let mut batch = DecodeBatch::default();
        let mut rows = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let &Part { id, start, count } = part;
            let cached = self.scheduler.get(id).expect("it was scheduled");
            let prompt = self.sequences[&id].prompt_rows(start, count);
            let is_complete = start + count == cached.tokens.len();
            let outputs = match (prompt.is_empty(), is_complete) {
                (true, false) => 0..0,
                (true, true) => count - 1..count,
                (false, _) => prompt.start..prompt.end + usize::from(is_complete),
            };
            rows.extend(prompt.map(|row| Row::Prompt(id, start + row + 1)));
            rows.extend(is_complete.then_some(Row::Next(id)));
            let ids = &cached.tokens[start..start + count];
            batch.push(self.sequences[&id].number, ids, start, &cached.pages, outputs);
            if let Some(Some(adapter)) = own.get(index) {
                batch.adapt(adapter);
            }
        }
        assert_eq!(rows.len(), batch.outputs(), "a use for every row");
        let states = self.states.as_mut().expect("the engine is awake");
        let hidden = self.model.causal_lm().decode(&batch, states, adapters);
        if let Err(error) = self.model.causal_lm().device().check() {
            let error = Error::from(rekindle_models::Error::from(error));
            return self.fail_all(parts.iter().map(|part| part.id), &error);
        }
        self.counts.computed_tokens += batch.tokens() as u64;
        parts.iter().for_each(|part| self.scheduler.computed(part));
        for (chunk, rows) in rows.chunks(LOGIT_ROWS).enumerate() {
            let hidden = hidden.rows(chunk * LOGIT_ROWS, rows.len());
            if let Some(drawn) = self.draw(&hidden, rows, adapters) {
                match drawn {
                    Ok(drawn) => drawn.into_iter().for_each(|(id, drawn)| self.next_token(id, Choice::Drawn(drawn))),
                    Err(error) => self.fail_all(rows.iter().map(|row| row.sample()), &error),
                }
                continue;
            }
            let logits = self.model.causal_lm().logits(&hidden, adapters);
            let vocab = logits.len() / rows.len();
            for (row, logits) in rows.iter().zip(logits.chunks(vocab)) {
                match *row {
                    Row::Prompt(id, token) => {
                        let token = self.scheduler.get(id).expect("it was computed").tokens[token];
                        self.sequences.get_mut(&id).expect("it was computed").push_prompt(token, logits);
                    }
                    Row::Next(id) => {
                        let forked = self.fork(id);
                        self.next_token(id, Choice::Logits(logits));
                        forked.into_iter().for_each(|other| self.next_token(other, Choice::Logits(logits)));
                    }
                }
            }
        }
    }

    /// Chooses tokens on the device from hidden states, those of forked samples included. Returns `None` if a row needs its
    /// logits on the host.
    fn draw(
        &mut self,
        hidden: &Tensor<2>,
        rows: &[Row],
        adapters: bool,
    ) -> Option<Result<Vec<(SampleId, Drawn)>, Error>> {
        let lm = self.model.causal_lm();
        let can_draw = |row: &Row| match *row {
            Row::Next(id) => {
                let sequence = &self.sequences[&id];
                sequence.prompt.is_none() && sequence.draw_on_device(0).is_some()
            }
            Row::Prompt(..) => false,
        };
        if !lm.has_steps() || !rows.iter().all(can_draw) {
            return None;
        }
        let (mut samples, mut places) = (Vec::new(), Vec::new());
        for (row, place) in rows.iter().zip(0..) {
            let id = row.sample();
            for sample in std::iter::once(id).chain(self.fork(id)) {
                samples.push(sample);
                places.push(place);
            }
        }
        let draws: Vec<_> =
            samples.iter().map(|id| self.sequences[id].draw_on_device(0).expect("as the first")).collect();
        let hidden = if samples.len() == rows.len() { hidden.clone() } else { embedding::forward(hidden, &places) };
        let drawn = self.model.causal_lm().draw(&hidden, &draws, adapters);
        Some(drawn.map(|drawn| samples.into_iter().zip(drawn).collect()).map_err(Error::from))
    }

    /// Starts the other samples of a request from the first one's prompt; returns those that start.
    fn fork(&mut self, id: SampleId) -> Vec<SampleId> {
        if id.sample != 0 || self.sequences.get(&id).is_none_or(|sequence| sequence.new_tokens > 0) {
            return Vec::new();
        }
        let others: Vec<SampleId> = self
            .sequences
            .range(SampleId { sample: 1, ..id }..)
            .map(|(&other, _)| other)
            .take_while(|other| other.request == id.request)
            .collect();
        let forked: Vec<SampleId> = others.into_iter().filter(|&other| self.scheduler.fork(id, other)).collect();
        if let Some(states) = &mut self.states {
            let number = |id: &SampleId| self.sequences[id].number;
            forked.iter().for_each(|other| states.copy_sequence(number(&id), number(other)));
        }
        forked
    }

    /// Takes the next token of a sample.
    pub(super) fn next_token(&mut self, id: SampleId, choice: Choice<'_>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Some(tokens) = sequence.prompt.take() {
            self.events.push(Event::Prompt { request: id.request, tokens });
        }
        if sequence.settings.max_tokens == 0 {
            return self.finish(id, FinishReason::Length);
        }
        let token = match choice {
            Choice::Logits(logits) => sequence.choose(logits),
            Choice::Drawn(drawn) => sequence.accept(drawn),
        };
        match token {
            Ok(token) => {
                self.counts.new_tokens += 1;
                let ends = sequence.ends_with(token.id);
                self.scheduler.push(id, token.id);
                self.events.push(Event::Token { request: id.request, sample: id.sample, token });
                if let Some(reason) = ends {
                    self.finish(id, reason);
                }
            }
            Err(Refused::Error(error)) => self.fail(id, error),
            Err(Refused::NonFinite) => {
                let tokens = &self.scheduler.get(id).expect("it runs").tokens;
                let error = self.model.causal_lm().non_finite_logits(tokens, sequence.new_tokens + 1);
                self.fail(id, error.into());
            }
        }
    }
}

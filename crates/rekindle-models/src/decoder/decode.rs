//! New tokens of sequences whose earlier tokens are in a state.

use core::convert::Infallible;
use core::ops::Range;
use std::sync::Arc;

use rekindle_kernels::paged_attention::{KvPages, PAGE, PagedBatch};
use rekindle_kernels::{DeviceError, Params, Tensor, embedding};
use rekindle_lora::{AdapterRows, RowAdapter};

use super::Decoder;
use crate::RouterPass;
use crate::layers::{Block, Context, LayerState, Mixer, RecurrentStates};

/// New tokens of several sequences, one after another: whole prompts, parts of prompts, single tokens.
#[derive(Clone, Debug, Default)]
pub struct DecodeBatch {
    ids: Vec<u32>,
    sequences: Vec<SequenceRows>,
    pub(crate) pages: PagedBatch,
    /// The rows whose hidden states are wanted.
    outputs: Vec<u32>,
    /// The adapters of tokens that have one of their own.
    adapters: Vec<BatchAdapter>,
}

/// The adapter of some tokens of a batch.
#[derive(Clone, Debug)]
struct BatchAdapter {
    first: usize,
    count: usize,
    adapter: Arc<RowAdapter>,
}

impl BatchAdapter {
    fn rows(&self) -> AdapterRows<'_> {
        AdapterRows { first: self.first, count: self.count, adapter: &self.adapter }
    }
}

/// The rows of a batch that belong to one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SequenceRows {
    /// The number that the caller gave it.
    pub(crate) sequence: u64,
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Tokens before these.
    pub(crate) past: usize,
}

impl DecodeBatch {
    /// Returns a batch of the tokens of a step, which only attention can read.
    pub(super) fn of_step(pages: PagedBatch) -> Self {
        Self { pages, ..Self::default() }
    }

    /// Adds the next tokens of a sequence that has `past` tokens. The caller chose its number, and `pages` hold all of its
    /// tokens. `outputs` are the new tokens whose hidden states are wanted, by their index in `ids`.
    ///
    /// # Panics
    /// If there are too few pages, or no such tokens.
    pub fn push(&mut self, sequence: u64, ids: &[u32], past: usize, pages: &[u32], outputs: Range<usize>) {
        assert!(outputs.end <= ids.len(), "outputs {outputs:?} of {} tokens", ids.len());
        let first = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.sequences.push(SequenceRows { sequence, first, count: ids.len(), past });
        self.pages.push(past, ids.len(), pages);
        self.outputs.extend(outputs.map(|index| (first + index) as u32));
    }

    /// Applies an adapter to the tokens of the last sequence, for [`Decoder::decode`] without the active adapter.
    ///
    /// # Panics
    /// In an empty batch.
    pub fn adapt(&mut self, adapter: &Arc<RowAdapter>) {
        let &SequenceRows { first, count, .. } = self.sequences.last().expect("a sequence was added");
        match self.adapters.last_mut() {
            Some(last) if last.first + last.count == first && Arc::ptr_eq(&last.adapter, adapter) => {
                last.count += count;
            }
            _ => self.adapters.push(BatchAdapter { first, count, adapter: Arc::clone(adapter) }),
        }
    }

    /// Returns the number of new tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Returns the number of tokens whose hidden states are wanted.
    pub fn outputs(&self) -> usize {
        self.outputs.len()
    }

    /// Returns the rows of each sequence.
    pub(crate) fn sequences(&self) -> &[SequenceRows] {
        &self.sequences
    }
}

/// The states of all layers.
#[derive(Debug)]
pub struct DecodeStates {
    layers: Vec<LayerState>,
    /// Pages of each layer.
    pub(super) pages: usize,
}

impl DecodeStates {
    /// Copies what page `from` holds to page `to`, in every layer.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            match layer {
                LayerState::Pages(pages) => pages.copy_page(from, to),
                LayerState::Recurrent(_) => {}
            }
        }
    }

    /// Gives sequence `to` what recurrent layers keep of sequence `from`; it shares the pages by its block table.
    pub fn copy_sequence(&mut self, from: u64, to: u64) {
        self.recurrent().for_each(|states| states.copy(from, to));
    }

    /// Drops what recurrent layers keep of a sequence that has ended.
    pub fn remove_sequence(&mut self, sequence: u64) {
        self.recurrent().for_each(|states| states.remove(sequence));
    }

    fn recurrent(&mut self) -> impl Iterator<Item = &mut RecurrentStates> {
        self.layers.iter_mut().filter_map(|layer| match layer {
            LayerState::Recurrent(states) => Some(states),
            LayerState::Pages(_) => None,
        })
    }
}

impl Decoder {
    /// Allocates states for sequences that take `pages` pages together.
    ///
    /// # Errors
    /// [`DeviceError`] where the device's memory does not suffice.
    pub fn paged_states(&self, pages: usize) -> Result<DecodeStates, DeviceError> {
        let layer = |block: &Block| {
            Ok(match &block.mixer {
                Mixer::Attention(attention) => {
                    LayerState::Pages(KvPages::new(pages, attention.heads, self.device(), self.dtype())?)
                }
                Mixer::GatedDelta(_) => LayerState::Recurrent(RecurrentStates::default()),
            })
        };
        Ok(DecodeStates { layers: self.layers.iter().map(layer).collect::<Result<_, DeviceError>>()?, pages })
    }

    /// Returns the bytes of one page in the states of all layers.
    pub fn page_bytes(&self) -> usize {
        let attention = self.layers.iter().filter_map(|block| block.mixer.attention());
        attention.map(|attention| KvPages::page_bytes(attention.heads, self.dtype())).sum()
    }

    /// Returns true if sequences that begin alike can share their state: no layer is recurrent.
    pub fn shares_prefixes(&self) -> bool {
        self.layers.iter().all(|block| block.mixer.attention().is_some())
    }

    /// Returns states for a single sequence of `capacity` tokens, with its pages: the first, the second and so on.
    pub(crate) fn states_for_one(&self, capacity: usize) -> Result<(DecodeStates, Vec<u32>), DeviceError> {
        let pages = capacity.div_ceil(PAGE);
        let table = (0..pages as u32).collect();
        Ok((self.paged_states(pages)?, table))
    }

    /// Returns the normalized hidden states of the tokens of `batch` that are wanted, `[outputs, hidden]`, and adds the
    /// batch's tokens to `states`.
    ///
    /// On the CPU in f32 the bits of a token depend only on its sequence up to there. For models with gated delta layers
    /// they also depend on how the sequence was split over calls.
    pub fn decode(&self, params: &Params, batch: &DecodeBatch, states: &mut DecodeStates, adapters: bool) -> Tensor<2> {
        let positions = batch.pages.positions();
        let ropes: Vec<_> = self.ropes.iter().map(|tables| tables.angles(&positions)).collect();
        let router = RouterPass::Off;
        let rows: Vec<AdapterRows<'_>> = batch.adapters.iter().map(BatchAdapter::rows).collect();
        let ctx = Context {
            params,
            ropes: &ropes,
            documents: &[],
            sequences: None,
            dropout: None,
            adapters,
            rows: &rows,
            router,
        };
        let h = self.decode_layers(ctx, self.embed(ctx, &batch.ids), states, batch);
        let wanted = match *batch.outputs {
            // One row is read where it is.
            [row] => h.rows(row as usize, 1),
            _ => embedding::forward(&h, &batch.outputs),
        };
        self.norm.forward(params, &wanted, 0).0
    }

    /// Returns the residual stream of a batch after the last layer, from the rows of the embedding table.
    pub(super) fn decode_layers(
        &self,
        ctx: Context<'_>,
        h: Tensor<2>,
        states: &mut DecodeStates,
        batch: &DecodeBatch,
    ) -> Tensor<2> {
        let layer = |index: usize, layer: &Block, h| layer.decode(ctx, h, &mut states.layers[index], batch);
        let Ok(h) = self.walk(h, None, layer, |_, _| Ok::<(), Infallible>(()));
        h
    }
}

//! The optimizer state of every parameter.

use core::ops::Range;

use super::blockwise::{self, BLOCK, BlockwiseCoefficients, HostBlocks, SMALLEST};
use super::{Clip, StateFormat, UpdateRule, UpdateStep, cpu, cuda, dynamic_map, portable};
use crate::runtime::{Array, MemoryUse};
use crate::tensor::{MetaMemory, two_devices};
use crate::{Backend, Device, Group, ParamInfo, Tensor, host, params};

/// The state of all parameters, or of those elements that belong to a shard.
#[derive(Debug)]
pub struct OptimizerState {
    rule: UpdateRule,
    format: StateFormat,
    pub(super) device: Device,
    /// The elements of the shard.
    shard: Range<usize>,
    /// Every parameter, also those outside the shard, which have no elements there.
    pub(super) slots: Vec<ParamState>,
    /// One vector for each of [`UpdateRule::moments`], of the parameters whose state is in `f32`.
    pub(super) moments: Vec<Tensor<1>>,
    /// The state of the other parameters.
    pub(super) blocks: Blocks,
}

/// A parameter and where its state lies.
#[derive(Clone, Debug)]
pub(super) struct ParamState {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// Its elements among those of all parameters.
    pub(super) whole: Range<usize>,
    /// Those of them in the shard.
    pub(super) range: Range<usize>,
    decays: bool,
    group: Group,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) enum Place {
    /// The first element in [`OptimizerState::moments`].
    Dense(usize),
    /// Blocks, and tiles of the CUDA kernel.
    Blocks { blocks: Range<usize>, tiles: Range<usize> },
}

/// 8-bit blocks.
#[derive(Debug)]
pub(super) enum Blocks {
    Host(Vec<HostBlocks>),
    Cuda(blockwise::cuda::Blocks),
    /// Counted only.
    Meta(#[allow(dead_code, reason = "held, not read")] MetaMemory),
}

/// Neighbours that move alike and have an `f32` state.
struct Run {
    range: Range<usize>,
    at: usize,
    decays: bool,
    group: Group,
}

/// Bytes of a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Bytes on the device of the parameters.
    pub device: usize,
    /// Bytes in page-locked host memory, if the parameters are on CUDA.
    pub host: usize,
}

impl UpdateRule {
    /// The names of what it remembers of every element, PyTorch's.
    pub fn moments(&self) -> &'static [&'static str] {
        match self {
            Self::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
            Self::Lion { .. } => &["exp_avg"],
            Self::Sgd { momentum } if *momentum == 0.0 => &[],
            Self::Sgd { .. } => &["momentum_buffer"],
        }
    }
}

impl StateFormat {
    /// Returns the bytes of the state of parameters with these numbers of elements.
    pub fn bytes(self, rule: UpdateRule, sizes: impl IntoIterator<Item = usize>) -> StateBytes {
        let mut bytes = StateBytes::default();
        for numel in sizes {
            let moments = rule.moments().len();
            match self.has_blocks(rule, numel) {
                false => bytes.device += moments * 4 * numel,
                true if self == Self::Host8 => bytes.host += moments * (BLOCK + 4) * numel.div_ceil(BLOCK),
                true => bytes.device += moments * (BLOCK + 4) * numel.div_ceil(BLOCK),
            }
        }
        bytes
    }

    fn has_blocks(self, rule: UpdateRule, numel: usize) -> bool {
        self != Self::F32 && numel >= SMALLEST && !rule.moments().is_empty()
    }
}

impl OptimizerState {
    /// Zeros for parameters in ascending order of their places.
    pub fn new(infos: &[ParamInfo], device: &Device, rule: UpdateRule, format: StateFormat) -> Self {
        Self::of_shard(infos, 0..numel(infos), device, rule, format)
    }

    /// Divides the elements of parameters into one shard for each of `ranks`, of about equal length. No block of 8-bit state
    /// is in two of them.
    pub fn shards(infos: &[ParamInfo], rule: UpdateRule, format: StateFormat, ranks: usize) -> Vec<Range<usize>> {
        let numel = numel(infos);
        let cut = |rank: usize| {
            // Without an overflow for any number of parameters and ranks.
            let even = numel / ranks * rank + numel % ranks * rank / ranks;
            let inside = infos.partition_point(|info| info.at.range().end <= even);
            let Some(range) = infos.get(inside).map(|info| info.at.range()) else { return numel };
            match format.has_blocks(rule, range.len()) {
                true => range.start + (even - range.start) / BLOCK * BLOCK,
                // 16 bytes, for wide accesses.
                false => (even / 4 * 4).max(range.start),
            }
        };
        (0..ranks).map(|rank| cut(rank)..if rank + 1 == ranks { numel } else { cut(rank + 1) }).collect()
    }

    /// Zeros for the elements of `shard`, one of [`shards`](Self::shards).
    pub fn of_shard(
        infos: &[ParamInfo],
        shard: Range<usize>,
        device: &Device,
        rule: UpdateRule,
        format: StateFormat,
    ) -> Self {
        let mut slots: Vec<ParamState> = Vec::with_capacity(infos.len());
        let (mut end, mut blocks, mut tiles) = (0, 0, Vec::new());
        for ParamInfo { name, shape, at, decays, group } in infos {
            let whole = at.range();
            assert!(slots.last().is_none_or(|last| last.whole.end <= whole.start), "\"{name}\" comes in order");
            let inside = |element: usize| element.clamp(shard.start, shard.end);
            let range = inside(whole.start)..inside(whole.end);
            let place = if format.has_blocks(rule, whole.len()) {
                let first = tiles.len();
                tiles.extend(blockwise::tiles(&range, blocks, *decays, *group));
                let own = blocks..blocks + range.len().div_ceil(BLOCK);
                blocks = own.end;
                Place::Blocks { blocks: own, tiles: first..tiles.len() }
            } else {
                // As far from 16 bytes as the values are, for wide accesses.
                let at = end + (4 + range.start % 4 - end % 4) % 4;
                end = at + range.len();
                Place::Dense(at)
            };
            slots.push(ParamState {
                name: name.clone(),
                shape: shape.clone(),
                whole,
                range,
                decays: *decays,
                group: *group,
                place,
            });
        }
        let moments = rule.moments().iter();
        let blocks = match device {
            Device::Cuda(cuda) if blocks > 0 => {
                let (moments, host) = (rule.moments().len(), format == StateFormat::Host8);
                let tables = dynamic_map::tables();
                Blocks::Cuda(blockwise::cuda::Blocks::new(cuda, moments, blocks, host, &tiles, &tables))
            }
            Device::Meta(device) => {
                let bytes = moments.clone().count() * blocks * (BLOCK + size_of::<f32>());
                Blocks::Meta(device.charge(MemoryUse::OptimizerState, bytes))
            }
            Device::Burn(_) | Device::Cuda(_) => {
                Blocks::Host(moments.clone().map(|_| HostBlocks::new(blocks)).collect())
            }
        };
        let moments = moments.map(|_| params::zeros(end, device, MemoryUse::OptimizerState)).collect();
        Self { rule, format, device: device.clone(), shard, slots, moments, blocks }
    }

    /// The update rule.
    pub fn rule(&self) -> UpdateRule {
        self.rule
    }

    /// The format of the state.
    pub fn format(&self) -> StateFormat {
        self.format
    }

    /// Returns the elements that this is the state of.
    pub fn shard(&self) -> Range<usize> {
        self.shard.clone()
    }

    /// Returns the bytes of the state.
    pub fn bytes(&self) -> StateBytes {
        let mut bytes = StateBytes::default();
        let moments = self.rule.moments().len();
        for slot in &self.slots {
            match &slot.place {
                Place::Dense(_) => bytes.device += moments * 4 * slot.range.len(),
                Place::Blocks { blocks, .. } => {
                    let blocks = moments * (BLOCK + 4) * blocks.len();
                    *if self.format == StateFormat::Host8 { &mut bytes.host } else { &mut bytes.device } += blocks;
                }
            }
        }
        bytes
    }

    /// Changes `values`, those of the parameters within `range` of all elements, and their state by one step.
    ///
    /// # Panics
    /// If `values` or `grads` are not as many as `range` says, or it cuts a parameter in two.
    pub fn apply(
        &mut self,
        range: Range<usize>,
        values: &mut Tensor<1>,
        grads: &Tensor<1>,
        step: &UpdateStep,
        clip: &Clip,
    ) {
        assert_eq!(values.dims(), [range.len()], "values of the elements {range:?}");
        assert_eq!(grads.dims(), [range.len()], "gradients of the elements {range:?}");
        if clip.skips() {
            return;
        }
        let chosen = self.chosen(&range);
        self.apply_dense(&range, chosen.clone(), values, grads, step, clip);
        let backend = Backend::of(values);
        match backend {
            Backend::Cpu | Backend::Portable => {}
            Backend::Cuda => {
                return self.apply_blocks_cuda(range.start, chosen, [values.cuda(), grads.cuda()], step, clip.cuda());
            }
            // The CPU changes the values where they are, and copies those that something else refers to.
            Backend::Meta => {
                let owned = core::mem::replace(values, grads.clone()).into_meta().owned();
                *values = owned.into();
                return;
            }
        }
        let (values, grads, factor) = (values.burn_mut(), grads.burn(), clip.factor());
        for slot in &self.slots[chosen] {
            let Place::Blocks { blocks, .. } = &slot.place else { continue };
            let Blocks::Host(moments) = &mut self.blocks else { two_devices() };
            let local = slot.range.start - range.start..slot.range.end - range.start;
            let coefficients = BlockwiseCoefficients::of(self.rule, step, slot.decays, slot.group);
            let mut parts = moments.iter_mut().map(|moment| moment.part(blocks.clone()));
            let m = parts.next().expect("a moment at least");
            let change = |p: &mut [f32], g: &[f32]| {
                blockwise::cpu::step(self.rule, &coefficients, p, g, factor as f32, m, parts.next());
            };
            match backend {
                Backend::Cpu => {
                    let grads = host::View::of(grads);
                    host::with_mut(values, |p| change(&mut p[local.clone()], &grads.as_slice()[local]));
                }
                Backend::Portable => portable::on_host(values, grads, local, change),
                Backend::Cuda | Backend::Meta => unreachable!("returned above"),
            }
        }
    }

    fn apply_dense(
        &mut self,
        range: &Range<usize>,
        chosen: Range<usize>,
        values: &mut Tensor<1>,
        grads: &Tensor<1>,
        step: &UpdateStep,
        clip: &Clip,
    ) {
        for Run { range: run, at, decays, group } in self.runs(chosen) {
            let (lr, decay) = step.of(decays, group);
            let coefficients = StepCoefficients::of(self.rule, step.t, lr, decay);
            let (local, at) = (run.start - range.start..run.end - range.start, at..at + run.len());
            match Backend::of(values) {
                Backend::Cpu => {
                    let (p, g) = (values.burn_mut(), grads.burn());
                    cpu::step(p, g, clip.factor(), &mut self.moments, &coefficients, local, at);
                }
                Backend::Portable => {
                    let (p, g) = (values.burn_mut(), grads.burn());
                    portable::step(p, g, clip.factor(), &mut self.moments, &coefficients, local, at);
                }
                Backend::Meta => {}
                Backend::Cuda => {
                    let part = |x: &Array, range: &Range<usize>| x.part(range.start, [1, range.len()]);
                    let moments: Vec<Array> = self.moments.iter().map(|moment| part(moment.cuda(), &at)).collect();
                    let (p, g) = (part(values.cuda(), &local), part(grads.cuda(), &local));
                    cuda::step(&p, &g, &moments, &coefficients, clip.cuda());
                }
            }
        }
    }

    fn apply_blocks_cuda(
        &self,
        first: usize,
        chosen: Range<usize>,
        arrays: [&Array; 2],
        step: &UpdateStep,
        clip: &cuda::Clip,
    ) {
        let Blocks::Cuda(blocks) = &self.blocks else { return };
        let tiles = self.slots[chosen].iter().filter_map(|slot| match &slot.place {
            Place::Blocks { tiles, .. } => Some(tiles.clone()),
            Place::Dense(_) => None,
        });
        // Tiles lie in the order of the parameters.
        let Some(tiles) = tiles.reduce(|all, next| all.start..next.end) else { return };
        let kinds = [Group::Default, Group::Embedding].map(|group| [false, true].map(|decays| (decays, group)));
        let [[a, b], [c, d]] =
            kinds.map(|pair| pair.map(|(decays, group)| BlockwiseCoefficients::of(self.rule, step, decays, group)));
        blocks.step(self.rule, arrays, first, tiles, [a, b, c, d], clip);
    }

    /// The parameters within `range`.
    fn chosen(&self, range: &Range<usize>) -> Range<usize> {
        let first = self.slots.partition_point(|slot| slot.range.end <= range.start);
        let end = self.slots.partition_point(|slot| slot.range.start < range.end).max(first);
        for ParamState { name, range: slot, .. } in &self.slots[first..end] {
            assert!(range.start <= slot.start && slot.end <= range.end, "{range:?} cuts \"{name}\", {slot:?}, in two");
        }
        first..end
    }

    /// Longest runs of the chosen parameters that move alike and whose `f32` states are neighbours too.
    fn runs(&self, chosen: Range<usize>) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for ParamState { range, decays, group, place, .. } in &self.slots[chosen] {
            let &Place::Dense(at) = place else { continue };
            match runs.last_mut() {
                Some(run)
                    if run.range.end == range.start
                        && run.at + run.range.len() == at
                        && (run.decays, run.group) == (*decays, *group) =>
                {
                    run.range.end = range.end;
                }
                _ => runs.push(Run { range: range.clone(), at, decays: *decays, group: *group }),
            }
        }
        runs
    }
}

/// Returns the number of elements.
fn numel(infos: &[ParamInfo]) -> usize {
    infos.last().map_or(0, |last| last.at.range().end)
}

/// The coefficients of a step with an `f32` state, for parameters that move alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum StepCoefficients {
    AdamW {
        /// 1 − lr · weight_decay.
        keep: f64,
        /// lr / (1 − β₁ᵗ).
        step_size: f64,
        /// 1 / √(1 − β₂ᵗ).
        root_correction: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
    },
    Lion {
        /// 1 − lr · weight_decay.
        keep: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
    },
    Sgd {
        weight_decay: f64,
        lr: f64,
        momentum: f64,
    },
}

impl StepCoefficients {
    fn of(rule: UpdateRule, t: u64, lr: f64, weight_decay: f64) -> Self {
        let keep = 1.0 - lr * weight_decay;
        match rule {
            UpdateRule::AdamW { beta1, beta2, eps } => {
                let correct = |beta: f64| 1.0 - beta.powf(t as f64);
                let (step_size, root_correction) = (lr / correct(beta1), correct(beta2).sqrt().recip());
                Self::AdamW { keep, step_size, root_correction, beta1, beta2, eps }
            }
            UpdateRule::Lion { beta1, beta2 } => Self::Lion { keep, lr, beta1, beta2 },
            UpdateRule::Sgd { momentum } => Self::Sgd { weight_decay, lr, momentum },
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::ParamsBuilder;

    const ADAMW: UpdateRule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    #[test]
    fn runs_end_where_parameters_move_otherwise() {
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push("a", &[2, 3], true, &[0.0; 6]);
        builder.push("b", &[5], true, &[0.0; 5]);
        builder.push("c", &[3], false, &[0.0; 3]);
        builder.push_in(Group::Embedding, "d", &[2], false, &[0.0; 2]);
        let params = builder.build();
        let state = OptimizerState::new(params.infos(), &Device::cpu(), ADAMW, StateFormat::F32);
        let runs = |range| -> Vec<_> {
            let runs = state.runs(state.chosen(&range)).into_iter();
            runs.map(|run| (run.range, run.at, run.decays, run.group)).collect()
        };
        let c = (11..14, 11, false, Group::Default);
        assert_eq!(runs(0..16), [(0..11, 0, true, Group::Default), c.clone(), (14..16, 14, false, Group::Embedding)]);
        assert_eq!(runs(6..14), [(6..11, 6, true, Group::Default), c]);
    }

    #[test]
    fn shards_cover_everything_and_cut_no_block() {
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push("a", &[7], false, &[0.0; 7]);
        builder.push("b", &[90, 50], true, &[0.0; 4500]);
        builder.push("c", &[60, 90], true, &[0.0; 5400]);
        let params = builder.build();
        for ranks in 1..9 {
            for format in [StateFormat::F32, StateFormat::Blockwise8] {
                let shards = OptimizerState::shards(params.infos(), ADAMW, format, ranks);
                assert_eq!((shards.len(), shards[0].start, shards[ranks - 1].end), (ranks, 0, 9907));
                assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start), "{shards:?}");
                let even = 9907 / ranks;
                assert!(shards.iter().all(|shard| shard.len().abs_diff(even) <= BLOCK), "{shards:?}");
                let state = |shard| OptimizerState::of_shard(params.infos(), shard, &Device::cpu(), ADAMW, format);
                let bytes: usize = shards.iter().map(|shard| state(shard.clone()).bytes().device).sum();
                assert_eq!(bytes, state(0..9907).bytes().device, "no part of the state exists twice");
            }
        }
        assert_eq!(OptimizerState::shards(params.infos(), ADAMW, StateFormat::Blockwise8, 2)[0], 0..4507 + 256);
        assert_eq!(OptimizerState::shards(params.infos(), ADAMW, StateFormat::F32, 2)[0], 0..4952);
    }

    #[test]
    fn bytes_by_hand() {
        let (lion, sgd) = (UpdateRule::Lion { beta1: 0.9, beta2: 0.99 }, UpdateRule::Sgd { momentum: 0.0 });
        let of = |format: StateFormat, rule, sizes: &[usize]| format.bytes(rule, sizes.iter().copied());
        let device = |device| StateBytes { device, host: 0 };
        assert_eq!(of(StateFormat::F32, ADAMW, &[6, 10]), device(128));
        assert_eq!(of(StateFormat::F32, sgd, &[6, 10]), device(0));
        // 16 blocks and 17; the smaller parameter keeps f32.
        assert_eq!(of(StateFormat::Blockwise8, ADAMW, &[4096, 4097, 4095]), device(2 * 33 * 260 + 2 * 4 * 4095));
        assert_eq!(of(StateFormat::Blockwise8, lion, &[4096]), device(16 * 260));
        assert_eq!(of(StateFormat::Host8, lion, &[4096, 10]), StateBytes { device: 40, host: 16 * 260 });
    }
}

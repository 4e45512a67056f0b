//! The state in bytes: for checkpoints, exact to the bit.

use core::ops::Range;
use std::collections::BTreeMap;

use burn::tensor::DType;

use super::OptimizerState;
use super::blockwise::BLOCK;
use super::state::{Blocks, Place};
use crate::runtime::elementwise;
use crate::{DeviceError, Tensor, from_le_bytes, to_f32};

/// A named part of a state: `{parameter}.exp_avg`, say.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor {
    /// The parameter and what is remembered of it.
    pub name: String,
    /// Returns the dtype.
    pub dtype: DType,
    /// The parameter's, or `[blocks]`.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major. Of the state of a shard, only those of the shard; those of all shards, one after
    /// another, are the whole tensor.
    pub bytes: Vec<u8>,
}

/// A state that cannot be loaded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// It was not saved for these parameters and this optimizer.
    #[error("the optimizer state does not match the run: {}", .0.join("; "))]
    Other(Vec<String>),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A tensor of [`OptimizerState::tensors`] without its bytes.
#[derive(Debug, PartialEq)]
struct Part {
    name: String,
    dtype: DType,
    /// The shape of the whole tensor.
    shape: Vec<usize>,
    /// The elements of the tensor that belong to the shard.
    inside: Range<usize>,
    moment: usize,
    at: At,
}

/// Its place.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// The first element in the `f32` moments.
    Dense(usize),
    /// The first block, for codes.
    Codes(usize),
    /// The first block, for scales.
    Absmax(usize),
}

impl Part {
    fn numel(&self) -> usize {
        self.inside.len()
    }

    /// Length.
    fn bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }

    /// The length of the whole tensor.
    fn whole_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

impl OptimizerState {
    /// Everything, each part read from the device when it is reached. A moment in 8-bit blocks is two parts: codes, and
    /// `.absmax` with a scale for every 256 of them. The state of a shard gives its piece of every tensor.
    pub fn tensors(&self) -> impl Iterator<Item = Result<StateTensor, DeviceError>> + '_ {
        self.parts().map(|part| {
            let bytes = self.read(&part)?;
            let Part { name, dtype, shape, .. } = part;
            self.device.check().map(|()| StateTensor { name, dtype, shape, bytes })
        })
    }

    /// Replaces everything by what [`tensors`](Self::tensors) of the whole state gave; the state of a shard takes its piece
    /// of it.
    ///
    /// # Errors
    /// Unless `tensors` are exactly those of this state; then nothing changes.
    pub fn load(&mut self, tensors: impl IntoIterator<Item = StateTensor>) -> Result<(), StateError> {
        let mut found: BTreeMap<String, StateTensor> = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let (mut problems, mut loaded) = (Vec::new(), Vec::new());
        for part in self.parts() {
            match found.remove(&part.name) {
                None => problems.push(format!("\"{}\" is missing", part.name)),
                Some(t) if t.dtype != part.dtype || t.shape != part.shape => problems.push(format!(
                    "\"{}\" is {:?} {:?}, not {:?} {:?}",
                    part.name, t.dtype, t.shape, part.dtype, part.shape
                )),
                Some(t) if t.bytes.len() != part.whole_bytes() => {
                    problems.push(format!("\"{}\" has {} bytes", part.name, t.bytes.len()));
                }
                Some(t) => loaded.push((part, t.bytes)),
            }
        }
        problems.extend(found.into_keys().map(|name| format!("\"{name}\" does not belong to this run")));
        if !problems.is_empty() {
            return Err(StateError::Other(problems));
        }
        let inside = |part: &Part| part.inside.start * part.dtype.size()..part.inside.end * part.dtype.size();
        loaded
            .into_iter()
            .try_for_each(|(part, bytes)| self.write(&part, &bytes[inside(&part)]))
            .map_err(StateError::from)
    }

    fn parts(&self) -> impl Iterator<Item = Part> + use<'_> {
        let moments = self.rule().moments();
        self.slots.iter().flat_map(move |slot| {
            moments.iter().enumerate().flat_map(move |(moment, what)| {
                let name = format!("{}.{what}", slot.name);
                let shape = slot.shape.clone();
                // A parameter outside the shard has no elements, wherever they are.
                let inside = match slot.range.is_empty() {
                    true => 0..0,
                    false => slot.range.start - slot.whole.start..slot.range.end - slot.whole.start,
                };
                match &slot.place {
                    &Place::Dense(at) => {
                        vec![Part { name, dtype: DType::F32, shape, inside, moment, at: At::Dense(at) }]
                    }
                    Place::Blocks { blocks, .. } => {
                        let first = inside.start / BLOCK;
                        let absmax = Part {
                            name: format!("{name}.absmax"),
                            dtype: DType::F32,
                            shape: vec![slot.whole.len().div_ceil(BLOCK)],
                            inside: first..first + blocks.len(),
                            moment,
                            at: At::Absmax(blocks.start),
                        };
                        let at = At::Codes(blocks.start);
                        vec![Part { name, dtype: DType::U8, shape, inside, moment, at }, absmax]
                    }
                }
            })
        })
    }

    fn read(&self, part: &Part) -> Result<Vec<u8>, DeviceError> {
        if part.inside.is_empty() {
            return Ok(Vec::new());
        }
        let range = |at: usize| at..at + part.numel();
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(match (&self.blocks, part.at) {
            (_, At::Dense(at)) => floats(&to_f32(match &self.moments[part.moment] {
                Tensor::Burn(all) => Tensor::<1>::Burn(all.clone().slice([range(at)])),
                Tensor::Cuda(all) => Tensor::Cuda(all.part(at, [1, part.numel()])),
                Tensor::Meta(all) => Tensor::Meta(all.part(at, [1, part.numel()])),
            })),
            (Blocks::Host(moments), At::Codes(block)) => moments[part.moment].codes[range(BLOCK * block)].to_vec(),
            (Blocks::Host(moments), At::Absmax(block)) => floats(&moments[part.moment].absmax[range(block)]),
            (Blocks::Meta(_), At::Codes(_) | At::Absmax(_)) => vec![0; part.bytes()],
            (Blocks::Cuda(blocks), at) => {
                let mut bytes = vec![0; part.bytes()];
                let (which, from) = at.in_memory();
                blocks.read(part.moment, which, from, &mut bytes)?;
                bytes
            }
        })
    }

    fn write(&mut self, part: &Part, bytes: &[u8]) -> Result<(), DeviceError> {
        if part.inside.is_empty() {
            return Ok(());
        }
        let range = |at: usize| at..at + part.numel();
        match (&mut self.blocks, part.at) {
            (_, At::Dense(at)) => {
                let values: Tensor<1> = from_le_bytes(bytes, [part.numel()], &self.device, DType::F32);
                match &mut self.moments[part.moment] {
                    Tensor::Burn(all) => all.inplace(|all| all.slice_assign([range(at)], values.into_burn())),
                    Tensor::Cuda(all) => elementwise::copy_into(values.cuda(), &all.part(at, [1, part.numel()])),
                    Tensor::Meta(_) => {}
                }
            }
            (Blocks::Host(moments), At::Codes(block)) => {
                moments[part.moment].codes[range(BLOCK * block)].copy_from_slice(bytes);
            }
            (Blocks::Host(moments), At::Absmax(block)) => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                moments[part.moment].absmax[range(block)].iter_mut().zip(values).for_each(|(old, new)| *old = new);
            }
            (Blocks::Meta(_), At::Codes(_) | At::Absmax(_)) => {}
            (Blocks::Cuda(blocks), at) => {
                let (which, from) = at.in_memory();
                blocks.write(part.moment, which, from, bytes)?;
            }
        }
        Ok(())
    }
}

impl At {
    /// Returns which of a moment's memories on the device, and the byte there.
    fn in_memory(self) -> (usize, usize) {
        match self {
            Self::Codes(block) => (0, BLOCK * block),
            Self::Absmax(block) => (1, 4 * block),
            Self::Dense(_) => unreachable!("not in blocks"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::{Clip, StateFormat, UpdateRule, UpdateStep, apply_shard, clipped_step};
    use crate::{Device, Grads, Params, ParamsBuilder, from_f32};

    const RULE: UpdateRule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    fn params() -> Params {
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push("a", &[2, 3], true, &[0.5; 6]);
        builder.push("b", &[50, 90], false, &[0.25; 4500]);
        builder.build()
    }

    fn step(params: &mut Params, state: &mut OptimizerState, t: u64) {
        let grads = grads(params, t);
        clipped_step(params, &grads, state, &UpdateStep { t, rates: 1e-2.into(), weight_decay: 0.1 }, 1.0);
    }

    fn grads(params: &Params, t: u64) -> Grads {
        let mut grads = params.zero_grads();
        for info in params.infos() {
            let values = (0..info.at.range().len()).map(|i| (i % 97) as f32 - 1.5 * t as f32).collect();
            grads.add(info.at, from_f32(values, info.at.dims(), &Device::cpu(), DType::F32));
        }
        grads
    }

    fn state(params: &Params, format: StateFormat) -> OptimizerState {
        OptimizerState::new(params.infos(), &Device::cpu(), RULE, format)
    }

    #[test]
    fn a_state_that_was_saved_goes_on_with_the_same_bits() {
        for format in [StateFormat::F32, StateFormat::Blockwise8] {
            let mut whole = params();
            let mut whole_state = state(&whole, format);
            step(&mut whole, &mut whole_state, 1);
            let saved: Vec<StateTensor> = whole_state.tensors().map(Result::unwrap).collect();
            let names: Vec<&str> = saved.iter().map(|tensor| tensor.name.as_str()).collect();
            assert_eq!(names[..3], ["a.exp_avg", "a.exp_avg_sq", "b.exp_avg"]);
            assert_eq!(names.contains(&"b.exp_avg_sq.absmax"), format == StateFormat::Blockwise8, "{names:?}");
            let mut resumed = params();
            resumed.set_all_values(whole.all_values());
            let mut resumed_state = state(&resumed, format);
            resumed_state.load(saved.into_iter().rev()).expect("its own tensors");
            for t in 2..4 {
                step(&mut whole, &mut whole_state, t);
                step(&mut resumed, &mut resumed_state, t);
            }
            assert_eq!(whole.all_values(), resumed.all_values());
            let bytes =
                |state: &OptimizerState| state.tensors().map(|t| t.expect("the CPU works").bytes).collect::<Vec<_>>();
            assert_eq!(bytes(&whole_state), bytes(&resumed_state));
        }
    }

    /// Steps of the shards one after another are those of the whole state, and so are their tensors.
    #[test]
    fn shards_take_the_steps_of_the_whole() {
        for format in [StateFormat::F32, StateFormat::Blockwise8] {
            let mut whole = params();
            let mut whole_state = state(&whole, format);
            let mut sharded = params();
            let shards = OptimizerState::shards(sharded.infos(), RULE, format, 3);
            let of_shard = |params: &Params, shard: &Range<usize>| {
                OptimizerState::of_shard(params.infos(), shard.clone(), &Device::cpu(), RULE, format)
            };
            let mut states: Vec<OptimizerState> = shards.iter().map(|shard| of_shard(&sharded, shard)).collect();
            let joined = |states: &[OptimizerState]| -> Vec<StateTensor> {
                let mut all: Vec<StateTensor> = states[0].tensors().map(Result::unwrap).collect();
                for state in &states[1..] {
                    for (whole, piece) in all.iter_mut().zip(state.tensors().map(Result::unwrap)) {
                        assert_eq!((&whole.name, &whole.shape), (&piece.name, &piece.shape));
                        whole.bytes.extend(piece.bytes);
                    }
                }
                all
            };
            for t in 1..4 {
                step(&mut whole, &mut whole_state, t);
                let grads = grads(&sharded, t);
                let clip = Clip::of(&grads, 1.0, 1.0);
                for state in &mut states {
                    let step = UpdateStep { t, rates: 1e-2.into(), weight_decay: 0.1 };
                    apply_shard(&mut sharded, &grads, state, &step, &clip);
                }
                assert_eq!(whole.all_values(), sharded.all_values());
                let expected: Vec<StateTensor> = whole_state.tensors().map(Result::unwrap).collect();
                assert_eq!(joined(&states), expected);
                // Another number of shards takes over.
                let shards = OptimizerState::shards(sharded.infos(), RULE, format, t as usize + 3);
                states = shards.iter().map(|shard| of_shard(&sharded, shard)).collect();
                states.iter_mut().for_each(|state| state.load(expected.clone()).expect("its own tensors"));
            }
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_named_and_changes_nothing() {
        let mut state = state(&params(), StateFormat::F32);
        let before: Vec<StateTensor> = state.tensors().map(Result::unwrap).collect();
        let mut tensors = before.clone();
        tensors[0].bytes.iter_mut().for_each(|byte| *byte = 1);
        tensors[1].shape = vec![3, 2];
        tensors[3].name = "c.exp_avg_sq".to_owned();
        let StateError::Other(problems) = state.load(tensors).expect_err("they do not fit") else {
            panic!("nothing fails")
        };
        assert_eq!(
            problems,
            [
                "\"a.exp_avg_sq\" is F32 [3, 2], not F32 [2, 3]",
                "\"b.exp_avg_sq\" is missing",
                "\"c.exp_avg_sq\" does not belong to this run"
            ]
        );
        assert_eq!(state.tensors().map(Result::unwrap).collect::<Vec<_>>(), before);
    }
}

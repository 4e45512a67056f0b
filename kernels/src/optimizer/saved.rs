//! The state in bytes: for checkpoints, exact to the bit.

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
    /// Little-endian elements, row-major.
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
    shape: Vec<usize>,
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
        self.shape.iter().product()
    }

    /// Length.
    fn bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }
}

impl OptimizerState {
    /// Everything, each part read from the device when it is reached. A moment in 8-bit blocks is two parts: codes, and
    /// `.absmax` with a scale for every 256 of them.
    pub fn tensors(&self) -> impl Iterator<Item = Result<StateTensor, DeviceError>> + '_ {
        self.parts().map(|part| {
            let bytes = self.read(&part)?;
            let Part { name, dtype, shape, .. } = part;
            self.device.check().map(|()| StateTensor { name, dtype, shape, bytes })
        })
    }

    /// Replaces everything by what [`tensors`](Self::tensors) gave.
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
                Some(t) if t.bytes.len() != part.bytes() => {
                    problems.push(format!("\"{}\" has {} bytes", part.name, t.bytes.len()));
                }
                Some(t) => loaded.push((part, t.bytes)),
            }
        }
        problems.extend(found.into_keys().map(|name| format!("\"{name}\" does not belong to this run")));
        if !problems.is_empty() {
            return Err(StateError::Other(problems));
        }
        loaded.into_iter().try_for_each(|(part, bytes)| self.write(&part, &bytes)).map_err(StateError::from)
    }

    fn parts(&self) -> impl Iterator<Item = Part> + use<'_> {
        let moments = self.rule().moments();
        self.slots.iter().flat_map(move |slot| {
            moments.iter().enumerate().flat_map(move |(moment, what)| {
                let name = format!("{}.{what}", slot.name);
                let shape = slot.shape.clone();
                match &slot.place {
                    &Place::Dense(at) => vec![Part { name, dtype: DType::F32, shape, moment, at: At::Dense(at) }],
                    Place::Blocks { blocks, .. } => {
                        let (scales, at) = (format!("{name}.absmax"), At::Absmax(blocks.start));
                        let absmax = Part { name: scales, dtype: DType::F32, shape: vec![blocks.len()], moment, at };
                        vec![Part { name, dtype: DType::U8, shape, moment, at: At::Codes(blocks.start) }, absmax]
                    }
                }
            })
        })
    }

    fn read(&self, part: &Part) -> Result<Vec<u8>, DeviceError> {
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
    use crate::optimizer::{StateFormat, UpdateRule, UpdateStep, clipped_step};
    use crate::{Device, Params, ParamsBuilder, from_f32};

    const RULE: UpdateRule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    fn params() -> Params {
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push("a", &[2, 3], true, &[0.5; 6]);
        builder.push("b", &[50, 90], false, &[0.25; 4500]);
        builder.build()
    }

    fn step(params: &mut Params, state: &mut OptimizerState, t: u64) {
        let mut grads = params.zero_grads();
        for info in params.infos() {
            let values = (0..info.at.range().len()).map(|i| (i % 97) as f32 - 1.5 * t as f32).collect();
            grads.add(info.at, from_f32(values, info.at.dims(), &Device::cpu(), DType::F32));
        }
        clipped_step(params, &grads, state, &UpdateStep { t, rates: 1e-2.into(), weight_decay: 0.1 }, 1.0);
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

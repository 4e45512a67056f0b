//! Changes of all parameters, or of a range of them.

use core::ops::Range;

use super::Params;
use super::stochastic::RoundingRng;
use crate::runtime::{Array, MemoryUse, elementwise};
use crate::tensor::cuda_dtype;
use crate::{Backend, DType, RngKey, Tensor, host};

impl Params {
    /// Gives all values to `f`, in order. Returns `None` without a call where they are not in one buffer of the CPU.
    pub fn with_values_mut<R>(&mut self, f: impl FnOnce(&mut [f32]) -> R) -> Option<R> {
        match &mut self.values {
            Tensor::Burn(values) if self.in_place.is_none() && Backend::of_burn(values) == Backend::Cpu => {
                Some(host::with_mut(values, f))
            }
            _ => None,
        }
    }

    /// Gives the buffer of all values on a CUDA device to `f`, which may queue work that writes it, and brings the copies up
    /// to date. Returns `None` without a call where there is no such buffer.
    pub fn with_cuda_values<R>(&mut self, f: impl FnOnce(&Array) -> R) -> Option<R> {
        let result = match &self.values {
            Tensor::Cuda(values) if self.in_place.is_none() => f(values),
            _ => return None,
        };
        self.sync();
        Some(result)
    }

    /// The seed of what is rounded stochastically, where values lie in place. 0 until this is called.
    pub fn set_rounding_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// Gives the values of the parameters in `range` to `f`, in f32 and in one or more pieces, each with the elements that
    /// it holds, and keeps what `f` leaves there. Values in place are rounded with the random numbers of `step`.
    pub(crate) fn change(&mut self, range: Range<usize>, step: u32, f: impl FnMut(Range<usize>, &mut Tensor<1>)) {
        self.change_values(range.clone(), step, f);
        match range.len() == self.numel() {
            _ if self.are_in_place() => {}
            true => self.sync(),
            false => self.sync_part(range),
        }
    }

    /// [`change`](Self::change) without bringing the copies of the values up to date.
    pub(crate) fn change_values(
        &mut self,
        range: Range<usize>,
        step: u32,
        mut f: impl FnMut(Range<usize>, &mut Tensor<1>),
    ) {
        let seed = self.seed;
        if let Some(in_place) = &mut self.in_place {
            let first = self.infos.partition_point(|info| info.at.offset < range.start);
            let inside = self.infos.iter().zip(in_place).enumerate().skip(first);
            for (param, (info, storage)) in inside.take_while(|(_, (info, _))| info.at.offset < range.end) {
                let mut values = storage.flat();
                f(info.at.range(), &mut values);
                storage.store(values, RoundingRng { key: RngKey { seed, step }, param: param as u32 });
            }
            return;
        }
        if range.len() == self.numel() {
            return f(range, &mut self.values);
        }
        match &mut self.values {
            Tensor::Cuda(all) => f(range.clone(), &mut all.part(range.start, [1, range.len()]).into()),
            // Some values are changed in a copy.
            Tensor::Meta(all) => f(range.clone(), &mut all.part(range.start, [1, range.len()]).into()),
            Tensor::Burn(all) => {
                let mut values = Tensor::Burn(all.clone().slice([range.clone()]));
                f(range.clone(), &mut values);
                all.inplace(|all| all.slice_assign([range.clone()], values.into_burn()));
            }
        }
    }

    /// [`sync`](Self::sync) for some of the values, if there are no copies outside the flat buffer.
    fn sync_part(&mut self, range: Range<usize>) {
        match (&self.values, &self.compute, &self.param_copies) {
            (Tensor::Cuda(values), Some(compute), None) => {
                let part = |all: &Array| all.part(range.start, [1, range.len()]);
                elementwise::copy_into(&part(values), &part(compute));
            }
            _ => self.sync_changed(&range),
        }
    }

    /// Brings the copies of the values up to date.
    pub(crate) fn sync(&mut self) {
        self.sync_changed(&(0..usize::MAX));
    }

    /// [`sync`](Self::sync) after some values have changed.
    fn sync_changed(&mut self, range: &Range<usize>) {
        let values = match &self.values {
            Tensor::Burn(_) | Tensor::Meta(_) => return,
            Tensor::Cuda(values) => values,
        };
        if self.dtype != DType::F32 {
            match &self.compute {
                Some(compute) => elementwise::copy_into(values, compute),
                None => {
                    let dtype = cuda_dtype(self.dtype);
                    self.compute = Some(elementwise::cast(values, dtype, MemoryUse::Parameters));
                }
            }
        }
        if let Some(param_copies) = &self.param_copies {
            param_copies.sync(values);
        }
        let changed = |reads: Range<usize>| reads.start < range.end && range.start < reads.end;
        self.derived.iter().filter(|derived| changed(derived.reads())).for_each(|derived| derived.update(values));
    }
}

//! Selections of experts in the order of the experts.

use std::sync::Arc;

use super::cuda::DeviceDispatch;
use crate::Device;
use crate::runtime::MemoryUse;
use crate::tensor::{MetaDevice, MetaMemory, two_devices};

/// The T·K selections of T tokens, sorted by expert: which rows each expert computes. Cloning shares the memory.
///
/// Selection s = t·K + slot is the expert that token t has in that slot. Row i of a grouped operation is selection
/// `sorted[i]`; the sort is stable, so that an expert's rows are in the order of the tokens. A token never has an expert
/// in two slots.
#[derive(Clone, Debug)]
pub struct Dispatch {
    tokens: usize,
    experts: usize,
    top_k: usize,
    place: DispatchPlace,
}

/// A dispatch where it is used.
#[derive(Clone, Debug)]
pub(crate) enum DispatchPlace {
    /// A dispatch in host memory, for the CPU and Burn's other devices.
    Host(Arc<HostDispatch>),
    /// A dispatch on a CUDA device. The host never knows the number of rows of an expert.
    Cuda(DeviceDispatch),
    /// The memory that the host's would take.
    Meta(#[allow(dead_code, reason = "held while it is counted")] Arc<MetaMemory>),
}

impl DispatchPlace {
    /// A dispatch without values.
    pub(super) fn meta(device: &MetaDevice, rows: usize, experts: usize) -> Self {
        let bytes = size_of::<u32>() * (2 * rows + experts + 1);
        Self::Meta(Arc::new(device.charge(MemoryUse::Activations, bytes)))
    }
}

/// A dispatch in plain memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDispatch {
    /// The first row of each expert, and the number of rows at the end: `[experts + 1]`.
    pub offsets: Vec<u32>,
    /// The selection of each row, `[tokens · top_k]`.
    pub sorted: Vec<u32>,
    /// The row of each selection, `[tokens · top_k]`.
    pub rows: Vec<u32>,
}

impl HostDispatch {
    /// Sorts the selections `chosen`, each below `experts`.
    ///
    /// # Panics
    /// For a selection that names no expert.
    pub fn of(chosen: &[u32], experts: usize) -> Self {
        let mut offsets = vec![0_u32; experts + 1];
        for &expert in chosen {
            offsets[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let (mut sorted, mut rows) = (vec![0; chosen.len()], vec![0; chosen.len()]);
        for (selection, &expert) in (0_u32..).zip(chosen) {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            sorted[row as usize] = selection;
            rows[selection as usize] = row;
        }
        Self { offsets, sorted, rows }
    }

    /// The rows of an expert.
    pub fn range(&self, expert: usize) -> core::ops::Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }

    /// The expert of a row.
    pub fn expert(&self, row: usize) -> usize {
        self.offsets.partition_point(|&first| first as usize <= row) - 1
    }

    /// The expert of each selection.
    pub fn chosen(&self) -> Vec<u32> {
        let mut chosen = vec![0; self.sorted.len()];
        for (expert, ends) in (0_u32..).zip(self.offsets.windows(2)) {
            for &selection in &self.sorted[ends[0] as usize..ends[1] as usize] {
                chosen[selection as usize] = expert;
            }
        }
        chosen
    }
}

impl Dispatch {
    /// The dispatch of `chosen`, `top_k` experts for each token.
    ///
    /// # Panics
    /// If `chosen` is not a multiple of `top_k` long or names an expert that is not below `experts`.
    pub fn of(chosen: &[u32], experts: usize, top_k: usize, device: &Device) -> Self {
        assert!(chosen.len().is_multiple_of(top_k), "{} selections in slots of {top_k}", chosen.len());
        let host = || HostDispatch::of(chosen, experts);
        let place = match device {
            Device::Burn(_) => DispatchPlace::Host(Arc::new(host())),
            Device::Cuda(cuda) => DispatchPlace::Cuda(DeviceDispatch::upload(cuda, &host())),
            Device::Meta(device) => DispatchPlace::meta(device, chosen.len(), experts),
        };
        Self { tokens: chosen.len() / top_k, experts, top_k, place }
    }

    pub(super) fn new(tokens: usize, experts: usize, top_k: usize, place: DispatchPlace) -> Self {
        Self { tokens, experts, top_k, place }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Experts of each token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Number of rows, tokens · top_k.
    pub fn rows(&self) -> usize {
        self.tokens * self.top_k
    }

    /// Copies the dispatch to the host. Waits for the device; after an error of it all selections are of expert 0, and
    /// [`Device::check`] says what happened. On a device without values the selections go round the experts.
    pub fn to_host(&self) -> HostDispatch {
        match &self.place {
            DispatchPlace::Host(host) => host.as_ref().clone(),
            DispatchPlace::Cuda(device) => device.download().unwrap_or_else(|_| self.made_up(|_| 0)),
            DispatchPlace::Meta(_) => self.made_up(|selection| selection % self.experts),
        }
    }

    fn made_up(&self, expert: impl Fn(usize) -> usize) -> HostDispatch {
        let chosen: Vec<u32> = (0..self.rows()).map(|selection| expert(selection) as u32).collect();
        HostDispatch::of(&chosen, self.experts)
    }

    /// The dispatch in plain memory, where the operation runs on the CPU or in Burn's operations.
    pub(crate) fn host(&self) -> &HostDispatch {
        match &self.place {
            DispatchPlace::Host(host) => host,
            DispatchPlace::Cuda(_) | DispatchPlace::Meta(_) => two_devices(),
        }
    }

    /// The dispatch on a CUDA device, where the operation runs there.
    #[allow(dead_code, reason = "read by the kernels")]
    pub(crate) fn cuda(&self) -> &DeviceDispatch {
        match &self.place {
            DispatchPlace::Cuda(device) => device,
            DispatchPlace::Host(_) | DispatchPlace::Meta(_) => two_devices(),
        }
    }

    /// The number of rows that each expert has where nothing is computed: the same for all, as nearly as that goes.
    pub(crate) fn even_rows(&self) -> Vec<usize> {
        let (rows, experts) = (self.rows(), self.experts);
        (0..experts).map(|expert| rows / experts + usize::from(expert < rows % experts)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_experts_and_then_of_tokens() {
        let dispatch = HostDispatch::of(&[2, 0, 0, 3, 2, 3], 5);
        assert_eq!(dispatch.offsets, [0, 2, 2, 4, 6, 6]);
        assert_eq!(dispatch.sorted, [1, 2, 0, 4, 3, 5]);
        assert_eq!(dispatch.rows, [2, 0, 1, 4, 3, 5]);
        assert_eq!(dispatch.range(2), 2..4);
        assert_eq!(dispatch.range(1), 2..2);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|row| dispatch.expert(row)), [0, 0, 2, 2, 3, 3]);
        assert_eq!(dispatch.chosen(), [2, 0, 0, 3, 2, 3]);
    }

    #[test]
    fn without_values_rows_are_shared_evenly() {
        let device = Device::Meta(MetaDevice::default());
        let dispatch = Dispatch::of(&[0; 7], 3, 1, &device);
        assert_eq!(dispatch.even_rows(), [3, 2, 2]);
        assert_eq!(dispatch.to_host().offsets, [0, 3, 5, 7]);
    }
}

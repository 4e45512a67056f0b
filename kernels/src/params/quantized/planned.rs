//! Descriptions of quantized weights without values.

use std::sync::Arc;

use super::{MetaQuantized, Place, QuantizedData, QuantizedWeight};
use crate::runtime::MemoryUse;
use crate::{Device, tensor::MetaDevice};

/// The description of a quantized weight without values, which takes no memory of its device.
#[derive(Clone, Debug)]
pub(crate) enum PlannedQuantized {
    Meta {
        dims: [usize; 2],
        device: MetaDevice,
        bytes: (usize, usize),
        can_be_trained: bool,
    },
    /// The weight without its codes, and the bytes of these.
    Cuda(Arc<QuantizedData>, usize),
}

impl PlannedQuantized {
    /// Describes a weight without values.
    ///
    /// # Panics
    /// For a weight with values.
    pub(crate) fn of(weight: &QuantizedWeight) -> Self {
        assert!(weight.is_planned(), "a weight without values");
        match &weight.0 {
            Place::Meta(meta) => {
                let MetaQuantized { dims, device, bytes, can_be_trained, .. } = &**meta;
                Self::Meta { dims: *dims, device: device.clone(), bytes: *bytes, can_be_trained: *can_be_trained }
            }
            Place::Cuda(array, rest) => Self::Cuda(Arc::clone(rest), array.bytes().0),
            Place::Host(_) | Place::Copied(..) | Place::Burn(_) => unreachable!("it has values"),
        }
    }

    /// Returns another such weight.
    pub(crate) fn make(&self, device: &Device) -> QuantizedWeight {
        match self {
            Self::Meta { dims, device, bytes, can_be_trained } => {
                let memory = device.charge(MemoryUse::QuantizedWeights, bytes.0 + bytes.1);
                let (dims, bytes, can_be_trained, device) = (*dims, *bytes, *can_be_trained, device.clone());
                let meta = MetaQuantized { dims, device, bytes, can_be_trained, _memory: memory };
                QuantizedWeight(Place::Meta(Arc::new(meta)))
            }
            Self::Cuda(rest, codes) => QuantizedWeight::new(rest.with_bytes(vec![0; *codes], None), device),
        }
    }
}

//! Between Burn tensors of the CPU backend and slices.

use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};

/// A tensor's storage with its shape and strides, for reading.
pub(crate) struct View(FlexTensor);

impl View {
    /// Reads a matrix where it lies, strided or not; copies it only if a stride runs backward.
    pub(crate) fn strided<const D: usize>(tensor: &Tensor<D>) -> Self {
        let flex = primitive(tensor.clone());
        let forward = flex.layout().strides().iter().all(|&stride| stride >= 0);
        Self(if forward { flex } else { flex.to_contiguous() })
    }

    /// Reads a tensor as one row-major slice, copying only if it is not one already.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let flex = primitive(tensor.clone());
        Self(if flex.is_contiguous() { flex } else { flex.to_contiguous() })
    }

    /// Storage from the first element on, with the row and column strides of a matrix.
    pub(crate) fn matrix(&self) -> (&[f32], isize, isize) {
        let layout = self.0.layout();
        let strides = layout.strides();
        (&self.0.storage::<f32>()[layout.start_offset()..], strides[0], strides[1])
    }

    /// The elements in order. Taken once before a loop: finding the slice costs more than an element.
    pub(crate) fn as_slice(&self) -> &[f32] {
        self.0.as_slice::<f32>().expect("contiguous f32 by construction")
    }
}

/// A tensor that takes over `values`.
pub(crate) fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(values, shape)))
}

/// The values of `tensor`, without a copy when nothing else holds them.
pub(crate) fn into_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    primitive(tensor).into_data().try_into_vec::<f32>().expect("f32 by the choice of path")
}

/// Changes `tensor` in place (after a copy, if something else holds its storage).
pub(crate) fn with_mut<const D: usize, R>(tensor: &mut Tensor<D>, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let shape = tensor.dims();
    let taken = core::mem::replace(tensor, from_vec(Vec::new(), [0; D]));
    let mut values = into_vec(taken);
    let result = f(&mut values);
    *tensor = from_vec(values, shape);
    result
}

fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    tensor.try_into_primitive::<Flex>().expect("a plain tensor of the CPU backend, by the choice of path")
}

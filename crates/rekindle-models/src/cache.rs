//! Keys and values of the tokens so far.

use burn::tensor::Tensor;

/// One block's keys and values, with room for more.
#[derive(Clone, Debug)]
pub(crate) struct LayerCache {
    k: Option<Tensor<2>>,
    v: Option<Tensor<2>>,
    len: usize,
    capacity: usize,
}

impl LayerCache {
    /// Empty, with room for `capacity` tokens.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { k: None, v: None, len: 0, capacity }
    }

    /// Appends keys and values `[new, width]`; returns all so far, `[tokens, width]`.
    pub(crate) fn append(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let (start, end) = (self.len, self.len + k.dims()[0]);
        self.len = end;
        let capacity = self.capacity.max(end);
        let put = |slot: &mut Option<Tensor<2>>, new: Tensor<2>| {
            let width = new.dims()[1];
            let all = slot.take().unwrap_or_else(|| {
                let device = new.device();
                Tensor::zeros([capacity, width], (&device, new.dtype()))
            });
            // The only reference, so this writes in place.
            let all = all.slice_assign([start..end, 0..width], new);
            *slot = Some(all.clone());
            all.narrow(0, 0, end)
        };
        (put(&mut self.k, k), put(&mut self.v, v))
    }
}

//! The trained factors on a weight.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;

/// A LoRA adapter on a weight `[d_input, d_output]` of a module: ΔW = s·A·B.
///
/// It is attached to a parameter as a reparameterization of Burn, so its factors take part in optimizers, records and
/// device moves under the path `weight.lora`. Layers of this crate compute x·A·B; any other module reads W + s·A·B, which
/// Burn forms in every forward.
#[derive(Module, Debug)]
pub struct Adapter {
    /// A, `[d_input, r]`.
    pub a: Param<Tensor<2>>,
    /// B, `[r, d_output]`.
    pub b: Param<Tensor<2>>,
    /// s, which is part of the configuration and not of a record.
    pub scale: f64,
}

impl Reparameterization for Adapter {
    const NAME: &'static str = "lora";

    /// # Panics
    /// For the adapter of a quantized weight, which has no dense form.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let delta = self.delta();
        assert_eq!(
            base.dims()[..],
            delta.dims(),
            "the adapter of a QuantLinear cannot be merged; keep it, or dequantize the weight first"
        );
        let (dtype, shape) = (base.dtype(), base.shape());
        base + delta.cast(dtype).reshape(shape)
    }
}

impl Adapter {
    /// Returns ΔW.
    pub(crate) fn delta(&self) -> Tensor<2> {
        self.a.val().matmul(self.b.val()).mul_scalar(self.scale)
    }
}
